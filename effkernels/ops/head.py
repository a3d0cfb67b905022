"""Operators of a classifier's last feature layer: act(BN(1x1 convolution)), averaged over the image; x NHWC.

Training takes two launches forward (convolution with BatchNorm's statistics; BatchNorm, activation and mean) and four backward, two
of them cuBLAS's products; the autograd node keeps x, y (before the BatchNorm) and fp32 vectors. Inference takes one launch, and the
feature map is never stored.
"""

import torch

from effkernels.ops import sync_batchnorm
from effkernels.ops.autograd import LIB, absent, contiguous_like, differentiable, fp32, normalised, on_its_device, register
from effkernels.ops.counters import zeroed_counters
from effkernels.ops.mbconv import DTYPES

LIB.define(
    "head(Tensor x, Tensor conv_weight, Tensor weight, Tensor bias, Tensor(a!)? running_mean, Tensor(b!)? running_var, "
    "Tensor(c!)? num_batches, str dtype, str act, bool batch, float? momentum, float eps, str group) "
    "-> (Tensor out, Tensor y, Tensor mean, Tensor rstd, Tensor s2, Tensor s4)"
)
LIB.define(
    "head_backward(Tensor dout, Tensor x, Tensor conv_weight, Tensor weight, Tensor bias, Tensor y, Tensor mean, Tensor rstd, Tensor s2, "
    "Tensor s4, str act, bool batch, str group, bool[] needs) -> (Tensor dx, Tensor dconv_weight, Tensor dweight, Tensor dbias)"
)
LIB.define(
    "head_inference(Tensor x, Tensor conv_weight, Tensor weight, Tensor bias, Tensor running_mean, Tensor running_var, str dtype, "
    "str act, float eps) -> Tensor"
)


@on_its_device
def head(x, conv_weight, weight, bias, running_mean, running_var, num_batches, dtype, act, batch, momentum, eps, group):
    from effkernels.kernels.norm import BatchNorm
    from effkernels.kernels.pointwise import pointwise_forward
    from effkernels.kernels.pooled_norm import pooled_norm

    def convolution(**how):
        counters = zeroed_counters(x, conv_weight.shape[0])
        return pointwise_forward(x, conv_weight, dtype=DTYPES[dtype], counters=counters, **how)

    y, mean, rstd = normalised(convolution, weight, batch, running_mean, running_var, num_batches, momentum, eps, group)
    out, s2, s4 = pooled_norm(y, BatchNorm(weight, bias, mean, rstd), act=act)
    return out, y, mean, rstd, s2, s4


def head_fake(x, conv_weight, weight, bias, running_mean, running_var, num_batches, dtype, *settings):
    N, H, W, _ = x.shape
    O = conv_weight.shape[0]
    out, y = x.new_empty(N, O, dtype=DTYPES[dtype]), x.new_empty(N, H, W, O, dtype=DTYPES[dtype])
    return out, y, fp32(x, O), fp32(x, O), fp32(x, N, O), fp32(x, N, O)


@on_its_device
def head_backward(dout, x, conv_weight, weight, bias, y, mean, rstd, s2, s4, act, batch, group, needs):
    """Gradients of (x, conv_weight, weight, bias); ``needs`` says which."""
    from effkernels.kernels.norm import BatchNorm
    from effkernels.kernels.pooled_norm import pooled_norm_backward, pooled_norm_gradients

    N, H, W, O = y.shape
    norm = BatchNorm(weight.float(), bias.float(), mean, rstd) if group else BatchNorm(weight, bias, mean, rstd)
    dx = dw = dgamma = dbeta = terms = None
    if batch or needs[2] or needs[3]:
        dgamma, dbeta, *terms = pooled_norm_gradients(dout, s2, s4, norm, H * W)
        if group and batch:
            terms = sync_batchnorm.batch_terms(dgamma, dbeta, (weight, mean, rstd), N * H * W, group)
        dgamma, dbeta = dgamma.to(weight.dtype), dbeta.to(bias.dtype)
    if needs[0] or needs[1]:
        dy = pooled_norm_backward(dout, y, norm, terms if batch else None, act=act).view(-1, O)
        if needs[0]:
            dx = torch.mm(dy, conv_weight.flatten(1).to(dy.dtype)).view(x.shape).to(x.dtype)
        if needs[1]:
            dw = torch.mm(dy.t(), x.view(-1, x.shape[-1]).to(dy.dtype)).to(conv_weight.dtype).view(conv_weight.shape)
    return tuple(absent(x) if t is None or not need else t for t, need in zip((dx, dw, dgamma, dbeta), needs, strict=True))


def head_backward_fake(dout, x, conv_weight, weight, bias, *rest):
    likes = (x, conv_weight, weight, bias)
    return tuple(contiguous_like(t) if need else absent(x) for t, need in zip(likes, rest[-1], strict=True))


@on_its_device
def head_inference(x, conv_weight, weight, bias, running_mean, running_var, dtype, act, eps):
    """x [N, H, W, K] -> [N, O] in the compute dtype."""
    from effkernels.kernels.norm import BatchNorm
    from effkernels.kernels.pointwise import pointwise_forward

    norm = BatchNorm(weight, bias, running_mean, var=running_var, eps=eps)
    return pointwise_forward(x, conv_weight, dtype=DTYPES[dtype], epilogue=norm, act2=act, pool=True)[0]


def head_inference_fake(x, conv_weight, weight, bias, running_mean, running_var, dtype, act, eps):
    return x.new_empty(x.shape[0], conv_weight.shape[0], dtype=DTYPES[dtype])


Head = differentiable("head", head, head_backward, inputs=range(4), settings=(8, 9, 12))
register("head", head, head_fake, Head)
register("head_backward", head_backward, head_backward_fake)
register("head_inference", head_inference, head_inference_fake)
