"""Where each library keeps the layers of its MBConv blocks: one reader a class, and one judge of what they find.

A reader takes a block and returns a ``Block``: every layer with its name in the block, and what the block's own forward does with
them, read from the module as it is at that moment, so nothing that is changed later goes stale. Libraries are known by the path of
the class; none is imported.
"""

import functools
from typing import NamedTuple

import torch
from torch import nn

from effkernels import dispatch, reference
from effkernels.geometry import PADDINGS, pad_amounts
from effkernels.parameters import BatchNormParams, SqueezeExciteParams

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
ACTS, GATES = tuple(reference.ACTIVATIONS), tuple(reference.GATES)


def path_of(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


class Stage(NamedTuple):
    """A convolution, its BatchNorm and its activation, and what pads for it; each (name, module), or None where there is none.

    act may be a name of ``effkernels.reference.ACTIVATIONS`` in place of the module, pad one of ``effkernels.geometry.PADDINGS``.
    """

    conv: tuple[str, nn.Module]
    bn: tuple[str, nn.Module]
    act: tuple[str, nn.Module | str] | None = None
    pad: tuple[str, nn.Module | str] | None = None


class Gate(NamedTuple):
    """Squeeze-excite: 1x1 convolution, activation, 1x1 convolution, gate function."""

    reduce: tuple[str, nn.Module]
    act: tuple[str, nn.Module]
    expand: tuple[str, nn.Module]
    gate: tuple[str, nn.Module] | None  # None: torch.sigmoid


def draw_drop_path(x, rate):
    return reference.drop_path_mask(x.shape[0], rate, x.device)


class Block(NamedTuple):
    """What a reader finds in a block."""

    expand: Stage | None
    depthwise: Stage
    gate: Gate | None
    project: Stage
    residual: bool
    identities: tuple = ()  # modules that must not change what goes through them
    drop_rate: float = 0.0  # of samples of the residual branch, in this mode
    drop_mask: object = draw_drop_path  # (x, rate) -> fp32 [N], one draw as the library's own
    now: str | None = None  # a reason that holds in the block's present mode only
    in_place: bool = False  # the residual is added in place: under autocast the sum keeps the branch's dtype, not an fp32 input's


# ---- readers -----------------------------------------------------------------------------------------------------------------------


def _timm_stage(block, conv, bn, identities):
    norm = getattr(block, bn)
    act = getattr(norm, "act", None)  # none where BatchNormAct2d was converted to nn.SyncBatchNorm: then there is no activation
    if getattr(norm, "drop", None) is not None:
        identities.append((f"{bn}.drop", norm.drop))
    return Stage((conv, getattr(block, conv)), (bn, norm), act if act is None else (f"{bn}.act", act))


def _timm(block):
    """InvertedResidual (conv_pw bn1 conv_dw bn2 aa se conv_pwl bn3) and DepthwiseSeparableConv (conv_dw bn1 aa se conv_pw bn2)."""
    if getattr(block, "conv_s2d", None) is not None:
        return "conv_s2d: a space-to-depth convolution comes first"
    identities = []
    if hasattr(block, "conv_pwl"):
        expand = _timm_stage(block, "conv_pw", "bn1", identities)
        depthwise = _timm_stage(block, "conv_dw", "bn2", identities)
        project = _timm_stage(block, "conv_pwl", "bn3", identities)
    else:
        expand = None
        depthwise = _timm_stage(block, "conv_dw", "bn1", identities)
        project = _timm_stage(block, "conv_pw", "bn2", identities)
    if getattr(block, "aa", None) is not None:
        identities.append(("aa", block.aa))
    gate = squeeze_excite("se", block.se)
    if isinstance(gate, str):
        return gate
    return _with_drop_path(Block(expand, depthwise, gate, project, block.has_skip, tuple(identities)), "drop_path", block.drop_path)


def _leaves(name, module):
    """(name, layer) of everything in nested Sequentials, in order."""
    if type(module).forward is not nn.Sequential.forward:
        return [(name, module)]
    return [leaf for inner, child in module.named_children() for leaf in _leaves(f"{name}.{inner}", child)]


def _torchvision(block):
    """A Sequential of [conv bn act] conv bn act [squeeze-excite] conv bn, nested or not: EfficientNet, MobileNetV2 and V3, MnasNet."""
    name = next(name for name in ("block", "conv", "layers") if name in block._modules)
    stages, gates, identities = [], [], []
    for leaf in _leaves(name, getattr(block, name)):
        layer = leaf[1]
        if isinstance(layer, nn.Conv2d):
            stages.append([leaf, None, None])
        elif isinstance(layer, nn.modules.batchnorm._BatchNorm) and stages and stages[-1][1] is None:
            stages[-1][1] = leaf
        elif path_of(type(layer)) in ACTIVATIONS and stages and None not in stages[-1][:2] and stages[-1][2] is None and not gates:
            stages[-1][2] = leaf
        elif path_of(type(layer)) in GATED and len(stages) in (1, 2) and not gates:
            gates.append((len(stages), leaf))
        else:
            return f"{leaf[0]} is a {type(layer).__name__}, where kernels have no such layer"
    if len(stages) not in (2, 3) or any(bn is None for _, bn, _ in stages) or (gates and gates[0][0] != len(stages) - 1):
        return f"{name} is not [1x1 convolution,] depthwise convolution, [squeeze-excite,] 1x1 convolution, each with its BatchNorm"
    gate = squeeze_excite(*gates[0][1]) if gates else None
    if isinstance(gate, str):
        return gate
    expand, depthwise, project = ([None] if len(stages) == 2 else []) + [Stage(*stage) for stage in stages]
    residual = block.apply_residual if name == "layers" else block.use_res_connect
    found = Block(expand, depthwise, gate, project, residual, tuple(identities), in_place=name == "block")
    return _with_drop_path(found, "stochastic_depth", getattr(block, "stochastic_depth", None))


def _draw_drop_connect(x, rate):
    """efficientnet_pytorch's: floor(keep + uniform) / keep, the uniform in the compute dtype."""
    keep = 1 - rate
    uniform = torch.rand(x.shape[0], dtype=dispatch.compute_dtype(x), device=x.device)
    return (torch.floor(keep + uniform) / keep).float()


def _lukemelas(block, drop_connect_rate=None):
    args, act = block._block_args, ("_swish", block._swish)

    def stage(conv, bn, act=act):
        layer = getattr(block, conv)
        pad = getattr(layer, "static_padding", None)
        return Stage((conv, layer), (bn, getattr(block, bn)), act, None if pad is None else (f"{conv}.static_padding", pad))

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
        stage("_expand_conv", "_bn0") if args.expand_ratio != 1 else None,
        stage("_depthwise_conv", "_bn1"),
        gate,
        stage("_project_conv", "_bn2", None),
        residual,
        tuple(identities),
        rate,
        _draw_drop_connect,
    )


