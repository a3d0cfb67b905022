"""The project's own family: efficientnet.MBConv, whose layers FusedMBConv reads itself, and its networks."""

from torch import nn

from effkernels.adapters.parts import Network, Reader, Stage


def read_network(model: nn.Module) -> Network:
    """efficientnet's, whose activation and padding are settings, and whose forward runs stem and head itself where
    ``fused`` is set.
    """
    act = ("config.act", model.config.act)
    stem = Stage(("conv_stem", model.conv_stem), ("bn1", model.bn1), act, ("config.padding", model.config.padding))
    head = Stage(("conv_head", model.conv_head), ("bn2", model.bn2), act)
    bypassed = tuple((name, getattr(model, name)) for name in ("conv_stem", "bn1", "conv_head", "bn2"))
    if not model.averages:
        head = f"global_pool is {model.global_pool}"
    return Network(stem=stem, middle=model.blocks, head=head, tail=model.classifier, bypassed=bypassed)


BLOCKS = {"efficientnet.model.plain_mbconv.MBConv": None}
NETWORKS = {
    "efficientnet.model.network.EfficientNet": Reader(read_network, ("forward", "forward_features", "forward_head"))
}
