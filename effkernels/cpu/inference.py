"""The functional forms in inference on a CPU: twins of ``effkernels.functional``, which checks their arguments.

Tensors are NCHW in channels_last memory, in the compute dtype (fp32 or bf16). Each convolution is one call of oneDNN
with its BatchNorm folded in, and the activation, or the residual's sum, done while the output is in registers; or, of
few pixels and many channels, a product with the weight as it is.
Squeeze-excite reads the depthwise output once to pool it and scales it in place; its two layers are fp32.
"""

import contextlib

import torch
import torch.nn.functional as F

from effkernels import reference
from effkernels.cpu.folded import Geometry, folded
from effkernels.dispatch import compute_dtype
from effkernels.geometry import conv_pads
from effkernels.parameters import BatchNormParams, SqueezeExciteParams

# Names of effkernels.reference.ACTIVATIONS: oneDNN's name, its scalars, and which form of it.
ACTIVATIONS = {
    "silu": ("swish", [], ""),
    "relu": ("relu", [], ""),
    "relu6": ("hardtanh", [0.0, 6.0], ""),
    "hard_swish": ("hardswish", [], ""),
    "gelu": ("gelu", [], "none"),
    "identity": ("none", [], ""),
}
# Bytes of the widest tensor of a block that is computed at once; a larger batch takes its images in several parts, each
# in the memory of the one before it. glibc gives blocks of more than 32 MB back to the system, and takes them again
# page by page; half of that leaves room for two, and part of it is still in the cache when the next layer reads it.
LARGEST_PART = 16 * 2**20


def _no_autocast():
    """Within: operators keep the dtypes that they are given."""
    return torch.autocast("cpu", enabled=False) if torch.is_autocast_enabled("cpu") else contextlib.nullcontext()


def _channels_last(x, dtype):
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def _convolution(x, layer, *, act, stride=1, padding="symmetric", groups=1, residual=None):
    """``act(BN(conv(x)))``, or ``BN(conv(x)) + residual``; layer: (weight, BatchNormParams)."""
    weight, norm = layer
    k = weight.shape[-1]
    if k == 1 and x.shape[0] * x.shape[2] * x.shape[3] < weight.shape[1] and weight.dtype == x.dtype:
        return _product(x, layer, act, residual)
    top, bottom, left, right = conv_pads(*x.shape[2:], k, stride, padding) if k > 1 else (0, 0, 0, 0)
    pads = (top, left)
    if (top, left) != (bottom, right):
        x, pads = reference.pad(x, k, stride, padding), (0, 0)
    geometry = Geometry(stride, pads, groups, x.dtype)
    kept = folded(weight, norm, geometry, x.shape)
    conv = list(pads), [stride, stride], [1, 1], groups
    if residual is not None:
        return torch.ops.mkldnn._convolution_pointwise.binary(
            x, residual, kept.weight, kept.bias, *conv, "add", None, None, [], None
        )
    return torch.ops.mkldnn._convolution_pointwise.default(x, kept.weight, kept.bias, *conv, *ACTIVATIONS[act])


def _product(x, layer, act, residual):
    """``_convolution`` of a 1x1 convolution as a product with the live weight, then BatchNorm and activation.

    With fewer pixels than input channels the weight is the larger tensor: two more passes over the output take less
    time than reading the weight, its copy and the folded one would, and nothing is kept that could be stale.
    """
    weight, norm = layer
    y = F.linear(x.permute(0, 2, 3, 1), weight.flatten(1))
    z = F.batch_norm(
        y.flatten(0, 2),
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        weight=norm.weight,
        bias=norm.bias,
        training=False,
        eps=norm.eps,
    ).view_as(y)
    z = reference.ACTIVATIONS[act](z).permute(0, 3, 1, 2)
    return z if residual is None else z.add_(residual)


def _gate_in_place(y, se):
    """y times squeeze-excite's gate of its mean, in fp32 up to the product."""
    pooled = y.mean((2, 3), dtype=torch.float32)
    hidden = F.linear(pooled, se.reduce_weight.flatten(1).float(), se.reduce_bias.float())
    hidden = reference.ACTIVATIONS[se.act](hidden)
    gate = reference.GATES[se.gate](F.linear(hidden, se.expand_weight.flatten(1).float(), se.expand_bias.float()))
    return y.mul_(gate.to(y.dtype)[:, :, None, None])


def _parts(x, elements, itemsize):
    """x's images in as many parts as keep ``elements`` an image within ``LARGEST_PART``."""
    return x.split(max(1, LARGEST_PART // (elements * itemsize)))


def mbconv(
    x: torch.Tensor,
    expand: tuple[torch.Tensor, BatchNormParams] | None,
    depthwise: tuple[torch.Tensor, BatchNormParams],
    squeeze_excite: SqueezeExciteParams | None,
    project: tuple[torch.Tensor, BatchNormParams],
    *,
    stride: int,
    padding: str,
    act: str,
    residual: bool,
) -> torch.Tensor:
    """``functional.mbconv`` with running statistics: x [N, I, H, W] -> [N, O, H', W']."""
    dtype, E = compute_dtype(x), depthwise[0].shape[0]
    images = _channels_last(x, dtype)
    inside = residual and x.dtype == dtype  # else the sum keeps the wider dtype of x

    def block(part):
        y = part if expand is None else _convolution(part, expand, act=act)
        y = _convolution(y, depthwise, act=act, stride=stride, padding=padding, groups=E)
        if squeeze_excite is not None:
            y = _gate_in_place(y, squeeze_excite)
        return _convolution(y, project, act="identity", residual=part if inside else None)

    with _no_autocast():
        parts = [block(part) for part in _parts(images, E * x.shape[2] * x.shape[3], dtype.itemsize)]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out + x if residual and not inside else out


def stem(
    x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, stride: int, padding: str, act: str
) -> torch.Tensor:
    """``functional.stem`` with running statistics: images [N, I, H, W] -> [N, S, H', W']."""
    images = _channels_last(x, compute_dtype(x))
    with _no_autocast():
        return _convolution(images, (weight, norm), act=act, stride=stride, padding=padding)


def head(x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, act: str) -> torch.Tensor:
    """``functional.head`` with running statistics: [N, K, H, W] -> [N, O]."""
    dtype = compute_dtype(x)
    with _no_autocast():
        parts = _parts(_channels_last(x, dtype), weight.shape[0] * x.shape[2] * x.shape[3], dtype.itemsize)
        pooled = [_convolution(part, (weight, norm), act=act).mean((2, 3)) for part in parts]
        return pooled[0] if len(pooled) == 1 else torch.cat(pooled)


def depthwise_conv_bn_act(
    x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, stride: int, padding: str, act: str
) -> torch.Tensor:
    """``functional.depthwise_conv_bn_act`` with running statistics, of a convolution, its BatchNorm and activation."""
    y = _channels_last(x, compute_dtype(x))
    with _no_autocast():
        return _convolution(y, (weight, norm), act=act, stride=stride, padding=padding, groups=weight.shape[0])


def squeeze_excite(x: torch.Tensor, params: SqueezeExciteParams) -> torch.Tensor:
    """``functional.squeeze_excite``: x [N, C, H, W] times its gate, in x's dtype also under autocast."""
    with _no_autocast():
        return _gate_in_place(x.clone(memory_format=torch.channels_last), params)
