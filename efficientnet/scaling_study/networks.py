"""The networks that the paper scales besides its own (Table 3): MobileNetV1, MobileNetV2 and ResNet-50, by depth, width
and resolution.
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from efficientnet.model.config import EfficientNetConfig, StageConfig, scaled_name
from efficientnet.model.network import EfficientNet
from efficientnet.model.scaling import Scaling, check_count, round_filters, round_repeats
from efficientnet.weights.factory import create_model
from effkernels import FusedDepthwiseConvBNAct

# (kernel, stride, expand, channels, repeats) of Sandler et al., 2018, Table 2: an EfficientNet without squeeze-excite,
# with ReLU6.
MOBILENET_V2_STAGES = tuple(
    StageConfig(kernel_size=3, stride=stride, expand_ratio=expand, channels=channels, repeats=repeats, se_ratio=0)
    for expand, channels, repeats, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )
)


@dataclass(frozen=True)
class BaselineStage:
    """``repeats`` blocks, the first with ``stride``. The ``channels`` of a ResNet are those inside its bottleneck."""

    stride: int
    channels: int
    repeats: int


@dataclass(frozen=True)
class BaselineConfig:
    """A network's stages, already scaled, and the image size in pixels that goes with them (it takes any)."""

    name: str
    stages: tuple[BaselineStage, ...]
    stem_channels: int
    resolution: int = 224

    def scaled(self, scaling: Scaling) -> "BaselineConfig":
        """The network with ``ceil(depth * repeats)`` blocks in every stage and ``round_filters(channels, width)``
        channels in every layer.
        """
        depth, width, resolution = scaling
        stages = tuple(
            replace(stage, channels=round_filters(stage.channels, width), repeats=round_repeats(stage.repeats, depth))
            for stage in self.stages
        )
        return replace(
            self, stages=stages, stem_channels=round_filters(self.stem_channels, width), resolution=resolution
        )


MOBILENET_V1 = BaselineConfig(
    "mobilenet_v1",
    (
        BaselineStage(stride=1, channels=64, repeats=1),
        BaselineStage(stride=2, channels=128, repeats=2),
        BaselineStage(stride=2, channels=256, repeats=2),
        BaselineStage(stride=2, channels=512, repeats=6),
        BaselineStage(stride=2, channels=1024, repeats=2),
    ),
    stem_channels=32,
)
RESNET50 = BaselineConfig(
    "resnet50",
    (
        BaselineStage(stride=1, channels=64, repeats=3),
        BaselineStage(stride=2, channels=128, repeats=4),
        BaselineStage(stride=2, channels=256, repeats=6),
        BaselineStage(stride=2, channels=512, repeats=3),
    ),
    stem_channels=64,
)


