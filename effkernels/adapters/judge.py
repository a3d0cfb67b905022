"""The judge of what readers find: the settings that kernels take, or the reason why they cannot serve a block or a
network.

Platform, dtype and device are not asked here (``effkernels.dispatch`` does).
"""

from typing import NamedTuple

from torch import nn

from effkernels import dispatch, reference
from effkernels.adapters.equivalents import ACTIVATIONS, FIXED_CONVS, NORMS, SAME_CONVS, is_identity, path_of
from effkernels.adapters.parts import Block, Network, Stage
from effkernels.geometry import LARGEST_KERNEL_SIZE, PADDINGS, pad_amounts

ACTS, GATES = tuple(reference.ACTIVATIONS), tuple(reference.GATES)


def activation(named: tuple[str, nn.Module | str] | None, accepted: tuple[str, ...], default: str) -> str | None:
    """Its name in ``effkernels.reference``, or None if kernels do not have it."""
    if named is None:
        return default
    module = named[1]
    name = module if isinstance(module, str) else ACTIVATIONS.get(path_of(type(module)))
    if name == "gelu" and getattr(module, "approximate", "none") != "none":
        return None
    return name if name in accepted else None


def padding_rule(stage: Stage) -> str | None:
    """The rule, of ``effkernels.geometry.PADDINGS``, by which a stage's convolution is padded; None if there is
    none.
    """
    conv = stage.conv[1]
    k, stride = conv.kernel_size[0], conv.stride[0]
    if path_of(type(conv)) in SAME_CONVS:
        return "same"
    own = dispatch.fixed_padding(conv)
    if own is None:
        return None
    left, right, top, bottom = own[1], own[1], own[0], own[0]
    pad = None if stage.pad is None else stage.pad[1]
    if isinstance(pad, str):
        expected = (k - 1) // 2 if pad == "symmetric" else 0
        return pad if own == (expected, expected) else None
    if pad is not None and not is_identity(pad):
        if path_of(type(pad)) != "torch.nn.modules.padding.ZeroPad2d":
            return None
        left, right, top, bottom = (a + b for a, b in zip(pad.padding, (left, right, top, bottom), strict=True))
    for rule in PADDINGS:
        if rule != "same" and (left, right) == (top, bottom) == pad_amounts(0, k, stride, rule):
            return rule
    return None


class Verdict(NamedTuple):
    """What the functional form takes besides tensors."""

    padding: str
    act: str
    se_act: str
    gate: str


def layers_of_block(block: Block) -> list[tuple[str, str, nn.Module]]:
    """(role: the name in FusedMBConv, name in the block, module) of every layer with parameters."""
    stages = [("conv_pw", "bn1", block.expand), ("conv_dw", "bn2", block.depthwise), ("conv_pwl", "bn3", block.project)]
    layers = []
    for conv, bn, stage in stages:
        if stage is not None:
            layers += [(conv, *stage.conv), (bn, *stage.bn)]
    if block.gate is not None:
        layers += [("se.conv_reduce", *block.gate.reduce), ("se.conv_expand", *block.gate.expand)]
    return layers


def judge_block(module: nn.Module, block: Block, layers: list[tuple[str, str, nn.Module]]) -> Verdict | str:
    """The settings of a block that kernels serve, or the reason, as a string, why they do not; platform and tensors are
    not asked.
    """
    return edited(module, "") or judge_layers(block, layers)


def judge_layers(block: Block, layers: list[tuple[str, str, nn.Module]]) -> Verdict | str:
    """As ``judge_block``, of layers that are no module by themselves."""
    for name, inner in block.identities:
        if not is_identity(inner):
            return f"{name} is a {type(inner).__name__}"
    conv_dw = block.depthwise.conv[1]
    problem = _type_problem(layers)
    if problem is not None:
        return problem
    k, stride = conv_dw.kernel_size[0], conv_dw.stride[0]
    if k % 2 == 0 or k > LARGEST_KERNEL_SIZE:
        return f"{block.depthwise.conv[0]} has kernel_size {k}, kernels have odd ones up to {LARGEST_KERNEL_SIZE}"
    if stride not in (1, 2):
        return f"{block.depthwise.conv[0]} has stride {stride}, kernels have 1 and 2"
    own = dispatch.fixed_padding(conv_dw)
    E, O = conv_dw.out_channels, block.project.conv[1].out_channels
    I = block.expand.conv[1].in_channels if block.expand is not None else E
    R = block.gate.reduce[1].out_channels if block.gate is not None else 0
    shapes = {
        "conv_pw": (E, I),
        "bn1": (E,),
        "conv_dw": (E, 1),
        "bn2": (E,),
        "se.conv_reduce": (R, E),
        "se.conv_expand": (E, R),
        "conv_pwl": (O, E),
        "bn3": (O,),
    }
    for role, name, layer in layers:
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else NORMS.get(path_of(type(layer)))
        depthwise = (k, stride, own[0] if own is not None else 0)
        problem = dispatch.layer_problem(name, layer, depthwise, shapes[role], role=role, kind=kind)
        if problem is not None:
            return problem
    pads = padding_rule(block.depthwise)
    if pads is None:
        where = block.depthwise.pad or block.depthwise.conv
        return f"{where[0]} pads {where[1]}, neither symmetrically nor as TensorFlow does"
    for stage in (block.expand, block.project):
        if stage is not None and stage.pad is not None and not is_identity(stage.pad[1]):
            return f"{stage.pad[0]} pads a 1x1 convolution"
    if block.residual and (stride != 1 or I != O):
        return f"a residual over stride {stride} and {I} -> {O} channels"
    return _acts(block, pads)


