"""The names that other libraries give the tensors of the same network, and what they take for granted beside them, as
one table.
"""

import re
import warnings
from dataclasses import dataclass

from efficientnet.model.config import VARIANTS, EfficientNetConfig


@dataclass(frozen=True)
class Layout:
    """The module names of one library. A pair is (convolution, BatchNorm), or squeeze-excite's (reduce, expand).

    stem, head and classifier are of the whole network; ``{n}`` in ``head`` is the number of stages plus one. block is a
    template of ``{flat}``, or of ``{stage}`` (or ``{stage1}``, counted from 1) and ``{block}``. expand, depthwise, se
    and project are names within a block; plain_* are those within a block that does not expand, where they differ.
    linear_se says that squeeze-excite's weights are 2-D, of nn.Linear.

    padding, bn_eps and bn_momentum are those of the networks that such weights come from, which no tensor tells. None:
    the names do not say.
    """

    name: str
    stem: tuple[str, str]
    block: str
    expand: tuple[str, str]
    depthwise: tuple[str, str]
    se: tuple[str, str]
    project: tuple[str, str]
    head: tuple[str, str]
    classifier: str
    plain_depthwise: tuple[str, str] | None = None
    plain_se: tuple[str, str] | None = None
    plain_project: tuple[str, str] | None = None
    linear_se: bool = False
    padding: str | None = None
    bn_eps: float | None = None
    bn_momentum: float | None = None

    def within_block(self, expands: bool) -> list[str]:
        """The module names of a block in the order expand (if any), depthwise, squeeze-excite, project."""
        if expands:
            return [*self.expand, *self.depthwise, *self.se, *self.project]
        return [
            *(self.plain_depthwise or self.depthwise),
            *(self.plain_se or self.se),
            *(self.plain_project or self.project),
        ]

    def modules(self, plan: "Plan") -> list[str]:
        """Every module of a network that is built like ``plan``, in an order that is the same for all layouts."""
        names, flat = list(self.stem), 0
        for s, stage in enumerate(plan):
            for b, expands in enumerate(stage):
                prefix = self.block.format(flat=flat, stage=s, stage1=s + 1, block=b)
                names += [f"{prefix}.{name}" for name in self.within_block(expands)]
                flat += 1
        return names + [name.format(n=len(plan) + 1) for name in self.head] + [self.classifier]

    def plan(self, modules: set[str]) -> "Plan":
        """The stages that the names show; all blocks in one stage where the names are flat. () if there is no block."""
        pattern = re.compile(re.sub(r"\\{\w+\\}", r"(\\d+)", re.escape(self.block)) + r"\.(.+)")
        inside = {}
        for module in modules:
            if match := pattern.fullmatch(module):
                *index, name = match.groups()
                inside.setdefault(tuple(map(int, index)), set()).add(name)
        only_expanding = set(self.within_block(True)) - set(self.within_block(False))
        stages = {}
        for index, names in sorted(inside.items()):
            stages.setdefault(index[:-1], []).append(bool(only_expanding & names))
        return tuple(map(tuple, stages.values()))


# For each stage, whether each of its blocks expands.
Plan = tuple[tuple[bool, ...], ...]

TF = {"padding": "same", "bn_eps": 1e-3, "bn_momentum": 0.01}

