"""All weight gradients of a block, in two launches. The first adds fp32 partials that other kernels left of each layer:

    depthwise       dw[c,tap] = sum_p partials[p,tap,c]
    project         dw[o,e]   = sum_s partials[s,o,e]
    stem            dw[i]     = sum_s D[s,i]             elements of the weight as they lie in memory
    expand          D, gram and xsum of ``expand_backward``
    squeeze-excite  db_e = sum_n dt,  db_r = sum_n du

and multiplies those of squeeze-excite's gradients that are products, for parts of the images: a single program would
take long over all of them. The second launch needs these results:

    expand          dw[e,i] = A[e] D[e,i] + k1[e] sum_j w[e,j] gram[j,i] + k0[e] xsum[i],  A = gamma rstd
    squeeze-excite  dW_e = sum over parts of dt^T v,  dW_r = sum over parts of du^T pooled,  v = phi(u)

The expand layer's formula is BatchNorm 1's backward dy1 = A dz + k0 + k1 y1 times x, with y1 = x w^T folded into x's
Gram matrix. Were gram not summed first, every block of dw would sum it again.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import expand_gradient_config, image_products_config, partials_config
from effkernels.kernels.activation import activate
from effkernels.kernels.batchnorm import BatchTerms
from effkernels.kernels.common import TL_DTYPES, cast, channel_vector_width, fp32, given, launcher, sized_jit
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector


@triton.jit
def add_partials(pid, sum_of, parts, row_stride, COLS, BLOCKS: tl.constexpr, TAPS: tl.constexpr = 1):
    """Store the sums of the first COLS elements of ``parts`` rows, in a fixed order, if ``pid`` is one of the programs
    for them, from 0 on. Return ``pid`` less the number of these programs.

    sum_of: (partials, where their sums are stored), or None, which has no programs. BLOCKS: (rows at a time, elements a
    program). TAPS: of TAPS * C elements [TAPS, C], to be stored as [C, TAPS].
    """
    if given(sum_of):
        partials, out = sum_of
        BLOCK_P: tl.constexpr = BLOCKS[0]
        BLOCK_COLS: tl.constexpr = BLOCKS[1]
        programs = tl.cdiv(COLS, BLOCK_COLS)
        if (pid >= 0) & (pid < programs):
            i = pid * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
            t = tl.arange(0, BLOCK_P)
            acc = tl.zeros([BLOCK_P, BLOCK_COLS], tl.float32)
            for start in range(0, parts, BLOCK_P):
                row = (start + t).to(tl.int64) * row_stride
                ok = (start + t < parts)[:, None] & (i < COLS)[None, :]
                acc += tl.load(partials + row[:, None] + i[None, :], mask=ok, other=0.0)
            at = i
            if TAPS > 1:
                C = COLS // TAPS
                at = i % C * TAPS + i // C
            tl.store(out + at, cast(tl.sum(acc, 0), out.dtype.element_ty), mask=i < COLS)
        pid -= programs
    return pid


@triton.jit
def multiply_images(
    pid,
    a,
    b,
    out,
    N,
    C,
    R,
    c_stride,
    r_stride,
    images,
    parts,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACT: tl.constexpr,
):
    """Store out[p,c,r] = sum_n a[n,c] phi(b[n,r]) over the ``images`` of part p, BLOCK_C x BLOCK_R a program, as
    ``add_partials`` does, and return the same. The strides of ``out`` are C * R, c_stride and r_stride."""
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks = blocks_c * tl.cdiv(R, BLOCK_R)
    if (pid >= 0) & (pid < blocks * parts):
        part = pid // blocks
        c = pid % blocks % blocks_c * BLOCK_C + tl.arange(0, BLOCK_C)
        r = pid % blocks // blocks_c * BLOCK_R + tl.arange(0, BLOCK_R)
        mc, mr = c < C, r < R
        last = tl.minimum(N, (part + 1) * images)
        acc = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
        for start in range(part * images, last, BLOCK_N):
            n = (start + tl.arange(0, BLOCK_N)).to(tl.int64)
            mn = (n < last)[:, None]
            left = tl.load(a + n[:, None] * C + c[None, :], mask=mn & mc[None, :], other=0.0)
            right = tl.load(b + n[:, None] * R + r[None, :], mask=mn & mr[None, :], other=0.0)
            if ACT != "identity":
                right = tl.where(mn & mr[None, :], activate(right, ACT, False), 0.0)
            acc = tl.dot(tl.trans(left), right, acc, input_precision="ieee")
        at = part.to(tl.int64) * C * R + c[:, None] * c_stride + r[None, :] * r_stride
        tl.store(out + at, acc, mask=mc[:, None] & mr[None, :])
    return pid - blocks * parts


@sized_jit
def weight_sums_kernel(
    dt,
    du,
    u,
    pooled,
    dw_expand,
    dw_reduce,
    expand_bias,
    reduce_bias,
    first,
    grams,
    project,
    depthwise,
    N,
    EV,
    IV,
    O,
    RV,
    images,
    image_parts,
    first_parts,
    gram_parts,
    project_parts,
    depthwise_parts,
    EVEC: tl.constexpr,
    IVEC: tl.constexpr,
    RVEC: tl.constexpr,
    TAPS: tl.constexpr,
    EXPAND_BIAS_BLOCKS: tl.constexpr,
    REDUCE_BIAS_BLOCKS: tl.constexpr,
    FIRST_BLOCKS: tl.constexpr,
    GRAM_BLOCKS: tl.constexpr,
    PROJECT_BLOCKS: tl.constexpr,
    DEPTHWISE_BLOCKS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACT: tl.constexpr,
):
    """The first launch; what takes longest begins first.

    ``expand_bias`` to ``depthwise`` are (partials, where their sums are stored) or None. dw_expand [image_parts, E, R]
    and dw_reduce [image_parts, R, E] are partials for the second launch.
    """
    E = EV * EVEC
    I = IV * IVEC
    R = RV * RVEC
    pid = tl.program_id(0)
    if dt is not None:
        pid = multiply_images(
            pid=pid,
            a=dt,
            b=u,
            out=dw_expand,
            N=N,
            C=E,
            R=R,
            c_stride=R,
            r_stride=1,
            images=images,
            parts=image_parts,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_R=BLOCK_R,
            ACT=ACT,
        )
        pid = multiply_images(
            pid=pid,
            a=pooled,
            b=du,
            out=dw_reduce,
            N=N,
            C=E,
            R=R,
            c_stride=1,
            r_stride=E,
            images=images,
            parts=image_parts,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_R=BLOCK_R,
            ACT="identity",
        )
    pid = add_partials(pid, expand_bias, N, E, E, EXPAND_BIAS_BLOCKS)
    pid = add_partials(pid, reduce_bias, N, R, R, REDUCE_BIAS_BLOCKS)
    pid = add_partials(pid, first, first_parts, E * I, E * I, FIRST_BLOCKS)
    pid = add_partials(pid, grams, gram_parts, (I + 1) * I, (I + 1) * I, GRAM_BLOCKS)
    pid = add_partials(pid, project, project_parts, O * E, O * E, PROJECT_BLOCKS)
    add_partials(
        pid=pid,
        sum_of=depthwise,
        parts=depthwise_parts,
        row_stride=(TAPS + 2) * E,
        COLS=TAPS * E,
        BLOCKS=DEPTHWISE_BLOCKS,
        TAPS=TAPS,
    )


@triton.jit
def expand_gradient(
    pid,
    D,
    gram,
    w,
    norm,
    terms,
    out,
    E,
    I,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """Store BLOCK_E x BLOCK_I of the expand layer's gradient, as ``add_partials`` does, and return the same; ``gram``
    and ``terms`` are None where BatchNorm 1 is frozen."""
    blocks_i = tl.cdiv(I, BLOCK_I)
    programs = tl.cdiv(E, BLOCK_E) * blocks_i
    if pid < programs:
        i = pid % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
        e = pid // blocks_i * BLOCK_E + tl.arange(0, BLOCK_E)
        mi, me = i < I, e < E
        mask = me[:, None] & mi[None, :]
        offset = e[:, None] * I + i[None, :]
        dw = tl.load(D + offset, mask=mask, other=0.0)
        dw *= (load_vector(norm.weight, e, me) * load_rstd(norm, e, me))[:, None]
        if terms is not None:
            dw += load_vector(terms[0], e, me)[:, None] * load_vector(gram + I * I, i, mi)[None, :]
            slope = load_vector(terms[1], e, me)
            for start in tl.range(0, I, BLOCK_K, num_stages=3):
                j = start + tl.arange(0, BLOCK_K)
                mj = j < I
                weight = tl.load(w + e[:, None] * I + j[None, :], mask=me[:, None] & mj[None, :], other=0.0)
                weight = cast(weight.to(tl.float32), DTYPE).to(tl.float32)  # as the forward rounded it
                right = tl.load(gram + j[:, None] * I + i[None, :], mask=mj[:, None] & mi[None, :], other=0.0)
                dw = tl.dot(weight * slope[:, None], right, dw, input_precision="ieee")
        tl.store(out + offset, cast(dw, out.dtype.element_ty), mask=mask)
    return pid - programs


@sized_jit
def weight_gradients_kernel(
    D,
    gram,
    expand_weight,
    norm1,
    terms1,
    expand_out,
    dw_expand,
    dw_reduce,
    EV,
    IV,
    RV,
    image_parts,
    EVEC: tl.constexpr,
    IVEC: tl.constexpr,
    RVEC: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SE_BLOCKS: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """The second launch. dw_expand and dw_reduce are (partials, where their sums are stored), or None."""
    E = EV * EVEC
    I = IV * IVEC
    weights = E * RV * RVEC
    pid = tl.program_id(0)
    if D is not None:
        pid = expand_gradient(
            pid=pid,
            D=D,
            gram=gram,
            w=expand_weight,
            norm=norm1,
            terms=terms1,
            out=expand_out,
            E=E,
            I=I,
            BLOCK_E=BLOCK_E,
            BLOCK_I=BLOCK_I,
            BLOCK_K=BLOCK_K,
            DTYPE=DTYPE,
        )
    pid = add_partials(pid, dw_expand, image_parts, weights, weights, SE_BLOCKS)
    add_partials(pid, dw_reduce, image_parts, weights, weights, SE_BLOCKS)


def contiguous_like(t: torch.Tensor) -> torch.Tensor:
    """New memory of t's shape, dtype and device, in row-major order."""
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


