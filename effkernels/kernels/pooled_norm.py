"""The head in training: BatchNorm and activation of a 1x1 convolution's output y and the mean over the image, forward
and backward.

    forward    out[n,c] = mean_hw phi(z),   z = BN(y);   s2[n,c] = sum_hw phi'(z),   s4[n,c] = sum_hw phi'(z) * yhat
    backward   dbeta = sum_n g * s2,   dgamma = sum_n g * s4,   dy = scale * g[n,c] * phi'(z) + k0 + k1 * y

g = dout / HW is the same for all pixels of an image, so that dbeta and dgamma need no pass over y.

In inference all of it is in the epilogue of ``pointwise_forward``.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import elementwise_config, pooled_norm_config
from effkernels.kernels.activation import activate_and_grad
from effkernels.kernels.batchnorm import BatchTerms, batch_terms
from effkernels.kernels.common import cast, channel_vector_width, fast_math, fp32, launcher, sized_jit
from effkernels.kernels.norm import BatchNorm, coefficients, load_vector, scale_and_shift


@sized_jit
def pooled_norm_kernel(
    y,
    out,
    s2_out,
    s4_out,
    norm,
    rows,
    CV,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """A program does BLOCK_C channels of one image."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    n = (tl.program_id(0) // tl.cdiv(C, BLOCK_C)).to(tl.int64)
    r = tl.arange(0, BLOCK_ROWS)
    mean, rstd, scale, shift = coefficients(norm, c, mc)
    mean, scale, shift = mean[None, :], scale[None, :], shift[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    s4 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(0, rows, BLOCK_ROWS):
        ok = (start + r < rows)[:, None] & mc[None, :]
        v = tl.load(y + n * rows * C + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
        dphi = tl.where(ok, dphi, 0.0)
        total += tl.where(ok, phi, 0.0)
        s2 += dphi
        s4 += dphi * (v - mean)
    tl.store(out + n * C + c, cast(tl.sum(total, 0) / rows, out.dtype.element_ty), mask=mc)
    tl.store(s2_out + n * C + c, tl.sum(s2, 0), mask=mc)
    tl.store(s4_out + n * C + c, tl.sum(s4, 0) * rstd, mask=mc)


@sized_jit
def pooled_norm_gradients_kernel(
    dout,
    s2,
    s4,
    norm,
    dgamma,
    dbeta,
    k0,
    k1,
    N,
    CV,
    inverse_pixels,
    count,
    CVEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A program does dbeta, dgamma and the batch terms of BLOCK_C channels, over all images in a fixed order."""
    C = CV * CVEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    i = tl.arange(0, BLOCK_N)
    s_beta = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    s_gamma = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for start in tl.range(0, N, BLOCK_N, num_stages=2):
        ok = (start + i < N)[:, None] & mc[None, :]
        at = (start + i).to(tl.int64)[:, None] * C + c[None, :]
        g = tl.load(dout + at, mask=ok, other=0.0).to(tl.float32) * inverse_pixels
        s_beta += g * tl.load(s2 + at, mask=ok, other=0.0)
        s_gamma += g * tl.load(s4 + at, mask=ok, other=0.0)
    db, dg = tl.sum(s_beta, 0), tl.sum(s_gamma, 0)
    tl.store(dbeta + c, cast(db, dbeta.dtype.element_ty), mask=mc)
    tl.store(dgamma + c, cast(dg, dgamma.dtype.element_ty), mask=mc)
    b0, b1 = batch_terms(norm, db, dg, count, c, mc)
    tl.store(k0 + c, b0, mask=mc)
    tl.store(k1 + c, b1, mask=mc)


@sized_jit
def pooled_norm_backward_kernel(
    dout,
    y,
    dy,
    norm,
    terms,
    rows,
    CV,
    image_blocks,
    inverse_pixels,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """A program does dy of BLOCK_ROWS pixels and BLOCK_C channels of one image."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = r[:, None] * C + c[None, :]
    scale, shift = scale_and_shift(norm, c, mc)
    g = load_vector(dout + n * C, c, mc)[None, :] * inverse_pixels * scale
    v = tl.load(y + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
    d = g * dphi
    if terms is not None:
        d += load_vector(terms[0], c, mc)[None, :] + load_vector(terms[1], c, mc)[None, :] * v
    tl.store(dy + n * rows * C + offset, cast(d, dy.dtype.element_ty), mask=ok)


@launcher
def pooled_norm(y: torch.Tensor, norm: BatchNorm, *, act: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return out [N, C] in y's dtype, and s2 and s4 fp32 [N, C], of y [N, H, W, C]; see the module docstring. norm:
    with rstd."""
    N, H, W, C = y.shape
    cfg = pooled_norm_config(C, y.dtype)
    out, s2, s4 = y.new_empty(N, C), fp32(y.device, N, C), fp32(y.device, N, C)
    pooled_norm_kernel[(N * triton.cdiv(C, cfg.BLOCK_C),)](
        y=y,
        out=out,
        s2_out=s2,
        s4_out=s4,
        norm=norm,
        rows=H * W,
        CV=C // channel_vector_width(C),
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return out, s2, s4


def pooled_norm_gradients(
    dout: torch.Tensor, s2: torch.Tensor, s4: torch.Tensor, norm: BatchNorm, pixels: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return dgamma and dbeta in their parameters' dtypes, and k0 and k1 fp32 [C].

    Args:
        dout: [N, C]. s2, s4: of ``pooled_norm``. norm: with rstd. pixels: H * W of the image.
    """
    N, C = dout.shape
    dgamma, dbeta = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    k0, k1 = fp32(dout.device, C), fp32(dout.device, C)
    pooled_norm_gradients_kernel[(triton.cdiv(C, 32),)](
        dout=dout,
        s2=s2,
        s4=s4,
        norm=norm,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        N=N,
        CV=C // channel_vector_width(C),
        inverse_pixels=1.0 / pixels,
        count=float(N * pixels),
        CVEC=channel_vector_width(C),
        BLOCK_N=64,
        BLOCK_C=32,
        num_warps=4,
    )
    return dgamma, dbeta, k0, k1


@launcher
def pooled_norm_backward(
    dout: torch.Tensor, y: torch.Tensor, norm: BatchNorm, terms: BatchTerms | None, *, act: str
) -> torch.Tensor:
    """Return dy, like y [N, H, W, C], from dout [N, C]; terms: (k0, k1), or None where the statistics are frozen."""
    N, H, W, C = y.shape
    cfg = elementwise_config(C, y.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BLOCK_ROWS)
    dy = torch.empty_like(y)
    pooled_norm_backward_kernel[(triton.cdiv(C, cfg.BLOCK_C) * N * image_blocks,)](
        dout=dout,
        y=y,
        dy=dy,
        norm=norm,
        terms=None if terms is None else tuple(terms),
        rows=H * W,
        CV=C // channel_vector_width(C),
        image_blocks=image_blocks,
        inverse_pixels=1.0 / (H * W),
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return dy
