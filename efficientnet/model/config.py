"""What an EfficientNet is made of: the stage table of B0, the published variants, and the names that they go by."""

import difflib
import fnmatch
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

from efficientnet.model.scaling import Scaling, check_count, round_filters, round_repeats
from effkernels.geometry import PADDINGS

# Of the pixels of ImageNet's training images, red, green and blue, scaled to [0, 1].
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class StageConfig:
    """``repeats`` MBConv blocks. The first has ``stride`` and changes the channels; the others have stride 1."""

    kernel_size: int
    stride: int
    expand_ratio: float
    channels: int
    repeats: int
    se_ratio: float = 0.25

    def __post_init__(self):
        check_count("repeats", self.repeats)


# Table 1 of the paper; the strides are those of the released code (the table lists input sizes).
B0_STAGES = (
    StageConfig(kernel_size=3, stride=1, expand_ratio=1, channels=16, repeats=1),
    StageConfig(kernel_size=3, stride=2, expand_ratio=6, channels=24, repeats=2),
    StageConfig(kernel_size=5, stride=2, expand_ratio=6, channels=40, repeats=2),
    StageConfig(kernel_size=3, stride=2, expand_ratio=6, channels=80, repeats=3),
    StageConfig(kernel_size=5, stride=1, expand_ratio=6, channels=112, repeats=3),
    StageConfig(kernel_size=5, stride=2, expand_ratio=6, channels=192, repeats=4),
    StageConfig(kernel_size=3, stride=1, expand_ratio=6, channels=320, repeats=1),
)

# Published scaling and classifier dropout. These are hand-rounded, not compound_scale(1..7).
VARIANTS = {
    "b0": (Scaling(depth=1.0, width=1.0, resolution=224), 0.2),
    "b1": (Scaling(depth=1.1, width=1.0, resolution=240), 0.2),
    "b2": (Scaling(depth=1.2, width=1.1, resolution=260), 0.3),
    "b3": (Scaling(depth=1.4, width=1.2, resolution=300), 0.3),
    "b4": (Scaling(depth=1.8, width=1.4, resolution=380), 0.4),
    "b5": (Scaling(depth=2.2, width=1.6, resolution=456), 0.4),
    "b6": (Scaling(depth=2.6, width=1.8, resolution=528), 0.5),
    "b7": (Scaling(depth=3.1, width=2.0, resolution=600), 0.5),
    "b8": (Scaling(depth=3.6, width=2.2, resolution=672), 0.5),
    "l2": (Scaling(depth=5.3, width=4.3, resolution=800), 0.5),
}

# What timm gives each name. A state_dict does not tell, so weights loaded into the wrong flavour fail silently.
FLAVOURS = {
    "efficientnet_": {"padding": "symmetric", "bn_eps": 1e-5, "bn_momentum": 0.1},
    "tf_efficientnet_": {"padding": "same", "bn_eps": 1e-3, "bn_momentum": 0.1},
}


