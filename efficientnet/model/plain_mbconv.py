"""The MBConv block in plain PyTorch."""

import torch

from effkernels.modules.mbconv import MBConvBase


class MBConv(MBConvBase):
    """Mobile inverted bottleneck (Sandler et al., 2018; Tan & Le, 2019) made of nn.Conv2d and nn.BatchNorm2d only.

    ``[1x1 expand, BN, act] -> k x k depthwise, BN, act -> squeeze-excite -> 1x1 project, BN -> [drop-path, + input]``.
    The expand step is absent at expand_ratio 1; the residual is there if and only if stride is 1 and in_channels ==
    out_channels. It has the arguments, parameters, buffers and numbers of ``effkernels.FusedMBConv``.

    Shapes: x [N, in_channels, H, W] -> [N, out_channels, H', W'].
    """

    def forward(self, x: torch.Tensor, draws: torch.Tensor | None = None) -> torch.Tensor:
        """Args: draws: fp32 [N] from [0, 1) that decide on drop-path; without them they are drawn here."""
        return self.forward_reference(x, draws)