def _transformers(block):
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
        Stage(*stage("expansion", "expand_conv", "expand_bn", "expand_act")) if block.expand_ratio != 1 else None,
        Stage(*depthwise),
        gate,
        Stage(*stage("projection", "project_conv", "project_bn")),
        residual,
        now=now,
    )


def _with_drop_path(block, name, module):
    """The block with timm's DropPath or torchvision's StochasticDepth; the two draw alike."""
    if module is None or not block.residual or path_of(type(module)) == "torch.nn.modules.linear.Identity":
        return block
    path = path_of(type(module))
    if path == "timm.layers.drop.DropPath":
        rate, per_sample = module.drop_prob, module.scale_by_keep
    elif path == "torchvision.ops.stochastic_depth.StochasticDepth":
        rate, per_sample = module.p, module.mode == "row"
    else:
        return f"{name} is a {type(module).__name__}"
    if not module.training or not rate:
        return block
    if not per_sample or not 0 < rate < 1:
        return block._replace(now=f"in training, {name} is {module}: kernels drop samples at a rate below 1 and scale the others")
    return block._replace(drop_rate=rate)


# Squeeze-excite modules: names of the two convolutions, the activation and the gate function between them, and of what must be
# an identity.
GATED = {
    "timm.models._efficientnet_blocks.SqueezeExcite": ("conv_reduce", "act1", "conv_expand", "gate", ()),
    "timm.layers.squeeze_excite.SEModule": ("fc1", "act", "fc2", "gate", ("bn",)),
    "torchvision.ops.misc.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation", ()),
    "torchvision.models.mobilenetv3.SqueezeExcitation": ("fc1", "activation", "fc2", "scale_activation", ()),
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetSqueezeExciteLayer": (
        "reduce", "act_reduce", "expand", "act_expand", (),
    ),
}  # fmt: skip


