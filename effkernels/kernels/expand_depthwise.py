"""Expand 1x1 inside the depthwise convolution, for inference: the expanded tensor never reaches memory.

    a1[n,h,w,e]   = phi(BN1(sum_i w1[e,i] x[n,h,w,i]))
    a2[n,oh,ow,e] = phi(BN2(sum_{kh,kw} w[e,kh,kw] a1[n, oh*s + kh - pad_top, ow*s + kw - pad_left, e]))

a1 is rounded to the compute dtype, and 0 outside the image. A program slides strips as ``depthwise_forward`` does: it
has S column strips of an image times BLOCK_E expanded channels, and goes down TH output rows with M = ceil(k/s) running
rows of sums. Where that kernel loads column j of its strips, [S, BLOCK_E], this one computes it, as the product of x's
column [S, I] with w1^T [I, BLOCK_E]: the strips are the rows of a tensor-core product, so a tap is still another tuple
entry. A strip of TW outputs evaluates (TW - 1) * s + k columns: an element of
a1 is computed (1 + (k - s) / (TW * s)) (1 + (k - s) / (TH * s)) times, 1.29 times at k = 3, s = 2, TW = 2, TH = 16.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import expand_depthwise_config
from effkernels.kernels.activation import activate
from effkernels.kernels.common import cast, channel_vector_width, dot, fast_math, fp32, launcher, sized_jit
from effkernels.kernels.depthwise_strips import load_weights, zero_blocks
from effkernels.kernels.norm import BatchNorm, scale_and_shift


@triton.jit
def load_forward_weight(w, n, k, K, mask, dtype: tl.constexpr):
    """w [N, K] as the right operand [k, n], rounded to the compute dtype."""
    return cast(tl.load(w + n[None, :] * K + k[:, None], mask=mask, other=0.0).to(tl.float32), dtype)


@triton.jit
def rounded(v, dtype: tl.constexpr, FAST: tl.constexpr):
    """fp32 v as it would come back from memory in the compute dtype.

    FAST (bf16 only) converts two values at once. A cast down that is cast up again right away LLVM makes one by one, on
    the slow unit that also does tanh.
    """
    if FAST:
        return tl.inline_asm_elementwise(
            "{ .reg .b32 t; cvt.rn.bf16x2.f32 t, $3, $2; shl.b32 $0, t, 16; and.b32 $1, t, 0xffff0000; }",
            "=r,=r,r,r",
            [v],
            dtype=tl.float32,
            is_pure=True,
            pack=2,
        )
    else:
        return cast(v, dtype).to(tl.float32)


@sized_jit
def expand_depthwise_kernel(
    x,
    w1,
    w,
    y,
    norm1,
    norm2,
    pool,
    N,
    H,
    W,
    IV,
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
    IVEC: tl.constexpr,
    CVEC: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_E: tl.constexpr,
    S: tl.constexpr,
    TW: tl.constexpr,
    SINGLE: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The module's docstring says which program does what.

    x [N, H, W, I], w1 [C, I], w [C, K, K], y [N, OH, OW, C], pool [N, groups, C] fp32 or None; I = IV * IVEC, C = CV *
    CVEC. norm1 and norm2 hold running statistics.
    """
    I = IV * IVEC
    C = CV * CVEC
    dtype: tl.constexpr = x.dtype.element_ty
    M: tl.constexpr = (K + STRIDE - 1) // STRIDE
    NC: tl.constexpr = (TW - 1) * STRIDE + K
    blocks_c = tl.cdiv(C, BLOCK_E)
    c = tl.program_id(0) % blocks_c * BLOCK_E + tl.arange(0, BLOCK_E)
    p = tl.program_id(0) // blocks_c
    mc = c < C
    i = tl.arange(0, BLOCK_I)
    mi = i < I
    if SINGLE:
        weight1 = load_forward_weight(w1, c, i, I, mi[:, None] & mc[None, :], dtype)
    taps = load_weights(w, c, mc, dtype, K * K)
    scale1, shift1 = scale_and_shift(norm1, c, mc)
    scale2, shift2 = scale_and_shift(norm2, c, mc)
    for g in range(p, N * groups, P):
        n = g // groups
        strip = g % groups * S + tl.arange(0, S)
        valid = strip < strips
        ow0 = strip % strips_w * TW
        oh0 = strip // strips_w * TH
        rows = tl.where(valid, tl.minimum(OH - oh0, TH), 0)
        iw0 = ow0 * STRIDE - pad_left
        ih = oh0 * STRIDE - pad_top
        xn = x + n.to(tl.int64) * H * W * I
        yn = y + n.to(tl.int64) * OH * OW * C
        off_in = (ih * W + iw0)[:, None] * I + i[None, :]
        off_out = ((oh0 - (M - 1)) * OW + ow0)[:, None] * C + c[None, :]
        acc = zero_blocks(M * TW, S, BLOCK_E)
        if pool is not None:
            pooled = tl.zeros([S, BLOCK_E], tl.float32)
        for t in tl.range(0, TH + M - 1, num_stages=STAGES):
            for r in tl.static_range(STRIDE):
                # Left of the image where the row is outside. That it changes with the row keeps the masks of all
                # columns from being made ahead of the loop, and held in registers.
                first_col = tl.where((ih >= 0) & (ih < H) & valid, iw0, -1024)
                for j in tl.static_range(NC):
                    inside = (first_col + j).to(tl.uint32, bitcast=True) < W.to(tl.uint32, bitcast=True)
                    e = tl.zeros([S, BLOCK_E], tl.float32)
                    if SINGLE:
                        column = tl.load(xn + off_in + j * I, mask=inside[:, None] & mi[None, :], other=0.0)
                        e = dot(column, weight1, e, PRECISION)
                    else:
                        for start in range(0, I, BLOCK_I):
                            rest = start + i < I
                            part = load_forward_weight(w1, c, start + i, I, rest[:, None] & mc[None, :], dtype)
                            column = tl.load(
                                xn + off_in + (j * I + start), mask=inside[:, None] & rest[None, :], other=0.0
                            )
                            e = dot(column, part, e, PRECISION)
                    a = rounded(activate(e * scale1 + shift1, ACT, FAST), dtype, FAST)
                    a = tl.where(inside[:, None], a, 0.0)
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
                if r == (K - 1) % STRIDE:
                    # Row oh0 + t - (M - 1) has met all its taps.
                    done = (t >= M - 1) & (t - (M - 1) < rows)
                    for o in tl.static_range(TW):
                        ok = (done & (ow0 + o < OW))[:, None]
                        v = activate(acc[(M - 1) * TW + o] * scale2 + shift2, ACT, FAST)
                        if pool is not None:
                            pooled += tl.where(ok, v, 0.0)
                        tl.store(yn + off_out + o * C, cast(v, dtype), mask=ok & mc[None, :])
                off_in += W * I
                ih += 1
            off_out += OW * C
            shifted = zero_blocks(TW, S, BLOCK_E)
            for b in tl.static_range((M - 1) * TW):
                shifted = shifted + (acc[b],)
            acc = shifted
        if pool is not None:
            tl.store(pool + (n.to(tl.int64) * groups + g % groups) * C + c, tl.sum(pooled, 0), mask=mc)


