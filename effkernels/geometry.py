"""Padding and output sizes of a k x k convolution: the one place that knows "symmetric" from TensorFlow's "same"."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PADDINGS = ("symmetric", "same", "same_as_even")
LARGEST_KERNEL_SIZE = 9  # of the depthwise kernels, whose sizes are odd


def pad_amounts(size: int, kernel_size: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros (before, after) one spatial dimension of ``size``.

    symmetric: ``(k - 1) // 2`` on both sides, as in timm's ``efficientnet_*`` and torchvision.
    same: TensorFlow's rule, ``total = max((ceil(n / s) - 1) * s + k - n, 0)``, ``total // 2`` before and the rest
    after; asymmetric at stride 2, and dependent on the actual input size.
    same_as_even: what "same" gives for even sizes, at any size: the fixed padding of ported networks.
    """
    if padding == "symmetric":
        return (kernel_size - 1) // 2, (kernel_size - 1) // 2
    if padding == "same_as_even":
        size = 2 * kernel_size  # any even size that the kernel fits
    if padding in ("same", "same_as_even"):
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        return total // 2, total - total // 2
    # Not PADDINGS, nor !r: TorchScript compiles this, and knows neither.
    raise ValueError(f"padding must be one of symmetric, same, same_as_even, got '{padding}'")


def conv_out_size(size: int, kernel_size: int, stride: int, padding: str) -> int:
    """Output length of one spatial dimension: ``floor((size + before + after - k) / s) + 1``."""
    return (size + sum(pad_amounts(size, kernel_size, stride, padding)) - kernel_size) // stride + 1


def check_conv_args(kernel_size: int, stride: int, padding: str) -> None:
    """ValueError unless (kernel_size, stride, padding) is a depthwise convolution this package has."""
    is_int = isinstance(kernel_size, int) and not isinstance(kernel_size, bool)
    if not is_int or kernel_size % 2 == 0 or not 1 <= kernel_size <= LARGEST_KERNEL_SIZE:
        raise ValueError(f"kernel_size must be an odd integer from 1 to {LARGEST_KERNEL_SIZE}, got {kernel_size!r}")
    if stride not in (1, 2) or not isinstance(stride, int) or isinstance(stride, bool):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")


def check_activation(
    x: "torch.Tensor",
    weight: "torch.Tensor | None",
    channels: int | None,
    kernel_size: int = 1,
    stride: int = 1,
    padding: str = "symmetric",
) -> None:
    """ValueError/TypeError unless x is a floating [N, channels, H, W] tensor on weight's device that the convolution
    fits.

    channels, weight: None where an edited layer has none of its own; then they are its own affair.
    """
    if not hasattr(x, "dim"):
        raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
    if x.dim() != 4:
        raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
    if channels is not None and x.shape[1] != channels:
        raise ValueError(f"x must have {channels} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
    if not x.is_floating_point():
        raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
    if weight is not None and x.device != weight.device:
        raise ValueError(f"x is on {x.device}, the weights are on {weight.device}: move one of them")
    for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
        if size < 1 or conv_out_size(size, kernel_size, stride, padding) < 1:
            raise ValueError(f"x's {name} {size} is too small for kernel_size {kernel_size} with padding {padding!r}")


def conv_pads(height: int, width: int, kernel_size: int, stride: int, padding: str) -> tuple[int, int, int, int]:
    """Zeros (top, bottom, left, right) around an image."""
    return *pad_amounts(height, kernel_size, stride, padding), *pad_amounts(width, kernel_size, stride, padding)


def conv_out_sizes(height: int, width: int, kernel_size: int, stride: int, padding: str) -> tuple[int, int]:
    """(height, width) of a convolution's output."""
    return conv_out_size(height, kernel_size, stride, padding), conv_out_size(width, kernel_size, stride, padding)
