"""One launch that finishes every weight gradient of a block from fp32 partials; each layer has a range of the programs.

    depthwise       dw[c,tap] = sum_p partials[p,tap,c]
    project         dw[o,e]   = sum_s partials[s,o,e]
    stem            dw[i]     = sum_s D[s,i]             elements of the weight as they lie in memory
    expand          dw[e,i]   = A[e] sum_s D[s,e,i] + k1[e] sum_j w[e,j] sum_t gram[t,j,i] + k0[e] sum_t xsum[t,i],  A =
    gamma rstd squeeze-excite  dW_e = dt^T v, db_e = sum_n dt, dW_r = du^T pooled, db_r = sum_n du,  v = phi(u)

The expand layer's formula is BatchNorm 1's backward dy1 = A dz + k0 + k1 y1 times x, with y1 = x w^T folded into x's
Gram matrix.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import weight_gradient_config
from effkernels.kernels.activation import activate
from effkernels.kernels.batchnorm import BatchTerms
from effkernels.kernels.common import TL_DTYPES, cast, channel_vector_width, launcher, sized_jit
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector


@triton.jit
def sum_of_partials(pid, partials, parts, row_stride, COLS, BLOCK_P: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """(i [BLOCK_COLS], the sums of elements i over ``parts`` rows), in a fixed order, BLOCK_P rows at a time."""
    i = pid * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    t = tl.arange(0, BLOCK_P)
    acc = tl.zeros([BLOCK_P, BLOCK_COLS], tl.float32)
    for start in tl.range(0, parts, BLOCK_P, num_stages=3):
        ok = (start + t < parts)[:, None] & (i < COLS)[None, :]
        acc += tl.load(partials + (start + t).to(tl.int64)[:, None] * row_stride + i[None, :], mask=ok, other=0.0)
    return i, tl.sum(acc, 0)


@triton.jit
def sum_splits(partials, splits, stride, row, col, mask, COLS, BLOCK_S: tl.constexpr):
    """The sum over splits of partials [rows, COLS], ``stride`` apart, at rows ``row`` and columns ``col``, BLOCK_S
    splits at a time."""
    s = tl.arange(0, BLOCK_S)
    acc = tl.zeros([BLOCK_S, row.shape[0], col.shape[0]], tl.float32)
    at = partials + (row[:, None] * COLS + col[None, :])[None, :, :]
    for start in tl.range(0, splits, BLOCK_S, num_stages=3):
        ok = (start + s < splits)[:, None, None] & mask[None, :, :]
        acc += tl.load(at + (start + s).to(tl.int64)[:, None, None] * stride, mask=ok, other=0.0)
    return tl.sum(acc, 0)


@triton.jit
def expand_gradient(
    pid,
    D,
    grams,
    w,
    norm,
    terms,
    out,
    splits,
    gram_splits,
    E,
    I,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """BLOCK_E x BLOCK_I of the expand layer's gradient; ``grams`` and ``terms`` are None where BatchNorm 1 is
    frozen."""
    blocks_i = tl.cdiv(I, BLOCK_I)
    i = pid % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    e = pid // blocks_i * BLOCK_E + tl.arange(0, BLOCK_E)
    mi, me = i < I, e < E
    mask = me[:, None] & mi[None, :]
    offset = e[:, None] * I + i[None, :]
    acc = sum_splits(D, splits, E * I, e, i, mask, I, BLOCK_S)
    acc *= (load_vector(norm.weight, e, me) * load_rstd(norm, e, me))[:, None]
    if terms is not None:
        size = (I + 1) * I
        xsum = tl.zeros([BLOCK_I], tl.float32)
        for start in range(0, gram_splits, 128):
            s = start + tl.arange(0, 128)
            sum_mask = (s < gram_splits)[:, None] & mi[None, :]
            xsum += tl.sum(
                tl.load(grams + s.to(tl.int64)[:, None] * size + I * I + i[None, :], mask=sum_mask, other=0.0), 0
            )
        acc += load_vector(terms[0], e, me)[:, None] * xsum[None, :]
        slope = load_vector(terms[1], e, me)
        for start in range(0, I, BLOCK_I):
            j = start + tl.arange(0, BLOCK_I)
            mj = j < I
            gram = sum_splits(grams, gram_splits, size, j, i, mj[:, None] & mi[None, :], I, BLOCK_S)
            weight = tl.load(w + e[:, None] * I + j[None, :], mask=me[:, None] & mj[None, :], other=0.0).to(tl.float32)
            weight = cast(weight, DTYPE).to(tl.float32) * slope[:, None]  # as the forward rounded it
            acc = tl.dot(weight, gram, acc, input_precision="ieee")
    tl.store(out + offset, cast(acc, out.dtype.element_ty), mask=mask)


@triton.jit
def squeeze_excite_gradient(
    pid,
    dt,
    du,
    u_in,
    pooled,
    dw_reduce,
    db_reduce,
    dw_expand,
    db_expand,
    N,
    C,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
):
    """BLOCK_C channels times BLOCK_R units of the bottleneck, over all images in order."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    c = pid % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
    r = pid // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)
    mc, mr = c < C, r < R
    dwe = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    dwr = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    dbe = tl.zeros([BLOCK_C], tl.float32)
    dbr = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, N, BLOCK_N):
        n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
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
    depthwise_partials,
    depthwise_out,
    project_partials,
    project_out,
    D,
    grams,
    expand_weight,
    norm1,
    terms1,
    first_out,
    dt,
    du,
    u,
    pooled,
    dw_reduce,
    db_reduce,
    dw_expand,
    db_expand,
    depthwise_parts,
    CV,
    project_parts,
    OV,
    splits,
    gram_splits,
    E,
    IV,
    N,
    R,
    CVEC: tl.constexpr,
    OVEC: tl.constexpr,
    IVEC: tl.constexpr,
    TAPS: tl.constexpr,
    DTYPE: tl.constexpr,
    ACT: tl.constexpr,
    DEPTHWISE_PARTS: tl.constexpr,
    DEPTHWISE_COLS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    C = CV * CVEC
    I = IV * IVEC
    COLS = OV * OVEC
    pid = tl.program_id(0)
    if expand_weight is not None:
        programs = tl.cdiv(E, BLOCK_E) * tl.cdiv(I, BLOCK_I)
        if pid < programs:
            expand_gradient(
                pid,
                D,
                grams,
                expand_weight,
                norm1,
                terms1,
                first_out,
                splits,
                gram_splits,
                E,
                I,
                BLOCK_E,
                BLOCK_I,
                BLOCK_S,
                DTYPE,
            )
        pid -= programs
    elif D is not None:  # the stem
        stem_programs = tl.cdiv(E * I, BLOCK_COLS)
        if pid < stem_programs:
            element, stem_total = sum_of_partials(pid, D, splits, E * I, E * I, BLOCK_P, BLOCK_COLS)
            tl.store(first_out + element, cast(stem_total, first_out.dtype.element_ty), mask=element < E * I)
        pid -= stem_programs
    if dt is not None:
        se_programs = tl.cdiv(C, BLOCK_C) * tl.cdiv(R, BLOCK_R)
        if (pid >= 0) & (pid < se_programs):
            squeeze_excite_gradient(
                pid,
                dt,
                du,
                u,
                pooled,
                dw_reduce,
                db_reduce,
                dw_expand,
                db_expand,
                N,
                C,
                R,
                BLOCK_N,
                BLOCK_R,
                BLOCK_C,
                ACT,
            )
        pid -= se_programs
    if project_partials is not None:
        project_programs = tl.cdiv(COLS, BLOCK_COLS)
        if (pid >= 0) & (pid < project_programs):
            i, total = sum_of_partials(pid, project_partials, project_parts, COLS, COLS, BLOCK_P, BLOCK_COLS)
            tl.store(project_out + i, cast(total, project_out.dtype.element_ty), mask=i < COLS)
        pid -= project_programs
    if depthwise_partials is not None:
        if pid >= 0:
            k, tap_total = sum_of_partials(
                pid, depthwise_partials, depthwise_parts, (TAPS + 2) * C, TAPS * C, DEPTHWISE_PARTS, DEPTHWISE_COLS
            )
            tl.store(
                depthwise_out + k % C * TAPS + k // C,
                cast(tap_total, depthwise_out.dtype.element_ty),
                mask=k < TAPS * C,
            )