class Sum(NamedTuple):
    """fp32 partials [parts, ...], and the contiguous tensor for the sums of their first elements over the parts, which
    are cast to its dtype."""

    partials: torch.Tensor
    out: torch.Tensor

    @property
    def blocks(self) -> tuple[int, int]:
        """BLOCKS of ``add_partials``."""
        cfg = partials_config(self.out.numel())
        return cfg.BLOCK_P, cfg.BLOCK_COLS

    @property
    def programs(self) -> int:
        """Programs that the first launch gives to this sum, one for each block of its columns."""
        return triton.cdiv(self.out.numel(), self.blocks[1])


def parts_of(total: Sum | None) -> int:
    """How many partial results a sum has, 0 where there is none."""
    return 0 if total is None else len(total.partials)


def blocks_of(total: Sum | None) -> tuple[int, int] | None:
    """The blocks in which a sum is taken, None where there is none."""
    return None if total is None else total.blocks


class Sums(NamedTuple):
    """The sums of the first launch. first: the expand layer's D, or the stem's gradient. grams: with xsum. expand_bias,
    reduce_bias: of squeeze-excite, over images."""

    depthwise: Sum | None = None
    project: Sum | None = None
    first: Sum | None = None
    grams: Sum | None = None
    expand_bias: Sum | None = None
    reduce_bias: Sum | None = None


