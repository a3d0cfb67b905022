"""One launch that finishes every weight gradient of a block from fp32 partials; each layer is a role, a range of the programs.

    depthwise       dw[c,tap] = sum_p partials[p,tap,c]
    project         dw[o,e]   = sum_s partials[s,o,e]
    stem            dw[i]     = sum_s D[s,i]             elements of the weight as they lie in memory
    expand          dw[e,i]   = A[e] sum_s D[s,e,i] + k1[e] sum_j w[e,j] sum_t gram[t,j,i] + k0[e] sum_t xsum[t,i],  A = gamma rstd
    squeeze-excite  dW_e = dt^T v, db_e = sum_n dt, dW_r = du^T pooled, db_r = sum_n du,  v = phi(u)

The expand layer's formula is BatchNorm 1's backward dy1 = A dz + k0 + k1 y1 times x, with y1 = x w^T folded into x's Gram matrix.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import weight_gradient_config
from effkernels.kernels.common import TL_DTYPES, activate, cast, channel_vector_width, launcher, load_vector, sized_jit
from effkernels.kernels.norm import BatchNorm


@triton.jit
def sum_of_partials(pid, partials, parts, row_stride, COLS, BP: tl.constexpr, BL: tl.constexpr):
    """(i [BL], sum over ``parts`` rows of element i) in a fixed order, BP rows in flight."""
    i = pid * BL + tl.arange(0, BL)
    t = tl.arange(0, BP)
    acc = tl.zeros([BP, BL], tl.float32)
    for start in tl.range(0, parts, BP, num_stages=3):
        ok = (start + t < parts)[:, None] & (i < COLS)[None, :]
        acc += tl.load(partials + (start + t).to(tl.int64)[:, None] * row_stride + i[None, :], mask=ok, other=0.0)
    return i, tl.sum(acc, 0)


@triton.jit
def sum_splits(partials, splits, stride, row, col, mask, COLS, BS: tl.constexpr):
    """sum_s partials[s] [rows, COLS], ``stride`` apart, at rows ``row`` and columns ``col``, BS splits at a time."""
    s = tl.arange(0, BS)
    acc = tl.zeros([BS, row.shape[0], col.shape[0]], tl.float32)
    at = partials + (row[:, None] * COLS + col[None, :])[None, :, :]
    for start in tl.range(0, splits, BS, num_stages=3):
        ok = (start + s < splits)[:, None, None] & mask[None, :, :]
        acc += tl.load(at + (start + s).to(tl.int64)[:, None, None] * stride, mask=ok, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def expand_gradient(
    pid, D, grams, w, gamma, rstd, k0, k1, out, splits, E, I,
    BE: tl.constexpr, BI: tl.constexpr, BS: tl.constexpr, GRAM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    blocks_i = tl.cdiv(I, BI)
    i = pid % blocks_i * BI + tl.arange(0, BI)
    e = pid // blocks_i * BE + tl.arange(0, BE)
    mi, me = i < I, e < E
    mask = me[:, None] & mi[None, :]
    offset = e[:, None] * I + i[None, :]
    acc = sum_splits(D, splits, E * I, e, i, mask, I, BS)
    acc *= (load_vector(gamma, e, me) * load_vector(rstd, e, me))[:, None]
    if GRAM:
        size = (I + 1) * I
        xsum = tl.zeros([BI], tl.float32)
        for start in range(0, splits, 16):
            s = start + tl.arange(0, 16)
            sum_mask = (s < splits)[:, None] & mi[None, :]
            xsum += tl.sum(tl.load(grams + s.to(tl.int64)[:, None] * size + I * I + i[None, :], mask=sum_mask, other=0.0), 0)
        acc += load_vector(k0, e, me)[:, None] * xsum[None, :]
        slope = load_vector(k1, e, me)
        for start in range(0, I, BI):
            j = start + tl.arange(0, BI)
            mj = j < I
            gram = sum_splits(grams, splits, size, j, i, mj[:, None] & mi[None, :], I, BS)
            weight = tl.load(w + e[:, None] * I + j[None, :], mask=me[:, None] & mj[None, :], other=0.0).to(tl.float32)
            weight = cast(weight, DTYPE).to(tl.float32) * slope[:, None]  # as the forward rounded it
            acc = tl.dot(weight, gram, acc, input_precision="ieee")
    tl.store(out + offset, cast(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def squeeze_excite_gradient(
    pid, dt, du, u_in, pooled, dw_reduce, db_reduce, dw_expand, db_expand, N, C, R,
    NB: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """CB channels times RB of the bottleneck, all images in order."""
    blocks_c = tl.cdiv(C, CB)
    c = pid % blocks_c * CB + tl.arange(0, CB)
    r = pid // blocks_c * RB + tl.arange(0, RB)
    mc, mr = c < C, r < R
    dwe = tl.zeros([CB, RB], tl.float32)
    dwr = tl.zeros([CB, RB], tl.float32)
    dbe = tl.zeros([CB], tl.float32)
    dbr = tl.zeros([RB], tl.float32)
    for start in range(0, N, NB):
        n = (start + tl.arange(0, NB)).to(tl.int64)
        mn = n < N
        mask_c = mn[:, None] & mc[None, :]
        mask_r = mn[:, None] & mr[None, :]
        at_c = n[:, None] * C + c[None, :]
        at_r = n[:, None] * R + r[None, :]
        dt_n = tl.load(dt + at_c, mask=mask_c, other=0.0)
        du_n = tl.load(du + at_r, mask=mask_r, other=0.0)
        v = tl.where(mask_r, activate(tl.load(u_in + at_r, mask=mask_r, other=0.0), ACT, False), 0.0)
        dwe = tl.dot(tl.trans(dt_n), v, dwe, input_precision="ieee")
        dwr = tl.dot(tl.trans(tl.load(pooled + at_c, mask=mask_c, other=0.0)), du_n, dwr, input_precision="ieee")
        dbe += tl.sum(dt_n, 0)
        dbr += tl.sum(du_n, 0)
    mask = mc[:, None] & mr[None, :]
    tl.store(dw_expand + c[:, None] * R + r[None, :], cast(dwe, dw_expand.dtype.element_ty), mask=mask)
    tl.store(dw_reduce + r[None, :] * C + c[:, None], cast(dwr, dw_reduce.dtype.element_ty), mask=mask)
    tl.store(db_expand + c, cast(dbe, db_expand.dtype.element_ty), mask=mc & (pid // blocks_c == 0))
    tl.store(db_reduce + r, cast(dbr, db_reduce.dtype.element_ty), mask=mr & (pid % blocks_c == 0))


@sized_jit
def weight_gradients_kernel(
    depthwise_partials, depthwise_out, project_partials, project_out,
    D, grams, expand_weight, gamma1, rstd1, k0, k1, expand_out,
    dt, du, u, pooled, dw_reduce, db_reduce, dw_expand, db_expand,
    depthwise_parts, CV, project_parts, OV, splits, E, IV, N, R,
    CVEC: tl.constexpr, OVEC: tl.constexpr, IVEC: tl.constexpr,
    TAPS: tl.constexpr, PROJECT: tl.constexpr, STEM: tl.constexpr, EXPAND: tl.constexpr, GRAM: tl.constexpr, DTYPE: tl.constexpr,
    SE: tl.constexpr, ACT: tl.constexpr, TP: tl.constexpr, TL: tl.constexpr, BP: tl.constexpr, BL: tl.constexpr, BE: tl.constexpr,
    BI: tl.constexpr, BS: tl.constexpr, NB: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr,
):  # fmt: skip
    C = CV * CVEC
    I = IV * IVEC
    COLS = OV * OVEC
    pid = tl.program_id(0)
    if EXPAND:
        programs = tl.cdiv(E, BE) * tl.cdiv(I, BI)
        if pid < programs:
            expand_gradient(pid, D, grams, expand_weight, gamma1, rstd1, k0, k1, expand_out, splits, E, I, BE, BI, BS, GRAM, DTYPE)
        pid -= programs
    if STEM:
        stem_programs = tl.cdiv(E * I, BL)
        if pid < stem_programs:
            element, stem_total = sum_of_partials(pid, D, splits, E * I, E * I, BP, BL)
            tl.store(expand_out + element, cast(stem_total, expand_out.dtype.element_ty), mask=element < E * I)
        pid -= stem_programs
    if SE:
        se_programs = tl.cdiv(C, CB) * tl.cdiv(R, RB)
        if (pid >= 0) & (pid < se_programs):
            squeeze_excite_gradient(pid, dt, du, u, pooled, dw_reduce, db_reduce, dw_expand, db_expand, N, C, R, NB, RB, CB, ACT)
        pid -= se_programs
    if PROJECT:
        project_programs = tl.cdiv(COLS, BL)
        if (pid >= 0) & (pid < project_programs):
            i, total = sum_of_partials(pid, project_partials, project_parts, COLS, COLS, BP, BL)
            tl.store(project_out + i, cast(total, project_out.dtype.element_ty), mask=i < COLS)
        pid -= project_programs
    if TAPS > 0:
        if pid >= 0:
            k, tap_total = sum_of_partials(pid, depthwise_partials, depthwise_parts, (TAPS + 2) * C, TAPS * C, TP, TL)
            tl.store(depthwise_out + k % C * TAPS + k // C, cast(tap_total, depthwise_out.dtype.element_ty), mask=k < TAPS * C)


def contiguous_like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


class LayerPartials(NamedTuple):
    """Partial sums fp32 [parts, ...] of a layer's weight gradient, with the weight whose shape and dtype the gradient gets."""

    partials: torch.Tensor
    weight: torch.Tensor