class DepthwiseSeparable(nn.Module):
    """``act(BN(1x1(act(BN(depthwise 3x3(x))))))`` with ReLU6 and no residual.

    Shapes: [N, I, H, W] -> [N, O, H', W'].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int, **factory):
        super().__init__()
        options = {"act": "relu6", "bn_eps": 1e-5, "bn_momentum": 0.1}
        self.depthwise = FusedDepthwiseConvBNAct(in_channels, 3, stride, **options, **factory)
        self.conv_pw = nn.Conv2d(in_channels, out_channels, 1, bias=False, **factory)
        self.bn = nn.BatchNorm2d(out_channels, **factory)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', H', W']."""
        return F.relu6(self.bn(self.conv_pw(self.depthwise(x))))


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, the last to four times the channels, plus the input or its projection.

    The 3x3 one has the stride, as in torchvision, whose names the layers have.
    """

    expansion = 4

    def __init__(self, in_channels: int, channels: int, stride: int, **factory):
        super().__init__()
        out_channels = self.expansion * channels
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(channels, **factory)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, 1, bias=False, **factory)
        self.bn2 = nn.BatchNorm2d(channels, **factory)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False, **factory)
        self.bn3 = nn.BatchNorm2d(out_channels, **factory)
        self.downsample = None
        if stride != 1 or in_channels != out_channels:
            project = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False, **factory)
            self.downsample = nn.Sequential(project, nn.BatchNorm2d(out_channels, **factory))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] -> [N, C', H', W']."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class _Baseline(nn.Module):
    """What both share: images [N, in_chans, H, W] -> stem, stages, global average pooling, linear -> logits [N,
    num_classes].
    """

    block: type[nn.Module]
    stem_layers: list[str]
    stem_kernel: int
    stem_operator: str
    block_operator: str

    def __init__(
        self,
        config: BaselineConfig,
        num_classes: int = 1000,
        in_chans: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        check_count("num_classes", num_classes)
        check_count("in_chans", in_chans)
        self.config, self.num_classes, self.in_chans = config, num_classes, in_chans
        factory = {"device": device, "dtype": dtype}
        k = self.stem_kernel
        self.conv1 = nn.Conv2d(in_chans, config.stem_channels, k, 2, k // 2, bias=False, **factory)
        self.bn1 = nn.BatchNorm2d(config.stem_channels, **factory)
        channels = config.stem_channels
        for i, stage in enumerate(config.stages, start=1):
            blocks = []
            for repeat in range(stage.repeats):
                blocks.append(self.block(channels, stage.channels, stage.stride if repeat == 0 else 1, **factory))
                channels = self.out_channels(stage)
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(channels, num_classes, **factory)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def out_channels(self, stage: BaselineStage) -> int:
        return stage.channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for i in range(1, len(self.config.stages) + 1):
            x = getattr(self, f"layer{i}")(x)
        return self.fc(x.mean((2, 3)))

    def stage_parts(self) -> list[tuple]:
        """As ``EfficientNet.stage_parts``."""
        k, stages = self.stem_kernel, self.config.stages
        parts = [(self.stem_operator, self.stem_layers, k, 2, None, self.config.stem_channels, 1)]
        for i, stage in enumerate(stages, start=1):
            channels = self.out_channels(stage)
            parts.append((self.block_operator, [f"layer{i}"], 3, stage.stride, None, channels, stage.repeats))
        return [*parts, ("Pool, Linear", ["fc"], 1, 1, None, self.num_classes, 1)]


class MobileNetV1(_Baseline):
    """Howard et al., 2017: a 3x3 stem of stride 2 and depthwise separable blocks, with ReLU6 as in the TensorFlow
    release.

    The depthwise layers run on fused kernels where these can run (``effkernels.FusedDepthwiseConvBNAct``).
    """

    block, block_operator = DepthwiseSeparable, "Depthwise, Conv"
    stem_operator, stem_layers, stem_kernel = "Conv", ["conv1", "bn1"], 3

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] -> [N, C, H / 2, W / 2]."""
        return F.relu6(self.bn1(self.conv1(x)))


class ResNet(_Baseline):
    """He et al., 2016, with bottlenecks: a 7x7 stem of stride 2, 3x3 max pooling of stride 2, and four stages.

    Its names and numbers are torchvision's.
    """

    block, block_operator = Bottleneck, "Bottleneck"
    stem_operator, stem_layers, stem_kernel = "Conv, MaxPool", ["conv1", "bn1", "maxpool"], 7

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.maxpool = nn.MaxPool2d(3, 2, 1)

    def out_channels(self, stage: BaselineStage) -> int:
        """Channels that a stage's blocks give."""
        return Bottleneck.expansion * stage.channels

    def stem(self, x: torch.Tensor) -> torch.Tensor:
        """Images [N, in_chans, H, W] -> [N, C, H / 4, W / 4]."""
        return self.maxpool(F.relu(self.bn1(self.conv1(x))))


UNSCALED = Scaling(depth=1.0, width=1.0, resolution=224)
BASES = ("efficientnet_b0", "mobilenet_v1", "mobilenet_v2", "resnet50")


def create_scaled(
    base: str,
    scaling: Scaling = UNSCALED,
    *,
    num_classes: int = 1000,
    in_chans: int = 3,
    fused: bool = True,
    device: torch.device | str | None = None,
) -> nn.Module:
    """The network ``base`` (one of BASES) scaled by any (depth, width, resolution), with fresh weights.

    ``fused`` chooses the blocks of EfficientNet, and of MobileNetV2, which is the same network without squeeze-excite.
    The result knows its image size as ``config.resolution``.

    Raises ValueError for another base or sizes out of range.
    """
    factory = {"num_classes": num_classes, "in_chans": in_chans, "device": device}
    if base == "efficientnet_b0":
        return create_model(scaled_name(scaling), fused=fused, **factory)
    if base == "mobilenet_v2":
        config = EfficientNetConfig.from_scaling(
            scaling, MOBILENET_V2_STAGES, act="relu6", drop_path_rate=0.0, name=base
        )
        return EfficientNet(config, fused=fused, **factory)
    if base == "mobilenet_v1":
        return MobileNetV1(MOBILENET_V1.scaled(scaling), **factory)
    if base == "resnet50":
        return ResNet(RESNET50.scaled(scaling), **factory)
    raise ValueError(f"base must be one of {', '.join(BASES)}, got {base!r}")
