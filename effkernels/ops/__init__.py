"""Custom operators of the kernels; importing this registers them."""

from effkernels.ops.autograd import run
from effkernels.ops.head import Head, head, head_backward, head_inference
from effkernels.ops.mbconv import MBConvFunction, mbconv, mbconv_backward, mbconv_inference
from effkernels.ops.single_layers import (
    BatchNormActAdd,
    DepthwiseBlock,
    SqueezeExcite,
    bn_act_add,
    bn_act_add_backward,
    bn_act_add_inference,
    depthwise_block,
    depthwise_block_backward,
    depthwise_block_inference,
    squeeze_excite,
    squeeze_excite_backward,
)
from effkernels.ops.stem import Stem, stem, stem_backward, stem_inference

__all__ = [
    "BatchNormActAdd",
    "DepthwiseBlock",
    "Head",
    "MBConvFunction",
    "SqueezeExcite",
    "Stem",
    "bn_act_add",
    "bn_act_add_backward",
    "bn_act_add_inference",
    "depthwise_block",
    "depthwise_block_backward",
    "depthwise_block_inference",
    "head",
    "head_backward",
    "head_inference",
    "mbconv",
    "mbconv_backward",
    "mbconv_inference",
    "run",
    "squeeze_excite",
    "squeeze_excite_backward",
    "stem",
    "stem_backward",
    "stem_inference",
]