def squeeze_excite(name, module):
    """``Gate`` of a library's squeeze-excite module, None for nn.Identity, else the reason as a string."""
    path = path_of(type(module))
    if path == "torch.nn.modules.linear.Identity":
        return None
    if path not in GATED:
        return f"{name} is a {type(module).__name__}, which is not squeeze-excite as kernels have it"
    *names, identities = GATED[path]
    if getattr(module, "add_maxpool", False):
        return f"{name} adds maximum pooling"
    for inner in identities:
        if path_of(type(getattr(module, inner))) != "torch.nn.modules.linear.Identity":
            return f"{name}.{inner} is a {type(getattr(module, inner)).__name__}"
    return Gate(*((f"{name}.{inner}", getattr(module, inner)) for inner in names))


_TIMM, _VISION = "timm.models._efficientnet_blocks", "torchvision.models"
READERS = {
    "efficientnet.model.plain_mbconv.MBConv": None,  # effkernels' own layers, which FusedMBConv reads itself
    f"{_TIMM}.InvertedResidual": _timm,
    f"{_TIMM}.DepthwiseSeparableConv": _timm,
    f"{_VISION}.efficientnet.MBConv": _torchvision,
    f"{_VISION}.mobilenetv2.InvertedResidual": _torchvision,
    f"{_VISION}.mobilenetv3.InvertedResidual": _torchvision,
    f"{_VISION}.mnasnet._InvertedResidual": _torchvision,
    "efficientnet_pytorch.model.MBConvBlock": _lukemelas,
    "transformers.models.efficientnet.modeling_efficientnet.EfficientNetBlock": _transformers,
}
_DENSE = "a dense k x k convolution in place of expand and depthwise (EfficientNetV2's Fused-MBConv)"
OTHERS = {  # blocks of the same networks that are not MBConv
    f"{_TIMM}.EdgeResidual": _DENSE,
    f"{_TIMM}.CondConvResidual": "the weights of its convolutions depend on the sample (CondConv)",
    f"{_TIMM}.UniversalInvertedResidual": "MobileNetV4's block has other depthwise layers",
    f"{_VISION}.efficientnet.FusedMBConv": _DENSE,
}


@functools.cache
def known(cls: type) -> tuple[type, object] | None:
    """(the library's class that ``cls`` is or inherits from, its reader or the reason why it has none); None for any other class."""
    for base in cls.__mro__:
        path = path_of(base)
        if path in READERS or path in OTHERS:
            return base, READERS[path] if path in READERS else OTHERS[path]
    return None


# ---- the judge ---------------------------------------------------------------------------------------------------------------------


def activation(named, accepted, default) -> str | None:
    """Its name in ``effkernels.reference``, or None if kernels do not have it."""
    if named is None:
        return default
    module = named[1]
    name = module if isinstance(module, str) else ACTIVATIONS.get(path_of(type(module)))
    if name == "gelu" and getattr(module, "approximate", "none") != "none":
        return None
    return name if name in accepted else None


def padding(stage: Stage) -> str | None:
    """The rule, of ``effkernels.geometry.PADDINGS``, by which a stage's convolution is padded; None if there is none."""
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
    if pad is not None and path_of(type(pad)) != "torch.nn.modules.linear.Identity":
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


def layers_of(block: Block) -> list[tuple[str, str, nn.Module]]:
    """(role: the name in FusedMBConv, name in the block, module) of every layer with parameters."""
    stages = [("conv_pw", "bn1", block.expand), ("conv_dw", "bn2", block.depthwise), ("conv_pwl", "bn3", block.project)]
    layers = []
    for conv, bn, stage in stages:
        if stage is not None:
            layers += [(conv, *stage.conv), (bn, *stage.bn)]
    if block.gate is not None:
        layers += [("se.conv_reduce", *block.gate.reduce), ("se.conv_expand", *block.gate.expand)]
    return layers


