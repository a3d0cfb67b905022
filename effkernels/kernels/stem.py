"""The stem: a dense 3 x 3 convolution of images of few channels, as a product of gathered patches with the weights.

    forward   y[n,oh,ow,s] = sum_{c,kh,kw} w[s,c,kh,kw] * x[n, c, oh*stride + kh - pad_top, ow*stride + kw - pad_left]
    wgrad     dw[s,c,kh,kw] = sum_{n,oh,ow} dy[n,oh,ow,s] * x[n, c, ...],     dy = scale * dout * phi'(BN(y)) + k0 + k1 * y

The image may have any strides and any dtype: elements are rounded to the compute dtype on load; the weights may be channels_last
too. The taps (c, kh, kw), padded to a power of two, are the inner dimension. A block of patches is gathered as [taps, pixels], so
that the lanes of a warp stand at neighbouring pixels, whose addresses are ``stride`` elements apart, and not at the taps of one
pixel, which lie in nine rows. Results are NHWC.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import stem_backward_config, stem_forward_config
from effkernels.kernels.batchnorm import finish_statistics, statistics_arguments, unpacked
from effkernels.kernels.common import (
    activate,
    activate_and_grad,
    bn_row,
    cast,
    channel_vector_width,
    check_counters,
    dot,
    fast_math,
    fp32,
    last_to_arrive,
    launcher,
    load_vector,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, BatchStatistics
from effkernels.kernels.pointwise import fold_rows, load_tile, matmul_precision, sum_rows


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
):  # fmt: skip
    """[BK, BM]: the taps of output pixels r of the image at x, rounded to the compute dtype; 0 outside of it."""
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
    x, w, y, gamma, beta, mean, var, tile_count, tile_mean, tile_m2,
    mean_out, rstd_out, running_mean, running_var, num_batches, counters, eps, momentum,
    H, W, OW, rows, I, NV, stride_n, stride_c, stride_h, stride_w, w_stride_s, w_stride_c, w_stride_h, w_stride_w,
    pad_top, pad_left, images, tiles, per_program, P,
    STRIDE: tl.constexpr, NVEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SINGLE: tl.constexpr,
    STATS: tl.constexpr, BP: tl.constexpr, UPDATE: tl.constexpr, COUNT: tl.constexpr, EPILOGUE: tl.constexpr, VAR_IS_RSTD: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BN channels of ``per_program`` tiles of BM output pixels of one image. SINGLE: BK covers all taps, so the weights stay."""
    K = I * 9
    N = NV * NVEC
    dtype: tl.constexpr = y.dtype.element_ty
    blocks_n = tl.cdiv(N, BN)
    block = tl.program_id(0) % blocks_n
    p = tl.program_id(0) // blocks_n
    c = block * BN + tl.arange(0, BN)
    mc = c < N
    k = tl.arange(0, BK)
    i = tl.arange(0, BM)
    if SINGLE:
        taps = tap_positions(k, K, H, stride_c, stride_h, stride_w)
        weight = load_weight(w, c, k, K, mc, w_stride_s, w_stride_c, w_stride_h, w_stride_w, dtype)
    if EPILOGUE:
        scale, shift = bn_row(gamma, beta, mean, var, eps, c, mc, VAR_IS_RSTD)
    if STATS:
        pivot = tl.zeros([BN], tl.float32)
        s1 = tl.zeros([BM // 16, 8, BN], tl.float32)
        s2 = tl.zeros([BM // 16, 8, BN], tl.float32)
        count = 0.0
    first = p * per_program
    for t in range(first, tl.minimum(first + per_program, images * tiles)):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BM
        ok = row0 + i < rows
        xn = x + image * stride_n
        acc = tl.zeros([BM, BN], tl.float32)
        if SINGLE:
            patches = load_patches(xn, row0 + i, rows, taps, H, W, OW, stride_h, stride_w, pad_top, pad_left, dtype, STRIDE)
            acc = dot(tl.trans(patches), weight, acc, PRECISION)
        else:
            for start in range(0, K, BK):
                kk = start + k
                taps_here = tap_positions(kk, K, H, stride_c, stride_h, stride_w)
                patches = load_patches(xn, row0 + i, rows, taps_here, H, W, OW, stride_h, stride_w, pad_top, pad_left, dtype, STRIDE)
                part = load_weight(w, c, kk, K, mc, w_stride_s, w_stride_c, w_stride_h, w_stride_w, dtype)
                acc = dot(tl.trans(patches), part, acc, PRECISION)
        if STATS:
            here = tl.minimum(rows - row0, BM).to(tl.float32)
            if t == first:
                pivot = tl.sum(acc, 0) / here  # rows outside are 0
            d = tl.where(ok[:, None], acc - pivot[None, :], 0.0)
            s1 += fold_rows(d)
            s2 += fold_rows(d * d)
            count += here
        if EPILOGUE:
            acc = activate(acc * scale + shift, ACT, FAST)
        base = image * rows + row0
        tl.store(y + base * N + i[:, None] * N + c[None, :], cast(acc, dtype), mask=ok[:, None] & mc[None, :])
    if STATS:
        moved = sum_rows(s1) / count
        tl.store(tile_mean + p.to(tl.int64) * N + c, pivot + moved, mask=mc)
        tl.store(tile_m2 + p.to(tl.int64) * N + c, sum_rows(s2) - moved * moved * count, mask=mc)
        # Each block of channels keeps its own counts: its last program must not wait for another block's.
        tl.store(tile_count + block * P + p, count)
        if last_to_arrive(counters + block, P):
            finish_statistics(
                tile_count + block * P, tile_mean, tile_m2, mean_out, rstd_out, running_mean, running_var, num_batches,
                P, N, eps, momentum, block, BP, BN, UPDATE, COUNT,
            )  # fmt: skip


@sized_jit
def stem_backward_kernel(
    dout, y, x, partials, gamma, beta, mean, rstd, k0, k1,
    H, W, OW, rows, I, NV, stride_n, stride_c, stride_h, stride_w, w_stride_s, w_stride_c, w_stride_h, w_stride_w,
    pad_top, pad_left, images, tiles, per_program,
    STRIDE: tl.constexpr, NVEC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, ACT: tl.constexpr,
    BATCH: tl.constexpr, FAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weight gradient of BN channels and BK taps from ``per_program`` tiles: fp32 partials [P, N * K] in the weight's memory order."""
    K = I * 9
    N = NV * NVEC
    dtype: tl.constexpr = y.dtype.element_ty
    blocks_n = tl.cdiv(N, BN)
    blocks_k = tl.cdiv(K, BK)
    c = tl.program_id(0) % blocks_n * BN + tl.arange(0, BN)
    mc = c < N
    k = tl.program_id(0) // blocks_n % blocks_k * BK + tl.arange(0, BK)
    p = tl.program_id(0) // (blocks_n * blocks_k)
    i = tl.arange(0, BM)
    taps = tap_positions(k, K, H, stride_c, stride_h, stride_w)
    scale, shift = bn_row(gamma, beta, mean, rstd, 0.0, c, mc, True)
    if BATCH:
        offset = load_vector(k0, c, mc)[None, :]
        slope = load_vector(k1, c, mc)[None, :]
    dw = tl.zeros([BK, BN], tl.float32)
    first = p * per_program
    for t in range(first, tl.minimum(first + per_program, images * tiles)):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BM
        ok = row0 + i < rows
        base = (image * rows + row0) * N
        dy = load_tile(dout + base, i, c, N, ok, mc).to(tl.float32) * scale
        if BATCH or ACT != "identity":
            v = load_tile(y + base, i, c, N, ok, mc).to(tl.float32)
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            dy = dy * dphi
        if BATCH:
            dy = tl.where(ok[:, None], dy + (offset + slope * v), 0.0)
        patches = load_patches(x + image * stride_n, row0 + i, rows, taps, H, W, OW, stride_h, stride_w, pad_top, pad_left, dtype, STRIDE)
        dw = dot(patches, cast(dy, dtype), dw, PRECISION)
    out = partials + p.to(tl.int64) * N * K
    offset_out = tap_offset(k, w_stride_c, w_stride_h, w_stride_w)[:, None] + c[None, :] * w_stride_s
    tl.store(out + offset_out, dw, mask=(k < K)[:, None] & mc[None, :])


def _addressable(x):
    """x, or a dense copy of it where the elements of one image lie 2**31 or more elements apart."""
    reach = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x if reach + 3 * (x.stride(2) + x.stride(3)) < 2**31 else x.contiguous()


def _geometry(x, weight, OW, rows, pads) -> dict:
    S = weight.shape[0]
    w_stride_s, w_stride_c, w_stride_h, w_stride_w = weight.stride()
    return {
        "H": x.shape[2], "W": x.shape[3], "OW": OW, "rows": rows, "I": x.shape[1],
        "NV": S // channel_vector_width(S), "NVEC": channel_vector_width(S),
        "stride_n": x.stride(0), "stride_c": x.stride(1), "stride_h": x.stride(2), "stride_w": x.stride(3),
        "w_stride_s": w_stride_s, "w_stride_c": w_stride_c, "w_stride_h": w_stride_h, "w_stride_w": w_stride_w,
        "pad_top": pads[0], "pad_left": pads[2], "images": x.shape[0],
    }  # fmt: skip


@launcher
def stem_forward(
    x,
    weight,
    stride,
    pads,
    *,
    dtype=None,
    epilogue: BatchNorm | None = None,
    act="identity",
    statistics: BatchStatistics | None = None,
    counters=None,
):
    """y = conv3x3(x) for images x [N, I, H, W] of any strides and dtype, weight [S, I, 3, 3]; see the module docstring.

    Args:
        pads: (top, bottom, left, right) zeros.
        dtype: compute dtype (default x's); x and weight are rounded to it on load.
        epilogue: act(BN(y)) is stored instead of y.
        statistics: y's statistics are finished by the last program of each block of channels, and (mean, rstd) fp32 [S] returned;
            counters: int32, 0, one per block of 16 channels or more.

    Returns: (y [N, OH, OW, S], statistics or None).
    """
    x = _addressable(x)
    N, I, H, W = x.shape
    S = weight.shape[0]
    top, bottom, left, right = pads
    OH, OW = (H + top + bottom - 3) // stride + 1, (W + left + right - 3) // stride + 1
    rows = OH * OW
    dtype = dtype or x.dtype
    cfg = stem_forward_config(I * 9, S, rows, dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    blocks_n = triton.cdiv(S, cfg.BN)
    per_program, P = cfg.spread(N * tiles, blocks_n, x.device)
    y = x.new_empty((N, OH, OW, S), dtype=dtype)
    stats = statistics is not None
    partial, merged = (weight,) * 3, (weight, weight)
    if stats:
        check_counters(counters, blocks_n)
        partial = fp32(x.device, blocks_n, P), fp32(x.device, P, S), fp32(x.device, P, S)
        merged = fp32(x.device, S), fp32(x.device, S)
    finish = statistics_arguments(statistics, merged[0])
    g, b, m, v, eps, is_rstd = unpacked(epilogue, weight)
    finish["eps"] = finish["eps"] if stats else eps
    stem_forward_kernel[(P * blocks_n,)](
        x, weight, y, g, b, m, v, *partial, *merged, counters=counters if stats else weight, **finish,
        **_geometry(x, weight, OW, rows, pads), tiles=tiles, per_program=per_program, P=P,
        STRIDE=stride, BM=cfg.BM, BN=cfg.BN, BK=cfg.BK, SINGLE=I * 9 <= cfg.BK,
        STATS=stats, BP=64, EPILOGUE=epilogue is not None, VAR_IS_RSTD=is_rstd, ACT=act,
        FAST=fast_math(dtype), PRECISION=matmul_precision(), **cfg.options,
    )  # fmt: skip
    return y, merged if stats else None


@launcher
def stem_backward(dout, y, x, weight, stride, pads, norm: BatchNorm, *, terms=None, act="identity"):
    """Weight gradient of ``stem_forward`` followed by BatchNorm and act, as partials for ``reduce_weight_gradients``: fp32 [P, S * K],
    to be summed, in the order in which ``torch.empty_like(weight)`` lies in memory.

    Args:
        dout: gradient of the activation [N, OH, OW, S], of y's dtype; y: ``stem_forward``'s result, before the BatchNorm.
        norm: with rstd; terms: (k0, k1) fp32 [S] of the BatchNorm's backward, or None when its statistics are frozen.
    """
    x = _addressable(x)
    N, _, OW, S = y.shape
    K = x.shape[1] * 9
    rows = y.shape[1] * OW
    cfg = stem_backward_config(K, S, rows, y.dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    blocks = triton.cdiv(S, cfg.BN) * triton.cdiv(K, cfg.BK)
    per_program, P = cfg.spread(N * tiles, blocks, x.device)
    partials = fp32(x.device, P, S * K)
    k0, k1 = terms or (weight, weight)
    stem_backward_kernel[(P * blocks,)](
        dout, y, x, partials, *norm[:4], k0, k1, **_geometry(x, torch.empty_like(weight), OW, rows, pads), tiles=tiles,
        per_program=per_program, STRIDE=stride, BM=cfg.BM, BN=cfg.BN, BK=cfg.BK, ACT=act, BATCH=terms is not None, FAST=fast_math(y.dtype),
        PRECISION=matmul_precision(), **cfg.options,
    )  # fmt: skip
    return partials
