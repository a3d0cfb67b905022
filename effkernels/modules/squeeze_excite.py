"""Squeeze-excite as a module: the plain layers, and the fused module that shares them."""

import torch
from torch import nn

from effkernels import dispatch
from effkernels.geometry import check_activation
from effkernels.parameters import SqueezeExciteParams
from effkernels.reference import ACTIVATIONS, GATES, activate


class SqueezeExcite(nn.Module):
    """Plain squeeze-excite: ``x * gate(W_e act(W_r mean_hw(x) + b_r) + b_e)``, with timm's names.

    Args:
        channels: channels of the tensor that is gated (E of an MBConv block).
        reduced_channels: width of the bottleneck; in EfficientNet ``max(1, int(0.25 * block input channels))``.
        act, gate: names from ``effkernels.reference.ACTIVATIONS`` and ``GATES``.

    Shapes: [N, channels, H, W] in and out; both convolutions are 1x1 with bias.
    """

    def __init__(
        self,
        channels: int,
        reduced_channels: int,
        act: str = "silu",
        gate: str = "sigmoid",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        for name, value in (("channels", channels), ("reduced_channels", reduced_channels)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {act!r}")
        if gate not in GATES:
            raise ValueError(f"gate must be one of {sorted(GATES)}, got {gate!r}")
        factory = {"device": device, "dtype": dtype}
        self.act, self.gate = act, gate
        self.conv_reduce = nn.Conv2d(channels, reduced_channels, 1, bias=True, **factory)
        self.conv_expand = nn.Conv2d(reduced_channels, channels, 1, bias=True, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W], each channel of an image times its gate, in x's dtype."""
        return self.forward_reference(x)

    def forward_reference(self, x: torch.Tensor) -> torch.Tensor:
        """In plain PyTorch, through the submodules (so their hooks run)."""
        pooled = x.mean((2, 3), keepdim=True)
        gate = self.gate if callable(self.gate) else GATES[self.gate]  # a module may have been put in its place
        return x * gate(self.conv_expand(activate(self.conv_reduce(pooled), self.act)))

    def extra_repr(self) -> str:
        return f"act={self.act}, gate={self.gate}"


class FusedSqueezeExcite(SqueezeExcite):
    """``SqueezeExcite`` on fused kernels: pooling, each of both layers, and the product, a launch each.

    Same arguments, parameters and numbers. x [N, channels, H, W] fp32, bf16 or fp16; pooled sums, both layers and the
    gate are fp32. Runs the plain layers where kernels cannot (``why_not_fused(x)`` tells the reason).
    """

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernels will serve x (or, without x, this module at all), else the reason why not."""
        C, R = (getattr(self.conv_reduce, name, 1) for name in ("in_channels", "out_channels"))
        return dispatch.why_not_fused(
            x, self.named_children(), C, shapes={"conv_reduce": (R, C), "conv_expand": (C, R)}
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W], each channel of an image times its gate, in x's dtype."""
        if dispatch.recording(x):
            return self.forward_reference(x)
        check_activation(x, getattr(self.conv_reduce, "weight", None), getattr(self.conv_reduce, "in_channels", None))
        if dispatch.only_plain_on_cpu(x) or self.why_not_fused(x) is not None:
            return self.forward_reference(x)
        from effkernels import functional

        return functional.squeeze_excite(x, SqueezeExciteParams.of(self))
