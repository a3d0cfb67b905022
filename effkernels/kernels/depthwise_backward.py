"""Depthwise k x k convolution on NHWC, the whole backward: the gradients of input and weight in one launch.

    dgrad      da[n,ih,iw,c] = sum_{kh,kw} w[c,kh,kw] * dy[n, (ih + pad_top - kh)/s, (iw + pad_left - kw)/s, c]
    wgrad      dw[c,kh,kw] = sum_{n,ih,iw} a[n,ih,iw,c] * dy[n, (ih + pad_top - kh)/s, (iw + pad_left - kw)/s, c]

where only whole quotients count. a is x [N, H, W, C], or phi1(BN1(x)) evaluated on load, as the forward took it. dy
[N, OH, OW, C] is given, or formed on load from the gradient dq of the gated activation that follows the convolution:

    dy = scale2 * (dq * gate + dpool) * phi2'(BN2(y)) + k0 + k1 * y

How a program works: S column strips of one image times BLOCK_C channels, one warp, and a row of a strip is a tuple of
[S, BLOCK_C] blocks, one per column, as in ``depthwise_forward``. The program slides down TH rows, keeps the last
M = ceil(k/s) rows of dy in registers and stands at the input pixel: one dy value serves dgrad and wgrad, and a and
phi1' are evaluated once, at the centre. Programs are persistent over (image, group of S strips), so partial weight
gradients number as many as programs, not tiles; ``weight_gradients`` adds them up. Where the registers of a program do
not suffice for everything (SPLIT), three programs share a tile: dgrad, and the upper and lower half of wgrad.

Where all lanes of a warp are at the same pixel (S = 1), a condition on the row is a branch and one on the column a
factor 0 or 1: what is masked was loaded as 0, so the product is 0. Most columns are inside whatever the strip, and have
none: dy's from M - 1 up to SURE_DY, x's from s - 1 up to SURE_X, which follow from what the width leaves when divided
by TW. An iteration of the loop does UNROLL rows of dy, which then move down the registers together:

    iteration     row of dy   its M - 1 halo columns and TW columns       x, dx: the centre of the last M rows of dy
    t, u = 0      newest      v v v v | v v v v v v v                     rows t - M + 1 ... t      loaded one
    t, u = 1      newest      v v v v | v v v v v v v                     rows t - M + 2 ... t + 1  iteration ahead
    t + UNROLL    M - 1 rows are copied to where the next iteration expects them, once
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import depthwise_backward_config
from effkernels.kernels.activation import activation_row, normalise_activate_and_grad
from effkernels.kernels.batchnorm import BatchTerms, finish_gradients
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
from effkernels.kernels.depthwise_strips import any_row, join_columns, load_weights, split_columns, zero_blocks
from effkernels.kernels.grouped_statistics import GROUP, last_of_group
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector, scale_and_shift


@triton.jit
def backward_part(
    program,
    dq,
    y,
    x,
    w,
    dx,
    partials,
    norm2,
    terms2,
    gates,
    dpool,
    norm1,
    counters,
    group_sums,
    dgamma1,
    dbeta1,
    k0_1,
    k1_1,
    count1,
    N,
    H,
    W,
    CV,
    OH,
    OW,
    pad_top,
    pad_left,
    first_row,
    first_col,
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
    XWP: tl.constexpr,
    SURE_DY: tl.constexpr,
    SURE_X: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    ACT2: tl.constexpr,
    ACT1: tl.constexpr,
    NEED_DX: tl.constexpr,
    W0: tl.constexpr,
    W1: tl.constexpr,
    FAST: tl.constexpr,
):
    """Input gradient if NEED_DX, and the gradients of kernel rows W0 .. W1-1."""
    C = CV * CVEC
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = (program % blocks_c) * BLOCK_C + tl.arange(0, BLOCK_C)
    p = program // blocks_c
    mc = c < C
    NEED_DW: tl.constexpr = W1 > W0
    UNIT1: tl.constexpr = 0.5 if FAST and ACT1 == "silu" else 1.0  # phi' over what normalise_activate_and_grad returns
    UNIT2: tl.constexpr = 0.5 if FAST and ACT2 == "silu" else 1.0
    M: tl.constexpr = (K + STRIDE - 1) // STRIDE
    ND: tl.constexpr = TW + M - 1  # columns of dy a strip needs
    D0: tl.constexpr = 0 if NEED_DX else W0 // STRIDE  # rows of dy it holds: oh - D0, ..., oh - D1 + 1
    D1: tl.constexpr = M if NEED_DX else (W1 + STRIDE - 1) // STRIDE
    XW: tl.constexpr = TW * STRIDE  # columns of x it owns
    if NEED_DX:
        taps = load_weights(w, c, mc, x.dtype.element_ty, K * K)
        if given(norm1):  # phi1' comes over UNIT1, which the taps make up for
            scaled = ()
            for i in tl.static_range(K * K):
                scaled = scaled + (taps[i] * UNIT1,)
            taps = scaled
    if given(norm2):
        scale2, shift2 = activation_row(norm2, c, mc, ACT2, FAST)
        scale_dq = scale_and_shift(norm2, c, mc)[0] * UNIT2
        if terms2 is not None:
            offset2 = load_vector(terms2[0], c, mc)[None, :]
            slope2 = load_vector(terms2[1], c, mc)[None, :]
    if given(norm1):
        scale1, shift1 = activation_row(norm1, c, mc, ACT1, FAST)
        mean1 = load_vector(norm1.mean, c, mc)[None, :]
        sum_dz = tl.zeros([S, BLOCK_C], tl.float32)
        sum_dzy = tl.zeros([S, BLOCK_C], tl.float32)
    dw = zero_blocks((W1 - W0) * K, S, BLOCK_C)
    j_dy = tl.arange(0, CW)[:, None]
    j_x = tl.arange(0, XWP)[:, None]
    for g in range(p, N * groups, P):
        n = g // groups
        strip = (g % groups) * S + tl.arange(0, S)
        valid = strip < strips
        # Rows and columns of dy are counted by (ih + pad_top) // s, which starts at first_row.
        col0 = first_col + (strip % strips_w) * TW
        row0 = first_row + (strip // strips_w) * TH
        if given(norm2):
            # dy = (dq * slope_dq + offset_dq) * phi2' + k0 + k1 * y
            slope_dq = scale_dq
            if gates is not None:
                slope_dq = scale_dq * load_vector(gates + n.to(tl.int64) * C, c, mc)[None, :]
            if dpool is not None:
                offset_dq = scale_dq * load_vector(dpool + n.to(tl.int64) * C, c, mc)[None, :]
        dqn = dq + n.to(tl.int64) * OH * OW * C
        if given(norm2):
            yn = y + n.to(tl.int64) * OH * OW * C
        xn = x + n.to(tl.int64) * H * W * C
        if NEED_DX:
            dxn = dx + n.to(tl.int64) * H * W * C
        ow0 = col0 - (M - 1)
        col_dy = ow0[None, :] + j_dy
        mask_dy = ((col_dy >= 0) & (col_dy < OW) & (j_dy < ND) & valid[None, :])[:, :, None] & mc[None, None, :]
        oh = row0 - (M - 1)
        off_dy = (((oh - D0) * OW)[None, :] + col_dy)[:, :, None] * C + c[None, None, :]
        iw0 = col0 * STRIDE - pad_left
        col_x = iw0[None, :] + j_x
        mask_x = ((col_x >= 0) & (col_x < W) & (j_x < XW) & valid[None, :])[:, :, None] & mc[None, None, :]
        ih = oh * STRIDE - pad_top
        off_x = ((ih * W)[None, :] + col_x)[:, :, None] * C + c[None, None, :]
        if S == 1:
            # Invalid rows are skipped; in invalid columns of the others, loaded as 0, these factors make zeros.
            if given(norm2):
                dy_in = ()
                for d in tl.static_range(ND):
                    dy_in = dy_in + (((ow0 + d >= 0) & (ow0 + d < OW)).to(tl.float32)[:, None],)
            if given(norm1):
                x_in = ()
                for j in tl.static_range(XW):
                    x_in = x_in + (((iw0 + j >= 0) & (iw0 + j < W)).to(tl.float32)[:, None],)
        ring = zero_blocks((D1 - D0) * ND, S, BLOCK_C)
        for t0 in tl.range(0, TH + M - 1, UNROLL, num_stages=STAGES):
            # All loads of the iteration come first, so that a warp waits for memory once.
            dq_blocks, y_blocks, x_blocks = (), (), ()
            for u in tl.static_range(UNROLL):
                mask = mask_dy & ((oh + u >= D0) & (oh + u < OH + D0))[None, :, None]
                dq_blocks = dq_blocks + (tl.load(dqn + (off_dy + u * OW * C), mask=mask, other=0.0),)
                if given(norm2):
                    y_blocks = y_blocks + (tl.load(yn + (off_dy + u * OW * C), mask=mask, other=0.0),)
                for r in tl.static_range(STRIDE if NEED_DW or given(norm1) else 0):
                    i = u * STRIDE + r
                    wanted = (t0 + u >= M - 1) & (ih + i >= 0) & (ih + i < H)
                    if u > 0:
                        wanted = wanted & (t0 + u < TH + M - 1)
                    mask = mask_x & wanted[None, :, None]
                    x_blocks = x_blocks + (tl.load(xn + (off_x + i * W * C), mask=mask, other=0.0),)
            off_dy += UNROLL * OW * C
            for u in tl.static_range(UNROLL):
                row_dy = (oh >= D0) & (oh < OH + D0)
                if any_row(row_dy):
                    newest = split_columns(dq_blocks[u], CW)
                    if given(norm2):
                        y_columns = split_columns(y_blocks[u], CW)
                    row = ()
                    for d in tl.static_range(ND):
                        v = newest[d].to(tl.float32)
                        if given(norm2):
                            y2 = y_columns[d].to(tl.float32)
                            phi, dphi = normalise_activate_and_grad(y2, scale2, shift2, ACT2, FAST)
                            v = v * slope_dq
                            if dpool is not None:
                                v += offset_dq
                            v = v * dphi
                            if terms2 is not None:
                                v += offset2 + slope2 * y2
                            if S > 1:
                                v = tl.where((row_dy & (ow0 + d >= 0) & (ow0 + d < OW))[:, None], v, 0.0)
                            elif d < M - 1 or d >= SURE_DY:
                                v = v * dy_in[d]
                        row = row + (v,)
                else:
                    row = zero_blocks(ND, S, BLOCK_C)
                # Triton loads ahead only in loops whose variables are results of operations, hence the 0 where the loop
                # begins.
                moved = row
                for i in tl.static_range((D1 - D0 - 1) * ND):
                    moved = moved + (ring[i] + 0.0 if STAGES > 1 and u == 0 else ring[i],)
                ring = moved  # ring[m * ND + d] is dy at row oh - D0 - m, column ow0 + d
                for r in tl.static_range(STRIDE):
                    row_x = (t0 + u >= M - 1) & (ih >= 0) & (ih < H)
                    if u > 0:  # TH + M - 1 need not divide by UNROLL
                        row_x = row_x & (t0 + u < TH + M - 1)
                    if any_row(row_x):
                        if NEED_DW or given(norm1):
                            x_columns = split_columns(x_blocks[u * STRIDE + r], XWP)
                        outputs = ()
                        for j in tl.static_range(XWP):
                            if j >= XW:
                                outputs = outputs + (tl.zeros([S, BLOCK_C], x.dtype.element_ty),)
                            else:
                                if NEED_DW or given(norm1):
                                    x1 = x_columns[j].to(tl.float32)
                                if given(norm1):
                                    a, slope = normalise_activate_and_grad(x1, scale1, shift1, ACT1, FAST)
                                    if S > 1:
                                        inside = (row_x & (iw0 + j >= 0) & (iw0 + j < W))[:, None]
                                        a = tl.where(inside, a, 0.0)
                                        slope = tl.where(inside, slope, 0.0)
                                    elif j < STRIDE - 1 or j >= SURE_X:
                                        a = a * x_in[j]
                                        slope = slope * x_in[j]
                                elif NEED_DW:
                                    a = x1
                                da = tl.zeros([S, BLOCK_C], tl.float32)
                                if NEED_DX:
                                    for i in tl.static_range(K * K):
                                        if i // K % STRIDE == r:
                                            if i % K % STRIDE == j % STRIDE:
                                                da += (
                                                    ring[i // K // STRIDE * ND + j // STRIDE - i % K // STRIDE + M - 1]
                                                    * taps[i]
                                                )
                                grads = ()
                                for i in tl.static_range((W1 - W0) * K):
                                    tap = dw[i]
                                    if (W0 + i // K) % STRIDE == r:
                                        if i % K % STRIDE == j % STRIDE:
                                            tap += (
                                                ring[
                                                    ((W0 + i // K) // STRIDE - D0) * ND
                                                    + j // STRIDE
                                                    - i % K // STRIDE
                                                    + M
                                                    - 1
                                                ]
                                                * a
                                            )
                                    grads = grads + (tap,)
                                dw = grads
                                if given(norm1) and NEED_DX:
                                    da = da * slope
                                    sum_dz += da
                                    sum_dzy += da * (x1 - mean1)
                                outputs = outputs + (cast(da, x.dtype.element_ty),)
                        if NEED_DX:
                            tl.store(dxn + off_x, join_columns(outputs, 0, XWP), mask=mask_x & row_x[None, :, None])
                    off_x += W * C
                    ih += 1
                oh += 1
    # One row of partials per program: k*k weight gradients, then BN1's two sums.
    out = partials + p.to(tl.int64) * (K * K + 2) * C + c
    if NEED_DW:
        for i in tl.static_range((W1 - W0) * K):
            tl.store(out + (W0 * K + i) * C, tl.sum(dw[i], 0), mask=mc)
    if given(norm1) and NEED_DX:
        tl.store(out + K * K * C, tl.sum(sum_dz, 0), mask=mc)
        tl.store(out + (K * K + 1) * C, tl.sum(sum_dzy, 0) * load_rstd(norm1, c, mc), mask=mc)
        if counters is not None:
            block_c = program % blocks_c
            group = p // GROUP
            parts = tl.cdiv(P, GROUP)
            counters += block_c * (1 + parts)
            if last_of_group(counters, p, P):
                row = group * GROUP + tl.arange(0, GROUP)
                mask = (row < P)[:, None] & mc[None, :]
                rows = partials + (row.to(tl.int64) * (K * K + 2) + K * K)[:, None] * C + c[None, :]
                out = group_sums + group * 2 * C + c
                tl.store(out, tl.sum(tl.load(rows, mask=mask, other=0.0, cache_modifier=".cg"), 0), mask=mc)
                tl.store(out + C, tl.sum(tl.load(rows + C, mask=mask, other=0.0, cache_modifier=".cg"), 0), mask=mc)
                if last_to_arrive(counters, parts):
                    finish_gradients(
                        sums=group_sums,
                        norm=norm1,
                        dgamma=dgamma1,
                        dbeta=dbeta1,
                        k0=k0_1,
                        k1=k1_1,
                        parts=parts,
                        row_stride=2 * C,
                        C=C,
                        count=count1,
                        block_c=block_c,
                        BLOCK_P=GROUP,
                        BLOCK_C=BLOCK_C,
                    )


@sized_jit
def depthwise_backward_kernel(
    dq,
    y,
    x,
    w,
    dx,
    partials,
    norm2,
    terms2,
    gates,
    dpool,
    norm1,
    counters,
    group_sums,
    dgamma1,
    dbeta1,
    k0_1,
    k1_1,
    count1,
    N,
    H,
    W,
    CV,
    OH,
    OW,
    pad_top,
    pad_left,
    first_row,
    first_col,
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
    XWP: tl.constexpr,
    SURE_DY: tl.constexpr,
    SURE_X: tl.constexpr,
    STAGES: tl.constexpr,
    UNROLL: tl.constexpr,
    ACT2: tl.constexpr,
    ACT1: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    FAST: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """Each program does its tiles' whole backward, or with SPLIT one of the parts: dgrad, the upper or the lower half
    of wgrad."""
    HALF: tl.constexpr = (K + 1) // 2
    PARTS: tl.constexpr = (1 if NEED_DX else 0) + (2 if NEED_DW else 0) if SPLIT else 1
    part = tl.program_id(0) % PARTS
    program = tl.program_id(0) // PARTS
    for i in tl.static_range(PARTS):
        if part == i:
            backward_part(
                program=program,
                dq=dq,
                y=y,
                x=x,
                w=w,
                dx=dx,
                partials=partials,
                norm2=norm2,
                terms2=terms2,
                gates=gates,
                dpool=dpool,
                norm1=norm1,
                counters=counters,
                group_sums=group_sums,
                dgamma1=dgamma1,
                dbeta1=dbeta1,
                k0_1=k0_1,
                k1_1=k1_1,
                count1=count1,
                N=N,
                H=H,
                W=W,
                CV=CV,
                OH=OH,
                OW=OW,
                pad_top=pad_top,
                pad_left=pad_left,
                first_row=first_row,
                first_col=first_col,
                strips_w=strips_w,
                strips=strips,
                groups=groups,
                P=P,
                TH=TH,
                K=K,
                STRIDE=STRIDE,
                CVEC=CVEC,
                BLOCK_C=BLOCK_C,
                S=S,
                TW=TW,
                CW=CW,
                XWP=XWP,
                SURE_DY=SURE_DY,
                SURE_X=SURE_X,
                STAGES=STAGES,
                UNROLL=UNROLL,
                ACT2=ACT2,
                ACT1=ACT1,
                NEED_DX=NEED_DX and i == 0,
                W0=HALF if SPLIT and i == PARTS - 1 else 0,
                W1=K if NEED_DW and i == PARTS - 1 else HALF if SPLIT and NEED_DW and i == PARTS - 2 else 0,
                FAST=FAST,
            )


def _strided(size: int, stride: int, pad: int) -> tuple[int, int]:
    """Return the first value, and the number of values, that (i + pad) // stride takes over i in [0, size)."""
    return pad // stride, (size - 1 + pad) // stride - pad // stride + 1


