"""Padding and output sizes of a k x k convolution: the one place that knows "symmetric" from TensorFlow's "same"."""

PADDINGS = ("symmetric", "same")


def pad_amounts(size: int, kernel_size: int, stride: int, padding: str) -> tuple[int, int]:
    """Zeros (before, after) one spatial dimension of ``size``.

    symmetric: ``(k - 1) // 2`` on both sides, as in timm's ``efficientnet_*`` and torchvision.
    same: TensorFlow's rule, ``total = max((ceil(n / s) - 1) * s + k - n, 0)``, ``total // 2`` before and the rest after;
    asymmetric at stride 2, and dependent on the actual input size.
    """
    if padding == "symmetric":
        return (kernel_size - 1) // 2, (kernel_size - 1) // 2
    if padding == "same":
        total = max((-(-size // stride) - 1) * stride + kernel_size - size, 0)
        return total // 2, total - total // 2
    raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")


def conv_out_size(size: int, kernel_size: int, stride: int, padding: str) -> int:
    """Output length of one spatial dimension: ``floor((size + before + after - k) / s) + 1``."""
    return (size + sum(pad_amounts(size, kernel_size, stride, padding)) - kernel_size) // stride + 1
