"""Stem and head of the libraries' networks: convolution, BatchNorm and activation around the blocks, and the pooling after them.

A reader takes a network and returns a ``Network``: its first and last layers and what its own forward does between and after them. Only
a whole forward is fused (feature extraction runs the network's own), and only of a forward that is, by the names in its code, the one
known here: a library may change it.
"""

from typing import NamedTuple

import torch.nn.functional as F
from torch import nn

from effkernels import dispatch
from effkernels.adapters import blocks as mbconv
from effkernels.adapters.blocks import ACTS, FIXED_CONVS, NORMS, SAME_CONVS, Block, Stage, activation, edited, path_of
from effkernels.adapters.blocks import padding as padding_rule
from effkernels.parameters import BatchNormParams


class Network(NamedTuple):
    """What a reader finds in a network."""

    stem: Stage
    middle: object  # what comes between stem and head, a function of one tensor
    head: Stage | str  # the 1x1 convolution before the pooling, or why there is none that kernels have
    tail: object  # what follows the pooling (the stem's successor ``middle``, where there is no head)
    bypassed: tuple  # (name, module) of everything inside that is not called by name any more
    separable: tuple[str, Block] | None = None  # after the stem: a block whose layers are no module by themselves


def _is(module, path):
    return path_of(type(module)) == path


def _average(pool):
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))


def _timm_stage(model, conv, bn):
    norm = getattr(model, bn)
    act = getattr(norm, "act", None)
    return Stage((conv, getattr(model, conv)), (bn, norm), None if act is None else (f"{bn}.act", act))


def _timm(model):
    if model.grad_checkpointing:
        return "grad_checkpointing is on"
    stem, bypassed = _timm_stage(model, "conv_stem", "bn1"), [("conv_stem", model.conv_stem), ("bn1", model.bn1)]
    if not hasattr(model, "bn2"):  # MobileNetV3
        return Network(stem, model.blocks, "its head pools before its convolution", model.forward_head, tuple(bypassed))
    pool = model.global_pool
    if not _is(pool, "timm.layers.adaptive_avgmax_pool.SelectAdaptivePool2d") or pool.pool_type != "avg" or pool.is_identity():
        head, tail = f"global_pool is {pool}", lambda x: model.forward_head(model.bn2(model.conv_head(x)))
    elif type(pool.flatten) is not nn.Flatten:
        head, tail = "global_pool does not flatten", lambda x: model.forward_head(model.bn2(model.conv_head(x)))
    else:
        head = _timm_stage(model, "conv_head", "bn2")
        bypassed += [("conv_head", model.conv_head), ("bn2", model.bn2), ("global_pool", pool)]

        def tail(x):
            return model.classifier(F.dropout(x, model.drop_rate, model.training) if model.drop_rate > 0 else x)

    return Network(stem, model.blocks, head, tail, tuple(bypassed))


def _sequential_stage(name, layers):
    """Stage of convolution, BatchNorm and perhaps activation in a Sequential's (name, module) pairs; None for anything else."""
    if len(layers) not in (2, 3) or not isinstance(layers[0][1], nn.Conv2d):
        return None
    return Stage(*((f"{name}.{inner}", layer) for inner, layer in layers))


def _torchvision(model):
    """features: Conv2dNormActivation, blocks, Conv2dNormActivation; MnasNet's layers are one flat Sequential."""
    flat = hasattr(model, "layers")
    name = "layers" if flat else "features"
    container = getattr(model, name)
    children, separable = list(container.named_children()), None
    if flat:
        stem, depthwise, project, head = (
            _sequential_stage(name, part) for part in (children[:3], children[3:6], children[6:8], children[-3:])
        )
        if depthwise is not None and project is not None:
            separable = f"{name}.{children[3][0]} to {children[7][0]}", Block(None, depthwise, None, project, residual=False)
        ends, blocks = children[:8] + children[-3:], children[8:-3]
    else:
        ends = [children[0], children[-1]]
        if any(type(end).forward is not nn.Sequential.forward for _, end in ends):
            return f"{name} does not begin and end with a convolution, its BatchNorm and activation"
        stem, head = (_sequential_stage(f"{name}.{inner}", list(end.named_children())) for inner, end in ends)
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
        if not _average(model.avgpool):
            return f"avgpool is {model.avgpool}"
    if dispatch.has_hooks(container) or "forward" in container.__dict__:
        return f"{name} has hooks"
    return Network(stem, middle, head, model.classifier, tuple(bypassed), separable)