class ImageProducts(NamedTuple):
    """Squeeze-excite's weight gradients over parts of the images."""

    expand: Sum  # [parts, C, R]
    reduce: Sum  # [parts, R, C]


@launcher
def weight_sums(sums: Sums, squeeze_excite: SqueezeExcitePartials | None, products: ImageProducts | None) -> None:
    """Start the first launch; ``products`` belong to ``squeeze_excite``."""
    cfg = image_products_config()
    programs = sum(total.programs for total in sums if total is not None)
    E, I, O, R, N, taps, images, image_parts, act = 8, 8, 8, 8, 0, 1, 1, 0, "identity"
    if sums.depthwise is not None:
        E, taps = len(sums.depthwise.out), sums.depthwise.out[0].numel()
        assert sums.depthwise.partials.shape[1] == taps + 2
    if sums.project is not None:
        O, E = sums.project.out.shape[:2]
    if sums.first is not None:
        E, I = len(sums.first.out), sums.first.out[0].numel()
    dt = du = u = pooled = None
    if squeeze_excite is not None:
        dt, du, u, pooled, _, act = squeeze_excite
        (N, E), R = dt.shape, u.shape[1]
        images, image_parts = cfg.images(N, E, R), parts_of(products.expand)
        programs += 2 * image_parts * triton.cdiv(E, cfg.BLOCK_C) * triton.cdiv(R, cfg.BLOCK_R)
    if not programs:
        return
    weight_sums_kernel[(programs,)](
        dt=dt,
        du=du,
        u=u,
        pooled=pooled,
        dw_expand=None if products is None else products.expand.partials,
        dw_reduce=None if products is None else products.reduce.partials,
        expand_bias=sums.expand_bias,
        reduce_bias=sums.reduce_bias,
        first=sums.first,
        grams=sums.grams,
        project=sums.project,
        depthwise=sums.depthwise,
        N=N,
        EV=E // channel_vector_width(E),
        IV=I // channel_vector_width(I),
        O=O,
        RV=R // channel_vector_width(R),
        images=images,
        image_parts=image_parts,
        first_parts=parts_of(sums.first),
        gram_parts=parts_of(sums.grams),
        project_parts=parts_of(sums.project),
        depthwise_parts=parts_of(sums.depthwise),
        EVEC=channel_vector_width(E),
        IVEC=channel_vector_width(I),
        RVEC=channel_vector_width(R),
        TAPS=taps,
        EXPAND_BIAS_BLOCKS=blocks_of(sums.expand_bias),
        REDUCE_BIAS_BLOCKS=blocks_of(sums.reduce_bias),
        FIRST_BLOCKS=blocks_of(sums.first),
        GRAM_BLOCKS=blocks_of(sums.grams),
        PROJECT_BLOCKS=blocks_of(sums.project),
        DEPTHWISE_BLOCKS=blocks_of(sums.depthwise),
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_C=cfg.BLOCK_C,
        BLOCK_R=cfg.BLOCK_R,
        ACT=act,
        num_warps=cfg.num_warps,
    )


