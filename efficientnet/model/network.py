"""EfficientNet (Tan & Le, 2019): stem, MBConv stages and head, with parameters named as in timm, and blocks fused or
plain.
"""

from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from efficientnet.model.config import IMAGENET_MEAN, IMAGENET_STD, EfficientNetConfig
from efficientnet.model.plain_mbconv import MBConv
from efficientnet.model.scaling import check_count
from effkernels.dispatch import has_hooks
from effkernels.modules.mbconv import FusedMBConv
from effkernels.modules.stem_head import pooled_head, stem, stem_and_block
from effkernels.reference import activate


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
        self.frozen_norms: tuple[str, ...] = ()  # names of BatchNorm layers that stay in eval (``transfer.freeze``)
        self.weights_cfg: dict | None = None  # how the images of pretrained weights are prepared
        self.config, self.in_chans, self.num_classes = config, in_chans, num_classes
        self.drop_rate, self.drop_path_rate = drop_rate, drop_path_rate
        self.num_features = self.head_hidden_size = config.head_channels
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
        self.classifier = self._new_classifier(num_classes, **factory)
        if not self.conv_stem.weight.is_meta:  # nothing to fill, and PyTorch takes half a second over it
            self.apply(_init_weights)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``forward_head(forward_features(x))``. Fused, inference does not store the head's feature map."""
        if not self.fused or self._own_forward():
            return self.forward_head(self.forward_features(x))
        x = pooled_head(self._stages(x), self.conv_head, self.bn2, self.config.act)
        return self.classifier(F.dropout(x, self.drop_rate, self.training))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] -> the head's feature map [N, num_features, ceil(H / 32), ceil(W / 32)].

        Raises TypeError or ValueError that names what is wrong with the images.
        """
        return activate(self.bn2(self.conv_head(self._stages(x))), self.config.act)

    def train(self, mode: bool = True) -> "EfficientNet":
        """As ``nn.Module.train``, but the BatchNorm layers that ``transfer.freeze`` froze stay in eval."""
        super().train(mode)
        for name in self.frozen_norms:
            self.get_submodule(name).eval()
        return self

    def _own_forward(self):
        """Whether a subclass, or an attribute of this object, replaces one of the two halves of ``forward``."""
        names = ("forward_features", "forward_head")
        return any(name in self.__dict__ or getattr(type(self), name) is not getattr(EfficientNet, name) for name in names)

    def _stages(self, x):
        """Images -> the output of the last stage."""
        self._check_input(x)
        layers = self.conv_stem, self.bn1, self.config.act, self.config.padding
        blocks = self._own_blocks() if self.training else None
        if blocks is None:
            return self.blocks(stem(x, *layers, fused=self.fused))
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
            y = block(y, draws=next(draws)) if block.drops else block(y)
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
        return blocks if all(type(block).forward in own and "forward" not in block.__dict__ for block in blocks) else None

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The feature map -> logits [N, num_classes]; with pre_logits the pooled features [N, num_features]."""
        x = F.dropout(x.mean((2, 3)), self.drop_rate, self.training)
        return x if pre_logits else self.classifier(x)

    def get_classifier(self) -> nn.Module:
        """The classifier: nn.Linear, or nn.Identity with ``num_classes`` 0."""
        return self.classifier

    def reset_classifier(self, num_classes: int, global_pool: str | None = "avg") -> None:
        """Put in a fresh classifier for ``num_classes`` classes (0: none), on the network's device and in its dtype."""
        check_count("num_classes", num_classes, minimum=0)
        if global_pool not in ("avg", None):
            raise ValueError(f"global_pool must be 'avg', got {global_pool!r}")
        like = self.conv_head.weight
        self.num_classes = num_classes
        self.classifier = self._new_classifier(num_classes, device=like.device, dtype=like.dtype).train(self.training)
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
    def feature_info(self) -> list[dict]:
        """The last stage at each resolution, as in timm: its channels, its reduction of the image size, its module's
        name.
        """
        info, stages = [], self.config.stages
        for i, (stage, reduction) in enumerate(zip(stages, self.stage_reductions, strict=True)):
            if i + 1 == len(stages) or stages[i + 1].stride > 1:
                info.append({"stage": i + 1, "num_chs": stage.channels, "reduction": reduction, "module": f"blocks.{i}"})
        return info

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

    def _new_classifier(self, num_classes, **factory):
        return nn.Linear(self.num_features, num_classes, **factory) if num_classes else nn.Identity()

    def _check_input(self, x):
        if not isinstance(x, torch.Tensor):
            raise TypeError(f"images must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 4 or x.shape[1] != self.in_chans or 0 in x.shape[2:]:
            raise ValueError(f"images must be [N, {self.in_chans}, H, W], got shape {tuple(x.shape)}")
        if not x.is_floating_point():
            raise TypeError(f"images must be floating point, got {x.dtype}")
        if self.training and x.shape[0] == 0:
            raise ValueError(f"Expected more than 1 value per channel when training, got an empty batch of shape {tuple(x.shape)}")
        device = self.conv_stem.weight.device
        if x.device != device:
            raise ValueError(f"images are on {x.device} but the model is on {device}")


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