LAYOUTS = {
    layout.name: layout
    for layout in (
        # Also TensorFlow's weights under timm's names (tf_efficientnet_*): the model's name, not the file, says which.
        Layout(
            "timm",
            stem=("conv_stem", "bn1"),
            block="blocks.{stage}.{block}",
            expand=("conv_pw", "bn1"),
            depthwise=("conv_dw", "bn2"),
            se=("se.conv_reduce", "se.conv_expand"),
            project=("conv_pwl", "bn3"),
            plain_depthwise=("conv_dw", "bn1"),
            plain_project=("conv_pw", "bn2"),
            head=("conv_head", "bn2"),
            classifier="classifier",
        ),
        Layout(  # B0 to B4; B5 to B7 in ``conventions``
            "torchvision",
            stem=("features.0.0", "features.0.1"),
            block="features.{stage1}.{block}.block",
            expand=("0.0", "0.1"),
            depthwise=("1.0", "1.1"),
            se=("2.fc1", "2.fc2"),
            project=("3.0", "3.1"),
            plain_depthwise=("0.0", "0.1"),
            plain_se=("1.fc1", "1.fc2"),
            plain_project=("2.0", "2.1"),
            head=("features.{n}.0", "features.{n}.1"),
            classifier="classifier.1",
            padding="symmetric",
            bn_eps=1e-5,
            bn_momentum=0.1,
        ),
        Layout(  # efficientnet_pytorch, and TensorFlow's own weights as they were converted for it
            "lukemelas",
            stem=("_conv_stem", "_bn0"),
            block="_blocks.{flat}",
            expand=("_expand_conv", "_bn0"),
            depthwise=("_depthwise_conv", "_bn1"),
            se=("_se_reduce", "_se_expand"),
            project=("_project_conv", "_bn2"),
            head=("_conv_head", "_bn1"),
            classifier="_fc",
            **TF,
        ),
        Layout(
            "huggingface",
            stem=("efficientnet.embeddings.convolution", "efficientnet.embeddings.batchnorm"),
            block="efficientnet.encoder.blocks.{flat}",
            expand=("expansion.expand_conv", "expansion.expand_bn"),
            depthwise=("depthwise_conv.depthwise_conv", "depthwise_conv.depthwise_norm"),
            se=("squeeze_excite.reduce", "squeeze_excite.expand"),
            project=("projection.project_conv", "projection.project_bn"),
            head=("efficientnet.encoder.top_conv", "efficientnet.encoder.top_bn"),
            classifier="classifier",
            **TF,
        ),
        Layout(  # DeepLearningExamples
            "nvidia",
            stem=("stem.conv", "stem.bn"),
            block="layers.{stage}.block{block}",
            expand=("expand.conv", "expand.bn"),
            depthwise=("depsep.conv", "depsep.bn"),
            se=("se.squeeze", "se.expand"),
            project=("proj.conv", "proj.bn"),
            head=("features.conv", "features.bn"),
            classifier="classifier.fc",
            linear_se=True,
            padding="symmetric",
            bn_eps=1e-3,
            bn_momentum=0.01,
        ),
    )
}


def config_plan(config: EfficientNetConfig) -> Plan:
    """The plan of a network of this family."""
    stages, channels = [], config.stem_channels
    for stage in config.stages:
        inputs = [channels] + [stage.channels] * (stage.repeats - 1)
        stages.append(tuple(round(i * stage.expand_ratio) != i for i in inputs))
        channels = stage.channels
    return tuple(stages)


def conventions(layout: Layout, config: EfficientNetConfig) -> dict:
    """padding, bn_eps and bn_momentum of the networks that ``layout``'s weights come from; {} where the names do not
    say.
    """
    if layout.padding is None:
        return {}
    if layout.name == "torchvision" and config.head_channels >= 2048:  # B5 to B7
        return {"padding": "symmetric", "bn_eps": 1e-3, "bn_momentum": 0.01}
    return {field: getattr(layout, field) for field in TF}


# What wrappers put before each key; where a teacher and a student are kept together, the teacher, an average, comes
# first.
PREFIXES = (
    "module.",
    "_orig_mod.",
    "model.",
    "backbone.",
    "net.",
    "network.",
    "encoder.",
    "ema_model.",
    "ema.",
    "averaged_model.",
)
PREFIXES += ("teacher.", "student.", "online_network.", "base_model.", "_model.", "_module.", "m.")


def _behind(state, prefix):
    """(the entries with ``prefix``, without it; the other keys) where no other key is of the same network, else
    None.
    """
    inside = {key.removeprefix(prefix): tensor for key, tensor in state.items() if key.startswith(prefix)}
    # AveragedModel's.
    others = {key: tensor for key, tensor in state.items() if not key.startswith(prefix) and key != "n_averaged"}
    if not inside:
        return None
    if not others and prefix in ("module.", "_orig_mod."):  # torch's own wrappers, whatever they wrap
        return inside, []
    # Others are a loss of its own, a metric, a student: not half of this network.
    return (inside, list(others)) if _known(tidy(inside)) and not (others and _known(others)) else None


