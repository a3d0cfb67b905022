"""The operator of a whole MBConv block: [1x1 expand, BN1, act] -> depthwise, BN2, act -> [squeeze-excite] -> 1x1
project, BN3 [+ x].

One autograd node. It keeps x, the outputs y1, y2, y3 of the three convolutions before their BatchNorms, and fp32
vectors; with ``recompute`` not even y1. Launches, and what each reads and writes from memory once (e1: the expanded
tensor at the input's size, e2: after the depthwise convolution):

    forward    expand        x -> y1, BN1's statistics                                    e1
               depthwise     y1 -> y2, BN2's statistics                                   e1 +   e2
               pool          y2 -> pooled                                                        e2
               gate          pooled -> gate, by squeeze-excite (two launches)
               project       y2, gate -> y3, BN3's statistics                                    e2, or 3 e2
               apply         y3, x -> out
    backward   reduce        dout, y3 -> BN3's sums
               project       dout, y3, y2 -> dq, sums                                          2 e2, or 5 e2
               gate          sums -> squeeze-excite's gradients, BN2's sums
               depthwise     dq, y2, y1 -> dz1, BN1's sums                              2 e1 + 2 e2
               expand        dz1, x -> dx                                                 e1, or 2 e1
               weights       partials -> sums -> all weight gradients (two launches)
    inference  expand        x -> a1                                                      e1
               depthwise     a1 -> a2, pooled                                             e1 +   e2
               gate          pooled -> gate (two launches)
               project       a2, gate, x -> out                                                  e2, or 3 e2

With more than 128 outputs and many rows the project forward is a pass and a product of PyTorch; with more than 24 the
project backward is two such products with a pass between them; with many channels the expand backward is two launches
that read dz1 each. In inference the expand convolution lies inside the depthwise kernel where the model
of costs says so, and nothing of e1 is stored. As the first of a network, a block that does not expand takes the stem
along: a 3x3 convolution of images in place of the expand one.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkernels.geometry import conv_out_sizes, conv_pads
from effkernels.ops.autograd import Constant, Operator, fp32_like
from effkernels.ops.counters import zeroed_counters
from effkernels.ops.normalise import (
    backward_norm,
    batch_statistics,
    batch_terms,
    frozen_normalisation,
    normalisation,
)
from effkernels.ops.stem import stem_convolution, stem_gradients
from effkernels.parameters import BatchNormParams, SqueezeExciteParams


class BlockSettings(NamedTuple):
    """What a block does besides its tensors.

    dtype: of the computation. stride, padding: of the depthwise convolution. residual: whether x is added.
    keep: probability with which drop-path keeps an image's branch; with a negative one the draws are the branches'
        factors themselves.
    stem_stride: 0, or the stride of the stem that stands for the expand convolution. recompute: whether y1 is made
        again in the backward.
    """

    dtype: torch.dtype
    stride: int
    padding: str
    act: str
    residual: bool
    keep: float = -1.0
    stem_stride: int = 0
    recompute: bool = False


class BlockResults(NamedTuple):
    """out [N, H', W', O]; y1 [N, H, W, E] (None: it is recomputed, or there is no expand convolution), y2 [N, H', W',
    E] and y3 [N, H', W', O] before their BatchNorms, each with the fp32 mean and rstd that normalised it; of
    squeeze-excite, fp32, its gate [N, E], what was pooled [N, E] and the bottleneck before its activation [N, R].
    """

    out: Tensor
    y1: Tensor | None
    y2: Tensor
    y3: Tensor
    mean1: Tensor | None
    rstd1: Tensor | None
    mean2: Tensor
    rstd2: Tensor
    mean3: Tensor
    rstd3: Tensor
    gates: Tensor | None
    pooled: Tensor | None
    bottleneck: Tensor | None


def _counters(x, E, O):
    """Enough for the blocks of images and of channels and the groups of programs of every kernel."""
    return zeroed_counters(x, x.shape[0] + 512 + max(E, O) // 8)


def _first_convolution(x, weight, settings, **how):
    """(y1, (mean, rstd) or None) of the expand convolution of x [N, H, W, I], or of the stem of images x [N, I, H, W].

    weight: of the stem, or what ``_forward_weights`` gives.
    """
    if settings.stem_stride:
        return stem_convolution(
            x=x, weight=weight, stride=settings.stem_stride, padding=settings.padding, dtype=settings.dtype, **how
        )
    from effkernels.kernels.pointwise_forward import pointwise_forward

    return pointwise_forward(x, weight, dtype=settings.dtype, **how)


def _forward_weights(x, expand_weight, depthwise_weight, project_weight, settings, *, transforms):
    """Both 1x1 weights as the forward's kernels take them: the live ones, or their copies. The stem's stays as it
    is. transforms: whether the project convolution evaluates something on load.
    """
    from effkernels.kernels.weight_copies import forward_weights

    if settings.stem_stride:
        height, width = conv_out_sizes(*x.shape[2:], 3, settings.stem_stride, settings.padding)
    else:
        height, width = x.shape[1:3]
    out_height, out_width = conv_out_sizes(
        height=height,
        width=width,
        kernel_size=depthwise_weight.shape[-1],
        stride=settings.stride,
        padding=settings.padding,
    )
    expand = None if settings.stem_stride else expand_weight
    wanted = [(expand, len(x) * height * width, False), (project_weight, len(x) * out_height * out_width, transforms)]
    expand, project = forward_weights(wanted, settings.dtype)
    return expand_weight if expand is None else expand, project


def _depthwise_pads(a, weight, settings):
    return conv_pads(*a.shape[1:3], weight.shape[-1], settings.stride, settings.padding)


def _out_dtype(x, settings):
    return torch.promote_types(settings.dtype, x.dtype) if settings.residual else settings.dtype


def _forward(
    x: Tensor,
    expand_weight: Tensor | None,
    norm1: BatchNormParams | None,
    depthwise_weight: Tensor,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    project_weight: Tensor,
    norm3: BatchNormParams,
    branch_draws: Constant,
    settings: BlockSettings,
) -> BlockResults:
    """The launches of a forward that has a backward, from the top down: each takes what the one before it returned.

    x [N, H, W, I] in any dtype, or with ``settings.stem_stride`` images; weights as the modules hold them; branch_draws
    fp32 [N] or None. The running statistics of ``norm1`` to ``norm3`` are updated in place where they train.
    """
    from effkernels.kernels import batchnorm, squeeze_excite
    from effkernels.kernels.depthwise_forward import depthwise_forward
    from effkernels.kernels.pointwise_forward import pointwise_forward

    E, O, act = depthwise_weight.shape[0], project_weight.shape[0], settings.act
    counters = _counters(x, E, O)
    expand_weight, project_weight = _forward_weights(
        x=x,
        expand_weight=expand_weight,
        depthwise_weight=depthwise_weight,
        project_weight=project_weight,
        settings=settings,
        transforms=True,
    )

    y1 = bn1 = None
    if expand_weight is None:
        a = x.to(settings.dtype)
    else:
        wanted = batch_statistics(norm1, E, x.device)
        y1, found = _first_convolution(x, expand_weight, settings, statistics=wanted, counters=counters)
        bn1 = normalisation(norm1, wanted, found, y1)
        a = y1

    wanted = batch_statistics(norm2, E, x.device)
    y2, found, _ = depthwise_forward(
        a,
        depthwise_weight,
        settings.stride,
        _depthwise_pads(a, depthwise_weight, settings),
        prologue=bn1,
        act1="identity" if bn1 is None else act,
        statistics=wanted,
        counters=counters,
    )
    bn2 = normalisation(norm2, wanted, found, y2)

    gates = pooled = bottleneck = None
    if se is not None:
        gates, pooled, bottleneck = squeeze_excite.squeeze_excite_forward(
            sums=squeeze_excite.pool(y2, bn2, act=act),
            pixels=y2.shape[1] * y2.shape[2],
            w_reduce=se.reduce_weight,
            b_reduce=se.reduce_bias,
            w_expand=se.expand_weight,
            b_expand=se.expand_bias,
            act=se.act,
            gate=se.gate,
        )

    wanted = batch_statistics(norm3, O, x.device)
    y3, found = pointwise_forward(
        y2, project_weight, prologue=bn2, act1=act, gates=gates, statistics=wanted, counters=counters
    )
    bn3 = normalisation(norm3, wanted, found, y3)

    out = batchnorm.apply(
        y3,
        bn3,
        branch_draws=branch_draws,
        keep=settings.keep,
        residual=x if settings.residual else None,
        out_dtype=_out_dtype(x, settings),
    )
    return BlockResults(
        out,
        None if settings.recompute else y1,
        y2,
        y3,
        mean1=None if bn1 is None else bn1.mean,
        rstd1=None if bn1 is None else bn1.rstd,
        mean2=bn2.mean,
        rstd2=bn2.rstd,
        mean3=bn3.mean,
        rstd3=bn3.rstd,
        gates=gates,
        pooled=pooled,
        bottleneck=bottleneck,
    )


def _fake(x, expand_weight, norm1, depthwise_weight, norm2, se, project_weight, norm3, branch_draws, settings):
    N, H, W = x.shape[:3]
    if settings.stem_stride:
        H, W = conv_out_sizes(*x.shape[2:], 3, settings.stem_stride, settings.padding)
    E, O, k = depthwise_weight.shape[0], project_weight.shape[0], depthwise_weight.shape[-1]
    size = conv_out_sizes(height=H, width=W, kernel_size=k, stride=settings.stride, padding=settings.padding)
    expands = expand_weight is not None
    y1 = x.new_empty(N, H, W, E, dtype=settings.dtype) if expands and not settings.recompute else None
    return BlockResults(
        x.new_empty(N, *size, O, dtype=_out_dtype(x, settings)),
        y1,
        x.new_empty(N, *size, E, dtype=settings.dtype),
        x.new_empty(N, *size, O, dtype=settings.dtype),
        mean1=fp32_like(x, E) if expands else None,
        rstd1=fp32_like(x, E) if expands else None,
        mean2=fp32_like(x, E),
        rstd2=fp32_like(x, E),
        mean3=fp32_like(x, O),
        rstd3=fp32_like(x, O),
        gates=fp32_like(x, N, E) if se is not None else None,
        pooled=fp32_like(x, N, E) if se is not None else None,
        bottleneck=fp32_like(x, N, se.reduce_weight.shape[0]) if se is not None else None,
    )


def _backward(
    dout: Tensor,
    *,
    x: Tensor,
    expand_weight: Tensor | None,
    norm1: BatchNormParams | None,
    depthwise_weight: Tensor,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    project_weight: Tensor,
    norm3: BatchNormParams,
    branch_draws: Tensor | None,
    settings: BlockSettings,
    saved: BlockResults,
    needs: frozenset[str],
) -> dict[str, Tensor]:
    """What no wanted gradient depends on is not computed: a step runs where one of ``needs`` lies before it in the
    block.
    """
    from effkernels.kernels import batchnorm, squeeze_excite
    from effkernels.kernels.depthwise_backward import depthwise_backward
    from effkernels.kernels.expand_backward import expand_backward
    from effkernels.kernels.project_backward import project_backward
    from effkernels.kernels.weight_copies import weight_copies
    from effkernels.kernels.weight_gradients import (
        ExpandPartials,
        LayerPartials,
        SqueezeExcitePartials,
        reduce_weight_gradients,
    )

    need_dz1 = bool(needs & {"x", "expand_weight", "norm1_weight", "norm1_bias"})
    need_dq = need_dz1 or "depthwise_weight" in needs
    need_se = any(name.startswith("se_") for name in needs)
    need_sums = need_dq or need_se or bool(needs & {"norm2_weight", "norm2_bias"})
    need_norm3 = norm3.training or bool(needs & {"norm3_weight", "norm3_bias"})
    act, gradients = settings.act, {}
    N, height, width, E = saved.y2.shape
    rows2 = N * height * width
    counters = _counters(x, E, project_weight.shape[0])
    bn1 = None if norm1 is None else backward_norm(norm1, saved.mean1, saved.rstd1)
    bn2 = backward_norm(norm2, saved.mean2, saved.rstd2)
    bn3 = backward_norm(norm3, saved.mean3, saved.rstd3)

    terms3 = None
    if need_norm3:
        sums3 = batchnorm.gradient_reduce(
            dout, saved.y3, bn3, branch_draws=branch_draws, keep=settings.keep, counters=counters
        )
        gradients["norm3_weight"], gradients["norm3_bias"], *_ = sums3
        terms3 = batch_terms(norm3, bn3, sums3, rows2)

    # Both 1x1 weights as the forward rounded them, in one launch.
    need_expand = not settings.stem_stride and bool(needs & {"x", "expand_weight"}) and bn1 is not None
    wanted = {}
    if need_sums:
        wanted["project"] = project_weight, "plain"
    if need_expand:
        wanted["expand"] = expand_weight, "plain"
    rounded = dict(zip(wanted, weight_copies(list(wanted.values()), settings.dtype), strict=True))

    project = se_partials = terms2 = dpool = dq = None
    if need_sums or "project_weight" in needs:
        dq, sums, partials = project_backward(
            dout,
            saved.y3,
            saved.y2,
            rounded.get("project"),
            norm3=bn3,
            terms3=terms3,
            norm2=bn2,
            act=act,
            gates=saved.gates,
            branch_draws=branch_draws,
            keep=settings.keep,
            need_data=need_sums,
            need_dq=need_dq,
            need_dw="project_weight" in needs,
        )
        project = None if partials is None else LayerPartials(partials, project_weight)
    if need_sums:
        sums2 = None
        if se is not None:
            weights = se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias
            dt, du, dpool, sums2 = squeeze_excite.gate_backward(
                sums=sums,
                gates=saved.gates,
                u=saved.bottleneck,
                weights=weights,
                norm2=bn2,
                pixels=height * width,
                act=se.act,
                gate=se.gate,
                counters=counters,
            )
            if need_se:
                se_partials = SqueezeExcitePartials(
                    dt=dt, du=du, u=saved.bottleneck, pooled=saved.pooled, weights=weights, act=se.act
                )
        elif norm2.training or needs & {"norm2_weight", "norm2_bias"}:
            sums2 = batchnorm.gradient_merge(sums.view(-1, 2, E), bn2, rows2)
        if sums2 is not None:
            gradients["norm2_weight"], gradients["norm2_bias"], *_ = sums2
            terms2 = batch_terms(norm2, bn2, sums2, rows2)

    first = None
    if need_dq:
        a = saved.y1
        if expand_weight is None:
            a = x.to(settings.dtype)
        elif a is None:
            weight, _ = _forward_weights(
                x=x,
                expand_weight=expand_weight,
                depthwise_weight=depthwise_weight,
                project_weight=None,
                settings=settings,
                transforms=True,
            )
            a, _ = _first_convolution(x, weight, settings)
        dz1, partials, sums1 = depthwise_backward(
            dq=dq,
            x=a,
            weight=depthwise_weight,
            stride=settings.stride,
            pads=_depthwise_pads(a, depthwise_weight, settings),
            norm2=bn2,
            y2=saved.y2,
            terms2=terms2,
            act2=act,
            gates=saved.gates,
            dpool=dpool,
            norm1=bn1,
            act1="identity" if bn1 is None else act,
            need_dx=need_dz1,
            need_dw="depthwise_weight" in needs,
            counters=counters if bn1 is not None and need_dz1 else None,
        )
        if "depthwise_weight" in needs:
            first = LayerPartials(partials, depthwise_weight)

    expand = stem = None
    if need_dz1 and bn1 is None:
        gradients["x"] = (dz1 + dout if settings.residual else dz1).to(x.dtype)
    elif need_dz1:
        gradients["norm1_weight"], gradients["norm1_bias"], *_ = sums1
        terms1 = batch_terms(norm1, bn1, sums1, a.numel() // E)
        if settings.stem_stride:
            gradients["x"], partials = stem_gradients(
                dz1,
                a,
                x,
                expand_weight,
                stride=settings.stem_stride,
                padding=settings.padding,
                bn=bn1,
                terms=terms1,
                need_dx="x" in needs,
                need_dw="expand_weight" in needs,
            )
            stem = None if partials is None else LayerPartials(partials, expand_weight)
        elif need_expand:
            gradients["x"], partials, grams = expand_backward(
                dz1,
                x,
                rounded["expand"],
                norm1=bn1,
                terms1=terms1,
                residual=dout if settings.residual else None,
                need_dx="x" in needs,
                need_dw="expand_weight" in needs,
                out_dtype=x.dtype,
            )
            if partials is not None:
                expand = ExpandPartials(
                    partials=partials, grams=grams, weight=expand_weight, norm=bn1, terms=terms1, dtype=settings.dtype
                )

    d_depthwise, d_project, d_expand, d_se = reduce_weight_gradients(
        depthwise=first, project=project, expand=expand, squeeze_excite=se_partials, stem=stem
    )
    gradients |= {"depthwise_weight": d_depthwise, "project_weight": d_project, "expand_weight": d_expand}
    if d_se is not None:
        names = ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias")
        gradients |= dict(zip(names, d_se, strict=True))
    for name, norm in (("norm1", norm1), ("norm2", norm2), ("norm3", norm3)):
        if f"{name}_weight" in gradients:
            gradients[f"{name}_weight"] = gradients[f"{name}_weight"].to(norm.weight.dtype)
            gradients[f"{name}_bias"] = gradients[f"{name}_bias"].to(norm.bias.dtype)
    return gradients


def _inference(
    x: Tensor,
    expand_weight: Tensor | None,
    norm1: BatchNormParams | None,
    depthwise_weight: Tensor,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    project_weight: Tensor,
    norm3: BatchNormParams,
    settings: BlockSettings,
) -> Tensor:
    """Running statistics, no gradient; scale and shift come from the live buffers, so nothing goes stale."""
    from effkernels.configs.rules import expand_inside
    from effkernels.kernels import expand_depthwise, squeeze_excite
    from effkernels.kernels.common import matmul_precision
    from effkernels.kernels.depthwise_forward import depthwise_forward
    from effkernels.kernels.pointwise_forward import pointwise_forward

    act, dtype = settings.act, settings.dtype
    pads = _depthwise_pads(x, depthwise_weight, settings)
    bn2 = frozen_normalisation(norm2)
    E, k = depthwise_weight.shape[0], depthwise_weight.shape[-1]
    inside = expand_weight is not None and expand_inside(
        kernel_size=k, stride=settings.stride, in_channels=x.shape[-1], expanded=E, dtype=dtype, act=act
    )
    copied, project_weight = _forward_weights(
        x=x,
        expand_weight=None if inside else expand_weight,
        depthwise_weight=depthwise_weight,
        project_weight=project_weight,
        settings=settings,
        transforms=se is not None,
    )
    if inside:
        a, sums = expand_depthwise.expand_depthwise(
            x=x.to(dtype),
            w1=expand_weight,
            norm1=frozen_normalisation(norm1),
            weight=depthwise_weight,
            norm2=bn2,
            stride=settings.stride,
            pads=pads,
            act=act,
            pool=se is not None,
            precision=matmul_precision(),
        )
    else:
        if expand_weight is None:
            a = x.to(dtype)
        else:
            epilogue = frozen_normalisation(norm1)
            a, _ = pointwise_forward(x, copied, dtype=dtype, epilogue=epilogue, act2=act)
        a, _, sums = depthwise_forward(
            a, depthwise_weight, settings.stride, pads, epilogue=bn2, act2=act, pool=se is not None
        )
    gates = None
    if se is not None:
        gates, _, _ = squeeze_excite.squeeze_excite_forward(
            sums=sums,
            pixels=a.shape[1] * a.shape[2],
            w_reduce=se.reduce_weight,
            b_reduce=se.reduce_bias,
            w_expand=se.expand_weight,
            b_expand=se.expand_bias,
            act=se.act,
            gate=se.gate,
        )
    out, _ = pointwise_forward(
        a,
        project_weight,
        gates=gates,
        epilogue=frozen_normalisation(norm3),
        residual=x if settings.residual else None,
        out_dtype=_out_dtype(x, settings),
    )
    return out


def _inference_fake(x, expand_weight, norm1, depthwise_weight, norm2, se, project_weight, norm3, settings) -> Tensor:
    k = depthwise_weight.shape[-1]
    size = conv_out_sizes(*x.shape[1:3], k, settings.stride, settings.padding)
    return x.new_empty(x.shape[0], *size, project_weight.shape[0], dtype=_out_dtype(x, settings))


mbconv = Operator("mbconv", _forward, _fake, _backward)
mbconv_inference = Operator("mbconv_inference", _inference, _inference_fake)