def _lukemelas(model):
    act, settings = ("_swish", model._swish), model._global_params
    if not settings.include_top or not _average(model._avg_pooling):
        return "it has no classifier (include_top)"

    def stage(conv, bn):
        layer = getattr(model, conv)
        pad = getattr(layer, "static_padding", None)
        return Stage((conv, layer), (bn, getattr(model, bn)), act, None if pad is None else (f"{conv}.static_padding", pad))

    def middle(x):
        for index, block in enumerate(model._blocks):
            rate = settings.drop_connect_rate
            x = block(x, drop_connect_rate=rate * index / len(model._blocks) if rate else rate)
        return x

    names = ("_conv_stem", "_bn0", "_conv_head", "_bn1", "_swish", "_avg_pooling")
    bypassed = tuple((name, getattr(model, name)) for name in names)
    return Network(stage("_conv_stem", "_bn0"), middle, stage("_conv_head", "_bn1"), lambda x: model._fc(model._dropout(x)), bypassed)


def _own(model):
    """efficientnet's, whose activation and padding are settings, and whose forward runs stem and head itself where ``fused`` is set."""
    act = ("config.act", model.config.act)
    stem = Stage(("conv_stem", model.conv_stem), ("bn1", model.bn1), act, ("config.padding", model.config.padding))
    head = Stage(("conv_head", model.conv_head), ("bn2", model.bn2), act)
    bypassed = tuple((name, getattr(model, name)) for name in ("conv_stem", "bn1", "conv_head", "bn2"))
    return Network(stem, model.blocks, head, model.classifier, bypassed)


def _transformers(stem):
    """EfficientNetEmbeddings, a module of its own; the head's features are a result of the model, so they must be stored."""
    layers = [(name, getattr(stem, name)) for name in ("convolution", "batchnorm", "activation", "padding")]
    return Network(Stage(*layers), nn.Identity(), "the features before its pooling are a result of the model", nn.Identity(), tuple(layers))


_TIMM, _VISION = ("forward", "forward_features", "forward_head"), ("forward", "_forward_impl")
_COMMON = "forward_features forward_head conv_stem bn1 grad_checkpointing torch jit is_scripting checkpoint_seq blocks global_pool "
_COMMON += "drop_rate F dropout training classifier conv_head "
# class: (reader, methods, the names in their code)
NETWORKS = {
    "efficientnet.model.network.EfficientNet": (_own, _TIMM, None),
    "timm.models.efficientnet.EfficientNet": (_timm, _TIMM, _COMMON + "bn2"),
    "timm.models.mobilenetv3.MobileNetV3": (_timm, _TIMM, _COMMON + "norm_head act2 flatten"),
    "torchvision.models.efficientnet.EfficientNet": (_torchvision, _VISION, "_forward_impl features avgpool torch flatten classifier"),
    "torchvision.models.mobilenetv3.MobileNetV3": (_torchvision, _VISION, "_forward_impl features avgpool torch flatten classifier"),
    "torchvision.models.mobilenetv2.MobileNetV2": (
        _torchvision, _VISION, "_forward_impl features nn functional adaptive_avg_pool2d torch flatten classifier",
    ),
    "torchvision.models.mnasnet.MNASNet": (_torchvision, ("forward",), "layers mean classifier"),
    "efficientnet_pytorch.model.EfficientNet": (
        _lukemelas, ("forward", "extract_features"),
        "extract_features _avg_pooling _global_params include_top flatten _dropout _fc _swish _bn0 _conv_stem enumerate _blocks "
        "drop_connect_rate float len _bn1 _conv_head",
    ),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetEmbeddings": (
        _transformers, ("forward",), "padding convolution batchnorm activation",
    ),
}  # fmt: skip


def known(cls: type):
    """(reader, None) or (None, why its forward is not fused) of a network's class; None for any other class."""
    for base in cls.__mro__:
        found = NETWORKS.get(path_of(base))
        if found is not None:
            reader, methods, names = found
            if any(getattr(cls, method, None) is not getattr(base, method, None) for method in methods):
                return None, f"{cls.__name__} has a forward of its own"
            used = {name for method in methods for name in getattr(base, method).__code__.co_names}
            if names is not None and used != set(names.split()):
                return None, f"{base.__name__}'s forward is not the one known here"
            return reader, None
    return None


