"""Squeeze-excite as a module: the plain layers, and the fused module that shares them."""

import torch
from torch import nn

from effkernels.reference import ACTIVATIONS, GATES


class SqueezeExcite(nn.Module):
    """Plain squeeze-excite: ``x * gate(W_e act(W_r mean_hw(x) + b_r) + b_e)``, with timm's names.

    Args:
        channels: channels of the tensor that is gated (E of an MBConv block).
        reduced_channels: width of the bottleneck; in EfficientNet ``max(1, int(0.25 * block input channels))``.
        act, gate: names from ``effkernels.reference.ACTIVATIONS`` and ``GATES``.

    Shapes: [N, channels, H, W] in and out; both convolutions are 1x1 with bias.
    """

    def __init__(self, channels, reduced_channels, act="silu", gate="sigmoid", *, device=None, dtype=None):
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
        pooled = x.mean((2, 3), keepdim=True)
        return x * GATES[self.gate](self.conv_expand(ACTIVATIONS[self.act](self.conv_reduce(pooled))))

    def extra_repr(self):
        return f"act={self.act}, gate={self.gate}"