def edited(module: nn.Module, prefix: str) -> str | None:
    """Whether somebody listens to, or stands in for, a module inside."""
    for name, inner in module._modules.items():
        if inner is None:
            continue
        name = prefix + name
        if dispatch.has_hooks(inner):
            return f"{name} has hooks"
        if "forward" in inner.__dict__:
            return f"{name}.forward was replaced"
        if inner._modules:
            problem = edited(inner, f"{name}.")
            if problem is not None:
                return problem
    return None


def _type_problem(layers):
    for role, name, layer in layers:
        path = path_of(type(layer))
        if role.startswith("bn"):
            if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
                return f"{name} is a {type(layer).__name__}"
        elif path not in FIXED_CONVS and path not in SAME_CONVS:
            return f"{name} is a {type(layer).__name__}"
    return None


def _acts(block, pads):
    """The verdict, once the activations are ones that kernels have."""
    act = activation(block.depthwise.act, ACTS, "identity")
    if act is None:
        return f"{block.depthwise.act[0]} is {block.depthwise.act[1]}, not one of {', '.join(ACTS)}"
    if block.expand is not None:
        first = activation(block.expand.act, ACTS, "identity")
        if first != act:
            shown = "absent" if block.expand.act is None else f"{block.expand.act[0]} {block.expand.act[1]}"
            return f"the activation after the expand convolution ({shown}) is not that after the depthwise one ({act})"
    if activation(block.project.act, ACTS, "identity") != "identity":
        return (
            f"{block.project.act[0]} is {block.project.act[1]}: kernels have no activation after the project "
            "convolution"
        )
    se_act, gate = "identity", "sigmoid"
    if block.gate is not None:
        se_act, gate = activation(block.gate.act, ACTS, "identity"), activation(block.gate.gate, GATES, "sigmoid")
        if se_act is None:
            return f"{block.gate.act[0]} is {block.gate.act[1]}, not one of {', '.join(ACTS)}"
        if gate is None:
            return f"{block.gate.gate[0]} is {block.gate.gate[1]}, not one of {', '.join(GATES)}"
    return Verdict(pads, act, se_act, gate)


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
    problem = problem or dispatch.layer_problem(
        bn[0], bn[1], shape=shape[:1], role="bn", kind=NORMS.get(path_of(type(bn[1])))
    )
    drop = getattr(bn[1], "drop", None) if path_of(type(bn[1])) in NORMS else None
    if problem is None and drop is not None and not is_identity(drop):
        return f"{bn[0]}.drop is a {type(drop).__name__}"
    if problem is None and activation(stage.act, ACTS, "identity") is None:
        return f"{stage.act[0]} is {stage.act[1]}, not one of {', '.join(ACTS)}"
    return problem


def judge_network(network: Network | str) -> str | None:
    """Why kernels cannot serve a network's stem, or its head where it has one that they know; platform and tensors are
    not asked.
    """
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
        verdict = judge_separable(network)
        problem = verdict if isinstance(verdict, str) else None
    return problem


def judge_separable(network: Network) -> Verdict | str:
    """As ``judge_layers``, of the block after a network's stem whose layers are no module by themselves."""
    _, block = network.separable
    return judge_layers(block, layers_of_block(block))


def largest_of_network(network: Network) -> int:
    """Channels of the widest tensor that the stem makes; 1 where no convolution says it."""
    return getattr(network.stem.conv[1], "out_channels", 1)


def layers_of_network(network: Network) -> list[tuple[str, nn.Module]]:
    """(name, module) of every layer with parameters that kernels stand in for."""
    stages = [network.stem] if isinstance(network.head, str) else [network.stem, network.head]
    layers = [layer for stage in stages for layer in (stage.conv, stage.bn)]
    if network.separable is not None:
        layers += [(name, layer) for _, name, layer in layers_of_block(network.separable[1])]
    return layers
