"""BatchNorm on NHWC: statistics, their merge with the running-stat update, and the elementwise forward and backward.

    forward    z = (y - mean) * rstd * gamma + beta;   out = phi(z) [* gate[n,c]] [* mask[n]] [+ residual]
    backward   dz = dout * mask * phi'(z);   dbeta = sum dz;   dgamma = sum dz * yhat;   yhat = (y - mean) * rstd
               dy = gamma * rstd * (dz - (dbeta + yhat * dgamma) / M) = scale * dz + k0 + k1 * y     (M values a channel)

With frozen or running statistics the batch terms k0, k1 vanish. Statistics are fp32 (count, mean, M2) triples merged by Chan's
formula (Chan, Golub & LeVeque, 1979); every reduction is partials plus a second stage, in a fixed order: no float atomics.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import elementwise_config, reduction_config
from effkernels.kernels.common import (
    activate,
    activate_and_grad,
    bn_coefficients,
    bn_row,
    branch_factor,
    cast,
    channel_vector_width,
    check_counters,
    fast_math,
    fp32,
    last_to_arrive,
    launcher,
    load_vector,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, BatchStatistics


@sized_jit
def statistics_kernel(
    y, tile_count, tile_mean, tile_m2, rows, CV, rows_per_program,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Per-program (count, mean, M2) of y [rows, C]: sums shifted by the program's first row."""
    C = CV * CVEC
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    mc = c < C
    p = tl.program_id(1)
    first = p.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BR)
    pivot = tl.load(y + first * C + c, mask=mc & (first < rows), other=0.0).to(tl.float32)[None, :]
    s1 = tl.zeros([BR, BC], tl.float32)
    s2 = tl.zeros([BR, BC], tl.float32)
    for start in range(first, last, BR):
        ok = (start + r < last)[:, None] & mc[None, :]
        v = tl.load(y + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        d = tl.where(ok, v - pivot, 0.0)
        s1 += d
        s2 += d * d
    count = (last - first).to(tl.float32)
    shift = tl.sum(s1, 0) / count
    tl.store(tile_mean + p.to(tl.int64) * C + c, tl.sum(pivot, 0) + shift, mask=mc)
    tl.store(tile_m2 + p.to(tl.int64) * C + c, tl.sum(s2, 0) - shift * shift * count, mask=mc)
    tl.store(tile_count + p, count, mask=tl.program_id(0) == 0)


@triton.jit
def finish_statistics(
    tile_count, tile_mean, tile_m2, mean, rstd, running_mean, running_var, num_batches, tiles, C, eps, momentum, block_c,
    BP: tl.constexpr, BC: tl.constexpr, UPDATE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Chan's merge of all tiles for channels block_c * BC ..., mean and rstd for the kernels that follow, the running statistics.

    One pass over the tiles, shifted by the first tile's mean. COUNT: "", "increment" num_batches, or "cumulative", the average
    over num_batches (advanced before the launch).
    """
    c = block_c * BC + tl.arange(0, BC)
    mc = c < C
    t = tl.arange(0, BP)
    pivot = tl.load(tile_mean + c, mask=mc, other=0.0, cache_modifier=".cg")[None, :]
    n_sum = tl.zeros([BP], tl.float32)
    s1 = tl.zeros([BP, BC], tl.float32)
    s2 = tl.zeros([BP, BC], tl.float32)
    for start in range(0, tiles, BP):
        ok = start + t < tiles
        mask = ok[:, None] & mc[None, :]
        offset = (start + t).to(tl.int64)[:, None] * C + c[None, :]
        n = tl.load(tile_count + start + t, mask=ok, other=0.0, cache_modifier=".cg")
        m = tl.load(tile_mean + offset, mask=mask, other=0.0, cache_modifier=".cg")
        d = tl.where(mask, m - pivot, 0.0)
        n_sum += n
        s1 += n[:, None] * d
        s2 += tl.load(tile_m2 + offset, mask=mask, other=0.0, cache_modifier=".cg") + n[:, None] * d * d
    total = tl.sum(n_sum, 0)
    shift = tl.sum(s1, 0) / total
    merged = tl.sum(pivot, 0) + shift
    m2 = tl.maximum(tl.sum(s2, 0) - shift * shift * total, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(mean + c, merged, mask=mc)
    tl.store(rstd + c, 1.0 / tl.sqrt(m2 / total + eps), mask=mc)
    if UPDATE:
        factor = momentum
        if COUNT == "cumulative":
            factor = 1.0 / tl.load(num_batches).to(tl.float32)
        elif COUNT == "increment":
            tl.store(num_batches, tl.load(num_batches) + 1, mask=block_c == 0)
        old_mean = load_vector(running_mean, c, mc)
        old_var = load_vector(running_var, c, mc)
        unbiased = m2 / (total - 1.0)
        tl.store(running_mean + c, cast(old_mean + factor * (merged - old_mean), running_mean.dtype.element_ty), mask=mc)
        tl.store(running_var + c, cast(old_var + factor * (unbiased - old_var), running_var.dtype.element_ty), mask=mc)


@sized_jit
def merge_kernel(
    tile_count, tile_mean, tile_m2, mean, rstd, running_mean, running_var, num_batches, tiles, C, eps, momentum,
    BP: tl.constexpr, BC: tl.constexpr, UPDATE: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """``finish_statistics`` as a launch of its own."""
    finish_statistics(
        tile_count, tile_mean, tile_m2, mean, rstd, running_mean, running_var, num_batches, tiles, C, eps, momentum, tl.program_id(0),
        BP, BC, UPDATE, COUNT,
    )  # fmt: skip


@sized_jit
def apply_kernel(
    y, out, gamma, beta, mean, var, gate, mask, residual, eps, keep, rows, CV, image_blocks,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, VAR_IS_RSTD: tl.constexpr, ACT: tl.constexpr, BN: tl.constexpr,
    GATED: tl.constexpr, MASKED: tl.constexpr, RESIDUAL: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """out = phi(BN(y)) * gate * mask + residual on one block of BR pixels of one image."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BC)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BR + tl.arange(0, BR)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = r[:, None] * C + c[None, :]
    v = tl.load(y + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    if BN:
        scale, shift = bn_row(gamma, beta, mean, var, eps, c, mc, VAR_IS_RSTD)
        v = activate(v * scale + shift, ACT, FAST)
    if GATED:
        v = v * load_vector(gate + n * C, c, mc)[None, :]
    if MASKED:
        v = v * branch_factor(tl.load(mask + n), keep)
    if RESIDUAL:
        v += tl.load(residual + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n * rows * C + offset, cast(v, out.dtype.element_ty), mask=ok)


@sized_jit
def gradient_sums_kernel(
    dq, y, sums, gamma, beta, mean, rstd, mask, rows, CV, rows_per_program, parts,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    GATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """Per (n, part, c): sum dz and sum dz*yhat; with GATE also sum dq*phi(z), sum phi'(z), sum phi'(z)*yhat (sums [N, parts, 2|5, C])."""
    C = CV * CVEC
    NUM: tl.constexpr = 5 if GATE else 2
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    group = tl.program_id(0) // tl.cdiv(C, BC)
    n = (group // parts).to(tl.int64)
    first = group % parts * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BR)
    if BN:
        mu, r_std, scale, shift = bn_coefficients(gamma, beta, mean, rstd, 0.0, c, mc, True)
        mu, scale, shift = mu[None, :], scale[None, :], shift[None, :]
    s1 = tl.zeros([BR, BC], tl.float32)
    s3 = tl.zeros([BR, BC], tl.float32)
    if GATE:
        s_gate = tl.zeros([BR, BC], tl.float32)
        s2 = tl.zeros([BR, BC], tl.float32)
        s4 = tl.zeros([BR, BC], tl.float32)
    for start in range(first, last, BR):
        ok = (start + r < last)[:, None] & mc[None, :]
        offset = n * rows * C + (start + r)[:, None] * C + c[None, :]
        g = tl.load(dq + offset, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(y + offset, mask=ok, other=0.0).to(tl.float32)
        if BN:
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            centred = v - mu
            s1 += g * dphi
            s3 += g * dphi * centred
            if GATE:
                dphi = tl.where(ok, dphi, 0.0)
                s2 += dphi
                s4 += dphi * centred
                s_gate += g * phi
        elif GATE:
            s_gate += g * v
    factor = 1.0
    if MASKED:
        factor = tl.load(mask + n)
    out = sums + group.to(tl.int64) * NUM * C + c
    if BN:
        tl.store(out, tl.sum(s1, 0) * factor, mask=mc)
        tl.store(out + C, tl.sum(s3, 0) * r_std * factor, mask=mc)
    if GATE:
        tl.store(out + 2 * C, tl.sum(s_gate, 0), mask=mc)
        if BN:
            tl.store(out + 3 * C, tl.sum(s2, 0), mask=mc)
            tl.store(out + 4 * C, tl.sum(s4, 0) * r_std, mask=mc)


@triton.jit
def bn_terms(gamma, mean, rstd, dbeta, dgamma, count, c, mask):
    """(k0, k1) of dy = scale * dz + k0 + k1 * y."""
    r = load_vector(rstd, c, mask)
    scale = load_vector(gamma, c, mask) * r
    k1 = -scale * r * dgamma / count
    return -scale * dbeta / count - k1 * load_vector(mean, c, mask), k1


@triton.jit
def finish_gradients(
    sums, gamma, mean, rstd, dgamma, dbeta, k0, k1, parts, row_stride, C, count, block_c,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """dbeta and dgamma from rows (sum dz, sum dz*yhat) of ``parts`` partials, and the batch terms k0, k1, of one block of channels."""
    c = block_c * BC + tl.arange(0, BC)
    mc = c < C
    t = tl.arange(0, BP)
    s1 = tl.zeros([BP, BC], tl.float32)
    s3 = tl.zeros([BP, BC], tl.float32)
    for start in range(0, parts, BP):
        ok = (start + t < parts)[:, None] & mc[None, :]
        row = sums + (start + t).to(tl.int64)[:, None] * row_stride + c[None, :]
        s1 += tl.load(row, mask=ok, other=0.0, cache_modifier=".cg")
        s3 += tl.load(row + C, mask=ok, other=0.0, cache_modifier=".cg")
    db, dg = tl.sum(s1, 0), tl.sum(s3, 0)
    tl.store(dbeta + c, cast(db, dbeta.dtype.element_ty), mask=mc)
    tl.store(dgamma + c, cast(dg, dgamma.dtype.element_ty), mask=mc)
    b0, b1 = bn_terms(gamma, mean, rstd, db, dg, count, c, mc)
    tl.store(k0 + c, b0, mask=mc)
    tl.store(k1 + c, b1, mask=mc)


@sized_jit
def gradient_merge_kernel(
    sums, gamma, mean, rstd, dgamma, dbeta, k0, k1, parts, row_stride, C, count,
    BP: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """``finish_gradients`` as a launch of its own."""
    finish_gradients(sums, gamma, mean, rstd, dgamma, dbeta, k0, k1, parts, row_stride, C, count, tl.program_id(0), BP, BC)


@sized_jit
def gradient_reduce_kernel(
    dout, y, sums, gamma, beta, mean, rstd, mask, counters, dgamma, dbeta, k0, k1, images, rows, CV, rows_per_program, P, count, keep,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BP: tl.constexpr, ACT: tl.constexpr, MASKED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """sum dz and sum dz*yhat over ``rows_per_program`` consecutive pixels of the batch; the last of P programs finishes them."""
    C = CV * CVEC
    block_c = tl.program_id(0) % tl.cdiv(C, BC)
    c = block_c * BC + tl.arange(0, BC)
    mc = c < C
    p = tl.program_id(0) // tl.cdiv(C, BC)
    first = p.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, images * tl.full([], 1, tl.int64) * rows)
    r = tl.arange(0, BR)
    mu, r_std, scale, shift = bn_coefficients(gamma, beta, mean, rstd, 0.0, c, mc, True)
    mu, scale, shift = mu[None, :], scale[None, :], shift[None, :]
    s1 = tl.zeros([BR, BC], tl.float32)
    s3 = tl.zeros([BR, BC], tl.float32)
    for start in range(first, last, BR):
        row_ok = start + r < last
        ok = row_ok[:, None] & mc[None, :]
        offset = start * C + r[:, None] * C + c[None, :]
        g = tl.load(dout + offset, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(y + offset, mask=ok, other=0.0).to(tl.float32)
        if MASKED:
            n = start // rows
            n += ((start - n * rows).to(tl.int32) + r) // rows
            g = g * branch_factor(tl.load(mask + n, mask=row_ok, other=0.0), keep)[:, None]
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            g = g * dphi
        s1 += g
        s3 += g * (v - mu)
    out = sums + p.to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(s1, 0), mask=mc)
    tl.store(out + C, tl.sum(s3, 0) * r_std, mask=mc)
    if last_to_arrive(counters + block_c, P):
        finish_gradients(sums, gamma, mean, rstd, dgamma, dbeta, k0, k1, P, 2 * C, C, count, block_c, BP, BC)


@sized_jit
def apply_backward_kernel(
    dz, y, dx, gamma, beta, mean, rstd, k0, k1, gate, dpool, mask, rows, CV, image_blocks,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, BATCH: tl.constexpr,
    GATED: tl.constexpr, MASKED: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """dx = scale * (dz * gate + dpool) * mask * phi'(BN(y)) + k0 + k1 * y, or dz * gate + dpool without BN."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BC)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BR + tl.arange(0, BR)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = n * rows * C + r[:, None] * C + c[None, :]
    g = tl.load(dz + offset, mask=ok, other=0.0).to(tl.float32)
    if GATED:
        g = g * load_vector(gate + n * C, c, mc)[None, :] + load_vector(dpool + n * C, c, mc)[None, :]
    if MASKED:
        g = g * tl.load(mask + n)
    if BN:
        scale, shift = bn_row(gamma, beta, mean, rstd, 0.0, c, mc, True)
        v = tl.load(y + offset, mask=ok, other=0.0).to(tl.float32)
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            g = g * dphi
        g = g * scale
        if BATCH:
            g += load_vector(k0, c, mc)[None, :] + load_vector(k1, c, mc)[None, :] * v
    tl.store(dx + offset, cast(g, dx.dtype.element_ty), mask=ok)


@sized_jit
def sum_partials_kernel(partials, out, parts, row_stride, COLS, C, TAPS: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr):
    """out[c, tap] = sum over partials [parts, row_stride] of element tap * C + c: the depthwise weight gradient."""
    i = tl.program_id(0) * BL + tl.arange(0, BL)
    t = tl.arange(0, BP)
    acc = tl.zeros([BP, BL], tl.float32)
    for start in range(0, parts, BP):
        ok = (start + t < parts)[:, None] & (i < COLS)[None, :]
        acc += tl.load(partials + (start + t).to(tl.int64)[:, None] * row_stride + i[None, :], mask=ok, other=0.0)
    tl.store(out + i % C * TAPS + i // C, cast(tl.sum(acc, 0), out.dtype.element_ty), mask=i < COLS)


@launcher
def statistics(y):
    """(count [P], mean [P, C], m2 [P, C]) of y [..., C] over everything but C, in fp32 partials."""
    C = y.shape[-1]
    rows = y.numel() // C
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, P = cfg.split(rows, blocks_c, y.device)
    tiles = fp32(y.device, P), fp32(y.device, P, C), fp32(y.device, P, C)
    statistics_kernel[(blocks_c, P)](
        y, *tiles, rows, C // channel_vector_width(C), rows_per_program,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, num_warps=cfg.num_warps,
    )  # fmt: skip
    return tiles


def unpacked(norm: BatchNorm | None, absent) -> tuple:
    """(weight, bias, mean, rstd or var, eps, whether it is rstd), ``absent`` for each where there is none."""
    if norm is None:
        return (absent,) * 4 + (0.0, True)
    weight, bias, mean, rstd, var, eps = norm
    return weight, bias, mean, var if rstd is None else rstd, eps, rstd is not None


def statistics_arguments(how: BatchStatistics | None, absent) -> dict:
    """Those of ``finish_statistics``; ``absent`` stands for tensors that are not there."""
    how = how or BatchStatistics(0.0)
    update = how.running_mean is not None
    count = ""
    if update and how.num_batches_tracked is not None:
        count = "cumulative" if how.momentum is None else "increment"
    return {
        "running_mean": how.running_mean if update else absent,
        "running_var": how.running_var if update else absent,
        "num_batches": how.num_batches_tracked if count else absent,
        "eps": how.eps,
        "momentum": 0.0 if how.momentum is None else how.momentum,
        "UPDATE": update,
        "COUNT": count,
    }


def merge(tiles, how: BatchStatistics):
    """(mean [C], rstd [C]) of partial statistics (count [P], mean [P, C], m2 [P, C])."""
    count, tile_mean, tile_m2 = tiles
    P, C = tile_mean.shape
    mean, rstd = fp32(count.device, C), fp32(count.device, C)
    merge_kernel[(triton.cdiv(C, 32),)](
        count, tile_mean, tile_m2, mean, rstd, tiles=P, C=C, **statistics_arguments(how, mean), BP=64, BC=32, num_warps=4,
    )  # fmt: skip
    return mean, rstd


@launcher
def apply(y, norm: BatchNorm | None, *, act="identity", gates=None, branch_draws=None, keep=-1.0, residual=None, out_dtype=None):
    """phi(BN(y)) [* gates] [* branch scale] [+ residual] for y [N, H, W, C].

    norm: None for y itself. gates: fp32 [N, C]. residual: like y.
    branch_draws: fp32 [N], drop-path's: with ``keep`` above 0, draws from [0, 1) that stand for a scale of 1 / keep where they lie below
        it, else of 0; with ``keep`` negative, the scales themselves.
    """
    N, H, W, C = y.shape
    cfg = elementwise_config(C, y.dtype)
    out = torch.empty_like(y, dtype=out_dtype or y.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BR)
    g, b, m, v, eps, is_rstd = unpacked(norm, y)
    apply_kernel[(triton.cdiv(C, cfg.BC) * N * image_blocks,)](
        y, out, g, b, m, v, y if gates is None else gates, y if branch_draws is None else branch_draws,
        y if residual is None else residual, eps, keep,
        H * W, C // channel_vector_width(C), image_blocks,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, VAR_IS_RSTD=is_rstd, ACT=act, BN=norm is not None, GATED=gates is not None,
        MASKED=branch_draws is not None, RESIDUAL=residual is not None, FAST=fast_math(y.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return out


@launcher
def gradient_sums(dq, y, norm: BatchNorm | None, *, act="identity", branch_scale=None, for_gate=False):
    """Partial sums [N, parts, 2 or, for_gate, 5, C] of ``gradient_sums_kernel``; norm with rstd, or None (the gate's sum only)."""
    N, H, W, C = y.shape
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, parts = cfg.split(H * W, blocks_c * N, y.device)
    sums = fp32(y.device, N, parts, 5 if for_gate else 2, C)
    g, b, m, r, *_ = unpacked(norm, y)
    gradient_sums_kernel[(blocks_c * N * parts,)](
        dq, y, sums, g, b, m, r, y if branch_scale is None else branch_scale, H * W, C // channel_vector_width(C), rows_per_program, parts,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, BN=norm is not None, ACT=act, MASKED=branch_scale is not None, GATE=for_gate,
        FAST=fast_math(y.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return sums


@launcher
def gradient_reduce(dout, y, norm: BatchNorm, *, act="identity", branch_draws=None, keep=-1.0, counters):
    """(dgamma, dbeta, k0, k1) of phi(BN(y)) * branch scale in one launch: ``gradient_sums`` and ``gradient_merge``.

    Args:
        dout, y: [N, H, W, C], of any dtypes. norm: with rstd. branch_draws, keep: as in ``apply``.
        counters: int32, 0, at least ``ceil(C / 16)``.

    Returns: dgamma, dbeta in gamma's and beta's dtypes; k0, k1 fp32 [C].
    """
    N, H, W, C = y.shape
    gamma, beta, mean, rstd, *_ = norm
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, P = cfg.persistent(N * H * W, blocks_c, y.device)
    check_counters(counters, blocks_c)
    sums = fp32(y.device, P, 2, C)
    outs = torch.empty_like(gamma), torch.empty_like(beta), fp32(y.device, C), fp32(y.device, C)
    gradient_reduce_kernel[(blocks_c * P,)](
        dout, y, sums, gamma, beta, mean, rstd, y if branch_draws is None else branch_draws, counters, *outs,
        N, H * W, C // channel_vector_width(C), rows_per_program, P, float(N * H * W), keep,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, BP=cfg.BR, ACT=act, MASKED=branch_draws is not None, FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )  # fmt: skip
    return outs


def gradient_merge(sums, norm: BatchNorm, count):
    """(dgamma, dbeta, k0, k1), fp32 [C], from partials [..., row, C] whose first two rows are (sum dz, sum dz * yhat).

    ``sums`` may be a view of rows inside a larger buffer: its first dimension is reduced and rows are contiguous.
    """
    gamma, _, mean, rstd, *_ = norm
    C = sums.shape[-1]
    outs = [fp32(sums.device, C) for _ in range(4)]
    gradient_merge_kernel[(triton.cdiv(C, 32),)](
        sums, gamma, mean, rstd, *outs, sums.shape[0], sums.stride(0), C, float(count), BP=64, BC=32, num_warps=4,
    )  # fmt: skip
    return outs


@launcher
def apply_backward(dz, y, norm: BatchNorm | None, *, terms=None, act="identity", gates=None, dpool=None, branch_scale=None, out_dtype=None):
    """Gradient of ``apply``'s y; norm with rstd, or None; terms (k0, k1), or None for frozen statistics."""
    N, H, W, C = dz.shape
    cfg = elementwise_config(C, dz.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BR)
    dx = torch.empty_like(dz, dtype=out_dtype or dz.dtype)
    g, b, m, r, *_ = unpacked(norm, dz)
    k0, k1 = terms or (dz, dz)
    apply_backward_kernel[(triton.cdiv(C, cfg.BC) * N * image_blocks,)](
        dz, dz if y is None else y, dx, g, b, m, r, k0, k1, dz if gates is None else gates, dz if dpool is None else dpool,
        dz if branch_scale is None else branch_scale, H * W, C // channel_vector_width(C), image_blocks,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, BN=norm is not None, ACT=act, BATCH=terms is not None, GATED=gates is not None,
        MASKED=branch_scale is not None, FAST=fast_math(dz.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return dx


def sum_partials(partials, taps, like):
    """Weight gradient [C, 1, k, k] in ``like``'s dtype from depthwise partials [P, rows, C]."""
    P, rows, C = partials.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    sum_partials_kernel[(triton.cdiv(taps * C, 64),)](
        partials, out, P, rows * C, taps * C, C, TAPS=taps, BP=64, BL=64, num_warps=4,
    )  # fmt: skip
    return out
