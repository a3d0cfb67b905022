"""EfficientNet (Tan & Le, 2019): stem, MBConv stages and head, with parameters named as in timm, and blocks fused or
plain.
"""

from contextlib import contextmanager, nullcontext
from functools import partial
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficientnet.model.config import IMAGENET_MEAN, IMAGENET_STD, EfficientNetConfig
from efficientnet.model.plain_mbconv import MBConv
from efficientnet.model.scaling import check_count
from effkernels.dispatch import has_hooks, recording
from effkernels.modules.mbconv import FusedMBConv
from effkernels.modules.stem_head import pooled_head, stem, stem_and_block
from effkernels.reference import activate

POOLS = ("avg", "max", "avgmax", "catavgmax", "")


class GlobalPool(nn.Module):
    """[N, C, H, W] -> [N, C]: the mean over the image, its maximum, half their sum ("avgmax"), or both, [N, 2 C]
    ("catavgmax"); "" leaves it as it is.
    """

    def __init__(self, pool_type: str = "avg"):
        super().__init__()
        if pool_type not in POOLS:
            raise ValueError(f"global_pool must be one of {', '.join(map(repr, POOLS))}, got {pool_type!r}")
        self.pool_type = pool_type

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Features [N, C, H, W] -> [N, C], or twice as many for "catavgmax"; as they are without pooling."""
        if not self.pool_type:
            return x
        pools = [x.mean((2, 3))] if "avg" in self.pool_type else []
        pools += [x.amax((2, 3))] if "max" in self.pool_type else []
        if self.pool_type == "catavgmax":
            return torch.cat(pools, 1)
        return pools[0] if len(pools) == 1 else 0.5 * (pools[0] + pools[1])

    def extra_repr(self) -> str:
        return f"pool_type={self.pool_type!r}"


class FeatureInfo(list):
    """A list of dicts, as ``EfficientNet.feature_info``, that also answers under timm's names."""

    def __init__(self, info: list[dict], all_info: list[dict] | None = None):
        super().__init__(info)
        self.info = list(self if all_info is None else all_info)

    def get(self, key: str, idx: int | list[int] | None = None) -> object:
        """``key`` of every entry; of entry ``idx`` (or several) of all that the network has."""
        if isinstance(idx, int):
            return self.info[idx][key]
        return [entry[key] for entry in (self if idx is None else (self.info[i] for i in idx))]

    def channels(self, idx: int | list[int] | None = None) -> list[int] | int:
        """C of each feature map."""
        return self.get("num_chs", idx)

    def reduction(self, idx: int | list[int] | None = None) -> list[int] | int:
        """Pixels of the image over those of each feature map."""
        return self.get("reduction", idx)

    def module_name(self, idx: int | list[int] | None = None) -> list[str] | str:
        """The module whose output each feature map is."""
        return self.get("module", idx)