@dataclass(frozen=True)
class EfficientNetConfig:
    """Everything that defines a network except its input channels and classes. ``stages`` are already scaled.

    padding is "symmetric", or "same" for TensorFlow's rule, which depends on the image size. bn_momentum is PyTorch's,
    that is 1 - TensorFlow's; None means a cumulative average. drop_rate is the classifier's dropout, drop_path_rate the
    stochastic depth of the last block. resolution is the image size in pixels that the variant was made for; the
    network takes any size.

    Raises ValueError that names the field, its value and what is accepted.
    """

    stages: tuple[StageConfig, ...] = B0_STAGES
    stem_channels: int = 32
    head_channels: int = 1280
    resolution: int = 224
    act: str = "silu"
    padding: str = "symmetric"
    bn_eps: float = 1e-5
    bn_momentum: float | None = 0.1
    drop_rate: float = 0.2
    drop_path_rate: float = 0.2
    name: str = "efficientnet"

    def __post_init__(self):
        if not self.stages:
            raise ValueError("stages must have at least one StageConfig, got none")
        for field in ("stem_channels", "head_channels", "resolution"):
            check_count(field, getattr(self, field))
        if self.padding not in PADDINGS:
            raise ValueError(f"padding must be one of {PADDINGS}, got {self.padding!r}")
        if not self.bn_eps > 0:
            raise ValueError(f"bn_eps must be > 0, got {self.bn_eps!r}")
        if self.bn_momentum is not None and not 0 <= self.bn_momentum <= 1:
            raise ValueError(f"bn_momentum must be None or in [0, 1], got {self.bn_momentum!r}")

    @classmethod
    def from_name(cls, name: str) -> "EfficientNetConfig":
        """The network of that name.

        It is a published variant ("efficientnet_b0", "tf_efficientnet_b0", or "b0" for the former), or B0 scaled by the
        depth, width and image size in the name ("efficientnet_d1.2_w1.1_r258", also with "tf_").

        Raises ValueError that names the unknown model and near names.
        """
        if scaled := re.fullmatch(r"((?:tf_)?efficientnet_)d([\d.]+)_w([\d.]+)_r(\d+)", name):
            prefix, *factors = scaled.groups()
            try:
                scaling = Scaling(float(factors[0]), float(factors[1]), int(factors[2]))
            except ValueError:
                raise ValueError(
                    f"model {name!r} must name its depth, width and resolution as in efficientnet_d1.2_w1.1_r258"
                ) from None
            return cls.from_scaling(scaling, name=name, **FLAVOURS[prefix])
        name, _ = present_name(name)
        full = f"efficientnet_{name}" if name in VARIANTS else name
        if full not in list_models():
            near = difflib.get_close_matches(name, list_models(), n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(list_models())}"
            raise ValueError(f"unknown model {name!r}; {hint}")
        prefix, variant = full.rsplit("_", 1)
        scaling, drop_rate = VARIANTS[variant]
        return cls.from_scaling(scaling, name=full, drop_rate=drop_rate, **FLAVOURS[f"{prefix}_"])

    @classmethod
    def from_scaling(
        cls, scaling: Scaling, base: tuple[StageConfig, ...] = B0_STAGES, **fields
    ) -> "EfficientNetConfig":
        """The stage table ``base`` scaled by any (depth, width, resolution), such as ``compound_scale(1.5)``;
        ``fields`` set the rest.

        Stem and head scale in width only. Padding, BatchNorm and dropout default to those of "efficientnet_b0".
        """
        depth, width, resolution = scaling
        stages = tuple(
            replace(stage, channels=round_filters(stage.channels, width), repeats=round_repeats(stage.repeats, depth))
            for stage in base
        )
        return cls(
            stages=stages,
            stem_channels=round_filters(32, width),
            head_channels=round_filters(1280, width),
            resolution=resolution,
            **fields,
        )


# What timm called weights when they had names of models.
OLD_SUFFIXES = {"_ns_475": "ns_jft_in1k_475", "_ns": "ns_jft_in1k", "_ap": "ap_in1k"}


def present_name(name: str) -> tuple[str, str | None]:
    """(the model's name, the tag of its weights or None) of a name as people have it: with timm's prefixes ("timm/",
    "hf-hub:timm/"), a tag behind a dot, or one of timm's old suffixes, which warns ("tf_efficientnet_b0_ns" is
    "tf_efficientnet_b0.ns_jft_in1k").

    A name that is none of these comes back as it is.
    """
    short = re.sub(r"^(hf[-_]hub:)?(timm/)?", "", name)
    if (full := short.partition("."))[0] in list_models():
        return full[0], full[2] or None
    for suffix, tag in OLD_SUFFIXES.items():
        model = short.removesuffix(suffix)
        if short.endswith(suffix) and model.startswith("tf_") and model in list_models():
            warnings.warn(f"model {name!r} is the old name of {model}.{tag}", stacklevel=3)
            return model, tag
    return name, None


def scaled_name(scaling: Scaling) -> str:
    """The name that ``EfficientNetConfig.from_name`` has for B0 scaled so, to four decimals:
    "efficientnet_d1.2_w1.1_r258".
    """
    return f"efficientnet_d{round(scaling.depth, 4):g}_w{round(scaling.width, 4):g}_r{scaling.resolution}"


def list_models(filter: str | Sequence[str] = "", *, exclude_filters: str | Sequence[str] = "") -> list[str]:
    """The names that ``create_model`` knows, sorted naturally.

    Args:
        filter: an fnmatch wildcard ("efficientnet_b*") or several; a name is listed if any matches. Empty: all.
        exclude_filters: wildcards of names to leave out.
    """
    names = [prefix + variant for prefix in FLAVOURS for variant in VARIANTS]

    def matches(name, filters):
        return any(fnmatch.fnmatchcase(name, f) for f in ([filters] if isinstance(filters, str) else filters) if f)

    kept = (n for n in names if (not filter or matches(n, filter)) and not matches(n, exclude_filters))
    return sorted(kept, key=lambda n: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", n)])
