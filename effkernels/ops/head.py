"""Operators of a classifier's last feature layer: act(BN(1x1 convolution)), averaged over the image; x NHWC.

Training takes two launches forward (convolution with BatchNorm's statistics; BatchNorm, activation and mean) and four
backward, two of them cuBLAS's products; the autograd node keeps x, y (before the BatchNorm) and fp32 vectors. Inference
takes one launch, and the feature map is never stored.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from effkernels.ops.autograd import Operator, fp32_like
from effkernels.ops.counters import zeroed_counters
from effkernels.ops.normalise import backward_norm, batch_statistics, batch_terms, frozen_normalisation, normalisation
from effkernels.parameters import BatchNormParams


class HeadSettings(NamedTuple):
    """dtype: of the computation and of its results."""

    dtype: torch.dtype
    act: str


class HeadResults(NamedTuple):
    """out [N, O]; y [N, H, W, O], before its BatchNorm; fp32 mean and rstd [O] that normalised y; fp32 sums over the
    pixels of each image, [N, O], of phi' (sum_dphi) and of phi' yhat (sum_dphi_yhat), which are all that BatchNorm's
    backward needs of y.
    """

    out: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor
    sum_dphi: Tensor
    sum_dphi_yhat: Tensor


def _forward(x: Tensor, conv_weight: Tensor, norm: BatchNormParams, settings: HeadSettings) -> HeadResults:
    from effkernels.kernels.pointwise_forward import pointwise_forward
    from effkernels.kernels.pooled_norm import pooled_norm
    from effkernels.kernels.weight_copies import forward_weights

    wanted = batch_statistics(norm, conv_weight.shape[0], x.device)
    counters = zeroed_counters(x, 128 + conv_weight.shape[0])
    (weight,) = forward_weights([(conv_weight, x[..., 0].numel(), False)], settings.dtype)
    y, found = pointwise_forward(x, weight, dtype=settings.dtype, statistics=wanted, counters=counters)
    bn = normalisation(norm, wanted, found, y)
    out, sum_dphi, sum_dphi_yhat = pooled_norm(y, bn, act=settings.act)
    return HeadResults(out=out, y=y, mean=bn.mean, rstd=bn.rstd, sum_dphi=sum_dphi, sum_dphi_yhat=sum_dphi_yhat)


def _fake(x, conv_weight, norm, settings) -> HeadResults:
    N, H, W, _ = x.shape
    O = conv_weight.shape[0]
    out = x.new_empty(N, O, dtype=settings.dtype)
    y = x.new_empty(N, H, W, O, dtype=settings.dtype)
    return HeadResults(
        out=out,
        y=y,
        mean=fp32_like(x, O),
        rstd=fp32_like(x, O),
        sum_dphi=fp32_like(x, N, O),
        sum_dphi_yhat=fp32_like(x, N, O),
    )


def _backward(
    dout: Tensor,
    *,
    x: Tensor,
    conv_weight: Tensor,
    norm: BatchNormParams,
    settings: HeadSettings,
    saved: HeadResults,
    needs: frozenset[str],
) -> dict:
    from effkernels.kernels.pooled_norm import pooled_norm_backward, pooled_norm_gradients

    N, H, W, O = saved.y.shape
    bn = backward_norm(norm, saved.mean, saved.rstd)
    gradients, terms = {}, None
    if norm.training or "norm_weight" in needs or "norm_bias" in needs:
        sums = pooled_norm_gradients(dout=dout, s2=saved.sum_dphi, s4=saved.sum_dphi_yhat, norm=bn, pixels=H * W)
        terms = batch_terms(norm, bn, sums, N * H * W)
        dgamma, dbeta, *_ = sums
        gradients |= {"norm_weight": dgamma.to(norm.weight.dtype), "norm_bias": dbeta.to(norm.bias.dtype)}
    if "x" in needs or "conv_weight" in needs:
        dy = pooled_norm_backward(dout, saved.y, bn, terms, act=settings.act).view(-1, O)
        if "x" in needs:
            gradients["x"] = torch.mm(dy, conv_weight.flatten(1).to(dy.dtype)).view(x.shape).to(x.dtype)
        if "conv_weight" in needs:
            dw = torch.mm(dy.t(), x.view(-1, x.shape[-1]).to(dy.dtype))
            gradients["conv_weight"] = dw.to(conv_weight.dtype).view(conv_weight.shape)
    return gradients


def _inference(x: Tensor, conv_weight: Tensor, norm: BatchNormParams, settings: HeadSettings) -> Tensor:
    """x [N, H, W, K] -> [N, O] in the compute dtype."""
    from effkernels.kernels.pointwise_forward import pointwise_forward
    from effkernels.kernels.weight_copies import forward_weights

    epilogue = frozen_normalisation(norm)
    (weight,) = forward_weights([(conv_weight, x[..., 0].numel(), False)], settings.dtype, pool=True)
    out, _ = pointwise_forward(x, weight, dtype=settings.dtype, epilogue=epilogue, act2=settings.act, pool=True)
    return out


def _inference_fake(x, conv_weight, norm, settings) -> Tensor:
    return x.new_empty(x.shape[0], conv_weight.shape[0], dtype=settings.dtype)


head = Operator("head", _forward, _fake, _backward)
head_inference = Operator("head_inference", _inference, _inference_fake)