def judge(module: nn.Module, block: Block, layers) -> Verdict | str:
    """The settings of a block that kernels serve, or the reason, as a string, why they do not; platform and tensors are not asked."""
    return edited(module, "") or judge_layers(block, layers)


def judge_layers(block: Block, layers) -> Verdict | str:
    """As ``judge``, of layers that are no module by themselves."""
    for name, inner in block.identities:
        if path_of(type(inner)) != "torch.nn.modules.linear.Identity":
            return f"{name} is a {type(inner).__name__}"
    conv_dw = block.depthwise.conv[1]
    problem = _type_problem(layers)
    if problem is not None:
        return problem
    k, stride = conv_dw.kernel_size[0], conv_dw.stride[0]
    if k % 2 == 0 or k > 9:
        return f"{block.depthwise.conv[0]} has kernel_size {k}, kernels have odd ones up to 9"
    if stride not in (1, 2):
        return f"{block.depthwise.conv[0]} has stride {stride}, kernels have 1 and 2"
    own = dispatch.fixed_padding(conv_dw)
    E, O = conv_dw.out_channels, block.project.conv[1].out_channels
    I = block.expand.conv[1].in_channels if block.expand is not None else E
    R = block.gate.reduce[1].out_channels if block.gate is not None else 0
    shapes = {
        "conv_pw": (E, I), "bn1": (E,), "conv_dw": (E, 1), "bn2": (E,), "se.conv_reduce": (R, E), "se.conv_expand": (E, R),
        "conv_pwl": (O, E), "bn3": (O,),
    }  # fmt: skip
    for role, name, layer in layers:
        kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else NORMS.get(path_of(type(layer)))
        depthwise = (k, stride, own[0] if own is not None else 0)
        problem = dispatch.layer_problem(name, layer, depthwise, shapes[role], role=role, kind=kind)
        if problem is not None:
            return problem
    pads = padding(block.depthwise)
    if pads is None:
        where = block.depthwise.pad or block.depthwise.conv
        return f"{where[0]} pads {where[1]}, neither symmetrically nor as TensorFlow does"
    for stage in (block.expand, block.project):
        if stage is not None and stage.pad is not None and path_of(type(stage.pad[1])) != "torch.nn.modules.linear.Identity":
            return f"{stage.pad[0]} pads a 1x1 convolution"
    if block.residual and (stride != 1 or I != O):
        return f"a residual over stride {stride} and {I} -> {O} channels"
    return _acts(block, pads)


def edited(module, prefix):
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
        return f"{block.project.act[0]} is {block.project.act[1]}: kernels have no activation after the project convolution"
    se_act, gate = "identity", "sigmoid"
    if block.gate is not None:
        se_act, gate = activation(block.gate.act, ACTS, "identity"), activation(block.gate.gate, GATES, "sigmoid")
        if se_act is None:
            return f"{block.gate.act[0]} is {block.gate.act[1]}, not one of {', '.join(ACTS)}"
        if gate is None:
            return f"{block.gate.gate[0]} is {block.gate.gate[1]}, not one of {', '.join(GATES)}"
    return Verdict(pads, act, se_act, gate)


def run(x: torch.Tensor, block: Block, verdict: Verdict, training: bool) -> torch.Tensor:
    """The block on kernels."""
    from effkernels import functional

    norm = BatchNormParams.of
    se = None
    if block.gate is not None:
        reduce, expand = block.gate.reduce[1], block.gate.expand[1]
        se = SqueezeExciteParams(reduce.weight, reduce.bias, expand.weight, expand.bias, verdict.se_act, verdict.gate)
    stages = [None if s is None else (s.conv[1].weight, norm(s.bn[1])) for s in (block.expand, block.depthwise, block.project)]
    out = functional.mbconv(
        x,
        stages[0],
        stages[1],
        se,
        stages[2],
        stride=block.depthwise.conv[1].stride[0],
        padding=verdict.padding,
        act=verdict.act,
        residual=block.residual,
        training=training,
        mask=block.drop_mask(x, block.drop_rate) if block.drop_rate > 0 else None,
    )
    return out.to(dispatch.compute_dtype(x)) if block.in_place else out
