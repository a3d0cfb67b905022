"""The head in training: BatchNorm, activation and the mean over the image of a 1x1 convolution's output, forward and backward.

    forward    out[n,c] = mean_hw phi(z),   z = BN(y);   s2[n,c] = sum_hw phi'(z),   s4[n,c] = sum_hw phi'(z) * yhat
    backward   g = dout / HW is the same for all pixels of an image, so that dbeta = sum_n g * s2 and dgamma = sum_n g * s4 need no pass;
               dy = scale * g[n,c] * phi'(z) + k0 + k1 * y

Inference has all of it in the epilogue of ``pointwise_forward``.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import elementwise_config, reduction_config
from effkernels.kernels.batchnorm import bn_terms
from effkernels.kernels.common import (
    activate_and_grad,
    bn_coefficients,
    bn_row,
    cast,
    channel_vector_width,
    fast_math,
    fp32,
    launcher,
    load_vector,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm


@sized_jit
def pooled_norm_kernel(
    y, out, s2_out, s4_out, gamma, beta, mean, rstd, rows, CV,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """BC channels of an image a program."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    n = (tl.program_id(0) // tl.cdiv(C, BC)).to(tl.int64)
    r = tl.arange(0, BR)
    mu, r_std, scale, shift = bn_coefficients(gamma, beta, mean, rstd, 0.0, c, mc, True)
    mu, scale, shift = mu[None, :], scale[None, :], shift[None, :]
    total = tl.zeros([BR, BC], tl.float32)
    s2 = tl.zeros([BR, BC], tl.float32)
    s4 = tl.zeros([BR, BC], tl.float32)
    for start in range(0, rows, BR):
        ok = (start + r < rows)[:, None] & mc[None, :]
        v = tl.load(y + n * rows * C + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
        dphi = tl.where(ok, dphi, 0.0)
        total += tl.where(ok, phi, 0.0)
        s2 += dphi
        s4 += dphi * (v - mu)
    tl.store(out + n * C + c, cast(tl.sum(total, 0) / rows, out.dtype.element_ty), mask=mc)
    tl.store(s2_out + n * C + c, tl.sum(s2, 0), mask=mc)
    tl.store(s4_out + n * C + c, tl.sum(s4, 0) * r_std, mask=mc)


@sized_jit
def pooled_norm_gradients_kernel(
    dout, s2, s4, gamma, mean, rstd, dgamma, dbeta, k0, k1, N, CV, inverse_pixels, count,
    CVEC: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dbeta, dgamma and the batch terms of BC channels: all images in a fixed order."""
    C = CV * CVEC
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mc = c < C
    i = tl.arange(0, BN)
    s_beta = tl.zeros([BN, BC], tl.float32)
    s_gamma = tl.zeros([BN, BC], tl.float32)
    for start in tl.range(0, N, BN, num_stages=2):
        ok = (start + i < N)[:, None] & mc[None, :]
        at = (start + i).to(tl.int64)[:, None] * C + c[None, :]
        g = tl.load(dout + at, mask=ok, other=0.0).to(tl.float32) * inverse_pixels
        s_beta += g * tl.load(s2 + at, mask=ok, other=0.0)
        s_gamma += g * tl.load(s4 + at, mask=ok, other=0.0)
    db, dg = tl.sum(s_beta, 0), tl.sum(s_gamma, 0)
    tl.store(dbeta + c, cast(db, dbeta.dtype.element_ty), mask=mc)
    tl.store(dgamma + c, cast(dg, dgamma.dtype.element_ty), mask=mc)
    b0, b1 = bn_terms(gamma, mean, rstd, db, dg, count, c, mc)
    tl.store(k0 + c, b0, mask=mc)
    tl.store(k1 + c, b1, mask=mc)


@sized_jit
def pooled_norm_backward_kernel(
    dout, y, dy, gamma, beta, mean, rstd, k0, k1, rows, CV, image_blocks, inverse_pixels,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, ACT: tl.constexpr, BATCH: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dy of BR pixels of one image."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BC)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BR + tl.arange(0, BR)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = r[:, None] * C + c[None, :]
    scale, shift = bn_row(gamma, beta, mean, rstd, 0.0, c, mc, True)
    g = load_vector(dout + n * C, c, mc)[None, :] * inverse_pixels * scale
    v = tl.load(y + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
    d = g * dphi
    if BATCH:
        d += load_vector(k0, c, mc)[None, :] + load_vector(k1, c, mc)[None, :] * v
    tl.store(dy + n * rows * C + offset, cast(d, dy.dtype.element_ty), mask=ok)


@launcher
def pooled_norm(y, norm: BatchNorm, *, act):
    """(out [N, C] in y's dtype, s2, s4 fp32 [N, C]) of y [N, H, W, C], as in the module docstring; norm with rstd."""
    N, H, W, C = y.shape
    cfg = reduction_config(C, y.dtype)
    out, s2, s4 = y.new_empty(N, C), fp32(y.device, N, C), fp32(y.device, N, C)
    pooled_norm_kernel[(N * triton.cdiv(C, cfg.BC),)](
        y, out, s2, s4, *norm[:4], H * W, C // channel_vector_width(C),
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, ACT=act, FAST=fast_math(y.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return out, s2, s4


def pooled_norm_gradients(dout, s2, s4, norm: BatchNorm, pixels):
    """(dgamma, dbeta in their parameters' dtypes, k0, k1 fp32 [C]) from dout [N, C] and the results of ``pooled_norm``."""
    N, C = dout.shape
    gamma, beta, mean, rstd, *_ = norm
    outs = torch.empty_like(gamma), torch.empty_like(beta), fp32(dout.device, C), fp32(dout.device, C)
    pooled_norm_gradients_kernel[(triton.cdiv(C, 32),)](
        dout, s2, s4, gamma, mean, rstd, *outs, N, C // channel_vector_width(C), 1.0 / pixels, float(N * pixels),
        CVEC=channel_vector_width(C), BN=64, BC=32, num_warps=4,
    )  # fmt: skip
    return outs


@launcher
def pooled_norm_backward(dout, y, norm: BatchNorm, terms, *, act):
    """dy like y [N, H, W, C] from dout [N, C]; terms (k0, k1), or None when the statistics are frozen."""
    N, H, W, C = y.shape
    cfg = elementwise_config(C, y.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BR)
    dy = torch.empty_like(y)
    k0, k1 = terms or (dout, dout)
    pooled_norm_backward_kernel[(triton.cdiv(C, cfg.BC) * N * image_blocks,)](
        dout, y, dy, *norm[:4], k0, k1, H * W, C // channel_vector_width(C), image_blocks, 1.0 / (H * W),
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, ACT=act, BATCH=terms is not None, FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )  # fmt: skip
    return dy
