"""The stem: a dense 3 x 3 convolution of images of few channels, as a product of gathered patches with the weights.

    forward   y[n,oh,ow,s] = sum_{c,kh,kw} w[s,c,kh,kw] * x[n, c, oh*stride + kh - pad_top, ow*stride + kw - pad_left]
    wgrad     dw[s,c,kh,kw] = sum_{n,oh,ow} dy[n,oh,ow,s] * x[n, c, the same pixel]
              dy = scale * dout * phi'(BN(y)) + k0 + k1 * y

The image may have any strides and any dtype: elements are rounded to the compute dtype on load; the weights may be
channels_last too. The taps (c, kh, kw), padded to a power of two, are the inner dimension. A block of patches is
gathered as [taps, pixels], so that the lanes of a warp stand at neighbouring pixels, whose addresses are ``stride``
elements apart, and not at the taps of one pixel, which lie in nine rows. Results are NHWC.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import stem_backward_config, stem_forward_config
from effkernels.kernels.activation import activate, activate_and_grad
from effkernels.kernels.batchnorm import BatchTerms, finish_statistics, statistics_arguments
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    dot,
    fast_math,
    fold_rows,
    fp32,
    given,
    last_to_arrive,
    launcher,
    load_tile,
    matmul_precision,
    sized_jit,
    sum_rows,
)
from effkernels.kernels.norm import BatchNorm, BatchStatistics, load_vector, scale_and_shift


@triton.jit
def tap_offset(k, stride_c, stride_h, stride_w):
    """Offset of taps k, counted (channel, row, column), in a tensor of these strides."""
    return k // 9 * stride_c + k % 9 // 3 * stride_h + k % 3 * stride_w


@triton.jit
def tap_positions(k, K, H, stride_c, stride_h, stride_w):
    """(row, column, offset in x) of taps k relative to a patch's corner; beyond K a row that lies above every image."""
    return tl.where(k < K, k % 9 // 3, -H - 4), k % 3, tap_offset(k, stride_c, stride_h, stride_w)


@triton.jit
def load_weight(w, c, k, K, mc, w_stride_s, w_stride_c, w_stride_h, w_stride_w, dtype: tl.constexpr):
    """w as the right operand [k, c], rounded to the compute dtype."""
    offset = tap_offset(k, w_stride_c, w_stride_h, w_stride_w)[:, None] + c[None, :] * w_stride_s
    return cast(tl.load(w + offset, mask=(k < K)[:, None] & mc[None, :], other=0.0).to(tl.float32), dtype)


@triton.jit
def load_patches(
    x, r, rows, taps, H, W, OW, stride_h, stride_w, pad_top, pad_left, dtype: tl.constexpr, STRIDE: tl.constexpr
):
    """[BLOCK_K, BLOCK_M]: the taps of output pixels r of the image at x, rounded to the compute dtype; 0 outside of
    it."""
    row, col, offset = taps
    oh = r // OW
    ih = tl.where(r < rows, oh * STRIDE - pad_top, -4)  # above the image with all its taps
    iw = (r - oh * OW) * STRIDE - pad_left
    # As unsigned numbers negative ones are large: one comparison each.
    inside_h = (ih[None, :] + row[:, None]).to(tl.uint32, bitcast=True) < H.to(tl.uint32, bitcast=True)
    inside_w = (iw[None, :] + col[:, None]).to(tl.uint32, bitcast=True) < W.to(tl.uint32, bitcast=True)
    v = tl.load(x + ((ih * stride_h + iw * stride_w)[None, :] + offset[:, None]), mask=inside_h & inside_w, other=0.0)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@sized_jit
def stem_forward_kernel(
    x,
    w,
    y,
    norm,
    tile_count,
    tile_mean,
    tile_m2,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    counters,
    eps,
    momentum,
    H,
    W,
    OW,
    rows,
    I,
    NV,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    w_stride_s,
    w_stride_c,
    w_stride_h,
    w_stride_w,
    pad_top,
    pad_left,
    images,
    tiles,
    per_program,
    P,
    STRIDE: tl.constexpr,
    NVEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
    COUNT: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program does BLOCK_N channels of ``per_program`` tiles of BLOCK_M output pixels. SINGLE: BLOCK_K covers all
    taps, so that the weights stay.

    With ``mean`` and ``rstd`` it finishes y's statistics; with ``norm`` it stores the activation instead of y.
    """
    K = I * 9
    N = NV * NVEC
    dtype: tl.constexpr = y.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) % blocks_n
    p = tl.program_id(0) // blocks_n
    c = block * BLOCK_N + tl.arange(0, BLOCK_N)
    mc = c < N
    k = tl.arange(0, BLOCK_K)
    i = tl.arange(0, BLOCK_M)
    if SINGLE:
        taps = tap_positions(k, K, H, stride_c, stride_h, stride_w)
        weight = load_weight(
            w=w,
            c=c,
            k=k,
            K=K,
            mc=mc,
            w_stride_s=w_stride_s,
            w_stride_c=w_stride_c,
            w_stride_h=w_stride_h,
            w_stride_w=w_stride_w,
            dtype=dtype,
        )
    if given(norm):
        scale, shift = scale_and_shift(norm, c, mc)
    if mean is not None:
        pivot = tl.zeros([BLOCK_N], tl.float32)
        s1 = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
        s2 = tl.zeros([BLOCK_M // 16, 8, BLOCK_N], tl.float32)
        count = 0.0
    first = p * per_program
    for t in range(first, tl.minimum(first + per_program, images * tiles)):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BLOCK_M
        ok = row0 + i < rows
        xn = x + image * stride_n
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if SINGLE:
            patches = load_patches(
                x=xn,
                r=row0 + i,
                rows=rows,
                taps=taps,
                H=H,
                W=W,
                OW=OW,
                stride_h=stride_h,
                stride_w=stride_w,
                pad_top=pad_top,
                pad_left=pad_left,
                dtype=dtype,
                STRIDE=STRIDE,
            )
            acc = dot(tl.trans(patches), weight, acc, PRECISION)
        else:
            for start in range(0, K, BLOCK_K):
                kk = start + k
                taps_here = tap_positions(kk, K, H, stride_c, stride_h, stride_w)
                patches = load_patches(
                    x=xn,
                    r=row0 + i,
                    rows=rows,
                    taps=taps_here,
                    H=H,
                    W=W,
                    OW=OW,
                    stride_h=stride_h,
                    stride_w=stride_w,
                    pad_top=pad_top,
                    pad_left=pad_left,
                    dtype=dtype,
                    STRIDE=STRIDE,
                )
                part = load_weight(
                    w=w,
                    c=c,
                    k=kk,
                    K=K,
                    mc=mc,
                    w_stride_s=w_stride_s,
                    w_stride_c=w_stride_c,
                    w_stride_h=w_stride_h,
                    w_stride_w=w_stride_w,
                    dtype=dtype,
                )
                acc = dot(tl.trans(patches), part, acc, PRECISION)
        if mean is not None:
            here = tl.minimum(rows - row0, BLOCK_M).to(tl.float32)
            if t == first:
                pivot = tl.sum(acc, 0) / here  # rows outside are 0
            d = tl.where(ok[:, None], acc - pivot[None, :], 0.0)
            s1 += fold_rows(d)
            s2 += fold_rows(d * d)
            count += here
        if given(norm):
            acc = activate(acc * scale + shift, ACT, FAST)
        base = image * rows + row0
        tl.store(y + base * N + i[:, None] * N + c[None, :], cast(acc, dtype), mask=ok[:, None] & mc[None, :])
    if mean is not None:
        moved = sum_rows(s1) / count
        tl.store(tile_mean + p.to(tl.int64) * N + c, pivot + moved, mask=mc)
        tl.store(tile_m2 + p.to(tl.int64) * N + c, sum_rows(s2) - moved * moved * count, mask=mc)
        # Each block of channels keeps its own counts: its last program must not wait for another block's.
        tl.store(tile_count + block * P + p, count)
        if last_to_arrive(counters + block, P):
            finish_statistics(
                tile_count=tile_count + block * P,
                tile_mean=tile_mean,
                tile_m2=tile_m2,
                mean=mean,
                rstd=rstd,
                running_mean=running_mean,
                running_var=running_var,
                num_batches=num_batches,
                tiles=P,
                C=N,
                eps=eps,
                momentum=momentum,
                block_c=block,
                BLOCK_TILES=BLOCK_TILES,
                BLOCK_C=BLOCK_N,
                COUNT=COUNT,
            )


@sized_jit
def stem_backward_kernel(
    dout,
    y,
    x,
    partials,
    norm,
    terms,
    H,
    W,
    OW,
    rows,
    I,
    NV,
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    w_stride_s,
    w_stride_c,
    w_stride_h,
    w_stride_w,
    pad_top,
    pad_left,
    images,
    tiles,
    per_program,
    STRIDE: tl.constexpr,
    NVEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A program does BLOCK_N channels and BLOCK_K taps of ``per_program`` tiles: fp32 partials [P, N * K] in the
    weight's memory order."""
    K = I * 9
    N = NV * NVEC
    dtype: tl.constexpr = y.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_k = tl.cdiv(K, BLOCK_K)
    c = tl.program_id(0) % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mc = c < N
    k = tl.program_id(0) // blocks_n % blocks_k * BLOCK_K + tl.arange(0, BLOCK_K)
    p = tl.program_id(0) // (blocks_n * blocks_k)
    i = tl.arange(0, BLOCK_M)
    taps = tap_positions(k, K, H, stride_c, stride_h, stride_w)
    scale, shift = scale_and_shift(norm, c, mc)
    if terms is not None:
        offset = load_vector(terms[0], c, mc)[None, :]
        slope = load_vector(terms[1], c, mc)[None, :]
    dw = tl.zeros([BLOCK_K, BLOCK_N], tl.float32)
    first = p * per_program
    for t in range(first, tl.minimum(first + per_program, images * tiles)):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BLOCK_M
        ok = row0 + i < rows
        base = (image * rows + row0) * N
        dy = load_tile(dout + base, i, c, N, ok, mc).to(tl.float32) * scale
        if terms is not None or ACT != "identity":
            v = load_tile(y + base, i, c, N, ok, mc).to(tl.float32)
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            dy = dy * dphi
        if terms is not None:
            dy = tl.where(ok[:, None], dy + (offset + slope * v), 0.0)
        patches = load_patches(
            x=x + image * stride_n,
            r=row0 + i,
            rows=rows,
            taps=taps,
            H=H,
            W=W,
            OW=OW,
            stride_h=stride_h,
            stride_w=stride_w,
            pad_top=pad_top,
            pad_left=pad_left,
            dtype=dtype,
            STRIDE=STRIDE,
        )
        dw = dot(patches, cast(dy, dtype), dw, PRECISION)
    out = partials + p.to(tl.int64) * N * K
    offset_out = tap_offset(k, w_stride_c, w_stride_h, w_stride_w)[:, None] + c[None, :] * w_stride_s
    tl.store(out + offset_out, dw, mask=(k < K)[:, None] & mc[None, :])


def _addressable(x: torch.Tensor) -> torch.Tensor:
    """Return x, or a dense copy of it where the elements of one image lie 2**31 or more elements apart."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if reach + 3 * (x.stride(2) + x.stride(3)) < 2**31 else x.contiguous()


def _geometry(x: torch.Tensor, weight: torch.Tensor, OW: int, rows: int, pads: tuple) -> dict:
    """Return both kernels' arguments for sizes, strides and padding."""
    S = weight.shape[0]
    w_stride_s, w_stride_c, w_stride_h, w_stride_w = weight.stride()
    return {
        "H": x.shape[2],
        "W": x.shape[3],
        "OW": OW,
        "rows": rows,
        "I": x.shape[1],
        "NV": S // channel_vector_width(S),
        "NVEC": channel_vector_width(S),
        "stride_n": x.stride(0),
        "stride_c": x.stride(1),
        "stride_h": x.stride(2),
        "stride_w": x.stride(3),
        "w_stride_s": w_stride_s,
        "w_stride_c": w_stride_c,
        "w_stride_h": w_stride_h,
        "w_stride_w": w_stride_w,
        "pad_top": pads[0],
        "pad_left": pads[2],
        "images": x.shape[0],
    }


@launcher
def stem_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    *,
    dtype: torch.dtype | None = None,
    epilogue: BatchNorm | None = None,
    act: str = "identity",
    statistics: BatchStatistics | None = None,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
    """Convolve images x [N, I, H, W], of any strides and dtype, with weight [S, I, 3, 3]; see the module docstring.

    Args:
        pads: (top, bottom, left, right) zeros.
        dtype: the compute dtype (default x's); x and weight are rounded to it on load.
        epilogue: store act(BN(y)) instead of y.
        statistics: finish y's statistics in the last program of each block of channels.
        counters: needed for them: int32, all 0, one for each block of 16 channels or more; they are 0 again afterwards.

    Returns: y [N, OH, OW, S] in ``dtype``, and (mean, rstd) fp32 [S] of y, or None without ``statistics``.
    """
    x = _addressable(x)
    N, I, H, W = x.shape
    S = weight.shape[0]
    top, bottom, left, right = pads
    OH, OW = (H + top + bottom - 3) // stride + 1, (W + left + right - 3) // stride + 1
    rows = OH * OW
    dtype = dtype or x.dtype
    cfg = stem_forward_config(I * 9, S, rows, dtype)
    tiles = triton.cdiv(rows, cfg.BLOCK_M)
    blocks_n = triton.cdiv(S, cfg.BLOCK_N)
    per_program, P = cfg.spread(N * tiles, blocks_n, x.device)
    y = x.new_empty((N, OH, OW, S), dtype=dtype)
    tile_count = tile_mean = tile_m2 = mean = rstd = None
    if statistics is not None:
        check_counters(counters, blocks_n)
        tile_count, tile_mean, tile_m2 = fp32(x.device, blocks_n, P), fp32(x.device, P, S), fp32(x.device, P, S)
        mean, rstd = fp32(x.device, S), fp32(x.device, S)
    stem_forward_kernel[(P * blocks_n,)](
        x=x,
        w=weight,
        y=y,
        norm=epilogue,
        tile_count=tile_count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        mean=mean,
        rstd=rstd,
        **statistics_arguments(statistics),
        counters=counters if statistics is not None else None,
        **_geometry(x=x, weight=weight, OW=OW, rows=rows, pads=pads),
        tiles=tiles,
        per_program=per_program,
        P=P,
        STRIDE=stride,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_K=cfg.BLOCK_K,
        SINGLE=I * 9 <= cfg.BLOCK_K,
        BLOCK_TILES=64,
        ACT=act,
        FAST=fast_math(dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return y, None if statistics is None else (mean, rstd)


@launcher
def stem_backward(
    dout: torch.Tensor,
    y: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    norm: BatchNorm,
    *,
    terms: BatchTerms | None = None,
    act: str = "identity",
) -> torch.Tensor:
    """Return the weight gradient of ``stem_forward`` followed by BatchNorm and ``act``, as partials for
    ``reduce_weight_gradients``.

    Args:
        dout: the gradient of the activation [N, OH, OW, S], of y's dtype. y: what ``stem_forward`` returned, before the
            BatchNorm.
        norm: with rstd. terms: (k0, k1) fp32 [S] of its backward, or None where its statistics are frozen.

    Returns: fp32 [P, S * K], to be summed over P: K = 9 I taps, in the order in which ``torch.empty_like(weight)`` lies
        in memory.
    """
    x = _addressable(x)
    N, _, OW, S = y.shape
    K = x.shape[1] * 9
    rows = y.shape[1] * OW
    cfg = stem_backward_config(K, S, rows, y.dtype)
    tiles = triton.cdiv(rows, cfg.BLOCK_M)
    blocks = triton.cdiv(S, cfg.BLOCK_N) * triton.cdiv(K, cfg.BLOCK_K)
    per_program, P = cfg.spread(N * tiles, blocks, x.device)
    partials = fp32(x.device, P, S * K)
    stem_backward_kernel[(P * blocks,)](
        dout=dout,
        y=y,
        x=x,
        partials=partials,
        norm=norm,
        terms=None if terms is None else tuple(terms),
        **_geometry(x=x, weight=torch.empty_like(weight), OW=OW, rows=rows, pads=pads),
        tiles=tiles,
        per_program=per_program,
        STRIDE=stride,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_K=cfg.BLOCK_K,
        ACT=act,
        FAST=fast_math(y.dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return partials
