"""efficientnet_pytorch's blocks and networks (Luke Melas-Kyriazi's EfficientNet)."""

import torch
from torch import nn

from effkernels import dispatch
from effkernels.adapters.parts import Block, Gate, Network, Reader, Stage, is_global_average


def draw_drop_connect(x: torch.Tensor, rate: float) -> torch.Tensor:
    """efficientnet_pytorch's: floor(keep + uniform) / keep, the uniform in the compute dtype."""
    keep = 1 - rate
    uniform = torch.rand(x.shape[0], dtype=dispatch.compute_dtype(x), device=x.device)
    return (torch.floor(keep + uniform) / keep).float()


def read_block(block: nn.Module, drop_connect_rate: float | None = None) -> Block | str:
    """MBConvBlock, whose forward takes the rate of drop-connect."""
    args, act = block._block_args, ("_swish", block._swish)

    def stage(conv, bn, act=act):
        layer = getattr(block, conv)
        pad = getattr(layer, "static_padding", None)
        return Stage(
            (conv, layer), (bn, getattr(block, bn)), act, None if pad is None else (f"{conv}.static_padding", pad)
        )

    identities = []
    gate = None
    if block.has_se:
        gate = Gate(("_se_reduce", block._se_reduce), act, ("_se_expand", block._se_expand), None)
        for name in ("_se_reduce", "_se_expand"):
            if (pad := getattr(getattr(block, name), "static_padding", None)) is not None:
                identities.append((f"{name}.static_padding", pad))
    residual = block.id_skip and args.stride == 1 and args.input_filters == args.output_filters
    rate = drop_connect_rate if residual and block.training and drop_connect_rate else 0.0
    return Block(
        expand=stage("_expand_conv", "_bn0") if args.expand_ratio != 1 else None,
        depthwise=stage("_depthwise_conv", "_bn1"),
        gate=gate,
        project=stage("_project_conv", "_bn2", None),
        residual=residual,
        identities=tuple(identities),
        drop_rate=rate,
        draw_branch_scale=draw_drop_connect,
    )


def read_network(model: nn.Module) -> Network | str:
    """EfficientNet, whose forward gives each block a rate of drop-connect that grows with its depth."""
    act, settings = ("_swish", model._swish), model._global_params
    if not settings.include_top or not is_global_average(model._avg_pooling):
        return "it has no classifier (include_top)"

    def stage(conv, bn):
        layer = getattr(model, conv)
        pad = getattr(layer, "static_padding", None)
        return Stage(
            (conv, layer), (bn, getattr(model, bn)), act, None if pad is None else (f"{conv}.static_padding", pad)
        )

    def middle(x):
        for index, block in enumerate(model._blocks):
            rate = settings.drop_connect_rate
            x = block(x, drop_connect_rate=rate * index / len(model._blocks) if rate else rate)
        return x

    names = ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_swish", "_avg_pooling")
    bypassed = tuple((name, getattr(model, name)) for name in names)
    return Network(
        stem=stage("_conv_stem", "_bn0"),
        middle=middle,
        head=stage("_conv_head", "_bn1"),
        tail=lambda x: model._fc(model._dropout(x)),
        bypassed=bypassed,
    )


BLOCKS = {"efficientnet_pytorch.model.MBConvBlock": read_block}
NETWORKS = {
    "efficientnet_pytorch.model.EfficientNet": Reader(
        read_network,
        ("forward", "extract_features"),
        "extract_features _avg_pooling _global_params include_top flatten _dropout _fc _swish _bn0 _conv_stem "
        "enumerate _blocks "
        "drop_connect_rate float len _bn1 _conv_head",
    )
}
