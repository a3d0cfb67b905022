"""Backward of an MBConv block's project (1x1) convolution: BatchNorm 3, both gradients, and the sums of BatchNorm 2.

    dy[m,o] = scale3[o] factor[n] dout[m,o] + k0[o] + k1[o] y3[m,o]    BatchNorm 3's backward; factor: drop-path's
    dq[m,e] = sum_o dy[m,o] w[o,e]
    dw[o,e] = sum_m dy[m,o] q[m,e]                                     q = phi(z) gate[n,e],  z = BN2(y2)
    for each image n and channel e, over its rows m, the sums of       dq phi',  dq phi' yhat2,  and where there is a
                                                                       gate  dq phi,  phi',  phi' yhat2

Rows m are the pixels of an image n, in tiles of BLOCK_M. Both products are computed transposed, dq^T = w^T dy^T [E,
BLOCK_M] and dw^T = q^T dy [E, O], because a thread of the tensor cores then holds few channels and many rows:

    accumulator [16 channels, BLOCK_M rows] of a warp; lane 4 l + q holds  channels l and l + 8
                                                                      rows 8 j + 2 q and 8 j + 2 q + 1 of each

               rows  0 1    2 3    4 5    6 7    8 9    ..
    channel 0      [  0 ] [  1 ] [  2 ] [  3 ] [  0 ]   ..    BatchNorm 2's coefficients take two registers each, not
            1      [  4 ] [  5 ] [  6 ] [  7 ] [  4 ]   ..    one for every column; sums over rows run along a thread's
            ..       ..                                       own registers; and q^T, as it lies, is the left operand
            7      [ 28 ] [ 29 ] [ 30 ] [ 31 ] [ 28 ]   ..    of the other product.
            8      [  0 ] [  1 ] [  2 ] [  3 ] [  0 ]   ..

dy is materialised by a launch of its own: that moves 3 M O elements, where O is 2 to 16 times smaller than E, and
spares every block of channels E forming it again. Then, as ``configs.rules.project_backward_is_fused`` says,

    O <= 24, 16-bit   one kernel of one-warp programs for both gradients and the sums
    else              PyTorch's product for dq | ``gradient_sums`` of dq and y2, which stores q as it goes | PyTorch's
                      product for dw

The second form moves five tensors of M E elements where the first moves two. But a product of cuBLAS and a pass over
its result each run at their bytes, while one kernel that does all of it is bound by its instructions and its registers
as soon as the weight gradient no longer fits a thread's: at 14 x 14 pixels, O = 112 and E = 672, kernels for dq with
the sums and for dw, each at its best, were predicted to take 134 us, and this 87.

Weight gradients are fp32, of the first form one partial a split of the rows, which ``weight_gradients`` adds in order;
nothing is added by atomics. The sums of phi' and phi' yhat2 need no dq and could be made where the forward pools: that
would take five more instructions an element there and save two here.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import project_backward_is_fused, project_both_config, project_dy_config
from effkernels.kernels.activation import activate_and_grad, branch_factor
from effkernels.kernels.batchnorm import apply, gradient_sums
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    dot,
    fast_math,
    fp32,
    launcher,
    load_tile,
    matmul_precision,
    product,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector


@sized_jit
def project_dy_kernel(
    dout,
    y3,
    dy,
    norm3,
    k0,
    k1,
    branch_draws,
    keep,
    rows,
    OV,
    image_blocks,
    OVEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_O: tl.constexpr,
):
    """dy of BLOCK_M rows of an image and BLOCK_O channels; k0 None: no terms of batch statistics."""
    O = OV * OVEC
    c = tl.program_id(0) % tl.cdiv(O, BLOCK_O) * BLOCK_O + tl.arange(0, BLOCK_O)
    mask = c < O
    block = tl.program_id(0) // tl.cdiv(O, BLOCK_O)
    image = (block // image_blocks).to(tl.int64)
    row0 = block % image_blocks * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    ok = row0 + i < rows
    base = (image * rows + row0) * O
    scale = load_vector(norm3.weight, c, mask) * load_rstd(norm3, c, mask)
    if branch_draws is not None:
        scale *= branch_factor(tl.load(branch_draws + image), keep)
    v = load_tile(dout + base, i, c, O, ok, mask).to(tl.float32) * scale[None, :]
    if k0 is not None:
        slope = load_vector(k1, c, mask)[None, :]
        v += load_vector(k0, c, mask)[None, :] + slope * load_tile(y3 + base, i, c, O, ok, mask).to(tl.float32)
    tl.store(dy + base + i[:, None] * O + c[None, :], cast(v, dy.dtype.element_ty), mask=ok[:, None] & mask[None, :])


@triton.jit
def activation_coefficients(norm2, c, mask, HALVED: tl.constexpr):
    """(rstd, offset, gamma, beta) of channels c: yhat2 = y2 * rstd + offset, z = yhat2 * gamma + beta, or half of z."""
    half: tl.constexpr = 0.5 if HALVED else 1.0
    rstd = load_rstd(norm2, c, mask)
    gamma, beta = load_vector(norm2.weight, c, mask) * half, load_vector(norm2.bias, c, mask) * half
    return rstd, -load_vector(norm2.mean, c, mask) * rstd, gamma, beta


@triton.jit
def half_tanh(h, beside):
    """tanh(h), in the layout of ``beside``: Triton would else work on what depends on y2 alone in the layout it was
    loaded in, and again in that of the products.
    """
    return tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f,f", [h, beside], dtype=tl.float32, is_pure=True, pack=1
    )


@triton.jit
def phi_and_slope(z, beside, ACT: tl.constexpr, FAST: tl.constexpr, HALVED: tl.constexpr):
    """(phi(z), phi'(z)). HALVED (SiLU by tanh): z is given as h = z / 2, and the slope returned twice: five operations
    in all.
    """
    if HALVED:
        t = half_tanh(z, beside)
        up = t + 1.0
        return z * t + z, up * (z - z * t) + up
    else:
        return activate_and_grad(z, ACT, FAST)


@triton.jit
def store_sums(out, e, E, mask, s1, s3, s5, s2, s4, HALVED: tl.constexpr, GATED: tl.constexpr):
    """Rows of sums [2 or 5, E] at channels e; slopes are doubled if HALVED."""
    half: tl.constexpr = 0.5 if HALVED else 1.0
    tl.store(out + e, s1 * half, mask=mask)
    tl.store(out + E + e, s3 * half, mask=mask)
    if GATED:
        tl.store(out + 2 * E + e, s5, mask=mask)
        tl.store(out + 3 * E + e, s2 * half, mask=mask)
        tl.store(out + 4 * E + e, s4 * half, mask=mask)


@triton.jit
def load_weight(w, e, o, O, E, me, dtype: tl.constexpr):
    """w [O, E] as the left operand [BLOCK_E, BLOCK_K], rounded to the compute dtype."""
    v = tl.load(w + o[None, :] * E + e[:, None], mask=me[:, None] & (o < O)[None, :], other=0.0)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@triton.jit
def by_lane(acc, PAIRS: tl.constexpr):
    """acc [16 PAIRS, BLOCK_M], as one warp's tensor cores leave it, seen as [BLOCK_M / 4, l 8, q 4, 2 PAIRS].

    The outer dimensions are the rows and the channels of one lane, so nothing moves.
    """
    split = tl.reshape(acc, [PAIRS, 2, 8, acc.shape[1] // 8, 4, 2])
    return tl.reshape(tl.permute(split, (3, 5, 2, 4, 0, 1)), [acc.shape[1] // 4, 8, 4, 2 * PAIRS])


@triton.jit
def by_channel(x, PAIRS: tl.constexpr):
    """The inverse of ``by_lane``: [16 PAIRS, BLOCK_M]."""
    split = tl.reshape(x, [x.shape[0] // 2, 2, 8, 4, PAIRS, 2])
    return tl.reshape(tl.permute(split, (4, 5, 2, 0, 3, 1)), [16 * PAIRS, 4 * x.shape[0]])


@sized_jit
def project_both_kernel(
    dy,
    w,
    y2,
    dq,
    sums,
    partials,
    norm2,
    gates,
    images,
    rows,
    OV,
    EV,
    tiles_per_part,
    parts,
    step,
    OVEC: tl.constexpr,
    EVEC: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PAIRS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    HALVED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq, sums and partials of 16 PAIRS channels in one part of every ``step``-th image; BLOCK_O covers O. One warp: no
    barrier.

    y2 goes from memory to the lane that needs it, and dq back, without shared memory: lane 4 l + q works on the 2 PAIRS
    channels that follow one another from 2 PAIRS l on, 4 PAIRS bytes of a row. To the tensor cores these channels come
    in another order (``channel``), which nobody sees: w is loaded, and dw stored, in it.
    """
    O = OV * OVEC
    E = EV * EVEC
    dtype: tl.constexpr = y2.dtype.element_ty
    V: tl.constexpr = 2 * PAIRS
    blocks_e = tl.cdiv(E, 16 * PAIRS)
    c0 = tl.program_id(0) % blocks_e * 16 * PAIRS
    p = tl.program_id(0) // blocks_e
    part = p % parts
    i = tl.arange(0, BLOCK_M)
    o = tl.arange(0, BLOCK_O)
    mo = o < O
    index = tl.arange(0, 16 * PAIRS)
    channel = c0 + index % 8 * V + index // 16 * 2 + index // 8 % 2
    weight = load_weight(w=w, e=channel, o=o, O=O, E=E, me=channel < E, dtype=dtype)

    lanes = c0 + tl.arange(0, 8)[:, None, None] * V
    e = tl.max_contiguous(tl.multiple_of(lanes + tl.arange(0, V)[None, None, :], [1, 1, V]), [1, 1, V])  # [8, 1, V]
    me = e < E
    pairs = tl.arange(0, BLOCK_M // 4)[:, None, None, None]
    m = pairs // 2 * 8 + tl.arange(0, 4)[None, None, :, None] * 2 + pairs % 2  # rows of the tile [BLOCK_M / 4, 1, 4, 1]
    offset = m * E + e[None]
    rstd, centre, gamma, beta = activation_coefficients(norm2, e, me, HALVED)
    # Rows past an image are loaded as y2 = 0: what they add to sums without dq is taken off again.
    _, slope_outside = phi_and_slope(centre * gamma + beta, beta, ACT, FAST, HALVED)

    image = (p // parts).to(tl.int64)
    first = part * tiles_per_part * BLOCK_M
    last = first + (tiles_per_part - 1) * BLOCK_M
    row0 = first
    image_gates = 1.0
    if gates is not None:
        image_gates = load_vector(gates + image * E, e, me)[None]
    dw = tl.zeros([16 * PAIRS, BLOCK_O], tl.float32)
    s1 = tl.zeros([8, 4, V], tl.float32)
    s3 = tl.zeros([8, 4, V], tl.float32)
    s5 = tl.zeros([8, 4, V], tl.float32)
    s2 = tl.zeros([8, 4, V], tl.float32)
    s4 = tl.zeros([8, 4, V], tl.float32)
    y = tl.load(y2 + (image * rows + row0) * E + offset, mask=(row0 + m < rows) & me[None], other=0.0)
    steps = tl.cdiv(images - p // parts, step) * tiles_per_part
    for _ in tl.range(0, steps, num_stages=STAGES):
        ok = row0 + i < rows
        base = image * rows + row0
        d = load_tile(dy + base * O, i, o, O, ok, mo)
        v = y.to(tl.float32) * rstd[None] + centre[None]
        # The next tile's values are on their way while this one is worked on.
        done = row0 == last
        next_row0 = tl.where(done, first, row0 + BLOCK_M)
        next_image = tl.where(done, image + step, image)
        end = tl.where(next_image < images, rows, 0)
        y = tl.load(y2 + (next_image * rows + next_row0) * E + offset, mask=(next_row0 + m < end) & me[None], other=0.0)
        acc = dot(weight, tl.trans(d), tl.zeros([16 * PAIRS, BLOCK_M], tl.float32), PRECISION)
        g = by_lane(acc, PAIRS)
        if dq is not None:
            tl.store(dq + base * E + offset, cast(g, dtype), mask=(row0 + m < rows) & me[None])
        phi, dphi = phi_and_slope(v * gamma[None] + beta[None], g, ACT, FAST, HALVED)
        slope = g * dphi  # 0 in rows past the image, as dy is
        s1 += tl.sum(slope, 0)
        s3 += tl.sum(slope * v, 0)
        if gates is not None:
            s5 += tl.sum(g * phi, 0)
            s2 += tl.sum(dphi, 0)
            s4 += tl.sum(dphi * v, 0)
            phi *= image_gates
        if partials is not None:
            dw = dot(by_channel(cast(phi, dtype), PAIRS), d, dw, PRECISION)
        if done:
            row = sums + (image * parts + part) * (2 if gates is None else 5) * E
            outside = tl.maximum(last + BLOCK_M - rows, 0).to(tl.float32) * tl.reshape(slope_outside, [8, V])
            store_sums(
                out=row,
                e=tl.reshape(e, [8, V]),
                E=E,
                mask=tl.reshape(me, [8, V]),
                s1=tl.sum(s1, 1),
                s3=tl.sum(s3, 1),
                s5=tl.sum(s5, 1),
                s2=tl.sum(s2, 1) - outside,
                s4=tl.sum(s4, 1) - outside * tl.reshape(centre, [8, V]),
                HALVED=HALVED,
                GATED=gates is not None,
            )
            s1 = tl.zeros([8, 4, V], tl.float32)
            s3 = tl.zeros([8, 4, V], tl.float32)
            s5 = tl.zeros([8, 4, V], tl.float32)
            s2 = tl.zeros([8, 4, V], tl.float32)
            s4 = tl.zeros([8, 4, V], tl.float32)
            if gates is not None:
                image_gates = load_vector(gates + next_image * E, e, me & (next_image < images))[None]
        image = next_image
        row0 = next_row0
    if partials is not None:
        out = partials + p.to(tl.int64) * O * E + o[None, :] * E + channel[:, None]
        tl.store(out, dw, mask=(channel < E)[:, None] & mo[None, :])


def halved(act: str, fast: bool) -> bool:
    """HALVED, whether z and slopes are kept as z / 2 and 2 phi'(z): for SiLU by tanh.approx, which needs z / 2."""
    return fast and act == "silu"


@launcher
def project_dy(
    dout: torch.Tensor,
    y3: torch.Tensor,
    norm3: BatchNorm,
    terms3: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    branch_draws: torch.Tensor | None = None,
    keep: float = -1.0,
    dtype: torch.dtype,
) -> torch.Tensor:
    """dy [N, h, w, O] in ``dtype``: the gradient of BatchNorm 3's input."""
    N, H, W, O = dout.shape
    cfg = project_dy_config(O, dtype)
    dy = torch.empty_like(dout, dtype=dtype)
    k0, k1 = terms3 or (None, None)
    image_blocks = triton.cdiv(H * W, cfg.BLOCK_ROWS)
    project_dy_kernel[(triton.cdiv(O, cfg.BLOCK_C) * N * image_blocks,)](
        dout=dout,
        y3=None if terms3 is None else y3,
        dy=dy,
        norm3=norm3,
        k0=k0,
        k1=k1,
        branch_draws=branch_draws,
        keep=keep,
        rows=H * W,
        OV=O // channel_vector_width(O),
        image_blocks=image_blocks,
        OVEC=channel_vector_width(O),
        BLOCK_M=cfg.BLOCK_ROWS,
        BLOCK_O=cfg.BLOCK_C,
        num_warps=cfg.num_warps,
    )
    return dy


@launcher
def project_both(
    dy: torch.Tensor,
    y2: torch.Tensor,
    weight: torch.Tensor,
    norm2: BatchNorm,
    *,
    act: str,
    gates: torch.Tensor | None,
    need_dq: bool,
    need_dw: bool,
) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor | None]:
    """(dq or None, sums, partials or None) of ``project_backward`` in one launch, from dy [N, h, w, O]."""
    N, H, W, E = y2.shape
    O, rows = dy.shape[-1], H * W
    cfg = project_both_config(E, O, rows, y2.dtype)
    tiles, blocks_e = triton.cdiv(rows, cfg.BLOCK_M), triton.cdiv(E, cfg.BLOCK_E)
    parts, tiles_per_part, programs = cfg.parts(N, tiles, blocks_e, y2.device)
    step = max(1, programs // parts)
    dq = torch.empty_like(y2) if need_dq else None
    sums = fp32(y2.device, N, parts, 2 if gates is None else 5, E)
    partials = fp32(y2.device, step * parts, O, E) if need_dw else None
    fast = fast_math(y2.dtype)
    project_both_kernel[(step * parts * blocks_e,)](
        dy=dy,
        w=weight,
        y2=y2,
        dq=dq,
        sums=sums,
        partials=partials,
        norm2=norm2,
        gates=gates,
        images=N,
        rows=rows,
        OV=O // channel_vector_width(O),
        EV=E // channel_vector_width(E),
        tiles_per_part=tiles_per_part,
        parts=parts,
        step=step,
        OVEC=channel_vector_width(O),
        EVEC=channel_vector_width(E),
        BLOCK_M=cfg.BLOCK_M,
        PAIRS=cfg.BLOCK_E // 16,
        BLOCK_O=cfg.BLOCK_O,
        STAGES=cfg.stages,
        ACT=act,
        FAST=fast,
        HALVED=halved(act, fast),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dq, sums, partials


def project_backward(
    dout: torch.Tensor,
    y3: torch.Tensor,
    y2: torch.Tensor,
    weight: torch.Tensor | None,
    *,
    norm3: BatchNorm,
    terms3: tuple[torch.Tensor, torch.Tensor] | None,
    norm2: BatchNorm,
    act: str,
    gates: torch.Tensor | None = None,
    branch_draws: torch.Tensor | None = None,
    keep: float = -1.0,
    need_data: bool = True,
    need_dq: bool = True,
    need_dw: bool = True,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Data and weight gradient of the project convolution, and the sums of BatchNorm 2's and the gate's gradients.

    Args:
        dout: gradient of the block's output [N, h, w, O], of any dtype.
        y3: [N, h, w, O] and y2: [N, h, w, E], before their BatchNorms.
        weight: [O, E, 1, 1] or [O, E], rounded to y2's dtype; not read, and may be None, without ``need_data``.
        norm3, norm2: ``BatchNorm``. terms3: (k0, k1) fp32 [O] of BatchNorm 3's backward, or None with running
            statistics.
        gates: fp32 [N, E] or None. branch_draws, keep: drop-path's, as in ``batchnorm.apply``.
        need_data: whether sums are wanted; need_dq: dq too; need_dw: the weight gradient.

    Returns: (dq [N, h, w, E] or None, sums fp32 [N, parts, 5 (2 without gates), E]: dq*phi', dq*phi'*yhat2, dq*phi,
        phi', phi'*yhat2, or None; partials fp32 [S, O, E] of the weight gradient or None).
    """
    N, H, W, E = y2.shape
    O, rows = dout.shape[-1], N * H * W
    dy = project_dy(dout, y3, norm3, terms3, branch_draws=branch_draws, keep=keep, dtype=y2.dtype)
    if need_data and project_backward_is_fused(O, y2.dtype, act):
        return project_both(dy, y2, weight, norm2, act=act, gates=gates, need_dq=need_dq, need_dw=need_dw)
    dq = sums = q = partials = None
    if need_data:
        dq = torch.empty_like(y2)
        product(dy.view(rows, O), weight.reshape(O, E).to(y2.dtype), out=dq.view(rows, E))
        sums, q = gradient_sums(dq, y2, norm2, act=act, gates=gates, for_gate=gates is not None, activated=need_dw)
    elif need_dw:
        q = apply(y2, norm2, act=act, gates=gates)
    if need_dw:
        partials = fp32(y2.device, 1, O, E)
        product(dy.view(rows, O).t(), q.view(rows, E), out=partials[0])
    return dq if need_dq else None, sums, partials
