"""Forward of a 1x1 convolution: a product of NHWC rows, with what stands before and after it in an MBConv block.

    y[m,o] = sum_k a[m,k] w[o,k]     a = x or phi1(BN1(x)), either times gate[n,k] of the row's image n
    out    = y, or phi2(BN2(y)) [+ residual], or the mean of that over each image; BatchNorm's statistics of y if wanted

Rows are those of the whole batch, M = N H W, in tiles of BLOCK_M; an image's rows need not fill tiles, since the gate
may be loaded row by row. A program owns a slice of columns, cut into powers of two that sum to it exactly (48 = 32 +
16: no lane works on a column that is not there), and walks over row tiles p, p + P, p + 2P, ... What does not change
from tile to tile stays with it: weights in shared memory, coefficients of the epilogue and sums for the statistics in
registers.

How x gets to the tensor cores. Copied to shared memory, read back, transformed, stored and read again, every element
would pass shared memory three times, between barriers. But what a thread loads can be what it multiplies. A warp loads
8 rows of 32 values of k, 16 bytes a thread; of a step of 32 the tensor cores want of the same thread as many values:

    lane 4 r + q loads    k  = 8q .. 8q+7                                               of row r, then of row r + 8 W
    lane 4 r + q holds    k' = 2q, 2q+1 | 2q+8, 2q+9 | 2q+16, 2q+17 | 2q+24, 2q+25      of rows r and r + 8 of its warp

      k    0  1  2  3  4  5  6  7 |  8  9 10 11 12 13 14 15 | 16 ..     what lies in memory
           q = 0 ................ |  q = 1 ................ | q = 2     who loads it
      k'   0  1  8  9 16 17 24 25 |  2  3 10 11 18 19 26 27 |  4 ..     as which column of the product it counts

The order in which k is summed is free, and so is which row of a tile is called which: with w's columns in the order k'
and the tile's rows renamed (``accumulator_rows``), no value leaves its thread between the load and the product. Weights
that stay with a program are put into that order as they are loaded; those that come with every tile have been, once a
step, by ``weight_copies``. Reshapes and permutations below only say so: the compiler finds both layouts equal and emits
nothing. Where they are not (other GPUs, other shapes), it converts, and the result is the same.

Where x is multiplied as it lies in memory and a few tiles of all its columns fit shared memory, none of this is
needed: copies fill it with the next tiles while the tensor cores read this one from there (AHEAD = 0).

Where more columns than a program holds want something evaluated on x, that is a pass of its own and the product
PyTorch's, since every slice of columns would evaluate it again; so it is where weights do not stay and would be loaded
again by every tile (``product_is_apart``).

In the accumulator a thread holds rows r and r + 8 of every 16 W, so that a column's sums first run over the rows of one
thread, without a word between threads, and meet once after the last tile, by Chan's formula.

    a tile, W = 4     warp 0 | rows  0 .. 15, 64 .. 79, ... |     thread 4r+q: rows r, r+8; columns 2q, 2q+1 of every 8
                      warp 1 | rows 16 .. 31, 80 .. 95, ... |
                      ...                                         a thread's sums: [8 W, BLOCK_N] over all its tiles

Half precision sums y as it is, since rounding y costs more of its variance than fp32 sums do; fp32 subtracts a pivot,
the mean of a thread's rows of the first tile.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import pointwise_forward_config, product_is_apart
from effkernels.kernels.activation import activation_row, normalise_activate
from effkernels.kernels.batchnorm import apply, finish_channels, merge, statistics_arguments
from effkernels.kernels.batchnorm import statistics as batch_partials
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
    matmul_precision,
    product,
    sized_jit,
)
from effkernels.kernels.grouped_statistics import GROUP, last_of_group, merge_group_statistics
from effkernels.kernels.norm import BatchNorm, BatchStatistics


@triton.jit
def fragment(a, WARPS: tl.constexpr):
    """a [BLOCK_M, 32] as it was loaded, as the rows and columns of the tensor cores' operand: see the module's text."""
    PAIRS: tl.constexpr = a.shape[0] // (16 * WARPS)
    a = tl.reshape(a, [PAIRS, 2, WARPS, 8, 4, 2, 2, 2])  # pair, half, warp, r | q, step of 16, half of 8, odd
    a = tl.permute(a, (0, 2, 1, 3, 5, 6, 4, 7))
    return tl.reshape(a, [PAIRS * 16 * WARPS, 32])


@triton.jit
def accumulator_rows(BLOCK_M: tl.constexpr, WARPS: tl.constexpr):
    """The row of the tile that each row of the accumulator is."""
    i = tl.arange(0, BLOCK_M)
    return i // (16 * WARPS) * (16 * WARPS) + i // 8 % 2 * (8 * WARPS) + i // 16 % WARPS * 8 + i % 8


@triton.jit
def by_thread(v, WARPS: tl.constexpr):
    """v [BLOCK_M, BLOCK_N] with the rows that a thread holds along axes 0 and 2: [pairs, W, 2, 8, BLOCK_N]."""
    return tl.reshape(v, [v.shape[0] // (16 * WARPS), WARPS, 2, 8, v.shape[1]])


@triton.jit
def fold(v):
    """Sums over what a thread holds of v [pairs, W, 2, 8, BLOCK_N]: [1, W, 1, 8, BLOCK_N]."""
    return tl.sum(tl.sum(v, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def flat(sums):
    """``fold``'s sums [1, W, 1, 8, BLOCK_N] as [8 W, BLOCK_N]."""
    return tl.reshape(sums, [sums.shape[1] * 8, sums.shape[4]])


