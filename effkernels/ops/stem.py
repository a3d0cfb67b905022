"""Operators of the stem: act(BN(conv3x3(x))) for images x [N, I, H, W] of any strides; results NHWC.

Training takes two launches forward (convolution with statistics; BatchNorm + activation) and three backward; the
autograd node keeps x, y (before the BatchNorm) and fp32 vectors. Inference takes one launch. A network whose first
block does not expand has it as that block's first convolution in training (``mbconv``), which saves the launches and
the passes of its BatchNorm.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from effkernels.geometry import conv_out_sizes, conv_pads
from effkernels.ops.autograd import Operator, fp32_like
from effkernels.ops.counters import zeroed_counters
from effkernels.ops.normalise import backward_norm, batch_statistics, batch_terms, frozen_normalisation, normalisation
from effkernels.parameters import BatchNormParams

if TYPE_CHECKING:
    from effkernels.kernels.norm import BatchNorm


class StemSettings(NamedTuple):
    """dtype: of the computation and its results. stride: 1 or 2. padding: a name of
    ``effkernels.geometry.PADDINGS``.
    """

    dtype: torch.dtype
    stride: int
    padding: str
    act: str


class StemResults(NamedTuple):
    """out [N, H', W', S]; y, before its BatchNorm, like it; fp32 mean and rstd [S] that normalised y."""

    out: Tensor
    y: Tensor
    mean: Tensor
    rstd: Tensor


def stem_convolution(
    x: Tensor, weight: Tensor, stride: int, padding: str, dtype: torch.dtype, **how
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """(y [N, H', W', S], (mean, rstd) or None) of a 3x3 convolution; ``how`` as
    ``effkernels.kernels.stem.stem_forward`` takes it.
    """
    from effkernels.kernels.stem import stem_forward

    return stem_forward(x, weight, stride, conv_pads(*x.shape[2:], 3, stride, padding), dtype=dtype, **how)


def stem_gradients(
    dz: Tensor,
    y: Tensor,
    x: Tensor,
    weight: Tensor,
    *,
    stride: int,
    padding: str,
    bn: "BatchNorm",
    terms: tuple[Tensor, Tensor] | None,
    act: str = "identity",
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """(dx or None, partial sums of dw or None) of a 3x3 convolution, from the gradient dz of what follows its BatchNorm
    ``bn``.

    dx is rarely wanted, so PyTorch's own convolution makes it.
    """
    from effkernels.kernels import batchnorm
    from effkernels.kernels.stem import stem_backward

    pads, dx, partials = conv_pads(*x.shape[2:], 3, stride, padding), None, None
    if need_dw:
        partials = stem_backward(
            dout=dz, y=y, x=x, weight=weight, stride=stride, pads=pads, norm=bn, terms=terms, act=act
        )
    if need_dx:
        dx = _image_gradient(
            dy=batchnorm.apply_backward(dz, y, bn, terms=terms, act=act), x=x, weight=weight, stride=stride, pads=pads
        )
    return dx, partials


def _image_gradient(dy, x, weight, stride, pads):
    """The gradient of images x from dy [N, H', W', S]; it lies as x does."""
    top, bottom, left, right = pads
    N, I, H, W = x.shape
    padded = dy.new_empty(N, I, H + top + bottom, W + left + right)  # only its shape is read
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2),
        padded,
        weight.to(dy.dtype),
        None,
        stride=[stride, stride],
        padding=[0, 0],
        dilation=[1, 1],
        transposed=False,
        output_padding=[0, 0],
        groups=1,
        output_mask=[True, False, False],
    )
    return torch.empty_like(x).copy_(dx[:, :, top : top + H, left : left + W])


def _forward(x: Tensor, weight: Tensor, norm: BatchNormParams, settings: StemSettings) -> StemResults:
    from effkernels.kernels import batchnorm

    wanted = batch_statistics(norm, weight.shape[0], x.device)
    counters = zeroed_counters(x, weight.shape[0])
    y, found = stem_convolution(
        x=x,
        weight=weight,
        stride=settings.stride,
        padding=settings.padding,
        dtype=settings.dtype,
        statistics=wanted,
        counters=counters,
    )
    bn = normalisation(norm, wanted, found, y)
    return StemResults(batchnorm.apply(y, bn, act=settings.act), y, bn.mean, bn.rstd)


def _fake(x, weight, norm, settings) -> StemResults:
    S = weight.shape[0]
    out, y = (_output(x, weight, settings) for _ in range(2))
    return StemResults(out, y, fp32_like(x, S), fp32_like(x, S))


def _output(x, weight, settings):
    size = conv_out_sizes(*x.shape[2:], 3, settings.stride, settings.padding)
    return x.new_empty(x.shape[0], *size, weight.shape[0], dtype=settings.dtype)


def _backward(
    dout: Tensor,
    *,
    x: Tensor,
    weight: Tensor,
    norm: BatchNormParams,
    settings: StemSettings,
    saved: StemResults,
    needs: frozenset[str],
) -> dict:
    from effkernels.kernels import batchnorm
    from effkernels.kernels.weight_gradients import LayerPartials, reduce_weight_gradients

    y = saved.y
    bn = backward_norm(norm, saved.mean, saved.rstd)
    counters = zeroed_counters(x, y.shape[-1])
    sums = batchnorm.gradient_reduce(dout, y, bn, act=settings.act, counters=counters)
    dgamma, dbeta, *_ = sums
    dx, partials = stem_gradients(
        dout,
        y,
        x,
        weight,
        stride=settings.stride,
        padding=settings.padding,
        bn=bn,
        terms=batch_terms(norm, bn, sums, y.numel() // y.shape[-1]),
        act=settings.act,
        need_dx="x" in needs,
        need_dw="weight" in needs,
    )
    dw = None
    if partials is not None:
        _, _, dw, _ = reduce_weight_gradients(stem=LayerPartials(partials, weight))
    return {
        "x": dx,
        "weight": dw,
        "norm_weight": dgamma.to(norm.weight.dtype),
        "norm_bias": dbeta.to(norm.bias.dtype),
    }


def _inference(x: Tensor, weight: Tensor, norm: BatchNormParams, settings: StemSettings) -> Tensor:
    """Running statistics, no gradient; scale and shift come from the live buffers."""
    epilogue = frozen_normalisation(norm)
    y, _ = stem_convolution(
        x=x,
        weight=weight,
        stride=settings.stride,
        padding=settings.padding,
        dtype=settings.dtype,
        epilogue=epilogue,
        act=settings.act,
    )
    return y


def _inference_fake(x, weight, norm, settings) -> Tensor:
    return _output(x, weight, settings)


stem = Operator("stem", _forward, _fake, _backward)
stem_inference = Operator("stem_inference", _inference, _inference_fake)
