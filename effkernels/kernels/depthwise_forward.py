"""Depthwise k x k convolution on NHWC, forward: its launcher, and the kernel whose multiply-adds are a thread's own.

    y[n,oh,ow,c] = sum_{kh,kw} w[c,kh,kw] * a[n, oh*s + kh - pad_top, ow*s + kw - pad_left, c]

a is x [N, H, W, C], or the prologue phi1(BN1(x)) evaluated on load; padding is zero after the activation. y
[N, OH, OW, C] is stored, or the epilogue phi2(BN2(y)). Beside it a launch can give the batch statistics of y and the
sums of what it stored over each image.

How a program works: S column strips of one image times BLOCK_C channels, one warp. A row of a strip is a tuple of
[S, BLOCK_C] blocks, one per column, so that a tap is another tuple entry and needs no lane shift. For k <= 3 a thread
has the channels of a 16-byte load and each column is loaded by itself (WIDE); larger k leave registers for one channel
a thread, and a row is one block whose columns are split apart. The program slides down TH rows and scatters each
activated element into M = ceil(k/s) running output rows, so an element is activated once per strip that sees it,
1 + (k-1)/(TW*s) times on average, never k^2 times. Programs are persistent over (image, group of S strips), so partial
results number as many as programs, not tiles.

Where all lanes of a warp are at the same pixel (S = 1), a condition on the row is a branch and one on the column a
factor 0 or 1: what is masked was loaded as 0, so the product is 0. Statistics leave out outputs beyond the image the
same way; such an output sees no pixel that a stored one does not, so a NaN in it is in the statistics anyway.

In bf16 and fp16 the launcher prefers the kernel of ``depthwise_products``, which leaves the multiplications to the
tensor cores.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import depthwise_forward_config
from effkernels.kernels.activation import activation_row, normalise_activate
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
from effkernels.kernels.norm import BatchNorm, BatchStatistics


@triton.jit
def split_columns(block, NUM: tl.constexpr):
    """[NUM, S, BLOCK_C] -> NUM blocks [S, BLOCK_C]; NUM a power of two."""
    if NUM == 1:
        return (tl.reshape(block, [block.shape[1], block.shape[2]]),)
    else:
        halves = tl.reshape(block, [2, NUM // 2, block.shape[1], block.shape[2]])
        low, high = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        return split_columns(low, NUM // 2) + split_columns(high, NUM // 2)


@triton.jit
def join_columns(columns, FIRST: tl.constexpr, NUM: tl.constexpr):
    """columns[FIRST], columns[FIRST + 1], ... (NUM blocks [S, BLOCK_C]) -> [NUM, S, BLOCK_C]; NUM a power of two."""
    if NUM == 1:
        return columns[FIRST][None, :, :]
    else:
        low = join_columns(columns, FIRST, NUM // 2)
        high = join_columns(columns, FIRST + NUM // 2, NUM // 2)
        both = tl.permute(tl.join(low, high), (3, 0, 1, 2))
        return tl.reshape(both, [NUM, both.shape[2], both.shape[3]])


@triton.jit
def zero_blocks(NUM: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr):
    blocks = ()
    for i in tl.static_range(NUM):  # noqa: B007 (Triton has no anonymous loop variable)
        blocks = blocks + (tl.zeros([S, BLOCK_C], tl.float32),)
    return blocks


@triton.jit
def any_row(row_ok):
    return tl.max(row_ok.to(tl.int32), 0) > 0


@triton.jit
def load_weights(w, c, mask, dtype: tl.constexpr, TAPS: tl.constexpr):
    """Tuple of TAPS [1, BLOCK_C] fp32 vectors of w [C, TAPS], rounded to the compute dtype as a cast of the weight
    would."""
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (
            cast(tl.load(w + c * TAPS + t, mask=mask, other=0.0).to(tl.float32), dtype).to(tl.float32)[None, :],
        )
    return taps


# The last programs of GROUP programs merge their partials, and the last of those groups the groups': two short passes
# where one over up to 2000 programs would have a single warp wait for memory 60 times in a row. 32 rows of 32 channels
# are 32 values a thread.
GROUP = tl.constexpr(32)


@triton.jit
def merge_group_statistics(tile_count, tile_mean, tile_m2, group, P, C, c, mc):
    """(count, mean, M2) of programs group * GROUP ... by Chan's formula, stored in row P + group behind the programs'
    own."""
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
    """Whether this program is the last of its GROUP of the P programs; ``counters`` [1 + ceil(P / GROUP)], the first
    for the groups."""
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
    """Merge a forward program's sums of y - pivot, one for each strip: counts [S], the others [S, BLOCK_C]; the last
    program finishes ``mean`` and ``rstd``, if asked."""
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
            merge_group_statistics(tile_count, tile_mean, tile_m2, p // GROUP, P, C, c, mc)
            if last_to_arrive(counters, parts):
                finish_statistics(
                    tile_count + P,
                    tile_mean + P.to(tl.int64) * C,
                    tile_m2 + P.to(tl.int64) * C,
                    mean,
                    rstd,
                    running_mean,
                    running_var,
                    num_batches,
                    parts,
                    C,
                    eps,
                    momentum,
                    block_c,
                    GROUP,
                    BLOCK_C,
                    COUNT,
                )
    else:
        tl.store(tile_count + p, total, mask=block_c == 0)


@triton.jit
def load_columns(p, offset, col_ok, row_ok, mc, C, NUM: tl.constexpr, POW2: tl.constexpr, WIDE: tl.constexpr):
    """NUM neighbouring columns [S, BLOCK_C] of a row; ``offset`` is that of the first (WIDE) or of all POW2 of them in
    one block."""
    if WIDE:
        columns = ()
        for j in tl.static_range(NUM):
            columns = columns + (
                tl.load(p + (offset + j * C), mask=(col_ok[j] & row_ok)[:, None] & mc[None, :], other=0.0),
            )
        return columns
    else:
        return split_columns(tl.load(p + offset, mask=col_ok & row_ok[None, :, None], other=0.0), POW2)


@sized_jit
def depthwise_forward_kernel(
    x,
    w,
    y,
    norm1,
    norm2,
    tile_count,
    tile_mean,
    tile_m2,
    pool,
    counters,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    eps,
    momentum,
    N,
    H,
    W,
    CV,
    OH,
    OW,
    pad_top,
    pad_left,
    strips_w,
    strips,
    groups,
    P,
    TH,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    CVEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S: tl.constexpr,
    TW: tl.constexpr,
    CW: tl.constexpr,
    TWP: tl.constexpr,
    WIDE: tl.constexpr,
    STAGES: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    FAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    C = CV * CVEC
    M: tl.constexpr = (K + STRIDE - 1) // STRIDE
    NC: tl.constexpr = (TW - 1) * STRIDE + K
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = (tl.program_id(0) % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // blocks_c
    mc = c < C
    taps = load_weights(w, c, mc, x.dtype.element_ty, K * K)
    if given(norm1):
        scale1, shift1 = activation_row(norm1, c, mc, ACT1, FAST)
    if given(norm2):
        scale2, shift2 = activation_row(norm2, c, mc, ACT2, FAST)
    if tile_mean is not None:
        # Sums of y - pivot, a pivot for each strip and channel: the first value of the program's first group.
        pivot = tl.zeros([S, BLOCK_C], tl.float32)
        count = tl.zeros([S], tl.float32)
        s1 = tl.zeros([S, BLOCK_C], tl.float32)
        s2 = tl.zeros([S, BLOCK_C], tl.float32)
    for g in range(p, N * groups, P):
        n = g // groups
        strip = (g % groups) * S + tl.arange(0, S)
        valid = strip < strips
        strip = tl.minimum(strip, strips - 1)  # those beyond the last do its work again and keep nothing
        ow0 = (strip % strips_w) * TW
        oh0 = (strip // strips_w) * TH
        rows = tl.where(valid, tl.minimum(OH - oh0, TH), 0)
        iw0 = ow0 * STRIDE - pad_left
        ih = oh0 * STRIDE - pad_top
        xn = x + n.to(tl.int64) * H * W * C
        yn = y + n.to(tl.int64) * OH * OW * C
        in_x = ()
        for j in tl.static_range(NC):
            in_x = in_x + ((iw0 + j >= 0) & (iw0 + j < W),)
        if given(norm1) and S == 1:
            shift_in = ()
            for j in tl.static_range(NC):
                shift_in = shift_in + (tl.where(in_x[j][:, None], shift1, 0.0),)
        in_y = ()
        for o in tl.static_range(TW):
            in_y = in_y + (ow0 + o < OW,)
        if WIDE:
            mask_in = in_x
            off_in = (ih * W + iw0)[:, None] * C + c[None, :]
            off_out = ((oh0 - (M - 1)) * OW + ow0)[:, None] * C + c[None, :]
        else:
            j_in = tl.arange(0, CW)[:, None]
            j_out = tl.arange(0, TWP)[:, None]
            col_in = iw0[None, :] + j_in
            mask_in = ((col_in >= 0) & (col_in < W) & (j_in < NC))[:, :, None] & mc[None, None, :]
            off_in = ((ih * W)[None, :] + col_in)[:, :, None] * C + c[None, None, :]
            col_out = ow0[None, :] + j_out
            mask_out = ((col_out < OW) & (j_out < TW))[:, :, None] & mc[None, None, :]
            off_out = (((oh0 - (M - 1)) * OW)[None, :] + col_out)[:, :, None] * C + c[None, None, :]
        acc = zero_blocks(M * TW, S, BLOCK_C)
        if pool is not None:
            pooled = tl.zeros([S, BLOCK_C], tl.float32)
        for t in tl.range(0, TH + M - 1, num_stages=STAGES):
            for r in tl.static_range(STRIDE):
                row_ok = (ih >= 0) & (ih < H)
                columns = load_columns(xn, off_in, mask_in, row_ok, mc, C, NC, CW, WIDE)
                off_in += W * C
                pixels = ()
                for j in tl.static_range(NC):
                    pixels = pixels + (columns[j].to(tl.float32),)
                if given(norm1):
                    if S == 1:
                        # Padding is loaded as 0 and every phi(0) is 0, so without its shift a column stays 0; a row is
                        # one branch.
                        if tl.sum(row_ok.to(tl.int32), 0) > 0:
                            activated = ()
                            for j in tl.static_range(NC):
                                activated = activated + (
                                    normalise_activate(pixels[j], scale1, shift_in[j], ACT1, FAST),
                                )
                        else:
                            activated = zero_blocks(NC, S, BLOCK_C)
                    else:
                        activated = ()
                        row_in = row_ok.to(tl.float32)
                        for j in tl.static_range(NC):
                            a = normalise_activate(pixels[j], scale1, shift1, ACT1, FAST)
                            activated = activated + (a * (in_x[j].to(tl.float32) * row_in)[:, None],)
                    pixels = activated
                for j in tl.static_range(NC):
                    a = pixels[j]
                    summed = ()
                    for m in tl.static_range(M):
                        for o in tl.static_range(TW):
                            s = acc[m * TW + o]
                            if r + STRIDE * m < K:
                                if j - o * STRIDE >= 0:
                                    if j - o * STRIDE < K:
                                        s += a * taps[(r + STRIDE * m) * K + j - o * STRIDE]
                            summed = summed + (s,)
                    acc = summed
                ih += 1
            # Row oh0 + t - (M - 1) has met all its taps.
            done = (t >= M - 1) & (t - (M - 1) < rows)
            if any_row(done) if S == 1 else t >= M - 1:
                if tile_mean is not None:
                    if (g == p) & (t == M - 1):
                        pivot = acc[(M - 1) * TW]
                outputs = ()
                for o in tl.static_range(TWP):
                    if o < TW:
                        v = acc[(M - 1) * TW + o]
                        ok = (done & in_y[o])[:, None]
                        if tile_mean is not None:
                            d = v - pivot
                            if S == 1:
                                d = d * in_y[o].to(tl.float32)[:, None]
                            else:
                                d = tl.where(ok, d, 0.0)
                            s1 += d
                            s2 += d * d
                        if given(norm2):
                            v = normalise_activate(v, scale2, shift2, ACT2, FAST)
                        if pool is not None:
                            pooled += tl.where(ok, v, 0.0)
                        v = cast(v, y.dtype.element_ty)
                        if WIDE:
                            tl.store(yn + (off_out + o * C), v, mask=ok & mc[None, :])
                        outputs = outputs + (v,)
                    else:
                        outputs = outputs + (tl.zeros([S, BLOCK_C], y.dtype.element_ty),)
                if not WIDE:
                    tl.store(yn + off_out, join_columns(outputs, 0, TWP), mask=mask_out & done[None, :, None])
            off_out += OW * C
            shifted = zero_blocks(TW, S, BLOCK_C)
            for i in tl.static_range((M - 1) * TW):
                shifted = shifted + (acc[i],)
            acc = shifted
        if tile_mean is not None:
            count += (rows * tl.where(valid, tl.minimum(OW - ow0, TW), 0)).to(tl.float32)
        if pool is not None:
            tl.store(pool + (n.to(tl.int64) * groups + g % groups) * C + c, tl.sum(pooled, 0), mask=mc)
    if tile_mean is not None:
        store_statistics(
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
            BLOCK_C,
            COUNT,
        )


@triton.jit
def zero_products(NUM: tl.constexpr, B: tl.constexpr, S: tl.constexpr):
    blocks = ()
    for i in tl.static_range(NUM):  # noqa: B007
        blocks = blocks + (tl.zeros([B, 2 * S, 8], tl.float32),)
    return blocks


@triton.jit
def toeplitz_weights(w, c0, C, dtype: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr):
    """Tuple of K * E right operands [B, 16, 8] in ``dtype``, for E steps of 4 columns in each row of the kernel.

    Operand [b, (lane, column), (lane', output)] is w[c0 + B * lane + b, kh, column - STRIDE * output] where the lanes
    are the same and the tap exists, else 0.
    """
    E: tl.constexpr = (STRIDE + K + 3) // 4
    b = tl.arange(0, B)[:, None, None]
    k = tl.arange(0, 16)[None, :, None]
    n = tl.arange(0, 8)[None, None, :]
    channel = c0 + n // 2 * B + b
    operands = ()
    for i in tl.static_range(K * E):
        kw = i % E * 4 + k % 4 - STRIDE * (n % 2)
        mask = (k // 4 == n // 2) & (kw >= 0) & (kw < K) & (channel < C)
        value = tl.load(w + channel * K * K + i // E * K + kw, mask=mask, other=0.0)
        operands = operands + (cast(value.to(tl.float32), dtype),)
    return operands


@triton.jit
def pair_columns(left, right, B: tl.constexpr):
    """Two columns [S, 4 B] -> [S, 4, B, 2]."""
    return tl.reshape(tl.join(left, right), [left.shape[0], 4, B, 2])


@triton.jit
def left_operand(p00, p01, p10, p11, B: tl.constexpr):
    """Two pairs of columns for each of two blocks of outputs -> [B, (block, strip), (lane, column)].

    The order of the inner dimension, with the four columns of a lane side by side, is the one in which Triton gives a
    lane's operand registers to it, since k is 4 wide there.
    """
    a = tl.join(tl.join(p00, p01), tl.join(p10, p11))  # strip, lane, b, column's low bit, its high bit, block
    return tl.reshape(tl.permute(a, (2, 5, 0, 1, 4, 3)), [B, 2 * p00.shape[0], 16])


@triton.jit
def output_columns(acc, S: tl.constexpr, B: tl.constexpr):
    """[B, (block, strip), (lane, output)] -> four columns [S, 4 B]."""
    d = tl.permute(tl.reshape(acc, [B, 2, S, 4, 2]), (2, 3, 0, 4, 1))  # strip, lane, b, output, block
    first, second = tl.split(tl.reshape(d, [S, 4 * B, 2, 2]))
    v0, v1 = tl.split(first)
    v2, v3 = tl.split(second)
    return v0, v1, v2, v3


@sized_jit
def depthwise_products_kernel(
    x,
    w,
    y,
    norm1,
    norm2,
    tile_count,
    tile_mean,
    tile_m2,
    pool,
    counters,
    mean,
    rstd,
    running_mean,
    running_var,
    num_batches,
    eps,
    momentum,
    N,
    H,
    W,
    CV,
    OH,
    OW,
    pad_top,
    pad_left,
    strips_w,
    strips,
    groups,
    P,
    TH,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    CVEC: tl.constexpr,
    BLOCK_C: tl.constexpr,
    S: tl.constexpr,
    TW: tl.constexpr,
    SURE_IN: tl.constexpr,
    STAGES: tl.constexpr,
    ACT1: tl.constexpr,
    ACT2: tl.constexpr,
    FAST: tl.constexpr,
    COUNT: tl.constexpr,
):
    """The forward as products: 8 strips of TW columns, of any images, times 16 channels; one warp.

    A thread loads 4 neighbouring channels of a column, and four neighbouring threads the 16. Product b of a step takes
    channel b of each of the four:

        left  [strip, (thread, column)]            4 columns of the input, in the registers in which they were loaded
        right [(thread, column), (thread, output)] w[channel, kh, column - STRIDE * output], 0 between two threads
        sum   [strip, (thread, output)]            2 columns of the output, in the layout in which they are stored

    so that nothing changes its layout, and an instruction does 16 x 8 outputs' taps of a row of the kernel (STRIDE + K
    columns, in E steps of 4). Its 16 rows are the 8 strips at two neighbouring pairs of outputs. The activated input is
    rounded to its dtype, as unfused layers round it. A zero of ``right`` meets a value that no output of its own wants:
    where that is not finite, up to 4 channels and a few columns of the same strip are not either.

    SURE_IN: columns of the input, from K // 2 on, that are inside whatever the strip. It follows from what the image's
    width leaves when divided by TW, so that a few variants are all.
    """
    C = CV * CVEC
    B: tl.constexpr = BLOCK_C // 4
    M: tl.constexpr = (K + STRIDE - 1) // STRIDE
    E: tl.constexpr = (STRIDE + K + 3) // 4
    NC: tl.constexpr = (TW - 1) * STRIDE + K
    Q: tl.constexpr = TW // 4
    dtype: tl.constexpr = x.dtype.element_ty
    blocks_c = tl.cdiv(C, BLOCK_C)
    c0 = (tl.program_id(0) % blocks_c) * BLOCK_C
    c = c0 + tl.arange(0, BLOCK_C)
    p = tl.program_id(0) // blocks_c
    mc = c < C
    taps = toeplitz_weights(w, c0, C, dtype, K, STRIDE, B)
    if given(norm1):
        scale1, shift1 = activation_row(norm1, c, mc, ACT1, FAST)
    if given(norm2):
        scale2, shift2 = activation_row(norm2, c, mc, ACT2, FAST)
    if tile_mean is not None:
        # Sums of y - pivot, a pivot for each strip and channel: the first value of the program's first group.
        pivot = tl.zeros([S, BLOCK_C], tl.float32)
        count = tl.zeros([S], tl.float32)
        s1 = tl.zeros([S, BLOCK_C], tl.float32)
        s2 = tl.zeros([S, BLOCK_C], tl.float32)
    chunks = tl.cdiv(OH, TH)
    for g in range(p, chunks * groups, P):
        strip = (g % groups) * S + tl.arange(0, S)
        valid = strip < strips
        n = tl.minimum(strip, strips - 1) // strips_w
        ow0 = (strip % strips_w) * TW
        oh0 = (g // groups) * TH
        rows = tl.minimum(OH - oh0, TH)
        iw0 = ow0 * STRIDE - pad_left
        ih = oh0 * STRIDE - pad_top
        xn = x + ((n.to(tl.int64) * H + ih) * W + iw0)[:, None] * C + c[None, :]
        yn = y + ((n.to(tl.int64) * OH + oh0) * OW + ow0)[:, None] * C + c[None, :]
        in_x = ()
        for j in tl.static_range(NC):
            in_x = in_x + (((iw0 + j >= 0) & (iw0 + j < W))[:, None],)
        in_y = ()
        for o in tl.static_range(TW):
            in_y = in_y + (((ow0 + o < OW) & valid)[:, None] & mc[None, :],)
        # acc[m * Q + q]: columns 4 q ... 4 q + 3 of the output row that meets its last taps m rows before the newest.
        acc = zero_products((M - 1) * Q, B, S)
        if pool is not None:
            pooled = tl.zeros([S, BLOCK_C], tl.float32)
        for t in tl.range(0, rows + M - 1, num_stages=STAGES):
            for r in tl.static_range(STRIDE):
                if r == 0:  # output rows move on by one
                    acc = zero_products(Q, B, S) + acc
                row_ok = (ih >= 0) & (ih < H)
                columns = ()
                for j in tl.static_range(NC):
                    ok = (mc[None, :] if j >= K // 2 and j < SURE_IN else in_x[j] & mc[None, :]) & row_ok
                    columns = columns + (tl.load(xn + j * C, mask=ok, other=0.0),)
                if row_ok:
                    pairs = ()
                    for i in tl.static_range((TW // 2 - 1) * STRIDE + 2 * E):
                        both = ()
                        for j in tl.static_range(2):
                            if 2 * i + j < NC:
                                a = columns[2 * i + j]
                                if given(norm1):
                                    # What is outside is loaded as 0, and every phi(0) is 0.
                                    if 2 * i + j >= K // 2 and 2 * i + j < SURE_IN:
                                        shift = shift1
                                    else:
                                        shift = tl.where(in_x[2 * i + j], shift1, 0.0)
                                    a = cast(normalise_activate(a.to(tl.float32), scale1, shift, ACT1, FAST), dtype)
                            else:
                                a = tl.zeros([S, BLOCK_C], dtype)
                            both = both + (a,)
                        pairs = pairs + (pair_columns(both[0], both[1], B),)
                    for e in tl.static_range(E):
                        lefts = ()
                        for q in tl.static_range(Q):
                            lefts = lefts + (
                                left_operand(
                                    pairs[2 * q * STRIDE + 2 * e],
                                    pairs[2 * q * STRIDE + 2 * e + 1],
                                    pairs[(2 * q + 1) * STRIDE + 2 * e],
                                    pairs[(2 * q + 1) * STRIDE + 2 * e + 1],
                                    B,
                                ),
                            )
                        summed = ()
                        for i in tl.static_range(M * Q):
                            row = acc[i]
                            if r + STRIDE * (i // Q) < K:
                                row = dot(lefts[i % Q], taps[(r + STRIDE * (i // Q)) * E + e], row, "ieee")
                            summed = summed + (row,)
                        acc = summed
                xn += W * C
                ih += 1
            if t >= M - 1:  # row oh0 + t - (M - 1) has met all its taps
                for q in tl.static_range(Q):
                    finished = output_columns(acc[(M - 1) * Q + q], S, B)
                    for o in tl.static_range(4):
                        v = finished[o]
                        if tile_mean is not None:
                            if q == 0 and o == 0:
                                if (g == p) & (t == M - 1):
                                    pivot = v
                            d = v - pivot
                            d = tl.where(in_y[4 * q + o], d, 0.0)
                            s1 += d
                            s2 += d * d
                        if given(norm2):
                            v = normalise_activate(v, scale2, shift2, ACT2, FAST)
                        if pool is not None:
                            pooled += tl.where(in_y[4 * q + o], v, 0.0)
                        tl.store(yn + (4 * q + o) * C, cast(v, dtype), mask=in_y[4 * q + o])
                yn += OW * C
            newer = ()
            for i in tl.static_range((M - 1) * Q):
                newer = newer + (acc[i],)
            acc = newer
        if tile_mean is not None:
            count += (rows * tl.where(valid, tl.minimum(OW - ow0, TW), 0)).to(tl.float32)
        if pool is not None:
            row = (n.to(tl.int64) * chunks + g // groups) * strips_w + strip % strips_w
            tl.store(pool + row[:, None] * C + c[None, :], pooled, mask=valid[:, None] & mc[None, :])
    if tile_mean is not None:
        store_statistics(
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
            BLOCK_C,
            COUNT,
        )


@launcher
def depthwise_forward(
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    *,
    prologue: BatchNorm | None = None,
    act1: str = "identity",
    statistics: BatchStatistics | None = None,
    partial_statistics: bool = False,
    counters: torch.Tensor | None = None,
    epilogue: BatchNorm | None = None,
    act2: str = "identity",
    pool: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, tuple | None, torch.Tensor | None]:
    """Convolve NHWC x [N, H, W, C] with weight [C, 1, k, k], channel by channel; see the module docstring.

    Args:
        pads: (top, bottom, left, right) zeros.
        prologue: BatchNorm 1: a = act1(BN1(x)) is convolved instead of x.
        partial_statistics: return each program's statistics (count [P], mean [P, C], M2 [P, C]) of y, fp32.
        statistics: instead of them finish y's statistics in the last program of each block of channels.
        counters: needed for that: int32 [rules.depthwise_counters(C, device)], all 0; they are 0 again afterwards.
        epilogue: BatchNorm 2: act2(BN2(y)) is stored instead of y.
        pool: return fp32 sums of the stored values too, [N, T, C], to be added over T.
        out: where to store y (default: new memory).

    Returns: y [N, OH, OW, C] in x's dtype; the partial statistics, or (mean, rstd) fp32 [C] with ``statistics``, or
        None; the sums or None.
    """
    N, H, W, C = x.shape
    K = weight.shape[-1]
    top, bottom, left, right = pads
    OH, OW = (H + top + bottom - K) // stride + 1, (W + left + right - K) // stride + 1
    y = x.new_empty(N, OH, OW, C) if out is None else out
    cfg = depthwise_forward_config(K, stride, N, OH, OW, C, x.dtype, x.device)
    strips_w, chunks = triton.cdiv(OW, cfg.TW), triton.cdiv(OH, cfg.TH)
    strips = strips_w * (N if cfg.products else chunks)
    groups = triton.cdiv(strips, cfg.S)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    P = cfg.programs((chunks if cfg.products else N) * groups, blocks_c, x.device)
    found = tile_count = tile_mean = tile_m2 = mean = rstd = None
    if partial_statistics or statistics is not None:
        # A launch that finishes them keeps the merged statistics of groups of programs behind the programs' own.
        rows = P if statistics is None else P + triton.cdiv(P, GROUP.value)
        counts = rows if statistics is None else rows * blocks_c
        found = tile_count, tile_mean, tile_m2 = (
            fp32(x.device, counts),
            fp32(x.device, rows, C),
            fp32(x.device, rows, C),
        )
    if statistics is not None:
        check_counters(counters, blocks_c * (1 + triton.cdiv(P, GROUP.value)))
        found = mean, rstd = fp32(x.device, C), fp32(x.device, C)
    sums = fp32(x.device, N, chunks * strips_w if cfg.products else groups, C) if pool else None
    # Columns of a strip that lie inside of every image, so that they need no mask.
    last = (strips_w - 1) * cfg.TW
    if cfg.products and (cfg.S != 8 or cfg.TW % 4):
        raise ValueError(f"a depthwise configuration with products needs S = 8 and TW a multiple of 4, got {cfg}")
    form = (
        {
            "SURE_IN": min(W + left - last * stride, (cfg.TW - 1) * stride + K) if left <= K // 2 else 0,
            "STAGES": cfg.stages,
        }
        if cfg.products
        else {
            "CW": triton.next_power_of_2((cfg.TW - 1) * stride + K),
            "TWP": cfg.TW if cfg.wide else triton.next_power_of_2(cfg.TW),
            "WIDE": cfg.wide,
            "STAGES": cfg.stages,
        }
    )
    kernel = depthwise_products_kernel if cfg.products else depthwise_forward_kernel
    kernel[(P * blocks_c,)](
        x=x,
        w=weight,
        y=y,
        norm1=prologue,
        norm2=epilogue,
        tile_count=tile_count,
        tile_mean=tile_mean,
        tile_m2=tile_m2,
        pool=sums,
        counters=None if statistics is None else counters,
        mean=mean,
        rstd=rstd,
        **statistics_arguments(statistics),
        N=N,
        H=H,
        W=W,
        CV=C // channel_vector_width(C),
        OH=OH,
        OW=OW,
        pad_top=top,
        pad_left=left,
        strips_w=strips_w,
        strips=strips,
        groups=groups,
        P=P,
        TH=cfg.TH,
        K=K,
        STRIDE=stride,
        CVEC=channel_vector_width(C),
        BLOCK_C=cfg.BLOCK_C,
        S=cfg.S,
        TW=cfg.TW,
        ACT1=act1,
        ACT2=act2,
        FAST=fast_math(x.dtype),
        **form,
        **cfg.options,
    )
    return y, found, sums
