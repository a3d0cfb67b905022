"""1x1 convolutions as products of NHWC rows: forward, and the backward of an MBConv block's project convolution.

    forward           y[m,o]  = sum_k a[m,k] w[o,k]          a = x, phi(BN(x)), times gate[n,k] where there is one
    project backward  dq[m,e] = sum_o dy[m,o] w[o,e]         dy = scale * mask[n] * dout + k0 + k1 * y      (BatchNorm
    3's backward)
                      dw[o,e] = sum_m dy[m,o] q[m,e]         q = phi(BN2(y2)) * gate[n,e]

Nothing activated or gated is stored.

Rows are counted per image where something depends on the image (a gate, sums per image), else over the whole batch, in
tiles of BM. Programs are persistent over tiles; a backward launch holds two roles, data gradient and weight gradient,
that move over the same rows at the same time, so that what both read comes from DRAM once. Weight gradients are fp32
partials, one per split of the rows.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import pointwise_forward_config, project_backward_config
from effkernels.kernels.activation import activate, activate_and_grad, branch_factor
from effkernels.kernels.batchnorm import finish_statistics, statistics_arguments
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    dot,
    fast_math,
    fp32,
    given,
    last_to_arrive,
    launcher,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, BatchStatistics, load_rstd, load_vector, scale_and_shift


@triton.jit
def load_tile(x, i, c, C, ok, mc):
    """Rows i of x [BM, C] at channels c; 0 outside."""
    return tl.load(x + i[:, None] * C + c[None, :], mask=ok[:, None] & mc[None, :], other=0.0)


@triton.jit
def load_forward_weight(w, n, k, K, mask, dtype: tl.constexpr):
    """w [N, K] as the right operand [k, n], rounded to the compute dtype."""
    return cast(tl.load(w + n[None, :] * K + k[:, None], mask=mask, other=0.0).to(tl.float32), dtype)


@triton.jit
def activated_operand(
    v, scale, shift, gate, dtype: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr
):
    """The forward's left operand a from a loaded tile v."""
    if BN or GATED:
        v = v.to(tl.float32)
        if BN:
            v = activate(v * scale + shift, ACT, FAST)
        if GATED:
            v = v * gate
        return cast(v, dtype)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@triton.jit
