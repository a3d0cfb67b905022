"""Plain PyTorch twins of the fused operators: the CPU path, the fallback, and the truth the tests compare with."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from effkernels.geometry import conv_out_size, pad_amounts
from effkernels.parameters import BatchNormParams, SqueezeExciteParams

ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "gelu": F.gelu,
    "identity": lambda x: x,
}
GATES = {"sigmoid": torch.sigmoid, "hard_sigmoid": F.hardsigmoid}


def activate(x: torch.Tensor, act: str | Callable) -> torch.Tensor:
    """phi(x) of a name in ``ACTIVATIONS``, or of what was put in its place.

    Never in place: a hook may have kept x, and where the layer before it is now an nn.Identity, x is the caller's.
    """
    return act(x) if callable(act) else ACTIVATIONS[act](x)


def drop_path_scale(n: int, rate: float, device: torch.device) -> torch.Tensor:
    """``bernoulli(1 - rate) / (1 - rate)`` per sample, fp32 [N], drawn as timm draws it."""
    keep = 1.0 - rate
    return torch.empty(n, dtype=torch.float32, device=device).bernoulli_(keep).div_(keep)


@torch.fx.wrap
def drop_path_draws(n: int, device: torch.device) -> torch.Tensor:
    """One draw from [0, 1) per sample, fp32 [N]: drawn here by both paths, so what they drop agrees bit for bit."""
    return torch.rand(n, dtype=torch.float32, device=device)


@torch.fx.wrap
def pad(x: torch.Tensor, kernel_size: int, stride: int, padding: str) -> torch.Tensor:
    """x [N, C, H, W] with the zeros that the rule ``padding`` puts around it for a k x k convolution."""
    top, bottom = pad_amounts(x.shape[2], kernel_size, stride, padding)  # no generator: TorchScript compiles this
    left, right = pad_amounts(x.shape[3], kernel_size, stride, padding)
    return F.pad(x, (left, right, top, bottom)) if top > 0 or bottom > 0 or left > 0 or right > 0 else x


def drop_path(x: torch.Tensor, rate: float, training: bool, draws: torch.Tensor | None = None) -> torch.Tensor:
    """Stochastic depth per sample (Huang et al., 2016): x [N, C, H, W] over 1 - rate where its draw lies below it, else
    0; identity in eval or at rate 0.
    """
    if rate == 0.0 or not training:
        return x
    draws = drop_path_draws(x.shape[0], x.device) if draws is None else draws
    return x * ((draws < 1.0 - rate).float() / (1.0 - rate)).to(x.dtype).view(-1, 1, 1, 1)


def check_batch(norm: BatchNormParams, shape: Sequence[int], *conv: int | str) -> None:
    """ValueError if batch statistics are wanted of nothing, or of one value a channel (as PyTorch's batch_norm raises).

    shape [N, C, H, W] of the normalised tensor, or of the input of the convolution (kernel_size, stride, padding)
    before it.
    """
    if norm.training and not norm.group:
        n, c, h, w = shape
        if conv:
            h, w = conv_out_size(h, *conv), conv_out_size(w, *conv)
        if n * h * w <= 1:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {[n, c, h, w]}")


def check_memory(memory: str) -> None:
    """ValueError unless it is what a block may be told to keep for its backward."""
    if memory not in ("keep", "recompute"):
        raise ValueError(f"memory must be 'keep' or 'recompute', got {memory!r}")


def batch_norm(x: torch.Tensor, norm: BatchNormParams) -> torch.Tensor:
    """BatchNorm over [N, C, H, W] as nn.BatchNorm2d computes it, running statistics and counter included."""
    if norm.group:
        raise ValueError(
            f"the plain twins normalise one process's batch, got a BatchNorm of process group {norm.group!r}"
        )
    momentum = norm.momentum
    if norm.updates and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
        if momentum is None:
            momentum = 1.0 / float(norm.num_batches_tracked)
    running = (norm.running_mean, norm.running_var) if norm.updates or not norm.training else (None, None)
    return F.batch_norm(
        x, *running, norm.weight, norm.bias, training=norm.training, momentum=momentum or 0.0, eps=norm.eps
    )


def depthwise_conv(x: torch.Tensor, weight: torch.Tensor, stride: int, padding: str) -> torch.Tensor:
    """Depthwise convolution of x [N, C, H, W] with weight [C, 1, k, k] under either padding rule."""
    return _conv(x=x, weight=weight, stride=stride, padding=padding, groups=weight.shape[0])


def _conv(x, weight, stride, padding, groups):
    k = weight.shape[-1]
    if padding == "symmetric":
        return F.conv2d(x, weight, None, stride, (k - 1) // 2, 1, groups)
    return F.conv2d(pad(x, k, stride, padding), weight, None, stride, 0, 1, groups)


def squeeze_excite(x: torch.Tensor, params: SqueezeExciteParams) -> torch.Tensor:
    """Twin of ``functional.squeeze_excite``."""
    v = x.mean((2, 3), keepdim=True)
    v = ACTIVATIONS[params.act](F.conv2d(v, params.reduce_weight, params.reduce_bias))
    return x * GATES[params.gate](F.conv2d(v, params.expand_weight, params.expand_bias))


# The names below are also names of arguments.
_squeeze_excite, _drop_path = squeeze_excite, drop_path


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: BatchNormParams,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    act: str = "silu",
    pre_norm: BatchNormParams | None = None,
    pre_act: str = "identity",
    squeeze_excite: SqueezeExciteParams | None = None,
) -> torch.Tensor:
    """Twin of ``functional.depthwise_conv_bn_act``."""
    if pre_norm is not None:
        x = activate(batch_norm(x, pre_norm), pre_act)
    y = activate(batch_norm(depthwise_conv(x, weight, stride, padding), norm), act)
    return y if squeeze_excite is None else _squeeze_excite(y, squeeze_excite)


def bn_act_add(
    x: torch.Tensor,
    norm: BatchNormParams,
    *,
    act: str = "identity",
    branch_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """Twin of ``functional.bn_act_add``."""
    y = activate(batch_norm(x, norm), act)
    if branch_scale is not None:
        y = y * branch_scale.to(y.dtype).view(-1, 1, 1, 1)
    return y if residual is None else y + residual


def mbconv(
    x: torch.Tensor,
    expand: tuple[torch.Tensor, BatchNormParams] | None,
    depthwise: tuple[torch.Tensor, BatchNormParams],
    squeeze_excite: SqueezeExciteParams | None,
    project: tuple[torch.Tensor, BatchNormParams],
    *,
    stride: int = 1,
    padding: str = "symmetric",
    act: str = "silu",
    residual: bool = False,
    drop_path: float = 0.0,
    draws: torch.Tensor | None = None,
    training: bool = False,
    memory: str = "keep",
    branch_scale: torch.Tensor | None = None,
    stem_stride: int = 0,
) -> torch.Tensor:
    """Twin of ``functional.mbconv``; ``memory`` is the kernels' business."""
    check_memory(memory)
    y = x
    if stem_stride:
        y, expand = stem(x, *expand, stride=stem_stride, padding=padding, act=act), None
    if expand is not None:
        y = activate(batch_norm(F.conv2d(y, expand[0]), expand[1]), act)
    y = depthwise_conv_bn_act(y, *depthwise, stride=stride, padding=padding, act=act, squeeze_excite=squeeze_excite)
    y = batch_norm(F.conv2d(y, project[0]), project[1])
    if branch_scale is not None:
        y = y * branch_scale.to(y.dtype).view(-1, 1, 1, 1)
    elif residual:
        y = _drop_path(y, drop_path, training, draws)
    return y + x if residual else y


def head(x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, act: str = "silu") -> torch.Tensor:
    """Twin of ``functional.head``."""
    return activate(batch_norm(F.conv2d(x, weight), norm), act).mean((2, 3))


def stem(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: BatchNormParams,
    *,
    stride: int = 2,
    padding: str = "symmetric",
    act: str = "silu",
) -> torch.Tensor:
    """Twin of ``functional.stem``."""
    return activate(batch_norm(_conv(x=x, weight=weight, stride=stride, padding=padding, groups=1), norm), act)
