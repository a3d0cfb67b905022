"""Operators of the stem: act(BN(conv3x3(x))) for images x [N, I, H, W] of any strides; results NHWC.

Training takes two launches forward (convolution with statistics; BatchNorm + activation) and three backward; the autograd node keeps x,
y (before the BatchNorm) and fp32 vectors. Inference takes one launch. A network whose first block does not expand has it as that
block's first convolution in training (``mbconv``), which saves the launches and the passes of its BatchNorm.
"""

import torch

from effkernels.geometry import conv_out_size, pad_amounts
from effkernels.ops import sync_batchnorm
from effkernels.ops.autograd import LIB, absent, differentiable, fp32, normalised, on_its_device, register
from effkernels.ops.counters import zeroed_counters
from effkernels.ops.mbconv import DTYPES

LIB.define(
    "stem(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches, str dtype, int stride, str padding, str act, bool batch, float? momentum, float eps, str group) "
    "-> (Tensor out, Tensor y, Tensor mean, Tensor rstd)"
)
LIB.define(
    "stem_backward(Tensor dout, Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor y, Tensor mean, Tensor rstd, "
    "int stride, str padding, str act, bool batch, str group, bool[] needs) "
    "-> (Tensor dx, Tensor dweight, Tensor dnorm_weight, Tensor dnorm_bias)"
)
LIB.define(
    "stem_inference(Tensor x, Tensor weight, Tensor norm_weight, Tensor norm_bias, Tensor running_mean, Tensor running_var, "
    "str dtype, int stride, str padding, str act, float eps) -> Tensor"
)


def image_pads(x, stride, padding):
    return *pad_amounts(x.shape[2], 3, stride, padding), *pad_amounts(x.shape[3], 3, stride, padding)


def _output(x, weight, dtype, stride, padding):
    OH, OW = (conv_out_size(n, 3, stride, padding) for n in x.shape[2:])
    return x.new_empty(x.shape[0], OH, OW, weight.shape[0], dtype=DTYPES[dtype])


@on_its_device
def stem(
    x, weight, norm_weight, norm_bias, running_mean, running_var, num_batches, dtype, stride, padding, act, batch, momentum, eps, group
):
    from effkernels.kernels import batchnorm
    from effkernels.kernels import stem as kernels
    from effkernels.kernels.norm import BatchNorm

    def convolution(**how):
        counters = zeroed_counters(x, weight.shape[0])
        return kernels.stem_forward(x, weight, stride, image_pads(x, stride, padding), dtype=DTYPES[dtype], counters=counters, **how)

    y, mean, rstd = normalised(convolution, norm_weight, batch, running_mean, running_var, num_batches, momentum, eps, group)
    return batchnorm.apply(y, BatchNorm(norm_weight, norm_bias, mean, rstd), act=act), y, mean, rstd


def stem_fake(x, weight, norm_weight, norm_bias, running_mean, running_var, num_batches, dtype, stride, padding, *settings):
    S = weight.shape[0]
    out, y = (_output(x, weight, dtype, stride, padding) for _ in range(2))
    return out, y, fp32(x, S), fp32(x, S)


@on_its_device
def stem_backward(dout, x, weight, norm_weight, norm_bias, y, mean, rstd, stride, padding, act, batch, group, needs):
    from effkernels.kernels import batchnorm, weight_gradients
    from effkernels.kernels import stem as kernels
    from effkernels.kernels.norm import BatchNorm

    norm = BatchNorm(norm_weight.float(), norm_bias.float(), mean, rstd) if group else BatchNorm(norm_weight, norm_bias, mean, rstd)
    counters = zeroed_counters(x, y.shape[-1])
    dnorm_weight, dnorm_bias, *terms = batchnorm.gradient_reduce(dout, y, norm, act=act, counters=counters)
    if group and batch:
        terms = sync_batchnorm.batch_terms(dnorm_weight, dnorm_bias, (norm_weight, mean, rstd), y.numel() // y.shape[-1], group)
    terms = terms if batch else None
    pads = image_pads(x, stride, padding)
    dx, dw = absent(x), absent(x)
    if needs[1]:
        partials = kernels.stem_backward(dout, y, x, weight, stride, pads, norm, terms=terms, act=act)
        dw = weight_gradients.reduce_weight_gradients(stem=weight_gradients.LayerPartials(partials, weight))[2]
    if needs[0]:
        dx = image_gradient(batchnorm.apply_backward(dout, y, norm, terms=terms, act=act), x, weight, stride, pads)
    return dx, dw, dnorm_weight.to(norm_weight.dtype), dnorm_bias.to(norm_bias.dtype)


def image_gradient(dy, x, weight, stride, pads):
    """Rarely wanted, so PyTorch's own: dy [N, OH, OW, S] -> like x."""
    top, bottom, left, right = pads
    N, I, H, W = x.shape
    padded = dy.new_empty(N, I, H + top + bottom, W + left + right)  # only its shape is read
    dx, _, _ = torch.ops.aten.convolution_backward(
        dy.permute(0, 3, 1, 2), padded, weight.to(dy.dtype), None, [stride, stride], [0, 0], [1, 1], False, [0, 0], 1, [True, False, False]
    )  # fmt: skip
    return torch.empty_like(x).copy_(dx[:, :, top : top + H, left : left + W])


def stem_backward_fake(dout, x, weight, norm_weight, norm_bias, y, mean, rstd, stride, padding, act, batch, group, needs):
    dx, dw = (torch.empty_like(t) if need else absent(x) for t, need in zip((x, weight), needs, strict=False))
    return dx, dw, torch.empty_like(norm_weight), torch.empty_like(norm_bias)


@on_its_device
def stem_inference(x, weight, norm_weight, norm_bias, running_mean, running_var, dtype, stride, padding, act, eps):
    """Running statistics, no gradient; scale and shift come from the live buffers."""
    from effkernels.kernels import stem as kernels
    from effkernels.kernels.norm import BatchNorm

    epilogue = BatchNorm(norm_weight, norm_bias, running_mean, var=running_var, eps=eps)
    return kernels.stem_forward(x, weight, stride, image_pads(x, stride, padding), dtype=DTYPES[dtype], epilogue=epilogue, act=act)[0]


def stem_inference_fake(x, weight, norm_weight, norm_bias, running_mean, running_var, dtype, stride, padding, *settings):
    return _output(x, weight, dtype, stride, padding)


Stem = differentiable("stem", stem, stem_backward, inputs=range(4), settings=(8, 9, 10, 11, 14))
register("stem", stem, stem_fake, Stem)
register("stem_backward", stem_backward, stem_backward_fake)
register("stem_inference", stem_inference, stem_inference_fake)