class ExpandPartials(NamedTuple):
    """What ``expand_backward`` leaves of the expand layer's weight gradient.

    Attributes:
        partials: D fp32 [S, E, I]. grams: fp32 [S, I + 1, I], or None where BatchNorm 1 is frozen.
        weight: [E, I, 1, 1]. norm: BatchNorm 1, with rstd. terms: its (k0, k1) fp32 [E], or None where it is frozen.
        dtype: the compute dtype, to which the forward rounded the weight.
    """

    partials: torch.Tensor
    grams: torch.Tensor | None
    weight: torch.Tensor
    norm: BatchNorm
    terms: tuple[torch.Tensor, torch.Tensor] | None
    dtype: torch.dtype


class SqueezeExcitePartials(NamedTuple):
    """What the gradients of squeeze-excite's four parameters are made of.

    Attributes:
        dt: fp32 [N, C]. du, u: fp32 [N, R]. pooled: fp32 [N, C]; see ``squeeze_excite.gate_backward``.
        weights: (w_reduce, b_reduce, w_expand, b_expand). act: of the bottleneck.
    """

    dt: torch.Tensor
    du: torch.Tensor
    u: torch.Tensor
    pooled: torch.Tensor
    weights: tuple
    act: str


@launcher
def reduce_weight_gradients(
    depthwise: LayerPartials | None = None,
    project: LayerPartials | None = None,
    expand: ExpandPartials | None = None,
    squeeze_excite: SqueezeExcitePartials | None = None,
    stem: LayerPartials | None = None,
):
    """Weight gradients, in the parameters' shapes and dtypes, in one launch; an absent layer gives None.

    Args:
        depthwise: partials [P, k*k + 2, C] of ``depthwise_backward``, weight [C, 1, k, k].
        project: partials [S, O, E] of ``project_backward``, weight [O, E, 1, 1].
        stem: partials [S, elements] of ``stem_backward``, weight [E, I, 3, 3], dense; in place of expand.

    Returns: (depthwise, project, expand or stem gradient, tuple of squeeze-excite's four gradients).
    """
    outs = [None if part is None else contiguous_like(part.weight) for part in (depthwise, project, expand)]
    if stem is not None:
        outs[2] = torch.empty_like(stem.weight)
    se = None
    if squeeze_excite is not None:
        se = tuple(contiguous_like(t) for t in squeeze_excite.weights)
    if all(part is None for part in (depthwise, project, expand, stem, se)):
        return (None,) * 4
    any_tensor = (depthwise or project or expand or stem or squeeze_excite)[0]
    programs, C, R, N, act = 0, 1, 1, 1, "identity"
    taps, depthwise_parts, project_parts, COLS, splits, E, I = 0, 0, 0, 1, 0, 1, 1
    dtype = torch.float32
    if squeeze_excite is not None:
        (N, C), R, act = squeeze_excite.dt.shape, squeeze_excite.u.shape[1], squeeze_excite.act
    if expand is not None:
        (splits, E, I), dtype = expand.partials.shape, expand.dtype
    if stem is not None:
        splits, (E, I) = len(stem.partials), (len(stem.weight), stem.weight[0].numel())
    cfg = weight_gradient_config(splits, R)
    if se is not None:
        programs += triton.cdiv(C, cfg.CB) * triton.cdiv(R, cfg.RB)
    if expand is not None:
        programs += triton.cdiv(E, cfg.BE) * triton.cdiv(I, cfg.BI)
    if stem is not None:
        programs += triton.cdiv(E * I, cfg.BL)
    if project is not None:
        project_parts, COLS = project.partials.shape[0], project.partials[0].numel()
        programs += triton.cdiv(COLS, cfg.BL)
    if depthwise is not None:
        (depthwise_parts, rows, C), taps = depthwise.partials.shape, depthwise.weight.shape[-1] ** 2
        assert rows == taps + 2
        programs += triton.cdiv(taps * C, cfg.TL)
    if expand is not None:
        norm, terms = expand.norm, expand.terms or (None, None)
        expand_pointers = expand.partials, expand.grams, expand.weight, norm.weight, norm.rstd, *terms
    else:
        expand_pointers = (None if stem is None else stem.partials, *(None,) * 6)
    pointers = [
        None if depthwise is None else depthwise.partials, outs[0], None if project is None else project.partials, outs[1],
        *expand_pointers, outs[2],
        *((None,) * 4 if se is None else squeeze_excite[:4]), *(se or (None,) * 4),
    ]  # fmt: skip
    weight_gradients_kernel[(programs,)](
        *(any_tensor if t is None else t for t in pointers),
        depthwise_parts, C // channel_vector_width(C), project_parts, COLS // channel_vector_width(COLS), splits, E,
        I // channel_vector_width(I), N, R,
        CVEC=channel_vector_width(C), OVEC=channel_vector_width(COLS), IVEC=channel_vector_width(I),
        TAPS=taps, PROJECT=project is not None, STEM=stem is not None, EXPAND=expand is not None,
        GRAM=expand is not None and expand.grams is not None, DTYPE=TL_DTYPES[dtype], SE=se is not None, ACT=act,
        **cfg.blocks, num_warps=cfg.num_warps,
    )  # fmt: skip
    return (*outs, se)
