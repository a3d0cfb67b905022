"""Custom operators of the kernels; importing this registers them."""

from effkernels.ops.head import head, head_inference
from effkernels.ops.mbconv import mbconv, mbconv_inference
from effkernels.ops.single_layers import (
    bn_act_add,
    bn_act_add_inference,
    depthwise_block,
    depthwise_block_inference,
    squeeze_excite,
)
from effkernels.ops.stem import stem, stem_inference

__all__ = [
    "bn_act_add",
    "bn_act_add_inference",
    "depthwise_block",
    "depthwise_block_inference",
    "head",
    "head_inference",
    "mbconv",
    "mbconv_inference",
    "squeeze_excite",
    "stem",
    "stem_inference",
]