def contiguous_like(t: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(t, memory_format=torch.contiguous_format)


class LayerPartials(NamedTuple):
    """Partial sums fp32 [parts, ...] of a layer's weight gradient, with the weight whose shape and dtype the gradient
    gets."""

    partials: torch.Tensor
    weight: torch.Tensor


class ExpandPartials(NamedTuple):
    """What ``expand_backward`` leaves of the expand layer's weight gradient.

    Attributes:
        partials: D fp32 [S, E, I]. grams: fp32 [T, I + 1, I], or None where BatchNorm 1 is frozen.
        weight: [E, I, 1, 1]. norm: BatchNorm 1, with rstd. terms: its (k0, k1) fp32 [E], or None where it is frozen.
        dtype: the compute dtype, to which the forward rounded the weight.
    """

    partials: torch.Tensor
    grams: torch.Tensor | None
    weight: torch.Tensor
    norm: BatchNorm
    terms: BatchTerms | None
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
) -> tuple:
    """Finish all weight gradients of a block in one launch. What is not given gives None.

    Args:
        depthwise: partials [P, k*k + 2, C] of ``depthwise_backward``, weight [C, 1, k, k].
        project: partials [S, O, E] of ``project_backward``, weight [O, E, 1, 1].
        stem: partials [S, elements] of ``stem_backward``, weight [E, I, 3, 3], dense; in place of expand.

    Returns: the gradients of the depthwise, the project, and the expand or stem weight, and the tuple of
        squeeze-excite's four; all in their parameters' shapes and dtypes.
    """
    depthwise_gradient, project_gradient, first_gradient = (
        None if part is None else contiguous_like(part.weight) for part in (depthwise, project, expand)
    )
    if stem is not None:
        first_gradient = torch.empty_like(stem.weight)
    se = None
    if squeeze_excite is not None:
        se = tuple(contiguous_like(t) for t in squeeze_excite.weights)
    if all(part is None for part in (depthwise, project, expand, stem, se)):
        return (None,) * 4
    programs, C, R, N, act = 0, 1, 1, 1, "identity"
    taps, depthwise_parts, project_parts, COLS, splits, gram_splits, E, I = 0, 0, 0, 1, 0, 0, 1, 1
    dtype = torch.float32
    if squeeze_excite is not None:
        (N, C), R, act = squeeze_excite.dt.shape, squeeze_excite.u.shape[1], squeeze_excite.act
    if expand is not None:
        (splits, E, I), dtype = expand.partials.shape, expand.dtype
        gram_splits = 0 if expand.grams is None else len(expand.grams)
    if stem is not None:
        splits, (E, I) = len(stem.partials), (len(stem.weight), stem.weight[0].numel())
    cfg = weight_gradient_config(splits, R)
    if se is not None:
        programs += triton.cdiv(C, cfg.BLOCK_C) * triton.cdiv(R, cfg.BLOCK_R)
    if expand is not None:
        programs += triton.cdiv(E, cfg.BLOCK_E) * triton.cdiv(I, cfg.BLOCK_I)
    if stem is not None:
        programs += triton.cdiv(E * I, cfg.BLOCK_COLS)
    if project is not None:
        project_parts, COLS = project.partials.shape[0], project.partials[0].numel()
        programs += triton.cdiv(COLS, cfg.BLOCK_COLS)
    if depthwise is not None:
        (depthwise_parts, rows, C), taps = depthwise.partials.shape, depthwise.weight.shape[-1] ** 2
        assert rows == taps + 2
        programs += triton.cdiv(taps * C, cfg.DEPTHWISE_COLS)
    first = expand or stem  # the block's first convolution; both leave their partials in the same argument
    dt, du, u, pooled = (None,) * 4 if squeeze_excite is None else squeeze_excite[:4]
    dw_reduce, db_reduce, dw_expand, db_expand = se or (None,) * 4
    weight_gradients_kernel[(programs,)](
        depthwise_partials=None if depthwise is None else depthwise.partials,
        depthwise_out=depthwise_gradient,
        project_partials=None if project is None else project.partials,
        project_out=project_gradient,
        D=None if first is None else first.partials,
        grams=None if expand is None else expand.grams,
        expand_weight=None if expand is None else expand.weight,
        norm1=None if expand is None else expand.norm,
        terms1=None if expand is None or expand.terms is None else tuple(expand.terms),
        first_out=first_gradient,
        dt=dt,
        du=du,
        u=u,
        pooled=pooled,
        dw_reduce=dw_reduce,
        db_reduce=db_reduce,
        dw_expand=dw_expand,
        db_expand=db_expand,
        depthwise_parts=depthwise_parts,
        CV=C // channel_vector_width(C),
        project_parts=project_parts,
        OV=COLS // channel_vector_width(COLS),
        splits=splits,
        gram_splits=gram_splits,
        E=E,
        IV=I // channel_vector_width(I),
        N=N,
        R=R,
        CVEC=channel_vector_width(C),
        OVEC=channel_vector_width(COLS),
        IVEC=channel_vector_width(I),
        TAPS=taps,
        DTYPE=TL_DTYPES[dtype],
        ACT=act,
        **cfg.blocks,
        num_warps=cfg.num_warps,
    )
    return depthwise_gradient, project_gradient, first_gradient, se
