"""BatchNorm on NHWC: statistics, their merge with the running-stat update, and the elementwise forward and backward.

    forward    z = (y - mean) * rstd * gamma + beta;   out = phi(z) [* gates[n,c]] [* branch scale[n]] [+ residual]
    backward   dz = dout * branch scale * phi'(z);   dbeta = sum dz;   dgamma = sum dz * yhat
               dy = gamma * rstd * (dz - (dbeta + yhat * dgamma) / M) = scale * dz + k0 + k1 * y

where yhat = (y - mean) * rstd, and a channel has M values. With frozen or running statistics the batch terms k0 and k1
vanish. Statistics are fp32 triples (count, mean, M2) merged by Chan's formula (Chan, Golub & LeVeque, 1979); every
reduction is partials plus a second stage, in a fixed order, without float atomics.

The branch scale is drop-path's: it multiplies an image's branch by 0 or by 1 / keep. A launch takes it as such
(``branch_scale``), or makes it from draws in [0, 1) (``branch_draws``), which saves the launch that would turn one into
the other.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import elementwise_config, gradient_sums_config, reduction_config
from effkernels.kernels.activation import (
    activate,
    activate_and_grad,
    activation_row,
    branch_factor,
    normalise_activate_and_grad,
)
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    fast_math,
    fp32,
    given,
    last_to_arrive,
    launcher,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, BatchStatistics, coefficients, load_rstd, load_vector, scale_and_shift

BatchTerms = tuple[torch.Tensor, torch.Tensor]  # (k0, k1) fp32 [C]


@sized_jit
def statistics_kernel(
    y,
    tile_count,
    tile_mean,
    tile_m2,
    rows,
    CV,
    rows_per_program,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store each program's (count, mean, M2) of its rows of y [rows, C]. Sums are of differences from the mean of the
    program's first BLOCK_ROWS rows."""
    C = CV * CVEC
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    p = tl.program_id(1)
    first = p.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BLOCK_ROWS)
    ok = (first + r < last)[:, None] & mc[None, :]
    beginning = tl.load(y + (first + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
    pivot = (tl.sum(beginning, 0) / tl.minimum(last - first, BLOCK_ROWS))[None, :]
    s1 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
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
def finish_channels(
    tile_count,
    tile_mean,
    tile_m2,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    tiles,
    C,
    eps,
    momentum,
    c,
    mc,
    first,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Merge all tiles by Chan's formula for channels c [BLOCK_C] where mc: mean and rstd for the kernels that follow,
    the running statistics.

    One pass over the tiles, BLOCK_TILES at a time, as differences from the first tile's mean. ``running_mean`` and
    ``running_var`` are updated in place, unless they are None. COUNT says what ``num_batches`` is for: "" nothing,
    "increment" advances it, "cumulative" makes the running statistics the average over ``num_batches`` batches (which
    the caller has advanced before the launch); ``first`` says whether this call, of those for all channels, does so.
    """
    t = tl.arange(0, BLOCK_TILES)
    pivot = tl.load(tile_mean + c, mask=mc, other=0.0, cache_modifier=".cg")[None, :]
    n_sum = tl.zeros([BLOCK_TILES], tl.float32)
    s1 = tl.zeros([BLOCK_TILES, BLOCK_C], tl.float32)
    s2 = tl.zeros([BLOCK_TILES, BLOCK_C], tl.float32)
    for start in range(0, tiles, BLOCK_TILES):
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
    if running_mean is not None:
        factor = momentum
        if COUNT == "cumulative":
            factor = 1.0 / tl.load(num_batches).to(tl.float32)
        elif COUNT == "increment":
            tl.store(num_batches, tl.load(num_batches) + 1, mask=first)
        old_mean = load_vector(running_mean, c, mc)
        old_var = load_vector(running_var, c, mc)
        unbiased = m2 / (total - 1.0)
        tl.store(
            running_mean + c, cast(old_mean + factor * (merged - old_mean), running_mean.dtype.element_ty), mask=mc
        )
        tl.store(running_var + c, cast(old_var + factor * (unbiased - old_var), running_var.dtype.element_ty), mask=mc)


@triton.jit
def finish_statistics(
    tile_count,
    tile_mean,
    tile_m2,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    tiles,
    C,
    eps,
    momentum,
    block_c,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
):
    """``finish_channels`` for block ``block_c`` of BLOCK_C channels."""
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    finish_channels(
        tile_count=tile_count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        mean=mean,
        rstd=rstd,
        running_mean=running_mean,
        running_var=running_var,
        num_batches=num_batches,
        tiles=tiles,
        C=C,
        eps=eps,
        momentum=momentum,
        c=c,
        mc=c < C,
        first=block_c == 0,
        BLOCK_TILES=BLOCK_TILES,
        BLOCK_C=BLOCK_C,
        COUNT=COUNT,
    )


@sized_jit
def merge_kernel(
    tile_count,
    tile_mean,
    tile_m2,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    tiles,
    C,
    eps,
    momentum,
    BLOCK_TILES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
):
    """``finish_statistics`` as a launch of its own."""
    block_c = tl.program_id(0)
    finish_statistics(
        tile_count=tile_count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        mean=mean,
        rstd=rstd,
        running_mean=running_mean,
        running_var=running_var,
        num_batches=num_batches,
        tiles=tiles,
        C=C,
        eps=eps,
        momentum=momentum,
        block_c=block_c,
        BLOCK_TILES=BLOCK_TILES,
        BLOCK_C=BLOCK_C,
        COUNT=COUNT,
    )


@sized_jit
def apply_kernel(
    y,
    out,
    norm,
    gates,
    branch_draws,
    residual,
    keep,
    rows,
    CV,
    image_blocks,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """out = phi(BN(y)) * gates * branch scale + residual on one block of BLOCK_ROWS pixels of one image."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = r[:, None] * C + c[None, :]
    v = tl.load(y + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    if given(norm):
        scale, shift = scale_and_shift(norm, c, mc)
        v = activate(v * scale + shift, ACT, FAST)
    if gates is not None:
        v = v * load_vector(gates + n * C, c, mc)[None, :]
    if branch_draws is not None:
        v = v * branch_factor(tl.load(branch_draws + n), keep)
    if residual is not None:
        v += tl.load(residual + n * rows * C + offset, mask=ok, other=0.0).to(tl.float32)
    tl.store(out + n * rows * C + offset, cast(v, out.dtype.element_ty), mask=ok)


@sized_jit
def gradient_sums_kernel(
    dq,
    y,
    q,
    sums,
    norm,
    gates,
    branch_scale,
    rows,
    CV,
    rows_per_program,
    parts,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FOR_GATE: tl.constexpr,
    FAST: tl.constexpr,
):
    """Store the sums of one part of one image's pixels, for each channel, in sums [N, parts, 2 or 5, C].

    They are sum dz and sum dz * yhat; with FOR_GATE also sum dq * phi(z), sum phi'(z) and sum phi'(z) * yhat. And with
    q, store q = phi(z) * gates.

    One warp, whose lanes together hold BLOCK_ROWS rows of BLOCK_C channels: a lane adds its own rows, and lanes meet
    once at the end. STEPS such blocks of each tensor are on their way at a time.
    """
    C = CV * CVEC
    NUM: tl.constexpr = 5 if FOR_GATE else 2
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    group = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n = (group // parts).to(tl.int64)
    first = group % parts * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BLOCK_ROWS)
    if given(norm):
        mean = load_vector(norm.mean, c, mc)[None, :]
        scale, shift = activation_row(norm, c, mc, ACT, FAST)
    if q is not None:
        gate = 1.0
        if gates is not None:
            gate = load_vector(gates + n * C, c, mc)[None, :]
    s1 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    if FOR_GATE:
        s_gate = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        s2 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
        s4 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(first, last, STEPS * BLOCK_ROWS):
        loaded_g, loaded_v = (), ()
        for k in tl.static_range(STEPS):
            row = start + k * BLOCK_ROWS + r
            ok = (row < last)[:, None] & mc[None, :]
            offset = n * rows * C + (row[:, None] * C + c[None, :])
            loaded_g = loaded_g + (tl.load(dq + offset, mask=ok, other=0.0),)
            loaded_v = loaded_v + (tl.load(y + offset, mask=ok, other=0.0),)
        for k in tl.static_range(STEPS):
            row = start + k * BLOCK_ROWS + r
            ok = (row < last)[:, None] & mc[None, :]
            g, v = loaded_g[k].to(tl.float32), loaded_v[k].to(tl.float32)
            if given(norm):
                phi, dphi = normalise_activate_and_grad(v, scale, shift, ACT, FAST)
                centred = v - mean
                slope = g * dphi
                s1 += slope
                s3 += slope * centred
                if FOR_GATE:
                    dphi = tl.where(ok, dphi, 0.0)
                    s2 += dphi
                    s4 += dphi * centred
                    s_gate += g * phi
                if q is not None:
                    offset = n * rows * C + (row[:, None] * C + c[None, :])
                    tl.store(q + offset, cast(phi * gate, q.dtype.element_ty), mask=ok)
            elif FOR_GATE:
                s_gate += g * v
    factor = 1.0
    if branch_scale is not None:
        factor = tl.load(branch_scale + n)
    out = sums + group.to(tl.int64) * NUM * C + c
    if given(norm):
        rstd = load_rstd(norm, c, mc)
        undoubled: tl.constexpr = 0.5 if FAST and ACT == "silu" else 1.0  # see normalise_activate_and_grad
        tl.store(out, tl.sum(s1, 0) * (factor * undoubled), mask=mc)
        tl.store(out + C, tl.sum(s3, 0) * (rstd * factor * undoubled), mask=mc)
    if FOR_GATE:
        tl.store(out + 2 * C, tl.sum(s_gate, 0), mask=mc)
        if given(norm):
            tl.store(out + 3 * C, tl.sum(s2, 0) * undoubled, mask=mc)
            tl.store(out + 4 * C, tl.sum(s4, 0) * (rstd * undoubled), mask=mc)


@triton.jit
def batch_terms(norm, dbeta, dgamma, count, c, mask):
    """(k0, k1) of channels c, with dy = scale * dz + k0 + k1 * y, for statistics of a batch of ``count`` values a
    channel."""
    rstd = load_rstd(norm, c, mask)
    scale = load_vector(norm.weight, c, mask) * rstd
    k1 = -scale * rstd * dgamma / count
    return -scale * dbeta / count - k1 * load_vector(norm.mean, c, mask), k1


@triton.jit
def finish_gradients(
    sums,
    norm,
    dgamma,
    dbeta,
    k0,
    k1,
    parts,
    row_stride,
    C,
    count,
    block_c,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Store dbeta, dgamma and the batch terms k0, k1 of one block of channels, from ``parts`` partial rows (sum dz, sum
    dz * yhat)."""
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    t = tl.arange(0, BLOCK_P)
    s1 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in range(0, parts, BLOCK_P):
        ok = (start + t < parts)[:, None] & mc[None, :]
        row = sums + (start + t).to(tl.int64)[:, None] * row_stride + c[None, :]
        s1 += tl.load(row, mask=ok, other=0.0, cache_modifier=".cg")
        s3 += tl.load(row + C, mask=ok, other=0.0, cache_modifier=".cg")
    db, dg = tl.sum(s1, 0), tl.sum(s3, 0)
    tl.store(dbeta + c, cast(db, dbeta.dtype.element_ty), mask=mc)
    tl.store(dgamma + c, cast(dg, dgamma.dtype.element_ty), mask=mc)
    b0, b1 = batch_terms(norm, db, dg, count, c, mc)
    tl.store(k0 + c, b0, mask=mc)
    tl.store(k1 + c, b1, mask=mc)


@sized_jit
def gradient_merge_kernel(
    sums,
    norm,
    dgamma,
    dbeta,
    k0,
    k1,
    parts,
    row_stride,
    C,
    count,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """``finish_gradients`` as a launch of its own."""
    finish_gradients(
        sums=sums,
        norm=norm,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        parts=parts,
        row_stride=row_stride,
        C=C,
        count=count,
        block_c=tl.program_id(0),
        BLOCK_P=BLOCK_P,
        BLOCK_C=BLOCK_C,
    )


@sized_jit
def gradient_reduce_kernel(
    dout,
    y,
    sums,
    norm,
    branch_draws,
    counters,
    dgamma,
    dbeta,
    k0,
    k1,
    images,
    rows,
    CV,
    rows_per_program,
    P,
    count,
    keep,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """sum dz and sum dz * yhat over ``rows_per_program`` consecutive pixels of the batch; the last of P programs
    finishes them."""
    C = CV * CVEC
    block_c = tl.program_id(0) % tl.cdiv(C, BLOCK_C)
    c = block_c * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    p = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    first = p.to(tl.int64) * rows_per_program
    last = tl.minimum(first + rows_per_program, images * tl.full([], 1, tl.int64) * rows)
    r = tl.arange(0, BLOCK_ROWS)
    mean, rstd, scale, shift = coefficients(norm, c, mc)
    mean, scale, shift = mean[None, :], scale[None, :], shift[None, :]
    s1 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in tl.range(first, last, BLOCK_ROWS, num_stages=3):
        row_ok = start + r < last
        ok = row_ok[:, None] & mc[None, :]
        offset = start * C + r[:, None] * C + c[None, :]
        g = tl.load(dout + offset, mask=ok, other=0.0).to(tl.float32)
        v = tl.load(y + offset, mask=ok, other=0.0).to(tl.float32)
        if branch_draws is not None:
            n = start // rows
            n += ((start - n * rows).to(tl.int32) + r) // rows
            g = g * branch_factor(tl.load(branch_draws + n, mask=row_ok, other=0.0), keep)[:, None]
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            g = g * dphi
        s1 += g
        s3 += g * (v - mean)
    out = sums + p.to(tl.int64) * 2 * C + c
    tl.store(out, tl.sum(s1, 0), mask=mc)
    tl.store(out + C, tl.sum(s3, 0) * rstd, mask=mc)
    if last_to_arrive(counters + block_c, P):
        finish_gradients(
            sums=sums,
            norm=norm,
            dgamma=dgamma,
            dbeta=dbeta,
            k0=k0,
            k1=k1,
            parts=P,
            row_stride=2 * C,
            C=C,
            count=count,
            block_c=block_c,
            BLOCK_P=BLOCK_P,
            BLOCK_C=BLOCK_C,
        )


@sized_jit
def apply_backward_kernel(
    dz,
    y,
    dx,
    norm,
    terms,
    gates,
    dpool,
    branch_scale,
    rows,
    CV,
    image_blocks,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """dx = scale * (dz * gates + dpool) * branch scale * phi'(BN(y)) + k0 + k1 * y, or dz * gates + dpool without a
    BatchNorm."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    block = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n = (block // image_blocks).to(tl.int64)
    r = block % image_blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = (r < rows)[:, None] & mc[None, :]
    offset = n * rows * C + r[:, None] * C + c[None, :]
    g = tl.load(dz + offset, mask=ok, other=0.0).to(tl.float32)
    if gates is not None:
        g = g * load_vector(gates + n * C, c, mc)[None, :] + load_vector(dpool + n * C, c, mc)[None, :]
    if branch_scale is not None:
        g = g * tl.load(branch_scale + n)
    if given(norm):
        scale, shift = scale_and_shift(norm, c, mc)
        v = tl.load(y + offset, mask=ok, other=0.0).to(tl.float32)
        if ACT != "identity":
            phi, dphi = activate_and_grad(v * scale + shift, ACT, FAST)
            g = g * dphi
        g = g * scale
        if terms is not None:
            g += load_vector(terms[0], c, mc)[None, :] + load_vector(terms[1], c, mc)[None, :] * v
    tl.store(dx + offset, cast(g, dx.dtype.element_ty), mask=ok)


@sized_jit
def sum_partials_kernel(
    partials,
    out,
    parts,
    row_stride,
    COLS,
    C,
    TAPS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
):
    """out[c, tap] = sum over partials [parts, row_stride] of element tap * C + c: the depthwise weight gradient."""
    i = tl.program_id(0) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    t = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_P, BLOCK_COLS], tl.float32)
    for start in range(0, parts, BLOCK_P):
        ok = (start + t < parts)[:, None] & (i < COLS)[None, :]
        acc += tl.load(partials + (start + t).to(tl.int64)[:, None] * row_stride + i[None, :], mask=ok, other=0.0)
    tl.store(out + i % C * TAPS + i // C, cast(tl.sum(acc, 0), out.dtype.element_ty), mask=i < COLS)


@launcher
def statistics(y: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return fp32 partial statistics (count [P], mean [P, C], M2 [P, C]) of y [..., C] over everything but C."""
    C = y.shape[-1]
    rows = y.numel() // C
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows_per_program, P = cfg.persistent(rows, blocks_c, y.device)
    count, mean, m2 = fp32(y.device, P), fp32(y.device, P, C), fp32(y.device, P, C)
    statistics_kernel[(blocks_c, P)](
        y=y,
        tile_count=count,
        tile_mean=mean,
        tile_m2=m2,
        rows=rows,
        CV=C // channel_vector_width(C),
        rows_per_program=rows_per_program,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        num_warps=cfg.num_warps,
    )
    return count, mean, m2


def statistics_arguments(how: BatchStatistics | None) -> dict:
    """Return the arguments by which ``finish_statistics`` is told ``how``; None where a launch finishes no
    statistics."""
    how = how or BatchStatistics(0.0)
    updates = how.running_mean is not None
    count = ""
    if updates and how.num_batches_tracked is not None:
        count = "cumulative" if how.momentum is None else "increment"
    return {
        "running_mean": how.running_mean,
        "running_var": how.running_var,
        "num_batches": how.num_batches_tracked if count else None,
        "eps": how.eps,
        "momentum": 0.0 if how.momentum is None else how.momentum,
        "COUNT": count,
    }


def merge(
    tiles: tuple[torch.Tensor, torch.Tensor, torch.Tensor], how: BatchStatistics
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, rstd) fp32 [C] of partial statistics (count [P], mean [P, C], M2 [P, C]), finished as ``how``
    says."""
    count, tile_mean, tile_m2 = tiles
    P, C = tile_mean.shape
    mean, rstd = fp32(count.device, C), fp32(count.device, C)
    merge_kernel[(triton.cdiv(C, 32),)](
        tile_count=count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        mean=mean,
        rstd=rstd,
        tiles=P,
        C=C,
        **statistics_arguments(how),
        BLOCK_TILES=64,
        BLOCK_C=32,
        num_warps=4,
    )
    return mean, rstd


@launcher
def apply(
    y: torch.Tensor,
    norm: BatchNorm | None,
    *,
    act: str = "identity",
    gates: torch.Tensor | None = None,
    branch_draws: torch.Tensor | None = None,
    keep: float = -1.0,
    residual: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return phi(BN(y)) [* gates] [* branch scale] [+ residual] for y [N, H, W, C], in ``out_dtype`` (default y's).

    Args:
        norm: None for y itself, without activation.
        gates: fp32 [N, C]. residual: like y, of any dtype.
        branch_draws, keep: drop-path's, fp32 [N]. With ``keep`` above 0 they are draws from [0, 1): an image's branch
            is scaled by 1 / keep where its draw lies below ``keep``, else by 0. With ``keep`` negative they are the
            scales themselves.
    """
    N, H, W, C = y.shape
    cfg = elementwise_config(C, y.dtype)
    out = torch.empty_like(y, dtype=out_dtype or y.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BLOCK_ROWS)
    apply_kernel[(triton.cdiv(C, cfg.BLOCK_C) * N * image_blocks,)](
        y=y,
        out=out,
        norm=norm,
        gates=gates,
        branch_draws=branch_draws,
        residual=residual,
        keep=keep,
        rows=H * W,
        CV=C // channel_vector_width(C),
        image_blocks=image_blocks,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return out


@launcher
def gradient_sums(
    dq: torch.Tensor,
    y: torch.Tensor,
    norm: BatchNorm | None,
    *,
    act: str = "identity",
    gates: torch.Tensor | None = None,
    branch_scale: torch.Tensor | None = None,
    for_gate: bool = False,
    activated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return (sums, q). The partial sums fp32 [N, parts, 2, C] are what BatchNorm's backward is made of: rows sum dz
    and sum dz * yhat.

    Args:
        dq, y: [N, H, W, C]. norm: with rstd; None only with ``for_gate``, whose one row without a BatchNorm is row 2.
        branch_scale: fp32 [N], multiplies an image's gradient.
        for_gate: return [N, parts, 5, C], with the rows sum dq * phi(z), sum phi'(z) and sum phi'(z) * yhat too.
        activated: make q = phi(z) * gates too, in y's dtype; it is None otherwise. gates: fp32 [N, C] or None.
    """
    N, H, W, C = y.shape
    cfg = gradient_sums_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows_per_program, parts = cfg.split(H * W, blocks_c * N, y.device)
    sums = fp32(y.device, N, parts, 5 if for_gate else 2, C)
    q = torch.empty_like(y) if activated else None
    gradient_sums_kernel[(blocks_c * N * parts,)](
        dq=dq,
        y=y,
        q=q,
        sums=sums,
        norm=norm,
        gates=gates if activated else None,
        branch_scale=branch_scale,
        rows=H * W,
        CV=C // channel_vector_width(C),
        rows_per_program=rows_per_program,
        parts=parts,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        STEPS=cfg.steps,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FOR_GATE=for_gate,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return sums, q


@launcher
def gradient_reduce(
    dout: torch.Tensor,
    y: torch.Tensor,
    norm: BatchNorm,
    *,
    act: str = "identity",
    branch_draws: torch.Tensor | None = None,
    keep: float = -1.0,
    counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dgamma, dbeta, k0, k1) of phi(BN(y)) * branch scale in one launch: ``gradient_sums`` and
    ``gradient_merge`` together.

    Args:
        dout, y: [N, H, W, C], of any dtypes. norm: with rstd. branch_draws, keep: as in ``apply``.
        counters: int32, all 0, at least ``ceil(C / 16)``; they are 0 again afterwards.

    Returns: dgamma and dbeta in their parameters' dtypes; k0, k1 fp32 [C].
    """
    N, H, W, C = y.shape
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows_per_program, P = cfg.persistent(N * H * W, blocks_c, y.device)
    check_counters(counters, blocks_c)
    sums = fp32(y.device, P, 2, C)
    dgamma, dbeta = torch.empty_like(norm.weight), torch.empty_like(norm.bias)
    k0, k1 = fp32(y.device, C), fp32(y.device, C)
    gradient_reduce_kernel[(blocks_c * P,)](
        dout=dout,
        y=y,
        sums=sums,
        norm=norm,
        branch_draws=branch_draws,
        counters=counters,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        images=N,
        rows=H * W,
        CV=C // channel_vector_width(C),
        rows_per_program=rows_per_program,
        P=P,
        count=float(N * H * W),
        keep=keep,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        BLOCK_P=cfg.BLOCK_ROWS,
        ACT=act,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return dgamma, dbeta, k0, k1


def gradient_merge(
    sums: torch.Tensor, norm: BatchNorm, count: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (dgamma, dbeta, k0, k1), fp32 [C], from partial sums [parts, rows, C] whose first two rows are sum dz and
    sum dz * yhat.

    Args:
        sums: may be a view of rows inside a larger buffer; its first dimension is summed, and its rows are contiguous.
        norm: with rstd. count: values a channel.
    """
    C = sums.shape[-1]
    dgamma, dbeta, k0, k1 = (fp32(sums.device, C) for _ in range(4))
    gradient_merge_kernel[(triton.cdiv(C, 32),)](
        sums=sums,
        norm=norm,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        parts=sums.shape[0],
        row_stride=sums.stride(0),
        C=C,
        count=float(count),
        BLOCK_P=64,
        BLOCK_C=32,
        num_warps=4,
    )
    return dgamma, dbeta, k0, k1


@launcher
def apply_backward(
    dz: torch.Tensor,
    y: torch.Tensor | None,
    norm: BatchNorm | None,
    *,
    terms: BatchTerms | None = None,
    act: str = "identity",
    gates: torch.Tensor | None = None,
    dpool: torch.Tensor | None = None,
    branch_scale: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Return the gradient of ``apply``'s y, like dz [N, H, W, C], in ``out_dtype`` (default dz's).

    Args:
        y: [N, H, W, C], as ``apply`` took it; it is not read without ``norm``. norm: with rstd, or None.
        terms: (k0, k1) fp32 [C] of the BatchNorm's backward, or None where its statistics are frozen.
        gates, dpool: fp32 [N, C], both or neither. branch_scale: fp32 [N].
    """
    N, H, W, C = dz.shape
    cfg = elementwise_config(C, dz.dtype)
    image_blocks = triton.cdiv(H * W, cfg.BLOCK_ROWS)
    dx = torch.empty_like(dz, dtype=out_dtype or dz.dtype)
    apply_backward_kernel[(triton.cdiv(C, cfg.BLOCK_C) * N * image_blocks,)](
        dz=dz,
        y=y,
        dx=dx,
        norm=norm,
        terms=terms,
        gates=gates,
        dpool=dpool,
        branch_scale=branch_scale,
        rows=H * W,
        CV=C // channel_vector_width(C),
        image_blocks=image_blocks,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FAST=fast_math(dz.dtype),
        num_warps=cfg.num_warps,
    )
    return dx


def sum_partials(partials: torch.Tensor, taps: int, like: torch.Tensor) -> torch.Tensor:
    """Return the weight gradient [C, 1, k, k], in the dtype of the weight ``like``, from depthwise partials fp32 [P,
    rows, C]."""
    P, rows, C = partials.shape
    out = torch.empty_like(like, memory_format=torch.contiguous_format)
    sum_partials_kernel[(triton.cdiv(taps * C, 64),)](
        partials=partials,
        out=out,
        parts=P,
        row_stride=rows * C,
        COLS=taps * C,
        C=C,
        TAPS=taps,
        BLOCK_P=64,
        BLOCK_COLS=64,
        num_warps=4,
    )
    return out
