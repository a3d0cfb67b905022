"""The MBConv block in plain PyTorch."""

from effkernels.modules.mbconv import MBConvBase


class MBConv(MBConvBase):
    """Mobile inverted bottleneck (Sandler et al., 2018; Tan & Le, 2019) made of nn.Conv2d and nn.BatchNorm2d only.

    ``[1x1 expand, BN, act] -> k x k depthwise, BN, act -> squeeze-excite -> 1x1 project, BN -> [drop-path, + input]``; the
    expand step is absent at expand_ratio 1, the residual there iff stride is 1 and in_channels == out_channels. Same
    arguments, parameters, buffers and numbers as ``effkernels.FusedMBConv``.

    Shapes: x [N, in_channels, H, W] -> [N, out_channels, H', W'].
    """

    def forward(self, x, draws=None):
        """draws: fp32 [N] from [0, 1) for drop_path; else they are drawn here."""
        return self.forward_reference(x, draws)