def fold_rows(v):
    """Sum of rows r and r + 8 of every 16 of v [BM, BN]: a thread holds both in the layout of the tensor cores'
    results."""
    return tl.sum(tl.reshape(v, [v.shape[0] // 16, 2, 8, v.shape[1]]), 1)


@triton.jit
def sum_rows(folded):
    return tl.sum(tl.sum(folded, 0), 0)


@sized_jit
def pointwise_forward_kernel(
    x,
    w,
    y,
    norm1,
    gate,
    norm2,
    residual,
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
    images,
    rows,
    KV,
    NV,
    tiles,
    per_program,
    P,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    SINGLE: tl.constexpr,
    STAGES: tl.constexpr,
    X_DTYPE: tl.constexpr,
    ACT1: tl.constexpr,
    BP: tl.constexpr,
    COUNT: tl.constexpr,
    ACT2: tl.constexpr,
    POOL: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BN columns of ``per_program`` row tiles. SINGLE: BK covers all K, so the weights stay. X_DTYPE: compute in x's
    dtype, else y's."""
    K = KV * KVEC
    N = NV * NVEC
    dtype: tl.constexpr = x.dtype.element_ty if X_DTYPE else y.dtype.element_ty
    blocks_n = tl.cdiv(N, BN)
    block = tl.program_id(0) % blocks_n
    p = tl.program_id(0) // blocks_n
    c = block * BN + tl.arange(0, BN)
    mc = c < N
    k = tl.arange(0, BK)
    i = tl.arange(0, BM)
    if not given(norm1):
        scale1, shift1 = 0.0, 0.0
    if gate is None:
        gates = 0.0
    if SINGLE:
        mk = k < K
        weight = load_forward_weight(w, c, k, K, mk[:, None] & mc[None, :], dtype)
        if given(norm1):
            scale1, shift1 = scale_and_shift(norm1, k, mk)
    if given(norm2):
        scale2, shift2 = scale_and_shift(norm2, c, mc)
    if tile_mean is not None:
        pivot = tl.zeros([BN], tl.float32)
        s1 = tl.zeros([BM // 16, 8, BN], tl.float32)
        s2 = tl.zeros([BM // 16, 8, BN], tl.float32)
        count = 0.0
    if POOL:
        pooled = tl.zeros([BM // 16, 8, BN], tl.float32)
    first = p * per_program
    last = tl.minimum(first + per_program, images * tiles)
    for t in tl.range(first, last, num_stages=STAGES if SINGLE else 1):
        image = (t // tiles).to(tl.int64)
        row0 = (t % tiles).to(tl.int64) * BM
        ok = row0 + i < rows
        base = image * rows + row0
        acc = tl.zeros([BM, BN], tl.float32)
        if SINGLE:
            if gate is not None:
                gates = load_vector(gate + image * K, k, mk)[None, :]
            a = activated_operand(
                load_tile(x + base * K, i, k, K, ok, mk), scale1, shift1, gates, dtype, given(norm1), ACT1, gate is not None, FAST
            )
            acc = dot(a, weight, acc, PRECISION)
        else:
            for start in tl.range(0, K, BK, num_stages=STAGES):
                kk = start + k
                mk = kk < K
                weight = load_forward_weight(w, c, kk, K, mk[:, None] & mc[None, :], dtype)
                if given(norm1):
                    scale1, shift1 = scale_and_shift(norm1, kk, mk)
                if gate is not None:
                    gates = load_vector(gate + image * K, kk, mk)[None, :]
                a = activated_operand(
                    load_tile(x + base * K, i, kk, K, ok, mk), scale1, shift1, gates, dtype, given(norm1), ACT1, gate is not None, FAST
                )
                acc = dot(a, weight, acc, PRECISION)
        if tile_mean is not None:
            here = tl.minimum(rows - row0, BM).to(tl.float32)
            if t == first:
                pivot = tl.sum(tl.where(ok[:, None], acc, 0.0), 0) / here
            d = tl.where(ok[:, None], acc - pivot[None, :], 0.0)
            s1 += fold_rows(d)
            s2 += fold_rows(d * d)
            count += here
        if given(norm2):
            acc = activate(acc * scale2 + shift2, ACT2, FAST)
        if POOL:
            pooled += fold_rows(tl.where(ok[:, None], acc, 0.0))
        else:
            out_mask = ok[:, None] & mc[None, :]
            offset = i[:, None] * N + c[None, :]
            if residual is not None:
                acc += tl.load(residual + base * N + offset, mask=out_mask, other=0.0).to(tl.float32)
            tl.store(y + base * N + offset, cast(acc, y.dtype.element_ty), mask=out_mask)
    if POOL:
        tl.store(y + p.to(tl.int64) * N + c, cast(sum_rows(pooled) / rows, y.dtype.element_ty), mask=mc)
    if tile_mean is not None:
        shift = sum_rows(s1) / count
        tl.store(tile_mean + p.to(tl.int64) * N + c, pivot + shift, mask=mc)
        tl.store(tile_m2 + p.to(tl.int64) * N + c, sum_rows(s2) - shift * shift * count, mask=mc)
        # Each block of columns keeps its own counts: its last program must not wait for another block's.
        tl.store(tile_count + block * P + p, count)
        if mean is not None:
            if last_to_arrive(counters + block, P):
                finish_statistics(
                    tile_count + block * P,
                    tile_mean,
                    tile_m2,
                    mean,
                    rstd,
                    running_mean,
                    running_var,
                    num_batches,
                    P,
                    N,
                    eps,
                    momentum,
                    block,
                    BP,
                    BN,
                    COUNT,
                )


@triton.jit
def bn_backward_operand(dout, y, base, i, c, C, ok, mc, scale, offset, slope, factor, dtype: tl.constexpr, BATCH: tl.constexpr):
    """dy = scale * factor * dout + offset + slope * y, 0 in rows outside; rounded to the compute dtype."""
    v = load_tile(dout + base * C, i, c, C, ok, mc).to(tl.float32) * (scale * factor)
    if BATCH:
        v += offset + slope * load_tile(y + base * C, i, c, C, ok, mc).to(tl.float32)
        v = tl.where(ok[:, None], v, 0.0)
    return cast(v, dtype)


@triton.jit
def backward_rows(norm, terms, c, mc):
    """(scale, offset, slope) of a BatchNorm's backward as [1, BC] rows."""
    scale = load_vector(norm.weight, c, mc) * load_rstd(norm, c, mc)
    offset = tl.zeros_like(scale)
    slope = tl.zeros_like(scale)
    if terms is not None:
        offset = load_vector(terms[0], c, mc)
        slope = load_vector(terms[1], c, mc)
    return scale[None, :], offset[None, :], slope[None, :]


@triton.jit
def store_partial(partials, acc, row, col, ROWS, COLS, split):
    """acc [BL, BR] into partials [split, ROWS, COLS]."""
    offset = split.to(tl.int64) * ROWS * COLS + row[:, None] * COLS + col[None, :]
    tl.store(partials + offset, acc, mask=(row < ROWS)[:, None] & (col < COLS)[None, :])


@triton.jit
def project_weight_gradient(
    pid,
    dout,
    y3,
    y2,
    partials,
    norm3,
    terms3,
    mask,
    keep,
    norm2,
    gate,
    images,
    rows,
    O,
    E,
    tiles,
    splits,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw of BO x BW over every ``splits``-th row tile."""
    dtype: tl.constexpr = y2.dtype.element_ty
    blocks_e = tl.cdiv(E, BW)
    blocks_o = tl.cdiv(O, BO)
    c = pid % blocks_e * BW + tl.arange(0, BW)
    mc = c < E
    o = pid // blocks_e % blocks_o * BO + tl.arange(0, BO)
    mo = o < O
    split = pid // blocks_e // blocks_o
    i = tl.arange(0, BM)
    scale3, offset3, slope3 = backward_rows(norm3, terms3, o, mo)
    scale2, shift2 = scale_and_shift(norm2, c, mc)
    dw = tl.zeros([BO, BW], tl.float32)
    for t in tl.range(split, images * tiles, splits, num_stages=STAGES):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BM
        ok = row0 + i < rows
        base = image * rows + row0
        factor = branch_factor(tl.load(mask + image), keep) if mask is not None else 1.0
        dy = bn_backward_operand(dout, y3, base, i, o, O, ok, mo, scale3, offset3, slope3, factor, dtype, terms3 is not None)
        gates = load_vector(gate + image * E, c, mc)[None, :] if gate is not None else 0.0
        q = activated_operand(load_tile(y2 + base * E, i, c, E, ok, mc), scale2, shift2, gates, dtype, True, ACT, gate is not None, FAST)
        dw = dot(tl.trans(dy), q, dw, PRECISION)
    store_partial(partials, dw, o, c, O, E, split)


@triton.jit
def project_data_gradient(
    pid,
    dout,
    y3,
    y2,
    w,
    dq,
    sums,
    partials,
    norm3,
    terms3,
    mask,
    keep,
    norm2,
    gate,
    images,
    rows,
    O,
    E,
    tiles,
    parts,
    tiles_per_part,
    programs,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    SHARED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BE channels and their sums, for every ``programs``-th part of an image; SHARED: dw of all O (BK covers it)
    too."""
    dtype: tl.constexpr = y2.dtype.element_ty
    blocks_e = tl.cdiv(E, BE)
    c = pid % blocks_e * BE + tl.arange(0, BE)
    mc = c < E
    p = pid // blocks_e
    i = tl.arange(0, BM)
    k = tl.arange(0, BK)
    scale2, shift2 = scale_and_shift(norm2, c, mc)
    mu2 = load_vector(norm2.mean, c, mc)[None, :]
    if SHARED:
        mk = k < O
        scale3, offset3, slope3 = backward_rows(norm3, terms3, k, mk)
        weight = cast(tl.load(w + k[:, None] * E + c[None, :], mask=mk[:, None] & mc[None, :], other=0.0).to(tl.float32), dtype)
        dw = tl.zeros([BK, BE], tl.float32)
    for g in range(p, images * parts, programs):
        image = (g // parts).to(tl.int64)
        factor = branch_factor(tl.load(mask + image), keep) if mask is not None else 1.0
        gates = load_vector(gate + image * E, c, mc)[None, :] if gate is not None else 0.0
        s1 = tl.zeros([BM // 16, 8, BE], tl.float32)
        s3 = tl.zeros([BM // 16, 8, BE], tl.float32)
        if gate is not None:
            s_gate = tl.zeros([BM // 16, 8, BE], tl.float32)
            s2 = tl.zeros([BM // 16, 8, BE], tl.float32)
            s4 = tl.zeros([BM // 16, 8, BE], tl.float32)
        first = g % parts * tiles_per_part
        for t in tl.range(first, tl.minimum(first + tiles_per_part, tiles), num_stages=STAGES if SHARED else 1):
            row0 = t * BM
            ok = row0 + i < rows
            base = image * rows + row0
            acc = tl.zeros([BM, BE], tl.float32)
            if SHARED:
                dy = bn_backward_operand(dout, y3, base, i, k, O, ok, mk, scale3, offset3, slope3, factor, dtype, terms3 is not None)
                acc = dot(dy, weight, acc, PRECISION)
            else:
                for start in tl.range(0, O, BK, num_stages=STAGES):
                    kk = start + k
                    mkk = kk < O
                    scale, offset, slope = backward_rows(norm3, terms3, kk, mkk)
                    w_mask = mkk[:, None] & mc[None, :]
                    right = cast(tl.load(w + kk[:, None] * E + c[None, :], mask=w_mask, other=0.0).to(tl.float32), dtype)
                    left = bn_backward_operand(dout, y3, base, i, kk, O, ok, mkk, scale, offset, slope, factor, dtype, terms3 is not None)
                    acc = dot(left, right, acc, PRECISION)
            v = load_tile(y2 + base * E, i, c, E, ok, mc).to(tl.float32)
            phi, dphi = activate_and_grad(v * scale2 + shift2, ACT, FAST)
            slope_sum = acc * dphi  # rows outside: dy, and so acc, is 0
            s1 += fold_rows(slope_sum)
            s3 += fold_rows(slope_sum * (v - mu2))
            if gate is not None:
                s_gate += fold_rows(acc * phi)
                dphi = tl.where(ok[:, None], dphi, 0.0)
                s2 += fold_rows(dphi)
                s4 += fold_rows(dphi * (v - mu2))
            if dq is not None:
                tl.store(dq + base * E + i[:, None] * E + c[None, :], cast(acc, dtype), mask=ok[:, None] & mc[None, :])
            if SHARED:
                if gate is not None:
                    phi = phi * gates
                dw = dot(tl.trans(dy), cast(phi, dtype), dw, PRECISION)
        NUM: tl.constexpr = 5 if gate is not None else 2
        out = sums + (image * parts + g % parts) * NUM * E + c
        r_std = load_rstd(norm2, c, mc)
        tl.store(out, sum_rows(s1), mask=mc)
        tl.store(out + E, sum_rows(s3) * r_std, mask=mc)
        if gate is not None:
            tl.store(out + 2 * E, sum_rows(s_gate), mask=mc)
            tl.store(out + 3 * E, sum_rows(s2), mask=mc)
            tl.store(out + 4 * E, sum_rows(s4) * r_std, mask=mc)
    if SHARED:
        store_partial(partials, dw, k, c, O, E, p)


@sized_jit
def project_backward_kernel(
    dout,
    y3,
    y2,
    w,
    dq,
    sums,
    partials,
    norm3,
    terms3,
    mask,
    norm2,
    gate,
    keep,
    images,
    rows,
    KV,
    NV,
    tiles,
    parts,
    tiles_per_part,
    programs,
    splits,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    WGRAD: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WGRAD "shared": the data-gradient programs keep dw too; "role": programs of its own, first in the grid; "":
    none."""
    O = KV * KVEC
    E = NV * NVEC
    pid = tl.program_id(0)
    if WGRAD == "role":
        wgrad_programs = splits * tl.cdiv(O, BO) * tl.cdiv(E, BW)
        if pid < wgrad_programs:
            project_weight_gradient(
                pid,
                dout,
                y3,
                y2,
                partials,
                norm3,
                terms3,
                mask,
                keep,
                norm2,
                gate,
                images,
                rows,
                O,
                E,
                tiles,
                splits,
                BM,
                BO,
                BW,
                STAGES,
                ACT,
                FAST,
                PRECISION,
            )
        else:
            project_data_gradient(
                pid - wgrad_programs,
                dout,
                y3,
                y2,
                w,
                dq,
                sums,
                partials,
                norm3,
                terms3,
                mask,
                keep,
                norm2,
                gate,
                images,
                rows,
                O,
                E,
                tiles,
                parts,
                tiles_per_part,
                programs,
                BM,
                BE,
                BK,
                STAGES,
                ACT,
                False,
                FAST,
                PRECISION,
            )
    else:
        project_data_gradient(
            pid,
            dout,
            y3,
            y2,
            w,
            dq,
            sums,
            partials,
            norm3,
            terms3,
            mask,
            keep,
            norm2,
            gate,
            images,
            rows,
            O,
            E,
            tiles,
            parts,
            tiles_per_part,
            programs,
            BM,
            BE,
            BK,
            STAGES,
            ACT,
            WGRAD == "shared",
            FAST,
            PRECISION,
        )


def matmul_precision() -> str:
    """PRECISION of fp32 products, as ``torch.backends.cuda.matmul`` says (the older ``allow_tf32`` is reflected there
    too)."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


@launcher
def pointwise_forward(
    x,
    weight,
    *,
    dtype=None,
    prologue: BatchNorm | None = None,
    act1="identity",
    gates=None,
    statistics: BatchStatistics | None = None,
    partial_statistics=False,
    counters=None,
    epilogue: BatchNorm | None = None,
    act2="identity",
    residual=None,
    pool=False,
    out_dtype=None,
):
    """y = a w^T for x [N, H, W, K], weight [O, K, 1, 1]; see the module docstring.

    Args:
        dtype: compute dtype (default x's); x is rounded to it on load.
        prologue: with rstd: a = act1(BN(x)). gates: fp32 [N, K], multiplies a.
        partial_statistics: return per-program partial statistics (count [P], mean [P, O], m2 [P, O]) of y. statistics:
            the last program finishes them instead, and (mean, rstd) fp32 [O] are returned; counters: int32, zero, one
            per block of columns or more.
        epilogue: act2(BN(y)) is stored. residual: added last, [N, H, W, O]. out_dtype: default dtype.
        pool: store only the mean over H, W, [N, O].

    Returns: (y, statistics or None).
    """
    N, H, W, K = x.shape
    O = weight.shape[0]
    dtype = dtype or x.dtype
    per_image = gates is not None or pool
    images, rows = (N, H * W) if per_image else (1, N * H * W)
    cfg = pointwise_forward_config(K, O, rows, dtype, prologue is not None or gates is not None)
    tiles = triton.cdiv(rows, cfg.BM)
    blocks_n = triton.cdiv(O, cfg.BN)
    per_program, P = (tiles, images) if pool else cfg.spread(images * tiles, blocks_n, x.device)
    y = x.new_empty((N, O) if pool else (N, H, W, O), dtype=out_dtype or dtype)
    want_stats = partial_statistics or statistics is not None
    if statistics is not None:
        check_counters(counters, blocks_n)
    tile_count = tile_mean = tile_m2 = mean = rstd = None
    if want_stats:
        tile_count, tile_mean, tile_m2 = fp32(x.device, blocks_n, P), fp32(x.device, P, O), fp32(x.device, P, O)
    if statistics is not None:
        mean, rstd = fp32(x.device, O), fp32(x.device, O)
    pointwise_forward_kernel[(P * blocks_n,)](
        x=x,
        w=weight,
        y=y,
        norm1=prologue,
        gate=gates,
        norm2=epilogue,
        residual=residual,
        tile_count=tile_count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        mean=mean,
        rstd=rstd,
        counters=None if statistics is None else counters,
        **statistics_arguments(statistics),
        images=images,
        rows=rows,
        KV=K // channel_vector_width(K),
        NV=O // channel_vector_width(O),
        tiles=tiles,
        per_program=per_program,
        P=P,
        KVEC=channel_vector_width(K),
        NVEC=channel_vector_width(O),
        BM=cfg.BM,
        BN=cfg.BN,
        BK=cfg.BK,
        SINGLE=K <= cfg.BK,
        STAGES=cfg.stages,
        X_DTYPE=x.dtype == dtype,
        ACT1=act1,
        BP=max(1, 4096 // cfg.BN),
        ACT2=act2,
        POOL=pool,
        FAST=fast_math(dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    if statistics is not None:
        return y, (mean, rstd)
    return y, (tile_count[0], tile_mean, tile_m2) if partial_statistics else None


@launcher
def project_backward(
    dout,
    y3,
    y2,
    weight,
    *,
    norm3: BatchNorm,
    terms3=None,
    norm2: BatchNorm,
    act,
    gates=None,
    branch_draws=None,
    keep=-1.0,
    need_data=True,
    need_dq=True,
    need_dw=True,
):
    """Data and weight gradient of the project convolution in one launch.

    Args:
        dout: gradient of the block's output [N, h, w, O]; y3 [N, h, w, O] and y2 [N, h, w, E] before their BatchNorms.
        weight: [O, E, 1, 1]. norm3: with rstd; terms3: (k0, k1) fp32 [O] of its backward, or None when its statistics
            are frozen.
        norm2: with rstd. gates: fp32 [N, E] or None. branch_draws, keep: drop-path's, as in ``batchnorm.apply``.
        need_data: whether sums are wanted; need_dq: dq too.

    Returns: (dq [N, h, w, E] or None, sums fp32 [N, parts, 5 (2 without gate), E]: dq*phi', dq*phi'*yhat2, dq*phi,
        phi', phi'*yhat2, or None; partials fp32 [S, O, E] of the weight gradient or None).
    """
    N, H, W, E = y2.shape
    O = weight.shape[0]
    rows = H * W
    cfg = project_backward_config(E, O, rows, y2.dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    blocks_e = triton.cdiv(E, cfg.BN)
    wgrad = "" if not need_dw else "shared" if cfg.shared and need_data else "role"
    parts, tiles_per_part, programs, splits = cfg.plan(N, tiles, E, O, wgrad, need_data, y2.device)
    dq = torch.empty_like(y2) if need_dq else None
    sums = fp32(y2.device, N, parts, 2 if gates is None else 5, E) if need_data else None
    copies = programs if wgrad == "shared" else splits
    partials = fp32(y2.device, copies, O, E) if need_dw else None
    grid = programs * blocks_e + (splits * triton.cdiv(O, cfg.BL) * triton.cdiv(E, cfg.BR) if wgrad == "role" else 0)
    project_backward_kernel[(grid,)](
        dout=dout,
        y3=y3,
        y2=y2,
        w=weight,
        dq=dq,
        sums=sums,
        partials=partials,
        norm3=norm3,
        terms3=None if terms3 is None else tuple(terms3),
        mask=branch_draws,
        norm2=norm2,
        gate=gates,
        keep=keep,
        images=N,
        rows=rows,
        KV=O // channel_vector_width(O),
        NV=E // channel_vector_width(E),
        tiles=tiles,
        parts=parts,
        tiles_per_part=tiles_per_part,
        programs=programs,
        splits=splits,
        KVEC=channel_vector_width(O),
        NVEC=channel_vector_width(E),
        BM=cfg.BM,
        BE=cfg.BN,
        BK=cfg.BK,
        BO=cfg.BL,
        BW=cfg.BR,
        STAGES=cfg.stages,
        ACT=act,
        WGRAD=wgrad,
        FAST=fast_math(y2.dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dq, sums, partials
