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
from effkernels.kernels.batchnorm import statistics_arguments
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    fast_math,
    fp32,
    given,
    launcher,
    sized_jit,
)
from effkernels.kernels.depthwise_products import depthwise_products_kernel
from effkernels.kernels.depthwise_strips import any_row, join_columns, load_weights, split_columns, zero_blocks
from effkernels.kernels.grouped_statistics import GROUP, store_statistics
from effkernels.kernels.norm import BatchNorm, BatchStatistics


@triton.jit
def load_columns(p, offset, col_ok, row_ok, mc, C, NUM: tl.constexpr, POW2: tl.constexpr, WIDE: tl.constexpr):
    """Load NUM neighbouring columns of a row of S strips, a tuple of blocks [S, BLOCK_C]; 0 outside the image.

    With WIDE ``offset`` [S, BLOCK_C] is that of the first column and ``col_ok`` a tuple of conditions [S]. Without it
    both are [POW2, S, BLOCK_C], for all columns at once, padded to a power of two. row_ok [S]: whether the row exists.
    """
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
    """The forward by multiply-adds of each thread's own; the module's docstring says which program does what.

    x [N, H, W, C], w [C, K, K], y [N, OH, OW, C]; C = CV * CVEC. P programs share the groups of S strips of all images
    for each block of channels; a strip is TW columns wide and TH rows high. tile_count [P], tile_mean and tile_m2
    [P, C], fp32, take the programs' statistics, pool [N, groups, C], fp32, the sums of what is stored; each may be
    None. CW and TWP: the columns loaded and stored at once where a row is one block (not WIDE), powers of two.
    """
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
                columns = load_columns(
                    p=xn, offset=off_in, col_ok=mask_in, row_ok=row_ok, mc=mc, C=C, NUM=NC, POW2=CW, WIDE=WIDE
                )
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
    cfg = depthwise_forward_config(K=K, stride=stride, N=N, OH=OH, OW=OW, C=C, dtype=x.dtype, device=x.device)
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
    if not cfg.possible:
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
