"""torchvision's blocks and networks: EfficientNet, MobileNetV2 and V3, MnasNet."""

from torch import nn

from effkernels import dispatch
from effkernels.adapters.equivalents import ACTIVATIONS, GATED, path_of
from effkernels.adapters.parts import (
    DENSE,
    Block,
    Network,
    Reader,
    Stage,
    is_global_average,
    squeeze_excite,
    with_drop_path,
)


def leaves(name: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of everything in nested Sequentials, in order."""
    if type(module).forward is not nn.Sequential.forward:
        return [(name, module)]
    return [leaf for inner, child in module.named_children() for leaf in leaves(f"{name}.{inner}", child)]


def read_block(block: nn.Module) -> Block | str:
    """A Sequential of [conv bn act] conv bn act [squeeze-excite] conv bn, nested or not: EfficientNet, MobileNetV2 and
    V3, MnasNet.
    """
    name = next(name for name in ("block", "conv", "layers") if name in block._modules)
    stages, gates, identities = [], [], []
    for leaf in leaves(name, getattr(block, name)):
        layer = leaf[1]
        if isinstance(layer, nn.Conv2d):
            stages.append([leaf, None, None])
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and stages and stages[-1][1] is None:
            stages[-1][1] = leaf
        elif (
            path_of(type(layer)) in ACTIVATIONS
            and stages
            and None not in stages[-1][:2]
            and stages[-1][2] is None
            and not gates
        ):
            stages[-1][2] = leaf
        elif path_of(type(layer)) in GATED and len(stages) in (1, 2) and not gates:
            gates.append((len(stages), leaf))
        else:
            return f"{leaf[0]} is a {type(layer).__name__}, where kernels have no such layer"
    if (
        len(stages) not in (2, 3)
        or any(bn is None for _, bn, _ in stages)
        or (gates and gates[0][0] != len(stages) - 1)
    ):
        return (
            f"{name} is not [1x1 convolution,] depthwise convolution, [squeeze-excite,] 1x1 convolution, each with its "
            "BatchNorm"
        )
    gate = squeeze_excite(*gates[0][1]) if gates else None
    if isinstance(gate, str):
        return gate
    expand, depthwise, project = ([None] if len(stages) == 2 else []) + [Stage(*stage) for stage in stages]
    residual = block.apply_residual if name == "layers" else block.use_res_connect
    found = Block(
        expand=expand,
        depthwise=depthwise,
        gate=gate,
        project=project,
        residual=residual,
        identities=tuple(identities),
        in_place=name == "block",
    )
    return with_drop_path(found, "stochastic_depth", getattr(block, "stochastic_depth", None))


def sequential_stage(name: str, layers: list[tuple[str, nn.Module]]) -> Stage | None:
    """Stage of convolution, BatchNorm and perhaps activation in a Sequential's (name, module) pairs; None for anything
    else.
    """
    if len(layers) not in (2, 3) or not isinstance(layers[0][1], nn.Conv2d):
        return None
    return Stage(*((f"{name}.{inner}", layer) for inner, layer in layers))


def read_network(model: nn.Module) -> Network | str:
    """features: Conv2dNormActivation, blocks, Conv2dNormActivation; MnasNet's layers are one flat Sequential."""
    flat = hasattr(model, "layers")
    name = "layers" if flat else "features"
    container = getattr(model, name)
    if type(container).forward is not nn.Sequential.forward:
        return f"{name} is a {type(container).__name__}"
    children, separable = list(container.named_children()), None
    if flat:
        stem, depthwise, project, head = (
            sequential_stage(name, part) for part in (children[:3], children[3:6], children[6:8], children[-3:])
        )
        if depthwise is not None and project is not None:
            separable = (
                f"{name}.{children[3][0]} to {children[7][0]}",
                Block(None, depthwise, None, project, residual=False),
            )
        ends, blocks = children[:8] + children[-3:], children[8:-3]
    else:
        ends = [children[0], children[-1]]
        if any(type(end).forward is not nn.Sequential.forward for _, end in ends):
            return f"{name} does not begin and end with a convolution, its BatchNorm and activation"
        stem, head = (sequential_stage(f"{name}.{inner}", list(end.named_children())) for inner, end in ends)
        blocks = children[1:-1]
    if stem is None or head is None or (flat and separable is None):
        return f"{name} does not begin and end with a convolution, its BatchNorm and activation"

    def middle(x):
        for _, block in blocks:
            x = block(x)
        return x

    bypassed = [(f"{name}.{inner}", end) for inner, end in ends]
    if hasattr(model, "avgpool"):
        bypassed.append(("avgpool", model.avgpool))
        if not is_global_average(model.avgpool):
            return f"avgpool is {model.avgpool}"
    if dispatch.has_hooks(container) or "forward" in container.__dict__:
        return f"{name} has hooks"
    return Network(
        stem=stem, middle=middle, head=head, tail=model.classifier, bypassed=tuple(bypassed), separable=separable
    )


BLOCKS = {
    "torchvision.models.efficientnet.MBConv": read_block,
    "torchvision.models.mobilenetv2.InvertedResidual": read_block,
    "torchvision.models.mobilenetv3.InvertedResidual": read_block,
    "torchvision.models.mnasnet._InvertedResidual": read_block,
    "torchvision.models.efficientnet.FusedMBConv": DENSE,
}
_METHODS, _NAMES = ("forward", "_forward_impl"), "_forward_impl features avgpool torch flatten classifier"
NETWORKS = {
    "torchvision.models.efficientnet.EfficientNet": Reader(read_network, _METHODS, _NAMES),
    "torchvision.models.mobilenetv3.MobileNetV3": Reader(read_network, _METHODS, _NAMES),
    "torchvision.models.mobilenetv2.MobileNetV2": Reader(
        read_network, _METHODS, "_forward_impl features nn functional adaptive_avg_pool2d torch flatten classifier"
    ),
    "torchvision.models.mnasnet.MNASNet": Reader(read_network, ("forward",), "layers mean classifier"),
}
