"""Depthwise convolution + BatchNorm + activation as one module."""

import torch
from torch import nn

from effkernels import dispatch, reference
from effkernels.geometry import check_activation, check_conv_args
from effkernels.parameters import BatchNormParams
from effkernels.reference import ACTIVATIONS, activate


class FusedDepthwiseConvBNAct(nn.Module):
    """``act(BN(depthwise_kxk(x)))`` on fused kernels, with submodules ``conv`` (no bias) and ``bn``.

    Args:
        channels: C. kernel_size: odd, up to ``effkernels.geometry.LARGEST_KERNEL_SIZE``. stride: 1 or 2.
        act: a name in ``effkernels.reference.ACTIVATIONS``. padding: one in ``effkernels.geometry.PADDINGS``.
        bn_eps, bn_momentum: of the BatchNorm.

    Shapes: x [N, C, H, W] -> [N, C, H', W'], channels_last. Dtypes, fallback and errors as ``FusedMBConv``.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        act: str = "silu",
        padding: str = "symmetric",
        bn_eps: float = 1e-3,
        bn_momentum: float | None = 0.01,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not isinstance(channels, int) or isinstance(channels, bool) or channels < 1:
            raise ValueError(f"channels must be an integer >= 1, got {channels!r}")
        check_conv_args(kernel_size, stride, padding)
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {act!r}")
        self.kernel_size, self.stride, self.padding, self.act = kernel_size, stride, padding, act
        symmetric = (kernel_size - 1) // 2 if padding == "symmetric" else 0
        factory = {"device": device, "dtype": dtype}
        self.conv = nn.Conv2d(
            channels, channels, kernel_size, stride, symmetric, groups=channels, bias=False, **factory
        )
        self.bn = nn.BatchNorm2d(channels, eps=bn_eps, momentum=bn_momentum, **factory)

    def check_input(self, x: torch.Tensor) -> None:
        """ValueError/TypeError naming what is wrong with x."""
        weight, channels = (getattr(self.conv, name, None) for name in ("weight", "in_channels"))
        check_activation(
            x=x,
            weight=weight,
            channels=channels,
            kernel_size=self.kernel_size,
            stride=self.stride,
            padding=self.padding,
        )

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernels will serve x (or, without x, this module at all), else the reason why not."""
        pad = (self.kernel_size - 1) // 2 if self.padding == "symmetric" else 0
        C = getattr(self.conv, "in_channels", 1)
        # Whole blocks have it fused.
        judge = (lambda: "bn is a SyncBatchNorm") if isinstance(self.bn, nn.SyncBatchNorm) else None
        return dispatch.why_not_fused(
            x=x,
            layers=self.named_children(),
            largest=C,
            depthwise=(self.kernel_size, self.stride, pad),
            shapes={"bn": (C,)},
            judge=judge,
        )

    def forward_reference(self, x: torch.Tensor) -> torch.Tensor:
        """In plain PyTorch."""
        if not dispatch.recording(x):
            self.check_input(x)
        if self.padding != "symmetric" and not dispatch.pads_itself(self.conv):
            x = reference.pad(x, self.kernel_size, self.stride, self.padding)
        return activate(self.bn(self.conv(x)), self.act)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C, H', W']: kernels where ``why_not_fused`` is None, the plain layers elsewhere."""
        if dispatch.recording(x):
            return self.forward_reference(x)
        self.check_input(x)
        if dispatch.only_plain_on_cpu(x) or self.why_not_fused(x) is not None:
            return self.forward_reference(x)
        from effkernels import functional

        return functional.depthwise_conv_bn_act(
            x, self.conv.weight, BatchNormParams.of(self.bn), stride=self.stride, padding=self.padding, act=self.act
        )

    def extra_repr(self) -> str:
        return f"act={self.act}, padding={self.padding}"
