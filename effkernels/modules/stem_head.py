"""A network's first and last feature layers, given as the plain layers that own the parameters: fused where the kernels
can serve.
"""

import torch
from torch import nn

from effkernels import dispatch, reference
from effkernels.geometry import conv_out_size
from effkernels.modules.mbconv import FusedMBConv
from effkernels.parameters import BatchNormParams
from effkernels.reference import activate


def _why_not_fused(x, name, conv, bn, expected=(1, 1, 0)):
    """``dispatch.why_not_fused`` for a convolution that must have ``expected`` kernel size, stride and padding, and its
    BatchNorm.
    """
    if dispatch.only_plain_on_cpu(x):
        return "the input is on the CPU"
    if x.shape[0] == 0:
        return "the input is empty"
    if not isinstance(conv, nn.Conv2d):
        return f"{name} is a {type(conv).__name__}"
    if conv.in_channels != x.shape[1] or getattr(bn, "num_features", None) != conv.out_channels:
        return f"{name} does not fit its input or its BatchNorm"
    return dispatch.why_not_fused(x, ((name, conv), ("bn", bn)), conv.out_channels, expected)


def stem(
    x: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str, padding: str, *, fused: bool = True
) -> torch.Tensor:
    """``act(bn(conv(x)))`` of a k x k convolution of images; under padding "same" conv itself has none and x is padded
    here.
    """
    k, stride = (conv.kernel_size[0], conv.stride[0]) if isinstance(conv, nn.Conv2d) else (3, 2)
    expected = (3, stride if stride in (1, 2) else 2, 1 if padding == "symmetric" else 0)
    if (
        fused
        and not dispatch.recording(x)
        and _why_not_fused(x=x, name="conv_stem", conv=conv, bn=bn, expected=expected) is None
    ):
        from effkernels import functional

        return functional.stem(x, conv.weight, BatchNormParams.of(bn), stride=stride, padding=padding, act=act)
    if padding != "symmetric" and not dispatch.pads_itself(conv):
        x = reference.pad(x, k, stride, padding)
    return activate(bn(conv(x)), act)


def stem_and_block(
    x: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str, padding: str, block: FusedMBConv
) -> torch.Tensor | None:
    """``block(stem(x, ...))`` in training as one autograd node, without storing the stem's output; None where that
    cannot be.

    It can where both are fused, and ``block`` neither expands nor has a residual, as a network's first.
    """
    if block.expands or block.has_residual or (block.act, block.padding) != (act, padding) or dispatch.has_hooks(block):
        return None
    if not (bn.training or block.training) or type(block).forward is not FusedMBConv.forward:
        return None
    stride = conv.stride[0] if isinstance(conv, nn.Conv2d) else 0
    if (
        stride not in (1, 2)
        or _why_not_fused(
            x=x, name="conv_stem", conv=conv, bn=bn, expected=(3, stride, 1 if padding == "symmetric" else 0)
        )
        is not None
    ):
        return None
    size = (conv_out_size(n, 3, stride, padding) for n in x.shape[2:])
    inside = x.new_empty(1, dtype=dispatch.compute_dtype(x)).expand(x.shape[0], conv.out_channels, *size)
    if conv.out_channels != block.in_channels or block.why_not_fused(inside) is not None:
        return None
    return block.fused(x, stem=(conv.weight, BatchNormParams.of(bn)), stem_stride=stride)


def pooled_head(x: torch.Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, act: str) -> torch.Tensor:
    """``act(bn(conv(x)))`` of a 1x1 convolution, averaged over the image: [N, K, H, W] -> [N, O]."""
    if _why_not_fused(x, "conv_head", conv, bn) is None:
        from effkernels import functional

        return functional.head(x, conv.weight, BatchNormParams.of(bn), act=act)
    return activate(bn(conv(x)), act).mean((2, 3))