class EfficientNet(nn.Module):
    """An image classifier: 3x3 stem of stride 2, MBConv stages, 1x1 head, global average pooling, dropout, linear.

    Its state_dict is timm's: ``conv_stem bn1 blocks.S.B.* conv_head bn2 classifier``. Weights start as in the
    TensorFlow release: convolutions N(0, 2 / fan_out) with ``fan_out = k * k * out_channels / groups``, the classifier
    U(-r, r) with ``r = 1 / sqrt(num_classes)``, biases 0, BatchNorm 1 and 0.

    The arguments are those of ``create_model``, with an ``EfficientNetConfig`` for the name.

    Shapes: images [N, in_chans, H, W], contiguous or channels_last -> logits [N, num_classes].
    """

    def __init__(
        self,
        config: EfficientNetConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float | None = None,
        drop_path_rate: float | None = None,
        fused: bool = True,
        *,
        memory: str = "keep",
        output_stride: int = 32,
        global_pool: str = "avg",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        drop_rate = config.drop_rate if drop_rate is None else drop_rate
        drop_path_rate = config.drop_path_rate if drop_path_rate is None else drop_path_rate
        check_count("num_classes", num_classes, minimum=0)
        check_count("in_chans", in_chans)
        _check_rate("drop_rate", drop_rate)
        _check_rate("drop_path_rate", drop_path_rate)
        if output_stride not in (2, 4, 8, 16, 32):
            raise ValueError(f"output_stride must be 2, 4, 8, 16 or 32, got {output_stride!r}")
        self.fused, self.output_stride = fused, output_stride
        self.grad_checkpointing = False
        self.weights_cfg: dict | None = None  # how the images of pretrained weights are prepared
        self.config, self.in_chans, self.num_classes = config, in_chans, num_classes
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.num_features = config.head_channels
        factory = {"device": device, "dtype": dtype}
        norm = {"eps": config.bn_eps, "momentum": config.bn_momentum, **factory}

        symmetric = 1 if config.padding == "symmetric" else 0
        self.conv_stem = nn.Conv2d(in_chans, config.stem_channels, 3, 2, symmetric, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(config.stem_channels, **norm)

        self.stage_reductions: list[int] = []
        stages, channels, index, reduction, dilation = [], config.stem_channels, 0, 2, 1
        total = sum(stage.repeats for stage in config.stages)
        for stage in config.stages:
            blocks = []
            stride, first_dilation = stage.stride, dilation
            # The first block still sees the grid of its input, the others one that is finer than in training.
            if reduction * stride > output_stride:
                stride, dilation = 1, dilation * stride
            reduction *= stride
            self.stage_reductions.append(reduction)
            for repeat in range(stage.repeats):
                block = (FusedMBConv if fused else MBConv)(
                    channels,
                    stage.channels,
                    stage.kernel_size,
                    stride if repeat == 0 else 1,
                    stage.expand_ratio,
                    stage.se_ratio,
                    act=config.act,
                    padding=config.padding,
                    bn_eps=config.bn_eps,
                    bn_momentum=config.bn_momentum,
                    drop_path=drop_path_rate * index / total,
                    memory=memory,
                    dilation=first_dilation if repeat == 0 else dilation,
                    **factory,
                )
                blocks.append(block)
                channels, index = stage.channels, index + 1
            stages.append(nn.Sequential(*blocks))
        self.blocks = nn.Sequential(*stages)

        self.conv_head = nn.Conv2d(channels, config.head_channels, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(config.head_channels, **norm)
        self.global_pool, self.classifier = self._new_classifier(num_classes, global_pool, **factory)
        if not self.conv_stem.weight.is_meta:  # nothing to fill, and PyTorch takes half a second over it
            self.apply(_init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``forward_head(forward_features(x))``. Fused, inference does not store the head's feature map."""
        if not self.fused or recording(x) or self._own_forward() or not self.averages:
            return self.forward_head(self.forward_features(x))
        x = pooled_head(self._stages(x), self.conv_head, self.bn2, self.config.act)
        return self.classifier(F.dropout(x, self.drop_rate, self.training))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] -> the head's feature map [N, num_features, ceil(H / 32), ceil(W / 32)].

        Raises TypeError or ValueError that names what is wrong with the images.
        """
        return activate(self.bn2(self.conv_head(self._stages(x))), self.config.act)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """Images -> (the head's feature map, feature maps of ``indices``), under timm's names.

        Args:
            indices: of ``feature_info``; an integer n means the last n, None all.
            norm: accepted and unused, as in timm: the maps have passed their BatchNorm.
            stop_early: end after the last of the maps; what is returned with them is that stage's output, not the
                head's.
            output_fmt: "NCHW", the only one there is.
            intermediates_only: return the list alone.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        info = self.feature_info
        if isinstance(indices, int):
            chosen = range(len(info))[-indices:] if 0 < indices <= len(info) else []
        else:
            chosen = range(len(info)) if indices is None else [i + len(info) if i < 0 else i for i in indices]
        if not chosen or not all(0 <= i < len(info) for i in chosen):
            raise ValueError(f"indices must be of the {len(info)} entries of feature_info, got {indices!r}")
        wanted = {info[i]["stage"] for i in chosen}
        if not recording(x):
            self._check_input(x)
        x, maps = (
            stem(
                x=x,
                conv=self.conv_stem,
                bn=self.bn1,
                act=self.config.act,
                padding=self.config.padding,
                fused=self.fused,
            ),
            [],
        )
        for number, stage in enumerate(self.blocks, start=1):
            x = self._run(stage, x)
            if number in wanted:
                maps.append(x)
            if number == max(wanted) and (stop_early or intermediates_only):
                break
        if intermediates_only:
            return maps
        if number == len(self.blocks):
            x = activate(self.bn2(self.conv_head(x)), self.config.act)
        return x, maps

    def __prepare_scriptable__(self) -> torch.fx.GraphModule:
        """What torch.jit.script compiles in place of the network: the operators of its plain layers, without dropout.

        Raises ValueError in training mode, whose dropout the graph would keep for ever.
        """
        if self.training:
            raise ValueError("torch.jit.script takes the network as it is in evaluation: call eval() first")
        return torch.fx.symbolic_trace(self)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Whether blocks keep only their input for the backward, and compute the rest again there. Numbers stay the
        same.
        """
        self.grad_checkpointing = enable

    def _run(self, block, x, **kwargs):
        """``block(x)``, checkpointed or not."""
        if not self.grad_checkpointing or not torch.is_grad_enabled():
            return block(x, **kwargs)
        again = {} if torch.compiler.is_compiling() else {"context_fn": partial(_computing_again, block)}
        return checkpoint(block, x, use_reentrant=False, **again, **kwargs)

    @property
    def averages(self) -> bool:
        """Whether the pooling is the mean over the image, and nobody listens to it."""
        pool = self.global_pool
        return (
            type(pool) is GlobalPool
            and pool.pool_type == "avg"
            and not has_hooks(pool)
            and "forward" not in pool.__dict__
        )

    def _own_forward(self):
        """Whether a subclass, or an attribute of this object, replaces one of the two halves of ``forward``."""
        names = ("forward_features", "forward_head")
        return any(
            name in self.__dict__ or getattr(type(self), name) is not getattr(EfficientNet, name) for name in names
        )

    def _stages(self, x):
        """Images -> the output of the last stage."""
        layers = self.conv_stem, self.bn1, self.config.act, self.config.padding
        if recording(x):
            return self.blocks(stem(x, *layers, fused=False))
        self._check_input(x)
        blocks = self._own_blocks() if self.training or self.grad_checkpointing else None
        if not blocks:
            return self._run(self.blocks, stem(x, *layers, fused=self.fused))
        dropping = sum(block.drops for block in blocks)
        # The draws of all blocks take one launch.
        draws = torch.rand(dropping, x.shape[0], dtype=torch.float32, device=x.device).unbind() if dropping else ()
        draws = iter(draws)
        y = stem_and_block(x, *layers, blocks[0]) if self.fused else None
        if y is None:
            y = stem(x, *layers, fused=self.fused)
        else:
            blocks = blocks[1:]
        for block in blocks:
            y = self._run(block, y, draws=next(draws)) if block.drops else self._run(block, y)
        return y

    def _own_blocks(self):
        """The blocks in order, or None where one of them or its stage is wrapped, hooked or replaced.

        Those run as they are. A checkpointed stage, say, runs again without the others, so it must draw what it drops
        itself.
        """
        stages = (self.blocks, *self.blocks)
        if any(type(stage) is not nn.Sequential or has_hooks(stage) or "forward" in stage.__dict__ for stage in stages):
            return None
        blocks = [block for stage in self.blocks for block in stage]
        own = (MBConv.forward, FusedMBConv.forward)
        return (
            blocks if all(type(block).forward in own and "forward" not in block.__dict__ for block in blocks) else None
        )

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The feature map -> logits [N, num_classes]; with pre_logits the pooled features [N, num_features]."""
        x = F.dropout(self.global_pool(x), self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The classifier: nn.Linear, or nn.Identity with ``num_classes`` 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh classifier for ``num_classes`` classes (0: none), on the device and in the dtype of the network.

        global_pool: one of ``POOLS``; None keeps the present one. "" returns the feature map, and has no classifier.
        """
        check_count("num_classes", num_classes, minimum=0)
        if global_pool is None:
            global_pool = getattr(self.global_pool, "pool_type", "avg")
        like = next(self.parameters())
        pool, classifier = self._new_classifier(num_classes, global_pool, device=like.device, dtype=like.dtype)
        self.num_classes, self.global_pool, self.classifier = (
            num_classes,
            pool.train(self.training),
            classifier.train(self.training),
        )
        _init_weights(self.classifier)

    def stage_parts(self) -> list[tuple]:
        """What the network consists of, for ``profile.stage_table``.

        A row for the stem, each stage, the head and the classifier (if any): (operator, its submodules, kernel_size,
        stride, expand_ratio, channels, repeats).
        """
        config = self.config
        parts = [("Conv", ["conv_stem", "bn1"], 3, 2, None, config.stem_channels, 1)]
        for i, s in enumerate(config.stages):
            parts.append(("MBConv", [f"blocks.{i}"], s.kernel_size, s.stride, s.expand_ratio, s.channels, s.repeats))
        parts.append(("Conv", ["conv_head", "bn2"], 1, 1, None, config.head_channels, 1))
        if isinstance(self.classifier, nn.Linear):
            parts.append(("Pool, Linear", ["classifier"], 1, 1, None, self.num_classes, 1))
        return parts

    @property
    def feature_info(self) -> FeatureInfo:
        """The last stage at each resolution, as in timm: its channels, its reduction of the image size, its module's
        name.
        """
        info, stages = [], self.config.stages
        for i, (stage, reduction) in enumerate(zip(stages, self.stage_reductions, strict=True)):
            if i + 1 == len(stages) or stages[i + 1].stride > 1:
                info.append(
                    {"stage": i + 1, "num_chs": stage.channels, "reduction": reduction, "module": f"blocks.{i}"}
                )
        return FeatureInfo(info)

    @property
    def pretrained_cfg(self) -> dict:
        """How images are prepared, under timm's keys.

        For pretrained weights it is as they were trained, else as is usual for this variant, whose crop leaves the
        32-pixel border of the release.
        """
        if self.weights_cfg:
            size = self.weights_cfg["input_size"][1:]
            return {**self.weights_cfg, "num_classes": self.num_classes, "input_size": (self.in_chans, *size)}
        resolution = self.config.resolution
        return {
            "architecture": self.config.name,
            "num_classes": self.num_classes,
            "input_size": (self.in_chans, resolution, resolution),
            "interpolation": "bicubic",
            "crop_pct": resolution / (resolution + 32),
            "mean": IMAGENET_MEAN,
            "std": IMAGENET_STD,
            "first_conv": "conv_stem",
            "classifier": "classifier",
        }

    default_cfg = pretrained_cfg

    def _new_classifier(self, num_classes, global_pool, **factory):
        """(pooling, classifier)."""
        pool = GlobalPool(global_pool)
        if num_classes and not global_pool:
            raise ValueError(
                "global_pool '' returns the feature map, which has no classifier: num_classes must be 0, got "
                f"{num_classes}"
            )
        self.head_hidden_size = self.num_features * (2 if global_pool == "catavgmax" else 1)
        return pool, nn.Linear(self.head_hidden_size, num_classes, **factory) if num_classes else nn.Identity()

    def _check_input(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(x).__name__}")
        # What was put in the stem's place takes what channels it takes, and where it likes.
        channels = self.conv_stem.in_channels if isinstance(self.conv_stem, nn.Conv2d) else None
        if x.dim() != 4 or x.shape[1] != (x.shape[1] if channels is None else channels) or 0 in x.shape[2:]:
            raise ValueError(
                f"images must be [N, {'C' if channels is None else channels}, H, W], got shape {tuple(x.shape)}"
            )
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point, got {x.dtype}")
        if self.training and x.shape[0] == 0:
            raise ValueError(
                f"Expected more than 1 value per channel when training, got an empty batch of shape {tuple(x.shape)}"
            )
        weight = getattr(self.conv_stem, "weight", None)
        if weight is not None and x.device != weight.device:
            raise ValueError(f"images are on {x.device} but the model is on {weight.device}")


@contextmanager
def _without_running_statistics(block):
    """The running statistics of BatchNorm stay as they are: they have counted this batch already."""
    before = [(buffer, buffer.clone()) for buffer in block.buffers()]
    try:
        yield
    finally:
        for buffer, value in before:
            buffer.data.copy_(value)  # unseen by autograd, which has kept the buffers of the first forward


def _computing_again(block):
    """Contexts of a checkpointed block: of its forward, and of the second one during the backward."""
    return nullcontext(), _without_running_statistics(block)


def _init_weights(module):
    if isinstance(module, nn.Conv2d):
        fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels // module.groups
        nn.init.normal_(module.weight, 0.0, (2.0 / fan_out) ** 0.5)
    elif isinstance(module, nn.Linear):
        bound = module.out_features**-0.5
        nn.init.uniform_(module.weight, -bound, bound)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
    else:
        return
    if module.bias is not None:
        nn.init.zeros_(module.bias)


def _check_rate(name, value):
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}")
