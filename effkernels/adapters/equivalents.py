"""Classes of every library that compute what one of torch.nn computes, by path, so that no library is imported."""

from torch import nn

# Classes that compute what one of torch.nn computes, or (for "same") what it does after TensorFlow's padding.
NORMS = {
    "timm.layers.norm_act.BatchNormAct2d": nn.BatchNorm2d,
    "timm.layers.norm_act.SyncBatchNormAct": nn.SyncBatchNorm,
}
FIXED_CONVS = {
    "torch.nn.modules.conv.Conv2d",
    "efficientnet_pytorch.utils.Conv2dStaticSamePadding",
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetDepthwiseConv2d",
}
SAME_CONVS = {"timm.layers.conv2d_same.Conv2dSame", "efficientnet_pytorch.utils.Conv2dDynamicSamePadding"}
ACTIVATIONS = {
    "torch.nn.modules.activation.SiLU": "silu",
    "torch.nn.modules.activation.ReLU": "relu",
    "torch.nn.modules.activation.ReLU6": "relu6",
    "torch.nn.modules.activation.Hardswish": "hard_swish",
    "torch.nn.modules.activation.GELU": "gelu",
    "torch.nn.modules.activation.Sigmoid": "sigmoid",
    "torch.nn.modules.activation.Hardsigmoid": "hard_sigmoid",
    "torch.nn.modules.linear.Identity": "identity",
    "timm.layers.activations.Swish": "silu",
    "timm.layers.activations.HardSwish": "hard_swish",
    "timm.layers.activations.GELU": "gelu",
    "timm.layers.activations.Sigmoid": "sigmoid",
    "timm.layers.activations.HardSigmoid": "hard_sigmoid",
    "efficientnet_pytorch.utils.Swish": "silu",
    "efficientnet_pytorch.utils.MemoryEfficientSwish": "silu",
    "transformers.activations.SiLUActivation": "silu",
    "transformers.activations.GELUActivation": "gelu",
}
# Squeeze-excite modules: names of the two convolutions, the activation and the gate function between them, and of what
# must be an identity.
GATED = {
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate", ()),
    "timm.layers.squeeze_excite.SEModule": ("fc1", "act", "fc2", "gate", ("bn",)),
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation", ()),
    "torchvision.models.mobilenetv3.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation", ()),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": (
        "reduce",
        "act_reduce",
        "expand",
        "act_expand",
        (),
    ),
}


def path_of(cls: type) -> str:
    """A class by where it is defined, as the tables above name it."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_identity(module: nn.Module) -> bool:
    """Whether a module returns what it is given."""
    return path_of(type(module)) == "torch.nn.modules.linear.Identity"
