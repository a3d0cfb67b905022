"""Operators of single layers: [BN, act] -> depthwise -> BN, act -> [squeeze-excite]; BN, act, drop-path, residual;
squeeze-excite.

Their BatchNorms are this process's alone: ``effkernels.functional`` refuses those that synchronise processes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkernels.geometry import conv_out_sizes, conv_pads
from effkernels.ops.autograd import Constant, Operator, Shortcut, fp32_like
from effkernels.ops.normalise import (
    batch_statistics,
    batch_terms,
    frozen_normalisation,
    running_normalisation,
    with_statistics,
)
from effkernels.parameters import BatchNormParams, SqueezeExciteParams

# ---- depthwise_block: [BN1 + act1] -> depthwise -> BN2 + act2 -> [squeeze-excite gate] ----


class DepthwiseSettings(NamedTuple):
    """stride, padding: of the convolution. act1, act2: after the first and the second BatchNorm."""

    stride: int
    padding: str
    act1: str
    act2: str


class DepthwiseResults(NamedTuple):
    """out and y, before its BatchNorm, [N, H', W', C]; fp32 mean and rstd [C] of each BatchNorm; as ``BlockResults`` of
    squeeze-excite.

    Nothing activated is kept."""

    out: Tensor
    y: Tensor
    mean1: Tensor | None
    rstd1: Tensor | None
    mean2: Tensor
    rstd2: Tensor
    gates: Tensor | None
    pooled: Tensor | None
    bottleneck: Tensor | None


def _pads(x, weight, settings):
    return conv_pads(*x.shape[1:3], weight.shape[-1], settings.stride, settings.padding)


def _merged(norm: BatchNormParams, tiles):
    """The ``BatchNorm`` of a batch whose partial statistics are ``tiles``, or of the running statistics (tiles
    None).
    """
    from effkernels.kernels import batchnorm

    if not norm.training:
        return running_normalisation(norm)
    channels, device = norm.weight.numel(), norm.weight.device
    return with_statistics(norm, *batchnorm.merge(tiles, batch_statistics(norm, channels, device)))


def _depthwise_forward(
    x: Tensor,
    weight: Tensor,
    norm1: BatchNormParams | None,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    settings: DepthwiseSettings,
) -> DepthwiseResults:
    from effkernels.kernels import batchnorm, squeeze_excite
    from effkernels.kernels.depthwise_forward import depthwise_forward

    bn1 = None
    if norm1 is not None:
        bn1 = _merged(norm1, batchnorm.statistics(x) if norm1.training else None)
    y, tiles, _ = depthwise_forward(
        x,
        weight,
        settings.stride,
        _pads(x, weight, settings),
        prologue=bn1,
        act1=settings.act1,
        partial_statistics=norm2.training,
    )
    bn2 = _merged(norm2, tiles)
    gates = pooled = bottleneck = None
    if se is not None:
        sums = squeeze_excite.pool(y, bn2, act=settings.act2)
        gates, pooled, bottleneck = _gates(sums, y, se)
    return DepthwiseResults(
        batchnorm.apply(y, bn2, act=settings.act2, gates=gates),
        y,
        mean1=None if bn1 is None else bn1.mean,
        rstd1=None if bn1 is None else bn1.rstd,
        mean2=bn2.mean,
        rstd2=bn2.rstd,
        gates=gates,
        pooled=pooled,
        bottleneck=bottleneck,
    )


def _gates(sums, y, se: SqueezeExciteParams):
    """(gates, pooled, bottleneck) from the sums over the pixels of y."""
    from effkernels.kernels import squeeze_excite

    return squeeze_excite.squeeze_excite_forward(
        sums=sums,
        pixels=y.shape[1] * y.shape[2],
        w_reduce=se.reduce_weight,
        b_reduce=se.reduce_bias,
        w_expand=se.expand_weight,
        b_expand=se.expand_bias,
        act=se.act,
        gate=se.gate,
    )


def _depthwise_output(x, weight, settings):
    size = conv_out_sizes(*x.shape[1:3], weight.shape[-1], settings.stride, settings.padding)
    return x.new_empty(x.shape[0], *size, x.shape[3])


def _depthwise_fake(x, weight, norm1, norm2, se, settings) -> DepthwiseResults:
    N, C = x.shape[0], x.shape[3]
    return DepthwiseResults(
        _depthwise_output(x, weight, settings),
        _depthwise_output(x, weight, settings),
        mean1=None if norm1 is None else fp32_like(x, C),
        rstd1=None if norm1 is None else fp32_like(x, C),
        mean2=fp32_like(x, C),
        rstd2=fp32_like(x, C),
        gates=None if se is None else fp32_like(x, N, C),
        pooled=None if se is None else fp32_like(x, N, C),
        bottleneck=None if se is None else fp32_like(x, N, se.reduce_weight.shape[0]),
    )


def _depthwise_backward(
    dout: Tensor,
    *,
    x: Tensor,
    weight: Tensor,
    norm1: BatchNormParams | None,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    settings: DepthwiseSettings,
    saved: DepthwiseResults,
    needs: frozenset[str],
) -> dict:
    from effkernels.kernels import batchnorm, squeeze_excite
    from effkernels.kernels.depthwise_backward import depthwise_backward

    need_dx = bool(needs & {"x", "norm1_weight", "norm1_bias"})  # the gradients of the first BatchNorm come with dx
    need_dw = "weight" in needs
    C, taps, y = x.shape[-1], weight.shape[-1] ** 2, saved.y
    pixels = y.shape[1] * y.shape[2]
    bn1 = None if norm1 is None else with_statistics(norm1, saved.mean1, saved.rstd1)
    bn2 = with_statistics(norm2, saved.mean2, saved.rstd2)
    gradients, dpool = {}, None
    sums, _ = batchnorm.gradient_sums(dout, y, bn2, act=settings.act2, for_gate=se is not None)
    if se is not None:
        weights = se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias
        dpool, se_gradients, sums2 = squeeze_excite.squeeze_excite_backward(
            sums=sums,
            pixels=pixels,
            gates=saved.gates,
            pooled=saved.pooled,
            u=saved.bottleneck,
            weights=weights,
            norm=bn2,
            act=se.act,
            gate=se.gate,
        )
        names = ("se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias")
        gradients |= dict(zip(names, se_gradients, strict=True))
    else:
        sums2 = batchnorm.gradient_merge(sums.view(-1, 2, C), bn2, y.shape[0] * pixels)
    dx, partials, _ = depthwise_backward(
        dq=dout,
        x=x,
        weight=weight,
        stride=settings.stride,
        pads=_pads(x, weight, settings),
        norm2=bn2,
        y2=y,
        terms2=batch_terms(norm2, bn2, sums2, y.shape[0] * pixels),
        act2=settings.act2,
        gates=saved.gates,
        dpool=dpool,
        norm1=bn1,
        act1=settings.act1,
        need_dx=need_dx,
        need_dw=need_dw,
    )
    if bn1 is not None and need_dx:
        rows = x.numel() // C
        sums1 = batchnorm.gradient_merge(partials[:, taps:], bn1, rows)
        dx = batchnorm.apply_backward(dx, x, bn1, terms=batch_terms(norm1, bn1, sums1, rows))
        gradients |= _norm_gradients("norm1", norm1, sums1)
    gradients |= _norm_gradients("norm2", norm2, sums2)
    return gradients | {"x": dx, "weight": batchnorm.sum_partials(partials, taps, weight) if need_dw else None}


def _norm_gradients(name: str, norm: BatchNormParams, sums) -> dict:
    dgamma, dbeta, *_ = sums
    return {f"{name}_weight": dgamma.to(norm.weight.dtype), f"{name}_bias": dbeta.to(norm.bias.dtype)}


def _depthwise_inference(
    x: Tensor,
    weight: Tensor,
    norm1: BatchNormParams | None,
    norm2: BatchNormParams,
    se: SqueezeExciteParams | None,
    settings: DepthwiseSettings,
) -> Tensor:
    """Running statistics, no gradient: BN2, the activation and the pooling in the depthwise kernel's epilogue; scale
    and shift from the live buffers.
    """
    from effkernels.kernels import batchnorm
    from effkernels.kernels.depthwise_forward import depthwise_forward

    out, _, sums = depthwise_forward(
        x,
        weight,
        settings.stride,
        _pads(x, weight, settings),
        prologue=None if norm1 is None else frozen_normalisation(norm1),
        act1=settings.act1,
        epilogue=frozen_normalisation(norm2),
        act2=settings.act2,
        pool=se is not None,
    )
    if se is None:
        return out
    gates, _, _ = _gates(sums, out, se)
    return batchnorm.apply(out, None, gates=gates)


def _depthwise_inference_fake(x, weight, norm1, norm2, se, settings) -> Tensor:
    return _depthwise_output(x, weight, settings)


# ---- bn_act_add: act(BN(x)) * branch scale + residual ----


class ActivationSettings(NamedTuple):
    """The name of the activation that follows the BatchNorm."""

    act: str


class NormResults(NamedTuple):
    """out, like x; fp32 mean and rstd [C] that normalised x."""

    out: Tensor
    mean: Tensor
    rstd: Tensor


def _sum_dtype(x, residual):
    return x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)


def _norm_forward(
    x: Tensor,
    norm: BatchNormParams,
    branch_scale: Constant,
    residual: Shortcut,
    settings: ActivationSettings,
) -> NormResults:
    from effkernels.kernels import batchnorm

    bn = _merged(norm, batchnorm.statistics(x) if norm.training else None)
    out_dtype = _sum_dtype(x, residual)
    out = batchnorm.apply(x, bn, act=settings.act, branch_draws=branch_scale, residual=residual, out_dtype=out_dtype)
    return NormResults(out, bn.mean, bn.rstd)


def _norm_fake(x, norm, branch_scale, residual, settings) -> NormResults:
    C = x.shape[-1]
    return NormResults(torch.empty_like(x, dtype=_sum_dtype(x, residual)), fp32_like(x, C), fp32_like(x, C))


def _norm_backward(
    dout: Tensor,
    *,
    x: Tensor,
    norm: BatchNormParams,
    branch_scale: Tensor | None,
    residual: None,
    settings: ActivationSettings,
    saved: NormResults,
    needs: frozenset[str],
) -> dict:
    from effkernels.kernels import batchnorm

    C = x.shape[-1]
    bn = with_statistics(norm, saved.mean, saved.rstd)
    sums, _ = batchnorm.gradient_sums(dout, x, bn, act=settings.act, branch_scale=branch_scale)
    sums = batchnorm.gradient_merge(sums.view(-1, 2, C), bn, x.numel() // C)
    gradients = _norm_gradients("norm", norm, sums)
    if "x" in needs:
        gradients["x"] = batchnorm.apply_backward(
            dout,
            x,
            bn,
            terms=batch_terms(norm, bn, sums, x.numel() // C),
            act=settings.act,
            branch_scale=branch_scale,
            out_dtype=x.dtype,
        )
    return gradients


def _norm_inference(x: Tensor, norm: BatchNormParams, residual: Tensor | None, settings: ActivationSettings) -> Tensor:
    from effkernels.kernels import batchnorm

    bn, out_dtype = frozen_normalisation(norm), _sum_dtype(x, residual)
    return batchnorm.apply(x, bn, act=settings.act, residual=residual, out_dtype=out_dtype)


def _norm_inference_fake(x, norm, residual, settings) -> Tensor:
    return torch.empty_like(x, dtype=_sum_dtype(x, residual))


# ---- squeeze_excite: x * gate(x) ----


class GateResults(NamedTuple):
    """out, like x; of squeeze-excite as in ``BlockResults``."""

    out: Tensor
    gates: Tensor
    pooled: Tensor
    bottleneck: Tensor


def _gate_forward(x: Tensor, se: SqueezeExciteParams) -> GateResults:
    from effkernels.kernels import batchnorm, squeeze_excite

    gates, pooled, bottleneck = _gates(squeeze_excite.pool(x), x, se)
    return GateResults(batchnorm.apply(x, None, gates=gates), gates, pooled, bottleneck)


def _gate_fake(x, se) -> GateResults:
    N, C = x.shape[0], x.shape[-1]
    return GateResults(
        torch.empty_like(x), fp32_like(x, N, C), fp32_like(x, N, C), fp32_like(x, N, se.reduce_weight.shape[0])
    )


def _gate_backward(
    dout: Tensor, *, x: Tensor, se: SqueezeExciteParams, saved: GateResults, needs: frozenset[str]
) -> dict:
    from effkernels.kernels import batchnorm, squeeze_excite

    sums, _ = batchnorm.gradient_sums(dout, x, None, for_gate=True)
    weights = se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias
    dpool, (d_reduce, d_reduce_bias, d_expand, d_expand_bias), _ = squeeze_excite.squeeze_excite_backward(
        sums=sums,
        pixels=x.shape[1] * x.shape[2],
        gates=saved.gates,
        pooled=saved.pooled,
        u=saved.bottleneck,
        weights=weights,
        act=se.act,
        gate=se.gate,
    )
    dx = batchnorm.apply_backward(dout, None, None, gates=saved.gates, dpool=dpool) if "x" in needs else None
    return {
        "x": dx,
        "se_reduce_weight": d_reduce,
        "se_reduce_bias": d_reduce_bias,
        "se_expand_weight": d_expand,
        "se_expand_bias": d_expand_bias,
    }


depthwise_block = Operator("depthwise_block", _depthwise_forward, _depthwise_fake, _depthwise_backward)
depthwise_block_inference = Operator("depthwise_block_inference", _depthwise_inference, _depthwise_inference_fake)
bn_act_add = Operator("bn_act_add", _norm_forward, _norm_fake, _norm_backward)
bn_act_add_inference = Operator("bn_act_add_inference", _norm_inference, _norm_inference_fake)
squeeze_excite = Operator("squeeze_excite", _gate_forward, _gate_fake, _gate_backward)