def _prefixes(state):
    """What may stand before each key: a usual prefix, or what precedes the one first convolution that there is."""
    stems = tuple(f".{layout.stem[0]}.weight" for layout in LAYOUTS.values())
    found = {key[: -len(stem) + 1] for key in state for stem in stems if key.endswith(stem)}
    return (*PREFIXES, *found) if len(found) == 1 else PREFIXES


def _known(state):
    try:
        return bool(recognise(state))
    except ValueError:
        return False


def tidy(state: dict) -> dict:
    """The state_dict without what wrappers add, and under each library's present names.

    DistributedDataParallel, torch.compile and Lightning put a prefix before every key, and may keep others besides.
    """
    while state and (found := next(filter(None, (_behind(state, prefix) for prefix in _prefixes(state))), None)):
        state, others = found
        if others:
            names = f"{', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
            warnings.warn(f"{len(others)} keys beside those of the network are left out: {names}", stacklevel=4)
    if "embeddings.convolution.weight" in state:  # Hugging Face's model without a classifier has no prefix
        state = {f"efficientnet.{key}": tensor for key, tensor in state.items()}
    if "stem.conv.weight" in state:  # NVIDIA's files of 2020 and 2021
        state = {
            re.sub(r"^layer(\d+)\.", lambda m: f"layers.{int(m[1]) - 1}.", key): tensor for key, tensor in state.items()
        }
    return state


def recognise(state: dict) -> Layout:
    """The layout of a tidy state_dict: the one that knows most of its keys, which must be more than half.

    Raises ValueError with the first keys that the nearest layout does not know.
    """
    modules = {key.rpartition(".")[0] for key in state}
    best, unknown = None, None
    for layout in LAYOUTS.values():
        known = set(layout.modules(layout.plan(modules)))
        others = [key for key in state if key.rpartition(".")[0] not in known]
        if best is None or len(others) < len(unknown):
            best, unknown = layout, others
    if 2 * len(unknown) >= len(state):
        more = ", ..." if len(unknown) > 3 else ""
        raise ValueError(
            f"is of an unknown layout: the nearest of {', '.join(LAYOUTS)} is {best.name}, which does not know "
            f"{len(unknown)} of "
            f"{len(state)} keys: {', '.join(unknown[:3])}{more}"
        )
    return best


def translate(state: dict, source: Layout, target: Layout, plan: Plan) -> dict:
    """The same tensors (views of them) under ``target``'s names. Keys that ``source`` does not know are kept as they
    are.
    """
    names = dict(zip(source.modules(plan), target.modules(plan), strict=True))
    se = tuple(f".{name}.weight" for name in source.se + (source.plain_se or ()))
    result = {}
    for key, tensor in state.items():
        module, _, suffix = key.rpartition(".")
        if key.endswith(se) and target.linear_se and tensor.shape[2:] == (1, 1):
            tensor = tensor.flatten(1)
        elif key.endswith(se) and not target.linear_se and tensor.dim() == 2:
            tensor = tensor[:, :, None, None]
        result[f"{names[module]}.{suffix}" if module in names else key] = tensor
    return result


def guess_config(state: dict, layout: Layout) -> EfficientNetConfig | None:
    """The published variant whose stem, number of blocks and head these tensors have, with ``layout``'s conventions; or
    None.
    """
    blocks = sum(map(len, layout.plan({key.rpartition(".")[0] for key in state})))
    stem = _channels(state, layout.stem[0])
    for variant in VARIANTS:
        config = EfficientNetConfig.from_name(variant)
        head = layout.head[0].format(n=len(config.stages) + 1)
        if (stem, blocks, _channels(state, head)) == (
            config.stem_channels,
            sum(stage.repeats for stage in config.stages),
            config.head_channels,
        ):
            return config
    return None


def _channels(state, module):
    weight = state.get(f"{module}.weight")
    return None if weight is None or not weight.dim() else weight.shape[0]
