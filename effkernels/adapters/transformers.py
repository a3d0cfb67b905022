"""Hugging Face's EfficientNet: its blocks, and its stem, which is a module of its own."""

from torch import nn

from effkernels.adapters.equivalents import path_of
from effkernels.adapters.parts import Block, Network, Reader, Stage, squeeze_excite

_MODULE = "transformers.models.efficientnet.modeling_efficientnet"
# The parts of a block whose own forward is a row of layers.
PARTS = {
    "expansion": "EfficientNetExpansionLayer",
    "depthwise_conv": "EfficientNetDepthwiseLayer",
    "projection": "EfficientNetFinalBlockLayer",
}


def read_block(block: nn.Module) -> Block | str:
    """EfficientNetBlock: expansion, depthwise layer, squeeze-excite and projection, a module each."""
    for owner, cls in PARTS.items():
        part = block._modules.get(owner)
        if part is not None and path_of(type(part)) != f"{_MODULE}.{cls}":
            return f"{owner} is a {type(part).__name__}"

    def stage(owner, conv, bn, act=None):
        layers = getattr(block, owner)
        return [(f"{owner}.{name}", getattr(layers, name)) for name in (conv, bn, act) if name is not None]

    depthwise = stage("depthwise_conv", "depthwise_conv", "depthwise_norm", "depthwise_act")
    if block.depthwise_conv.stride == 2:
        depthwise.append(("depthwise_conv.depthwise_conv_pad", block.depthwise_conv.depthwise_conv_pad))
    gate = squeeze_excite("squeeze_excite", block.squeeze_excite)
    if isinstance(gate, str):
        return gate
    projection = block.projection
    residual, dropout, now = projection.apply_dropout, projection.dropout, None
    if residual and dropout.training and dropout.p > 0:
        now = f"in training, projection.dropout (p={dropout.p:.3g}) drops single elements, not samples"
    return Block(
        expand=Stage(*stage("expansion", "expand_conv", "expand_bn", "expand_act"))
        if block.expand_ratio != 1
        else None,
        depthwise=Stage(*depthwise),
        gate=gate,
        project=Stage(*stage("projection", "project_conv", "project_bn")),
        residual=residual,
        now=now,
    )


def read_stem(stem: nn.Module) -> Network | str:
    """EfficientNetEmbeddings, a module of its own; the head's features are a result of the model, so they must be
    stored.
    """
    layers = [(name, getattr(stem, name)) for name in ("convolution", "batchnorm", "activation", "padding")]
    return Network(
        stem=Stage(*layers),
        middle=nn.Identity(),
        head="the features before its pooling are a result of the model",
        tail=nn.Identity(),
        bypassed=tuple(layers),
    )


BLOCKS = {f"{_MODULE}.EfficientNetBlock": read_block}
NETWORKS = {
    f"{_MODULE}.EfficientNetEmbeddings": Reader(read_stem, ("forward",), "padding convolution batchnorm activation")
}