@launcher
def finish_weight_gradients(
    expand: ExpandPartials | None, sums: Sums, products: ImageProducts | None, out: torch.Tensor | None
) -> None:
    """Start the second launch, for what is not None; ``out`` gets the expand layer's gradient."""
    if expand is None and products is None:
        return
    E, I, R, image_parts, programs, dtype = 8, 8, 8, 0, 0, torch.float32
    cfg = expand_gradient_config()
    if products is not None:
        (E, R), image_parts = products.expand.out.shape[:2], parts_of(products.expand)
        programs += products.expand.programs + products.reduce.programs
    if expand is not None:
        (E, I), dtype = expand.weight.shape[:2], expand.dtype
        programs += triton.cdiv(E, cfg.BLOCK_E) * triton.cdiv(I, cfg.BLOCK_I)
    weight_gradients_kernel[(programs,)](
        D=None if expand is None else sums.first.out,
        gram=None if sums.grams is None else sums.grams.out,
        expand_weight=None if expand is None else expand.weight,
        norm1=None if expand is None else expand.norm,
        terms1=None if expand is None or expand.terms is None else tuple(expand.terms),
        expand_out=out,
        dw_expand=None if products is None else products.expand,
        dw_reduce=None if products is None else products.reduce,
        EV=E // channel_vector_width(E),
        IV=I // channel_vector_width(I),
        RV=R // channel_vector_width(R),
        image_parts=image_parts,
        EVEC=channel_vector_width(E),
        IVEC=channel_vector_width(I),
        RVEC=channel_vector_width(R),
        BLOCK_E=cfg.BLOCK_E,
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_K=cfg.BLOCK_K,
        SE_BLOCKS=None if products is None else products.expand.blocks,
        DTYPE=TL_DTYPES[dtype],
        num_warps=cfg.num_warps,
    )


def reduce_weight_gradients(
    depthwise: LayerPartials | None = None,
    project: LayerPartials | None = None,
    expand: ExpandPartials | None = None,
    squeeze_excite: SqueezeExcitePartials | None = None,
    stem: LayerPartials | None = None,
) -> tuple:
    """Finish all weight gradients of a block in one launch, or two with expand or squeeze_excite. What is not given
    gives None.

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
    sums = Sums(
        depthwise=None if depthwise is None else Sum(depthwise.partials, depthwise_gradient),
        project=None if project is None else Sum(project.partials, project_gradient),
    )
    products = se = None
    if stem is not None:
        first_gradient = torch.empty_like(stem.weight)
        sums = sums._replace(first=Sum(stem.partials, first_gradient))
    elif expand is not None:
        sums = sums._replace(first=Sum(expand.partials, torch.empty_like(expand.partials[0])))
        if expand.grams is not None:
            sums = sums._replace(grams=Sum(expand.grams, torch.empty_like(expand.grams[0])))
    if squeeze_excite is not None:
        dt, du, *_ = squeeze_excite
        dw_reduce, db_reduce, dw_expand, db_expand = se = tuple(contiguous_like(t) for t in squeeze_excite.weights)
        (N, E), R = dt.shape, du.shape[1]
        parts = triton.cdiv(N, image_products_config().images(N, E, R))
        products = ImageProducts(
            expand=Sum(fp32(dt.device, parts, E, R), dw_expand), reduce=Sum(fp32(dt.device, parts, R, E), dw_reduce)
        )
        sums = sums._replace(expand_bias=Sum(dt, db_expand), reduce_bias=Sum(du, db_reduce))
    weight_sums(sums, squeeze_excite, products)
    finish_weight_gradients(expand, sums, products, first_gradient)
    return depthwise_gradient, project_gradient, first_gradient, se