@triton.jit
def thread_means(blocks, ok, count, WARPS: tl.constexpr):
    """For each of ``blocks`` the mean of the rows of a thread that are ``ok``, ``count`` of them."""
    means = ()
    for b in tl.static_range(len(blocks)):
        means = means + (fold(tl.where(ok, by_thread(blocks[b], WARPS), 0.0)) / tl.maximum(count, 1.0),)
    return means


@triton.jit
def zero_block(BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """An fp32 accumulator [BLOCK_M, BLOCK_N], all 0."""
    return tl.zeros([BLOCK_M, BLOCK_N], tl.float32)


@triton.jit
def zero_sums(BLOCKS: tl.constexpr, WARPS: tl.constexpr):
    """What ``fold`` gives of each block of columns, 0."""
    zeros = ()
    for b in tl.static_range(len(BLOCKS)):
        zeros = zeros + (fold(by_thread(zero_block(16 * WARPS, BLOCKS[b]), WARPS)),)
    return zeros


@triton.jit
def load(p, mask, EXACT: tl.constexpr):
    """What lies at p, 0 where ``mask`` is False; EXACT: it is True everywhere."""
    if EXACT:
        return tl.load(p)
    else:
        return tl.load(p, mask=mask, other=0.0)


@triton.jit
def right_operand(
    weight,
    n,
    k,
    end,
    row_length,
    EXACT_N: tl.constexpr,
    EXACT_K: tl.constexpr,
    dtype: tl.constexpr,
    PERMUTE: tl.constexpr,
):
    """weight [N, row_length] at columns k and rows n below ``end``, as [k, n] in the compute dtype; PERMUTE: in the
    order k'.
    """
    mask = (n < end)[:, None] & (k < row_length)[None, :]
    w = load(weight + n[:, None] * row_length + k[None, :], mask, EXACT_N and EXACT_K)
    if w.dtype != dtype:
        w = cast(w.to(tl.float32), dtype)
    if PERMUTE:
        w = tl.reshape(w, [w.shape[0], 4, 2, 2, 2])  # q, step of 16, half of 8, odd
        w = tl.reshape(tl.permute(w, (0, 2, 3, 1, 4)), [w.shape[0], 32])
    return tl.trans(w)


@triton.jit
def left_operand(
    a,
    table,
    gates,
    start,
    k,
    K,
    EXACT: tl.constexpr,
    dtype: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PERMUTED: tl.constexpr,
    WARPS: tl.constexpr,
):
    """phi1(BN1(a)) gate for columns start + k of x, without what is None, rounded to the compute dtype once.

    table: scale, shift [2, K]. gates: pointers [BLOCK_M, BLOCK_K] to columns k, [1, BLOCK_K] where one image has all
    rows.
    """
    inside = start + k < K
    if table is not None:
        scale = load(table + start + k, inside, EXACT)[None, :]
        shift = load(table + K + start + k, inside, EXACT)[None, :]
        a = normalise_activate(a.to(tl.float32), scale, shift, ACT, FAST)
    if gates is not None:
        a = a.to(tl.float32) * load(gates + start, inside[None, :], EXACT)
    if a.dtype != dtype:
        a = cast(a.to(tl.float32), dtype)
    return fragment(a, WARPS) if PERMUTED else a


@triton.jit
def load_step(xs, q: tl.constexpr, k, K, BLOCK_K: tl.constexpr, STEPS: tl.constexpr, EXACT: tl.constexpr):
    """Step q of STEPS of x; only the last may reach beyond the columns."""
    return load(xs + q * BLOCK_K, (q * BLOCK_K + k < K)[None, :], EXACT or q + 1 < STEPS)


@triton.jit
def rest(values):
    """All but the first."""
    others = ()
    for d in tl.static_range(1, len(values)):
        others = others + (values[d],)
    return others


@triton.jit
def tile_rows(x, t, i, images, rows, tiles, K, k, BLOCK_M: tl.constexpr, PER_IMAGE: tl.constexpr):
    """(first row of tile t, rows from there on, what row of the tile each i is, pointers [BLOCK_M, BLOCK_K] to x). The
    last row stands in for those beyond the end.
    """
    if PER_IMAGE:
        base = t // tiles * rows + t % tiles * BLOCK_M
        left = rows - t % tiles * BLOCK_M
    else:
        base = t * BLOCK_M
        left = images * rows - base
    row = tl.minimum(i, left - 1)
    return base, left, row, x + tl.cast(base, tl.int64) * K + row[:, None] * K + k[None, :]


@triton.jit
def tile_of(j, p, P, tiles, POOL: tl.constexpr):
    """Tile j of program p, of tiles p, p + P, ..., or with POOL of all tiles of images p, p + P, ..."""
    if POOL:
        return (p + j // tiles * P) * tiles + j % tiles
    else:
        return p + j * P


@sized_jit
def pointwise_forward_kernel(
    x,
    weight,
    y,
    norm1,
    table,
    gates,
    norm2,
    residual,
    tile_count,
    tile_mean,
    tile_m2,
    counters,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    eps,
    momentum,
    images,
    rows,
    KV,
    NV,
    tiles,
    P,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCKS: tl.constexpr,
    FIRST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    RESIDENT: tl.constexpr,
    AHEAD: tl.constexpr,
    PERMUTED: tl.constexpr,
    COPIED: tl.constexpr,
    WARPS: tl.constexpr,
    STAGES: tl.constexpr,
    X_DTYPE: tl.constexpr,
    PIVOT: tl.constexpr,
    EXACT_K: tl.constexpr,
    EXACT_N: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    PER_IMAGE: tl.constexpr,
    POOL: tl.constexpr,
    MERGED: tl.constexpr,
    COUNT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BLOCK_N columns, in BLOCKS that begin at FIRST, of the tiles that ``tile_of`` says.

    images of ``rows`` rows; tiles: of all rows, or, PER_IMAGE, of an image. RESIDENT: steps of BLOCK_K that cover K,
    whose weights stay; 0: the weights come with every tile.
    """
    K = KV * KVEC
    N = NV * NVEC
    dtype: tl.constexpr = x.dtype.element_ty if X_DTYPE else y.dtype.element_ty
    NB: tl.constexpr = len(BLOCKS)
    slices = tl.cdiv(N, BLOCK_N)
    n0 = tl.program_id(0) % slices * BLOCK_N
    end = tl.minimum(n0 + BLOCK_N, N)
    p = tl.program_id(0) // slices
    i = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    row_length = K  # of weight
    if COPIED:
        row_length = tl.cdiv(K, 32) * 32
    placed = accumulator_rows(BLOCK_M, WARPS) if PERMUTED else i

    scale2, shift2, weights = (), (), ()
    for b in tl.static_range(NB):
        n = n0 + FIRST[b] + tl.arange(0, BLOCKS[b])
        if given(norm2):
            scale, shift = activation_row(norm2, n, n < end, ACT2, FAST)
            scale2, shift2 = scale2 + (scale,), shift2 + (shift,)
        for q in tl.static_range(RESIDENT):
            w = right_operand(
                weight=weight,
                n=n,
                k=q * BLOCK_K + k,
                end=end,
                row_length=row_length,
                EXACT_N=EXACT_N,
                EXACT_K=EXACT_K or COPIED,
                dtype=dtype,
                PERMUTE=PERMUTED and not COPIED,
            )
            weights = weights + (w,)
    if tile_count is not None:
        s1, s2 = zero_sums(BLOCKS, WARPS), zero_sums(BLOCKS, WARPS)
        pivot = s1
        count = tl.zeros([1, WARPS, 1, 8, 1], tl.float32)
    if POOL:
        pooled = zero_sums(BLOCKS, WARPS)
    if given(norm1):
        # Every program writes the whole table, the same values, and reads them after its own barrier: none waits for
        # another.
        for start in range(0, K, 512):
            c = start + tl.arange(0, 512)
            scale, shift = activation_row(norm1, c, c < K, ACT1, FAST)
            tl.store(table + c[None, :], scale, mask=(c < K)[None, :])
            tl.store(table + K + c[None, :], shift, mask=(c < K)[None, :])
        tl.debug_barrier()

    if POOL:
        count_tiles = tl.cdiv(images - p, P) * tiles
    else:
        count_tiles = tl.cdiv((images * tiles if PER_IMAGE else tiles) - p, P)
    if RESIDENT and AHEAD > 0:
        t = tile_of(0, p, P, tiles, POOL)
        _, _, _, xs = tile_rows(
            x=x, t=t, i=i, images=images, rows=rows, tiles=tiles, K=K, k=k, BLOCK_M=BLOCK_M, PER_IMAGE=PER_IMAGE
        )
        ahead = ()
        for q in tl.static_range(AHEAD):
            ahead = ahead + (load_step(xs=xs, q=q, k=k, K=K, BLOCK_K=BLOCK_K, STEPS=RESIDENT, EXACT=EXACT_K),)
    for j in tl.range(0, count_tiles, num_stages=STAGES if RESIDENT and AHEAD == 0 else 1):
        t = tile_of(j, p, P, tiles, POOL)
        base, left, row, xs = tile_rows(
            x=x, t=t, i=i, images=images, rows=rows, tiles=tiles, K=K, k=k, BLOCK_M=BLOCK_M, PER_IMAGE=PER_IMAGE
        )
        wide = tl.cast(base, tl.int64)
        gates_at = None
        if gates is not None:
            if PER_IMAGE:
                gates_at = gates + t // tiles * K + k[None, :]
            else:
                gates_at = gates + ((base + row) // rows * K)[:, None] + k[None, :]
        blocks = ()
        for b in tl.static_range(NB):
            blocks = blocks + (zero_block(BLOCK_M, BLOCKS[b]),)
        if RESIDENT:
            if AHEAD > 0:
                next_t = tile_of(tl.minimum(j + 1, count_tiles - 1), p, P, tiles, POOL)
                _, _, _, next_xs = tile_rows(
                    x=x,
                    t=next_t,
                    i=i,
                    images=images,
                    rows=rows,
                    tiles=tiles,
                    K=K,
                    k=k,
                    BLOCK_M=BLOCK_M,
                    PER_IMAGE=PER_IMAGE,
                )
            else:
                ahead = ()
                for q in tl.static_range(RESIDENT):
                    ahead = ahead + (load_step(xs=xs, q=q, k=k, K=K, BLOCK_K=BLOCK_K, STEPS=RESIDENT, EXACT=EXACT_K),)
            for q in tl.static_range(RESIDENT):
                if AHEAD > 0 and q + AHEAD < RESIDENT:
                    ahead = ahead + (
                        load_step(xs=xs, q=q + AHEAD, k=k, K=K, BLOCK_K=BLOCK_K, STEPS=RESIDENT, EXACT=EXACT_K),
                    )
                elif AHEAD > 0:
                    ahead = ahead + (
                        load_step(
                            xs=next_xs, q=q + AHEAD - RESIDENT, k=k, K=K, BLOCK_K=BLOCK_K, STEPS=RESIDENT, EXACT=EXACT_K
                        ),
                    )
                a = left_operand(
                    a=ahead[0],
                    table=table,
                    gates=gates_at,
                    start=q * BLOCK_K,
                    k=k,
                    K=K,
                    EXACT=EXACT_K or q + 1 < RESIDENT,
                    dtype=dtype,
                    ACT=ACT1,
                    FAST=FAST,
                    PERMUTED=PERMUTED,
                    WARPS=WARPS,
                )
                ahead = rest(ahead)
                summed = ()
                for b in tl.static_range(NB):
                    summed = summed + (dot(a, weights[b * RESIDENT + q], blocks[b], PRECISION),)
                blocks = summed
        else:
            for start in tl.range(0, K, BLOCK_K, num_stages=STAGES):
                a = load(xs + start, (start + k < K)[None, :], EXACT_K)
                a = left_operand(
                    a=a,
                    table=table,
                    gates=gates_at,
                    start=start,
                    k=k,
                    K=K,
                    EXACT=EXACT_K,
                    dtype=dtype,
                    ACT=ACT1,
                    FAST=FAST,
                    PERMUTED=PERMUTED,
                    WARPS=WARPS,
                )
                summed = ()
                for b in tl.static_range(NB):
                    n = n0 + FIRST[b] + tl.arange(0, BLOCKS[b])
                    w = right_operand(
                        weight=weight,
                        n=n,
                        k=start + k,
                        end=end,
                        row_length=row_length,
                        EXACT_N=EXACT_N,
                        EXACT_K=EXACT_K or COPIED,
                        dtype=dtype,
                        PERMUTE=PERMUTED and not COPIED,
                    )
                    summed = summed + (dot(a, w, blocks[b], PRECISION),)
                blocks = summed
        ok = (placed < left)[:, None]
        if tile_count is not None:
            valid = by_thread(ok, WARPS)
            here = fold(valid.to(tl.float32))
            count += here
            if PIVOT:
                if j == 0:
                    pivot = thread_means(blocks, valid, here, WARPS)
        sums, squares, means = (), (), ()
        for b in tl.static_range(NB):
            n = n0 + FIRST[b] + tl.arange(0, BLOCKS[b])
            acc = blocks[b]
            if tile_count is not None:
                d = by_thread(acc, WARPS)
                if PIVOT:
                    d -= pivot[b]
                if left < BLOCK_M:
                    d = tl.where(valid, d, 0.0)
                sums, squares = sums + (s1[b] + fold(d),), squares + (s2[b] + fold(d * d),)
            if given(norm2):
                acc = normalise_activate(acc, scale2[b], shift2[b], ACT2, FAST)
            if POOL:
                if left < BLOCK_M:
                    acc = tl.where(ok, acc, 0.0)
                means = means + (pooled[b] + fold(by_thread(acc, WARPS)),)
            else:
                mask = ok if EXACT_N else ok & (n < end)[None, :]
                offset = placed[:, None] * N + n[None, :]
                if residual is not None:
                    acc += tl.load(residual + wide * N + offset, mask=mask, other=0.0).to(tl.float32)
                tl.store(y + wide * N + offset, cast(acc, y.dtype.element_ty), mask=mask)
        if tile_count is not None:
            s1, s2 = sums, squares
        if POOL:
            pooled = means
            if (j + 1) % tiles == 0:
                for b in tl.static_range(NB):
                    n = n0 + FIRST[b] + tl.arange(0, BLOCKS[b])
                    mean_of_image = tl.sum(flat(pooled[b]), 0) / rows
                    tl.store(
                        y + tl.cast(t // tiles, tl.int64) * N + n, cast(mean_of_image, y.dtype.element_ty), mask=n < end
                    )
                pooled = zero_sums(BLOCKS, WARPS)
    if tile_count is not None:
        held = flat(count)
        total = tl.sum(held)
        for b in tl.static_range(NB):
            n = n0 + FIRST[b] + tl.arange(0, BLOCKS[b])
            # Chan's formula over the threads' sums.
            s = flat(s1[b])
            shift = s / tl.maximum(held, 1.0)
            centre = flat(pivot[b]) + shift if PIVOT else shift
            merged = tl.sum(centre * held, 0) / total
            delta = centre - merged[None, :]
            m2 = tl.sum(flat(s2[b]) - s * shift + delta * delta * held, 0)
            tl.store(tile_mean + p.to(tl.int64) * N + n, merged, mask=n < end)
            tl.store(tile_m2 + p.to(tl.int64) * N + n, m2, mask=n < end)
        own = tl.program_id(0) % slices
        if counters is None:
            tl.store(tile_count + p, total, mask=own == 0)
        else:
            # Each slice of columns has its own counts and counters: none waits for another's programs.
            parts = tl.cdiv(P, GROUP)
            tile_count += own * (P + parts)
            counters += own * (1 + parts)
            tl.store(tile_count + p, total)
            if last_of_group(counters, p, P):
                for start in range(n0, n0 + BLOCK_N, MERGED):
                    c = start + tl.arange(0, MERGED)
                    merge_group_statistics(
                        tile_count=tile_count,
                        tile_mean=tile_mean,
                        tile_m2=tile_m2,
                        group=p // GROUP,
                        P=P,
                        C=N,
                        c=c,
                        mc=c < end,
                    )
                if last_to_arrive(counters, parts):
                    for start in range(n0, n0 + BLOCK_N, MERGED):
                        c = start + tl.arange(0, MERGED)
                        finish_channels(
                            tile_count=tile_count + P,
                            tile_mean=tile_mean + P.to(tl.int64) * N,
                            tile_m2=tile_m2 + P.to(tl.int64) * N,
                            mean=mean,
                            rstd=rstd,
                            running_mean=running_mean,
                            running_var=running_var,
                            num_batches=num_batches,
                            tiles=parts,
                            C=N,
                            eps=eps,
                            momentum=momentum,
                            c=c,
                            mc=c < end,
                            first=start == 0,
                            BLOCK_TILES=GROUP,
                            BLOCK_C=MERGED,
                            COUNT=COUNT,
                        )


def column_blocks(columns: int, one: bool) -> tuple[int, ...]:
    """Powers of two from 16 on, the largest first, that sum to ``columns`` (rounded up to a multiple of 16), or one
    that covers them.
    """
    if one:
        return (max(16, 1 << (columns - 1).bit_length()),)
    blocks = []
    while columns > 0:
        blocks.append(min(128, max(16, 1 << (columns.bit_length() - 1))))
        columns -= blocks[-1]
    return tuple(blocks)


def pointwise_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    prologue: BatchNorm | None = None,
    act1: str = "identity",
    gates: torch.Tensor | None = None,
    statistics: BatchStatistics | None = None,
    partial_statistics: bool = False,
    counters: torch.Tensor | None = None,
    epilogue: BatchNorm | None = None,
    act2: str = "identity",
    residual: torch.Tensor | None = None,
    pool: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """y = a w^T for x [N, H, W, K]; see the module docstring.

    Args:
        weight: [O, K, 1, 1] of any dtype, or the copy that ``weight_copies.forward_weights`` makes for this product.
        dtype: compute dtype (default x's); x is rounded to it on load.
        prologue: a = act1(BN(x)). gates: fp32 [N, K], multiplies a.
        partial_statistics: return per-program partial statistics (count [P], mean [P, O], m2 [P, O]) of y. statistics:
            the last programs finish them instead, and (mean, rstd) fp32 [O] are returned; counters: int32, zero, one
            for each slice of columns and one for each 32 of its programs.
        epilogue: act2(BN(y)) is stored. residual: added last, [N, H, W, O]. out_dtype: default dtype.
        pool: store only the mean over H, W, [N, O].

    Returns: (y, statistics or None).
    """
    N, H, W, K = x.shape
    dtype = dtype or x.dtype
    transforms = prologue is not None or gates is not None
    how = {
        "prologue": prologue,
        "act1": act1,
        "gates": gates,
        "statistics": statistics,
        "partial_statistics": partial_statistics,
        "epilogue": epilogue,
        "act2": act2,
        "residual": residual,
        "out_dtype": out_dtype or dtype,
    }
    if product_is_apart(K=K, N=weight.shape[0], rows=N * H * W, transforms=transforms, dtype=dtype, pool=pool):
        return _product_apart(x.to(dtype), weight, **how)
    return pointwise_forward_fused(x, weight, dtype=dtype, counters=counters, pool=pool, **how)


def _product_apart(
    x, weight, *, prologue, act1, gates, statistics, partial_statistics, epilogue, act2, residual, out_dtype
):
    """``pointwise_forward`` as a pass over x, PyTorch's product, and passes over y, which is smaller."""
    N, H, W, K = x.shape
    O = weight.shape[0]
    if weight.dim() == 3:
        raise ValueError(f"weight must be [O, K, 1, 1] or a plain copy, got a permuted one, {tuple(weight.shape)}")
    a = x if prologue is None and gates is None else apply(x, prologue, act=act1, gates=gates)
    y = x.new_empty(N, H, W, O)
    product(a.view(-1, K), weight.reshape(O, K).to(x.dtype).t(), out=y.view(-1, O))
    found = None
    if statistics is not None or partial_statistics:
        found = batch_partials(y)
    if statistics is not None:
        found = merge(found, statistics)
    if epilogue is not None or residual is not None or out_dtype != y.dtype:
        y = apply(y, epilogue, act=act2, residual=residual, out_dtype=out_dtype)
    return y, found


@launcher
def pointwise_forward_fused(
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    dtype: torch.dtype,
    prologue: BatchNorm | None,
    act1: str,
    gates: torch.Tensor | None,
    statistics: BatchStatistics | None,
    partial_statistics: bool,
    counters: torch.Tensor | None,
    epilogue: BatchNorm | None,
    act2: str,
    residual: torch.Tensor | None,
    pool: bool,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
    """``pointwise_forward`` in one launch."""
    N, H, W, K = x.shape
    O = weight.shape[0]
    if weight.dim() == 2:
        raise ValueError(f"weight must be [O, K, 1, 1] or a permuted copy, got a plain one, {tuple(weight.shape)}")
    copied = weight.dim() == 3
    cfg = pointwise_forward_config(
        K=K,
        N=O,
        rows=N * H * W,
        image_rows=H * W,
        dtype=dtype,
        prologue=prologue is not None,
        gated=gates is not None,
        pool=pool,
        copied=copied,
    )
    slices = triton.cdiv(O, cfg.BLOCK_N)
    per_image = pool or cfg.per_image
    tiles = triton.cdiv(H * W if per_image else N * H * W, cfg.BLOCK_M)
    P = cfg.programs(N if pool else N * tiles if per_image else tiles, slices, x.device)
    groups = triton.cdiv(P, GROUP.value)
    blocks = column_blocks(cfg.BLOCK_N, cfg.one_block)
    exact_n = O % cfg.BLOCK_N == 0 and sum(blocks) == cfg.BLOCK_N
    steps = triton.cdiv(K, cfg.BLOCK_K) if cfg.resident else 0
    y = x.new_empty((N, O) if pool else (N, H, W, O), dtype=out_dtype)
    table = None if prologue is None else fp32(x.device, 2, K)
    count = tile_mean = tile_m2 = mean = rstd = None
    if statistics is not None:
        check_counters(counters, slices * (1 + groups))
        mean, rstd = fp32(x.device, O), fp32(x.device, O)
    if statistics is not None or partial_statistics:
        parts = P if statistics is None else P + groups
        count, tile_mean, tile_m2 = fp32(x.device, slices, parts), fp32(x.device, parts, O), fp32(x.device, parts, O)
    pointwise_forward_kernel[(P * slices,)](
        x=x,
        weight=weight,
        y=y,
        norm1=prologue,
        table=table,
        gates=gates,
        norm2=epilogue,
        residual=residual,
        tile_count=count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        counters=None if statistics is None else counters,
        mean=mean,
        rstd=rstd,
        **statistics_arguments(statistics),
        images=N,
        rows=H * W,
        KV=K // channel_vector_width(K),
        NV=O // channel_vector_width(O),
        tiles=tiles,
        P=P,
        KVEC=channel_vector_width(K),
        NVEC=channel_vector_width(O),
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_N=cfg.BLOCK_N,
        BLOCKS=blocks,
        FIRST=tuple(sum(blocks[:b]) for b in range(len(blocks))),
        RESIDENT=steps,
        AHEAD=min(steps, cfg.ahead),
        STAGES=cfg.stages,
        WARPS=min(cfg.num_warps, cfg.BLOCK_M // 16),
        PERMUTED=cfg.fragments,
        COPIED=copied,
        X_DTYPE=x.dtype == dtype,
        PIVOT=dtype == torch.float32,
        EXACT_K=K % cfg.BLOCK_K == 0,
        EXACT_N=exact_n,
        ACT1=act1,
        ACT2=act2,
        PER_IMAGE=per_image,
        POOL=pool,
        MERGED=cfg.merged,
        FAST=fast_math(dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    if statistics is not None:
        return y, (mean, rstd)
    return y, (count[0], tile_mean, tile_m2) if partial_statistics else None
