"""Whole models: which blocks run fused, and why the others do not."""

import torch
from torch import nn


def explain(model: nn.Module, x: torch.Tensor | None = None) -> dict[str, str | None]:
    """{name of each MBConv-like module of ``model``: None if it runs fused, else the reason why not}.

    With x [N, C, H, W] (an input of the MODEL) the platform, dtype and device are judged too; without it only the blocks are.
    """
    from effkernels.modules.conv_bn_act import FusedDepthwiseConvBNAct
    from effkernels.modules.mbconv import FusedMBConv, MBConvBase

    reasons = {}
    for name, module in model.named_modules():
        if isinstance(module, (FusedMBConv, FusedDepthwiseConvBNAct)):
            reasons[name] = module.why_not_fused(x)
        elif isinstance(module, MBConvBase):
            reasons[name] = "a plain block (built with fused=False)"
    return reasons
