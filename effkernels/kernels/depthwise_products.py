"""Depthwise k x k convolution on NHWC, forward, as products for tensor cores: the kernel that ``depthwise_forward``
starts in bf16 and fp16 where its configuration asks for it.

    y[n,oh,ow,c] = sum_{kh,kw} w[c,kh,kw] * a[n, oh*s + kh - pad_top, ow*s + kw - pad_left, c]

A row of the kernel is a banded Toeplitz matrix: output column o takes input column j times w[c, kh, j - s*o]. A channel
by itself is too small a product for a tensor core, so four channels share one: the matrix is 0 between different
channels, and three quarters of the multiplications are by those zeros. The tensor cores so take over the multiply-adds,
which are most of the instructions of the kernel in ``depthwise_forward``. The docstring of
``depthwise_products_kernel`` has the shapes.
"""

import triton
import triton.language as tl

from effkernels.kernels.activation import activation_row, normalise_activate
from effkernels.kernels.common import cast, dot, given, sized_jit
from effkernels.kernels.grouped_statistics import store_statistics


@triton.jit
def zero_products(NUM: tl.constexpr, B: tl.constexpr, S: tl.constexpr):
    """A tuple of NUM fp32 accumulators [B, 2 S, 8], all 0."""
    blocks = ()
    for i in tl.static_range(NUM):  # noqa: B007
        blocks = blocks + (tl.zeros([B, 2 * S, 8], tl.float32),)
    return blocks


@triton.jit
def toeplitz_weights(w, c0, C, dtype: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr, B: tl.constexpr):
    """The weights of 4 B channels from c0 on as right operands of products: a tuple of K * E blocks [B, 16, 8] in
    ``dtype``, for E steps of 4 columns in each of the K rows of the kernel.

    Element [b, (lane, column), (lane', output)] of the operand of row kh and its first step is
    w[c0 + B * lane + b, kh, column - STRIDE * output] where the lanes are the same and the tap exists, else 0.
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
    """Put two neighbouring columns [S, 4 B] side by side for each lane and channel: [S, 4, B, 2]."""
    return tl.reshape(tl.join(left, right), [left.shape[0], 4, B, 2])


@triton.jit
def left_operand(p00, p01, p10, p11, B: tl.constexpr):
    """The left operand [B, (block, strip), (lane, column)] from two pairs of columns for each of two blocks of outputs.

    The four columns of a lane lie side by side in the inner dimension, because Triton gives a lane its operand
    registers in that order: it takes the operand to be 4 wide in k.
    """
    a = tl.join(tl.join(p00, p01), tl.join(p10, p11))  # strip, lane, b, column's low bit, its high bit, block
    return tl.reshape(tl.permute(a, (2, 5, 0, 1, 4, 3)), [B, 2 * p00.shape[0], 16])


@triton.jit
def output_columns(acc, S: tl.constexpr, B: tl.constexpr):
    """The four columns of outputs [S, 4 B] that an accumulator [B, (block, strip), (lane, output)] holds."""
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
    """The forward as products. A program is one warp with 8 strips of TW columns, of any images, times 16 channels.

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
    taps = toeplitz_weights(w=w, c0=c0, C=C, dtype=dtype, K=K, STRIDE=STRIDE, B=B)
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
            pivot=pivot,
            count=count,
            s1=s1,
            s2=s2,
            tile_count=tile_count,
            tile_mean=tile_mean,
            tile_m2=tile_m2,
            counters=counters,
            mean=mean,
            rstd=rstd,
            running_mean=running_mean,
            running_var=running_var,
            num_batches=num_batches,
            eps=eps,
            momentum=momentum,
            P=P,
            C=C,
            c=c,
            mc=mc,
            BLOCK_C=BLOCK_C,
            COUNT=COUNT,
        )