def methods_of(cls: type) -> tuple[str, ...]:
    """What a known network's forward consists of."""
    return next(NETWORKS[path_of(base)][1] for base in cls.__mro__ if path_of(base) in NETWORKS)


def runs_itself(cls: type) -> bool:
    """Whether a network's own forward takes kernels for stem and head where its attribute ``fused`` is set."""
    return any(path_of(base) in NETWORKS and NETWORKS[path_of(base)][0] is _own for base in cls.__mro__)


def argument_of(cls: type) -> str:
    return cls.forward.__code__.co_varnames[1]


def _stage_problem(stage, role):
    conv, bn = stage.conv, stage.bn
    if path_of(type(conv[1])) not in FIXED_CONVS | SAME_CONVS:
        return f"{conv[0]} is a {type(conv[1]).__name__}"
    k, stride = conv[1].kernel_size[0], conv[1].stride[0]
    if role == "conv_stem" and (k != 3 or stride not in (1, 2)):
        return f"{conv[0]} has kernel_size {k} and stride {stride}, kernels have 3 and stride 1 or 2"
    rule = padding_rule(stage)
    if rule is None:
        return f"{(stage.pad or conv)[0]} pads neither symmetrically nor as TensorFlow does"
    own = dispatch.fixed_padding(conv[1])
    expected = (k, stride, 0 if own is None else own[0])
    shape = (conv[1].out_channels, conv[1].in_channels)
    problem = dispatch.layer_problem(conv[0], conv[1], expected, shape, role=role, kind=nn.Conv2d)
    problem = problem or dispatch.layer_problem(bn[0], bn[1], shape=shape[:1], role="bn", kind=NORMS.get(path_of(type(bn[1]))))
    drop = getattr(bn[1], "drop", None)
    if problem is None and drop is not None and type(drop) is not nn.Identity:
        return f"{bn[0]}.drop is a {type(drop).__name__}"
    if problem is None and activation(stage.act, ACTS, "identity") is None:
        return f"{stage.act[0]} is {stage.act[1]}, not one of {', '.join(ACTS)}"
    return problem


def judge(network: Network | str) -> str | None:
    """Why kernels cannot serve a network's stem, or its head where it has one that they know; platform and tensors are not asked."""
    if isinstance(network, str):
        return network
    for name, module in network.bypassed:
        if dispatch.has_hooks(module):
            return f"{name} has hooks"
        if "forward" in module.__dict__:
            return f"{name}.forward was replaced"
        problem = edited(module, f"{name}.")
        if problem is not None:
            return problem
    problem = _stage_problem(network.stem, "conv_stem")
    if problem is None and not isinstance(network.head, str):
        problem = _stage_problem(network.head, "conv_head")
    if problem is None and network.separable is not None:
        verdict = _judge_separable(network)
        problem = verdict if isinstance(verdict, str) else None
    return problem


def _judge_separable(network):
    _, block = network.separable
    return mbconv.judge_layers(block, mbconv.layers_of(block))


def layers_of(network: Network):
    """(name, module) of every layer with parameters that kernels stand in for."""
    stages = [network.stem] if isinstance(network.head, str) else [network.stem, network.head]
    layers = [layer for stage in stages for layer in (stage.conv, stage.bn)]
    if network.separable is not None:
        layers += [(name, layer) for _, name, layer in mbconv.layers_of(network.separable[1])]
    return layers


def run(x, network: Network):
    """The whole network, stem, head and what is separable after the stem on kernels."""
    from effkernels import functional

    stem, head = network.stem, network.head
    conv, act = stem.conv[1], activation(stem.act, ACTS, "identity")
    norm = BatchNormParams.of(stem.bn[1])
    x = functional.stem(x, conv.weight, norm, stride=conv.stride[0], padding=padding_rule(stem), act=act)
    if network.separable is not None:
        x = mbconv.run(x, network.separable[1], _judge_separable(network), norm.training)
    x = network.middle(x)
    if not isinstance(head, str):
        x = functional.head(x, head.conv[1].weight, BatchNormParams.of(head.bn[1]), act=activation(head.act, ACTS, "identity"))
    return network.tail(x)
