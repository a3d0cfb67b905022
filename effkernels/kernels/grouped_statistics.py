"""Sums and statistics of many programs, merged in two short steps by the last programs of a launch.

With GROUP programs a group, the last program of a group to arrive merges what its GROUP programs stored, and the last
of those merges the groups. Every merge is in a fixed order, whichever program does it. Statistics are (count, mean, M2)
in fp32, merged by Chan's formula (Chan, Golub & LeVeque, 1979), here of parts i around a pivot:

    count = sum_i count_i
    mean  = pivot + shift,    shift = sum_i count_i (mean_i - pivot) / count
    M2    = sum_i M2_i + count_i (mean_i - pivot - shift)^2
"""

import triton
import triton.language as tl

from effkernels.kernels.batchnorm import finish_statistics
from effkernels.kernels.common import last_to_arrive

# The last programs of GROUP programs merge their partials, and the last of those groups the groups': two short passes
# where one over up to 2000 programs would have a single warp wait for memory 60 times in a row. 32 rows of 32 channels
# are 32 values a thread.
GROUP = tl.constexpr(32)


@triton.jit
def merge_group_statistics(tile_count, tile_mean, tile_m2, group, P, C, c, mc):
    """Merge (count, mean, M2) of the programs from group * GROUP on by Chan's formula, and store them in row P + group,
    behind the rows of the programs themselves.

    tile_count [rows], tile_mean and tile_m2 [rows, C], fp32; c [BLOCK_C] are the channels, and mc which of them exist.
    """
    row = group * GROUP + tl.arange(0, GROUP)
    mask = (row < P)[:, None] & mc[None, :]
    offset = row.to(tl.int64)[:, None] * C + c[None, :]
    n = tl.load(tile_count + row, mask=row < P, other=0.0, cache_modifier=".cg")
    mean = tl.load(tile_mean + offset, mask=mask, other=0.0, cache_modifier=".cg")
    m2 = tl.load(tile_m2 + offset, mask=mask, other=0.0, cache_modifier=".cg")
    pivot = tl.load(tile_mean + (group * GROUP).to(tl.int64) * C + c, mask=mc, other=0.0, cache_modifier=".cg")
    d = tl.where(mask, mean - pivot[None, :], 0.0)
    total = tl.sum(n, 0)
    shift = tl.sum(n[:, None] * d, 0) / total
    d -= shift[None, :]
    out = (P + group).to(tl.int64) * C + c
    tl.store(tile_count + P + group, total)
    tl.store(tile_mean + out, pivot + shift, mask=mc)
    tl.store(tile_m2 + out, tl.sum(m2 + n[:, None] * d * d, 0), mask=mc)


@triton.jit
def last_of_group(counters, p, P):
    """Whether this program p is the last to arrive of its GROUP of the P programs.

    counters: int32 [1 + ceil(P / GROUP)], one for each group behind the first, in which the groups are counted.
    """
    group = p // GROUP
    return last_to_arrive(counters + 1 + group, tl.minimum(P - group * GROUP, GROUP))


@triton.jit
def store_statistics(
    pivot,
    count,
    s1,
    s2,
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
    P,
    C,
    c,
    mc,
    BLOCK_C: tl.constexpr,
    COUNT: tl.constexpr,
):
    """Store the statistics of a depthwise forward's program, and in the last program finish those of the batch.

    A program comes with sums for each of its strips: the count of outputs [S], and [S, BLOCK_C] of a pivot, of
    s1 = sum(y - pivot) and of s2 = sum((y - pivot)^2). It merges the strips into one (count, mean, M2), row p of
    tile_count, tile_mean and tile_m2. Where ``mean`` is given the last programs merge those rows too, write mean and
    rstd [C] and update the running statistics; ``counters`` must be 0 then, and are 0 again afterwards.
    """
    blocks_c = tl.cdiv(C, BLOCK_C)
    block_c = tl.program_id(0) % blocks_c
    p = tl.program_id(0) // blocks_c
    # Chan's formula over the strips.
    total = tl.sum(count, 0)
    shift = s1 / tl.maximum(count, 1.0)[:, None]
    centre = pivot + shift
    merged = tl.sum(centre * count[:, None], 0) / total
    delta = centre - merged[None, :]
    tl.store(tile_mean + p.to(tl.int64) * C + c, merged, mask=mc)
    tl.store(tile_m2 + p.to(tl.int64) * C + c, tl.sum(s2 - s1 * shift + delta * delta * count[:, None], 0), mask=mc)
    if mean is not None:
        # Every channel block has its own copy of the counts: no block waits for another's.
        parts = tl.cdiv(P, GROUP)
        tile_count += block_c * (P + parts)
        counters += block_c * (1 + parts)
        tl.store(tile_count + p, total)
        if last_of_group(counters, p, P):
            merge_group_statistics(
                tile_count=tile_count, tile_mean=tile_mean, tile_m2=tile_m2, group=p // GROUP, P=P, C=C, c=c, mc=mc
            )
            if last_to_arrive(counters, parts):
                finish_statistics(
                    tile_count=tile_count + P,
                    tile_mean=tile_mean + P.to(tl.int64) * C,
                    tile_m2=tile_m2 + P.to(tl.int64) * C,
                    mean=mean,
                    rstd=rstd,
                    running_mean=running_mean,
                    running_var=running_var,
                    num_batches=num_batches,
                    tiles=parts,
                    C=C,
                    eps=eps,
                    momentum=momentum,
                    block_c=block_c,
                    BLOCK_TILES=GROUP,
                    BLOCK_C=BLOCK_C,
                    COUNT=COUNT,
                )
    else:
        tl.store(tile_count + p, total, mask=block_c == 0)