@launcher
def expand_depthwise(
    x: torch.Tensor,
    w1: torch.Tensor,
    norm1: BatchNorm,
    weight: torch.Tensor,
    norm2: BatchNorm,
    stride: int,
    pads: tuple[int, int, int, int],
    *,
    act: str,
    pool: bool,
    precision: str = "ieee",
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return a2 of the module docstring for x [N, H, W, I], w1 [E, I, 1, 1] and the depthwise weight [E, 1, k, k].

    Args:
        pads: (top, bottom, left, right) zeros.
        pool: return fp32 sums of a2 over pixels too, [N, parts, E], to be added over parts.
        precision: of fp32 products, "ieee" or "tf32".

    Returns: a2 [N, OH, OW, E] in x's dtype, and the sums or None, as ``depthwise_forward`` does with ``epilogue`` and
        ``pool``.
    """
    N, H, W, I = x.shape
    C, K = weight.shape[0], weight.shape[-1]
    top, bottom, left, right = pads
    OH, OW = (H + top + bottom - K) // stride + 1, (W + left + right - K) // stride + 1
    y = x.new_empty(N, OH, OW, C)
    cfg = expand_depthwise_config(K=K, stride=stride, N=N, I=I, E=C, OH=OH, OW=OW, dtype=x.dtype, device=x.device)
    strips_w = triton.cdiv(OW, cfg.TW)
    strips = strips_w * triton.cdiv(OH, cfg.TH)
    groups = triton.cdiv(strips, cfg.S)
    blocks_c = triton.cdiv(C, cfg.BLOCK_E)
    P = cfg.programs(N * groups, blocks_c, x.device)
    sums = fp32(x.device, N, groups, C) if pool else None
    expand_depthwise_kernel[(P * blocks_c,)](
        x=x,
        w1=w1,
        w=weight,
        y=y,
        norm1=norm1,
        norm2=norm2,
        pool=sums,
        N=N,
        H=H,
        W=W,
        IV=I // channel_vector_width(I),
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
        IVEC=channel_vector_width(I),
        CVEC=channel_vector_width(C),
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_E=cfg.BLOCK_E,
        S=cfg.S,
        TW=cfg.TW,
        SINGLE=I <= cfg.BLOCK_I,
        STAGES=cfg.stages,
        ACT=act,
        FAST=fast_math(x.dtype),
        PRECISION=precision,
        **cfg.options,
    )
    return y, sums