@launcher
def depthwise_backward(
    dq: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    stride: int,
    pads: tuple[int, int, int, int],
    *,
    norm2: BatchNorm | None = None,
    y2: torch.Tensor | None = None,
    terms2: BatchTerms | None = None,
    act2: str = "identity",
    gates: torch.Tensor | None = None,
    dpool: torch.Tensor | None = None,
    norm1: BatchNorm | None = None,
    act1: str = "identity",
    need_dx: bool = True,
    need_dw: bool = True,
    counters: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor, tuple | None]:
    """Return the gradients of ``depthwise_forward``, in one launch; all activations are NHWC.

    Args:
        dq: [N, OH, OW, C]: the gradient of y, or with ``norm2`` the gradient of the (gated) activation that follows y.
        x, weight, stride, pads: as the forward took them.
        norm2: the BatchNorm after y, with rstd. With it: y2, the forward's y [N, OH, OW, C]; terms2, (k0, k1) fp32 [C]
            of its backward, or None where its statistics are frozen; gates and dpool, fp32 [N, C] or None.
        norm1: the forward's prologue, with rstd: dx is then the gradient of BatchNorm 1's output, dz1, not that of its
            input.
        counters: int32 [rules.depthwise_counters(C, device)], all 0, and 0 again afterwards. With them, ``norm1`` and
            ``need_dx`` the last program of each block of channels finishes BatchNorm 1's backward.

    Returns: dx or None; partials fp32 [P, k*k + 2, C]; and what was finished, or None. The partials' rows up to k*k sum
        to the weight gradient, and the last two, with ``norm1``, to sum(dz1) and sum(dz1 * (x - mean) * rstd); they are
        uninitialised without it. Finished are (dgamma1, dbeta1, k0, k1): the first two in gamma's and beta's dtypes,
        the others fp32 [C], so that BatchNorm 1's input has the gradient scale1 * dz1 + k0 + k1 * x.
    """
    N, H, W, C = x.shape
    OH, OW = dq.shape[1:3]
    K = weight.shape[-1]
    top, _, left, _ = pads
    first_row, rows = _strided(H, stride, top)
    first_col, cols = _strided(W, stride, left)
    cfg = depthwise_backward_config(K=K, stride=stride, N=N, rows=rows, cols=cols, C=C, dtype=x.dtype, device=x.device)
    strips_w = triton.cdiv(cols, cfg.TW)
    M, last = triton.cdiv(K, stride), first_col + (strips_w - 1) * cfg.TW  # last: column of dy that begins a strip
    strips = strips_w * triton.cdiv(rows, cfg.TH)
    groups = triton.cdiv(strips, cfg.S)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    parts = need_dx + 2 * need_dw if cfg.split else 1
    P = cfg.programs(N * groups, blocks_c * max(parts, 1), x.device)
    dx = torch.empty_like(x) if need_dx else None
    partials = fp32(x.device, P, K * K + 2, C)
    finished = group_sums = None
    if norm1 is not None and counters is not None and need_dx:
        check_counters(counters, blocks_c * (1 + triton.cdiv(P, GROUP.value)))
        group_sums = fp32(x.device, triton.cdiv(P, GROUP.value), 2, C)
        finished = torch.empty_like(norm1.weight), torch.empty_like(norm1.bias), fp32(x.device, C), fp32(x.device, C)
    dgamma1, dbeta1, k0_1, k1_1 = finished or (None,) * 4
    # Columns that are inside whatever the strip; beyond k = 5, ptxas spills for the fewer factors.
    sure_dy, sure_x = min(OW - last + M - 1, cfg.TW + M - 1), min(W + left - last * stride, cfg.TW * stride)
    # Where a warp's share of x is under 16 bytes a thread, wider loads with idle lanes beat narrow ones.
    x_columns = max(triton.next_power_of_2(cfg.TW * stride), 512 // (cfg.S * cfg.BLOCK_C * x.element_size()))
    if need_dx or need_dw:
        depthwise_backward_kernel[(P * blocks_c * parts,)](
            dq=dq,
            y=y2,
            x=x,
            w=weight,
            dx=dx,
            partials=partials,
            norm2=norm2,
            terms2=None if terms2 is None else tuple(terms2),
            gates=gates,
            dpool=dpool,
            norm1=norm1,
            counters=None if finished is None else counters,
            group_sums=group_sums,
            dgamma1=dgamma1,
            dbeta1=dbeta1,
            k0_1=k0_1,
            k1_1=k1_1,
            count1=float(N * H * W),
            N=N,
            H=H,
            W=W,
            CV=C // channel_vector_width(C),
            OH=OH,
            OW=OW,
            pad_top=top,
            pad_left=left,
            first_row=first_row,
            first_col=first_col,
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
            CW=triton.next_power_of_2(cfg.TW + M - 1),
            XWP=x_columns,
            SURE_DY=sure_dy if K <= 5 else 0,
            SURE_X=sure_x if K <= 5 else 0,
            STAGES=cfg.stages,
            UNROLL=cfg.unroll,
            ACT2=act2,
            ACT1=act1,
            NEED_DX=need_dx,
            NEED_DW=need_dw,
            FAST=fast_math(x.dtype),
            SPLIT=cfg.split,
            **cfg.options,
        )
    return dx, partials, finished
