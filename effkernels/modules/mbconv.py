"""The MBConv block: its layers (MBConvBase, shared with efficientnet.MBConv) and the fused module."""

import torch
import torch.nn.functional as F
from torch import nn

from effkernels.geometry import PADDINGS, conv_out_size, pad_amounts
from effkernels.modules.squeeze_excite import SqueezeExcite
from effkernels.reference import ACTIVATIONS, drop_path


def check_conv_args(kernel_size, stride, padding):
    """ValueError unless (kernel_size, stride, padding) is a depthwise convolution this package has."""
    if not isinstance(kernel_size, int) or kernel_size < 1 or kernel_size % 2 == 0 or kernel_size > 9:
        raise ValueError(f"kernel_size must be an odd integer from 1 to 9, got {kernel_size!r}")
    if stride not in (1, 2) or isinstance(stride, bool):
        raise ValueError(f"stride must be 1 or 2, got {stride!r}")
    if padding not in PADDINGS:
        raise ValueError(f"padding must be one of {PADDINGS}, got {padding!r}")


class MBConvBase(nn.Module):
    """Layers of one MBConv block under timm's names, and their plain PyTorch forward.

    With expand_ratio > 1: ``conv_pw bn1 conv_dw bn2 se conv_pwl bn3`` (expand, depthwise, squeeze-excite, project);
    with expand_ratio 1: ``conv_dw bn1 se conv_pw bn2``. Subclasses choose the schedule, never the parameters.
    """

    squeeze_excite_cls = SqueezeExcite

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        expand_ratio: float = 6.0,
        se_ratio: float = 0.25,
        *,
        act: str = "silu",
        padding: str = "symmetric",
        bn_eps: float = 1e-3,
        bn_momentum: float | None = 0.01,
        drop_path: float = 0.0,
        device=None,
        dtype=None,
    ):
        super().__init__()
        for name, value in (("in_channels", in_channels), ("out_channels", out_channels)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        check_conv_args(kernel_size, stride, padding)
        if not expand_ratio >= 1:
            raise ValueError(f"expand_ratio must be >= 1, got {expand_ratio!r}")
        if not 0 <= se_ratio <= 1:
            raise ValueError(f"se_ratio must be in [0, 1] (of the block's input channels), got {se_ratio!r}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {act!r}")
        if not 0 <= drop_path < 1:
            raise ValueError(f"drop_path must be in [0, 1), got {drop_path!r}")
        self.in_channels, self.out_channels = in_channels, out_channels
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.expand_ratio, self.se_ratio, self.act, self.drop_path = expand_ratio, se_ratio, act, drop_path
        self.has_residual = stride == 1 and in_channels == out_channels

        mid = round(in_channels * expand_ratio)
        factory = {"device": device, "dtype": dtype}
        self.expands = mid != in_channels

        def norm(channels):
            return nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum, **factory)

        def pointwise(inputs, outputs):
            return nn.Conv2d(inputs, outputs, 1, bias=False, **factory)

        if self.expands:
            self.conv_pw, self.bn1 = pointwise(in_channels, mid), norm(mid)
        symmetric = (kernel_size - 1) // 2 if padding == "symmetric" else 0
        conv_dw = nn.Conv2d(mid, mid, kernel_size, stride, symmetric, groups=mid, bias=False, **factory)
        self.conv_dw = conv_dw
        setattr(self, "bn2" if self.expands else "bn1", norm(mid))
        if se_ratio > 0:
            reduced = max(1, int(in_channels * se_ratio))
            self.se = self.squeeze_excite_cls(mid, reduced, act, **factory)
        else:
            self.se = nn.Identity()
        if self.expands:
            self.conv_pwl, self.bn3 = pointwise(mid, out_channels), norm(out_channels)
        else:
            self.conv_pw, self.bn2 = pointwise(mid, out_channels), norm(out_channels)

    def check_input(self, x: torch.Tensor) -> None:
        """ValueError/TypeError naming what is wrong with the block's input, before any work."""
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4:
            raise ValueError(f"x must be [N, C, H, W], got shape {tuple(x.shape)}")
        if x.shape[1] != self.in_channels:
            raise ValueError(f"x must have {self.in_channels} channels, got {x.shape[1]} (shape {tuple(x.shape)})")
        if not x.is_floating_point():
            raise TypeError(f"x must be a floating point tensor, got {x.dtype}")
        if x.device != self.conv_dw.weight.device:
            raise ValueError(f"x is on {x.device} but the block's weights are on {self.conv_dw.weight.device}")
        for name, size in (("height", x.shape[2]), ("width", x.shape[3])):
            if size < 1 or conv_out_size(size, self.kernel_size, self.stride, self.padding) < 1:
                raise ValueError(f"x's {name} {size} is too small for kernel_size {self.kernel_size}, padding {self.padding!r}")

    def forward_reference(self, x: torch.Tensor) -> torch.Tensor:
        """The block in plain PyTorch, layer by layer through the submodules (so their hooks run)."""
        self.check_input(x)
        act = ACTIVATIONS[self.act]
        y = x
        if self.expands:
            y = act(self.bn1(self.conv_pw(y)))
        if self.padding == "same":
            (top, bottom), (left, right) = (pad_amounts(n, self.kernel_size, self.stride, "same") for n in x.shape[2:])
            if top or bottom or left or right:
                y = F.pad(y, (left, right, top, bottom))
        y = act(self.depthwise_norm(self.conv_dw(y)))
        y = self.project_norm(self.project_conv(self.se(y)))
        if self.has_residual:
            y = drop_path(y, self.drop_path, self.training) + x
        return y

    # The layers by what they do, since timm's names shift when there is no expand convolution.
    @property
    def depthwise_norm(self) -> nn.Module:
        return self.bn2 if self.expands else self.bn1

    @property
    def project_conv(self) -> nn.Module:
        return self.conv_pwl if self.expands else self.conv_pw

    @property
    def project_norm(self) -> nn.Module:
        return self.bn3 if self.expands else self.bn2

    def extra_repr(self):
        return f"expand_ratio={self.expand_ratio}, se_ratio={self.se_ratio}, act={self.act}, padding={self.padding}, drop_path={self.drop_path}"
