"""1x1 convolutions as products of NHWC rows: the forward, and the expand convolution's backward of an MBConv block.

    forward           y[m,o]  = sum_k a[m,k] w[o,k]          a = x, phi(BN(x)), times gate[n,k] where there is one
    expand backward   dx[m,i] = sum_e dz[m,e] A[e] w[e,i] + sum_j x[m,j] G[j,i] + c[i]  [+ dout[m,i]]
                      D[e,i]  = sum_m dz[m,e] x[m,i],   gram[j,i] = sum_m x[m,j] x[m,i],   xsum[i] = sum_m x[m,i]

The expand backward never reads y1: BatchNorm 1's backward is dy1 = A * dz + k0 + k1 * y1 with y1 = x w^T, so y1's term
folds into x: G = w^T diag(k1) w, c = k0 w, and dw = A D + k1 (w gram) + k0 xsum (``reduce_weight_gradients``). Nothing
activated or gated is stored.

Rows are counted per image where something depends on the image (a gate), else over the whole batch, in tiles of BM.
Programs are persistent over tiles; the backward launch holds two roles, data gradient and weight gradient, that move
over the same rows at the same time, so that what both read comes from DRAM once. Weight gradients are fp32 partials,
one per split of the rows.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import expand_backward_config, pointwise_forward_config
from effkernels.kernels.activation import activate
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

GRAM_BLOCK = 32  # rows and columns of a program's part of the Gram matrix


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
def store_partial(partials, acc, row, col, ROWS, COLS, split):
    """acc [BL, BR] into partials [split, ROWS, COLS]."""
    offset = split.to(tl.int64) * ROWS * COLS + row[:, None] * COLS + col[None, :]
    tl.store(partials + offset, acc, mask=(row < ROWS)[:, None] & (col < COLS)[None, :])


@triton.jit
def gram_matrix(pid, w, terms1, matrix, E, I, BG: tl.constexpr, dtype: tl.constexpr):
    """BG x BG of matrix fp32 [I + 1, I]: G[j,i] = sum_e w[e,j] k1[e] w[e,i] and, in row I, c[i] = sum_e k0[e] w[e,i]; w
    as the forward rounded it."""
    blocks = tl.cdiv(I, BG)
    i = pid % blocks * BG + tl.arange(0, BG)
    j = pid // blocks * BG + tl.arange(0, BG)
    mi, mj = i < I, j < I
    acc = tl.zeros([BG, BG], tl.float32)
    row = tl.zeros([BG], tl.float32)
    for start in range(0, E, BG):
        e = start + tl.arange(0, BG)
        me = e < E
        right = tl.load(w + e[:, None] * I + i[None, :], mask=me[:, None] & mi[None, :], other=0.0).to(tl.float32)
        left = tl.load(w + e[:, None] * I + j[None, :], mask=me[:, None] & mj[None, :], other=0.0).to(tl.float32)
        right, left = cast(right, dtype).to(tl.float32), cast(left, dtype).to(tl.float32)
        acc = tl.dot(tl.trans(left * load_vector(terms1[1], e, me)[:, None]), right, acc, input_precision="ieee")
        row += tl.sum(right * load_vector(terms1[0], e, me)[:, None], 0)
    tl.store(matrix + j[:, None] * I + i[None, :], acc, mask=mj[:, None] & mi[None, :])
    tl.store(matrix + I * I + i, row, mask=mi & (pid < blocks))


@triton.jit
def raw_operand(x, i, c, C, ok, mc, dtype: tl.constexpr):
    """Rows i of x at channels c, rounded to the compute dtype."""
    v = load_tile(x, i, c, C, ok, mc)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@triton.jit
def expand_weight_gradient(
    pid,
    dz,
    x,
    partials,
    grams,
    rows,
    E,
    I,
    tiles,
    splits,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """D of BE x BW, or beyond the last block of E a block of gram (and once xsum), over every ``splits``-th row
    tile."""
    dtype: tl.constexpr = dz.dtype.element_ty
    blocks_i = tl.cdiv(I, BW)
    blocks_e = tl.cdiv(E, BE)
    blocks_l = blocks_e + tl.cdiv(I, BE) if BATCH else blocks_e
    c = pid % blocks_i * BW + tl.arange(0, BW)
    mc = c < I
    block = pid // blocks_i % blocks_l
    split = pid // blocks_i // blocks_l
    m = tl.arange(0, BM)
    wide = tl.full([], BM, tl.int64)
    acc = tl.zeros([BE, BW], tl.float32)
    if block < blocks_e:
        e = block * BE + tl.arange(0, BE)
        me = e < E
        for t in tl.range(split, tiles, splits, num_stages=STAGES):
            base = t * wide
            ok = base + m < rows
            left = load_tile(dz + base * E, m, e, E, ok, me)
            acc = dot(tl.trans(left), raw_operand(x + base * I, m, c, I, ok, mc, dtype), acc, PRECISION)
        store_partial(partials, acc, e, c, E, I, split)
    else:
        if grams is not None:
            j = (block - blocks_e) * BE + tl.arange(0, BE)
            mj = j < I
            xsum = tl.zeros([BW], tl.float32)
            for t in tl.range(split, tiles, splits, num_stages=STAGES):
                base = t * wide
                ok = base + m < rows
                right = raw_operand(x + base * I, m, c, I, ok, mc, dtype)
                acc = dot(tl.trans(raw_operand(x + base * I, m, j, I, ok, mj, dtype)), right, acc, PRECISION)
                xsum += tl.sum(right.to(tl.float32), 0)
            out = grams + split.to(tl.int64) * (I + 1) * I
            tl.store(out + j[:, None] * I + c[None, :], acc, mask=mj[:, None] & mc[None, :])
            tl.store(out + I * I + c, xsum, mask=mc & (block == blocks_e))


@triton.jit
def expand_data_gradient(
    pid,
    dz,
    x,
    w,
    dx,
    norm1,
    matrix,
    dout,
    ready,
    rows,
    E,
    I,
    tiles,
    programs,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BI channels of dx in every ``programs``-th row tile. ready: how many blocks of the matrix are there, and next to
    it its readers."""
    dtype: tl.constexpr = dz.dtype.element_ty
    blocks_i = tl.cdiv(I, BI)
    c = pid % blocks_i * BI + tl.arange(0, BI)
    mc = c < I
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    wide = tl.full([], BM, tl.int64)
    for t in range(pid // blocks_i, tiles, programs):
        base = t * wide
        ok = base + m < rows
        acc = tl.zeros([BM, BI], tl.float32)
        for start in tl.range(0, E, BK, num_stages=STAGES):
            e = start + k
            me = e < E
            scale = load_vector(norm1.weight, e, me) * load_rstd(norm1, e, me)
            weight = tl.load(w + e[:, None] * I + c[None, :], mask=me[:, None] & mc[None, :], other=0.0).to(tl.float32)
            weight = cast(cast(weight, dtype).to(tl.float32) * scale[:, None], dtype)
            acc = dot(load_tile(dz + base * E, m, e, E, ok, me), weight, acc, PRECISION)
        if matrix is not None:
            if t == pid // blocks_i:  # the first tile, whose product above took the time that the matrix takes
                wait_for(ready, tl.cdiv(I, BG) * tl.cdiv(I, BG), programs * blocks_i)
            for start in tl.range(0, I, BK, num_stages=STAGES):
                j = start + k
                mj = j < I
                at = matrix + j[:, None] * I + c[None, :]
                right = cast(tl.load(at, mask=mj[:, None] & mc[None, :], other=0.0, cache_modifier=".cg"), dtype)
                acc = dot(raw_operand(x + base * I, m, j, I, ok, mj, dtype), right, acc, PRECISION)
            acc += tl.load(matrix + I * I + c, mask=mc, other=0.0, cache_modifier=".cg")[None, :]
        offset = m[:, None] * I + c[None, :]
        out_mask = ok[:, None] & mc[None, :]
        if dout is not None:
            acc += tl.load(dout + base * I + offset, mask=out_mask, other=0.0).to(tl.float32)
        tl.store(dx + base * I + offset, cast(acc, dx.dtype.element_ty), mask=out_mask)


@triton.jit
def wait_for(ready, arrivals, readers):
    """Until ``arrivals`` programs have added 1 to ``ready``; the last of ``readers`` that waited leaves it and the
    count after it at 0."""
    while tl.atomic_add(ready, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
    if tl.atomic_add(ready + 1, 1) == readers - 1:
        tl.store(ready, 0)
        tl.store(ready + 1, 0)


@sized_jit
def expand_backward_kernel(
    dz,
    x,
    w,
    dx,
    partials,
    grams,
    norm1,
    terms1,
    matrix,
    dout,
    counters,
    rows,
    KV,
    NV,
    tiles,
    programs,
    splits,
    total,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First, with batch statistics, the Gram matrix of the weights, then the weight-gradient programs, then those of
    dx.

    Those of dx wait for the matrix. Programs take their work by ticket in the order in which they start, so when one
    waits, those that it waits for are running, and wait for nothing: it ends. Counters, all left at 0: tickets, blocks
    of the matrix, its readers.
    """
    E = KV * KVEC
    I = NV * NVEC
    pid = tl.program_id(0)
    grams_first = 0
    if matrix is not None:
        pid = tl.atomic_add(counters, 1)
        if pid == total - 1:
            tl.store(counters, 0)
        grams_first = tl.cdiv(I, BG) * tl.cdiv(I, BG)
        if pid < grams_first:
            gram_matrix(pid, w, terms1, matrix, E, I, BG, dz.dtype.element_ty)
            tl.debug_barrier()
            tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
    pid -= grams_first
    if NEED_DW:
        blocks_l = tl.cdiv(E, BE) + tl.cdiv(I, BE) if terms1 is not None else tl.cdiv(E, BE)
        wgrad_programs = splits * blocks_l * tl.cdiv(I, BW)
        if (pid >= 0) & (pid < wgrad_programs):
            expand_weight_gradient(
                pid, dz, x, partials, grams, rows, E, I, tiles, splits, BM, BE, BW, STAGES, terms1 is not None, PRECISION
            )
        pid -= wgrad_programs
    if NEED_DX:
        if pid >= 0:
            expand_data_gradient(
                pid,
                dz,
                x,
                w,
                dx,
                norm1,
                matrix,
                dout,
                None if matrix is None else counters + 1,
                rows,
                E,
                I,
                tiles,
                programs,
                BM,
                BI,
                BK,
                BG,
                STAGES,
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
def expand_backward(
    dz, x, weight, *, norm1: BatchNorm, terms1=None, counters=None, residual=None, need_dx=True, need_dw=True, out_dtype=None
):
    """Data and weight gradient of the expand convolution in one launch, without its output.

    Args:
        dz: gradient of BatchNorm 1's output [N, H, W, E]; x: the block's input [N, H, W, I], of any dtype.
        weight: [E, I, 1, 1]. norm1: with rstd; terms1: (k0, k1) fp32 [E] of its backward, or None when its statistics
            are frozen.
        counters: int32, 0, at least 3; needed for dx with terms1. residual: added to dx, [N, H, W, I].

    Returns: (dx or None, D fp32 [S, E, I] or None, gram fp32 [S, I + 1, I] with xsum in the last row, or None).
    """
    N, H, W, E = dz.shape
    I = x.shape[-1]
    rows = N * H * W
    cfg = expand_backward_config(E, I, rows, dz.dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    matrix = None
    if terms1 is not None and need_dx:
        check_counters(counters, 3)
        matrix = fp32(dz.device, I + 1, I)
    blocks_i = triton.cdiv(I, cfg.BN)
    blocks_l = triton.cdiv(E, cfg.BL) + (triton.cdiv(I, cfg.BL) if terms1 is not None else 0)
    programs, splits = cfg.roles(tiles, blocks_i, blocks_l * triton.cdiv(I, cfg.BR), need_dx, need_dw, dz.device)
    dx = torch.empty_like(x, dtype=out_dtype or x.dtype) if need_dx else None
    partials = fp32(dz.device, splits, E, I) if need_dw else None
    grams = fp32(dz.device, splits, I + 1, I) if need_dw and terms1 is not None else None
    grid = (programs * blocks_i if need_dx else 0) + (splits * blocks_l * triton.cdiv(I, cfg.BR) if need_dw else 0)
    grid += 0 if matrix is None else triton.cdiv(I, GRAM_BLOCK) ** 2
    expand_backward_kernel[(grid,)](
        dz=dz,
        x=x,
        w=weight,
        dx=dx,
        partials=partials,
        grams=grams,
        norm1=norm1,
        terms1=None if terms1 is None else tuple(terms1),
        matrix=matrix,
        dout=residual,
        counters=None if matrix is None else counters,
        rows=rows,
        KV=E // channel_vector_width(E),
        NV=I // channel_vector_width(I),
        tiles=tiles,
        programs=programs,
        splits=splits,
        total=grid,
        KVEC=channel_vector_width(E),
        NVEC=channel_vector_width(I),
        BM=cfg.BM,
        BI=cfg.BN,
        BK=cfg.BK,
        BE=cfg.BL,
        BW=cfg.BR,
        BG=GRAM_BLOCK,
        STAGES=cfg.stages,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dx, partials, grams
