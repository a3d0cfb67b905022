"""What is measured: layers, blocks and models, with their sizes read off the networks themselves."""

import functools
from dataclasses import dataclass, replace

from efficientnet import MBConv, create_model
from efficientnet.config import EfficientNetConfig
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite
from effkernels.geometry import conv_out_size
from effkernels.modules.squeeze_excite import SqueezeExcite


class PlainDepthwiseConvBNAct(FusedDepthwiseConvBNAct):
    """The same layers, always in plain PyTorch."""

    forward = FusedDepthwiseConvBNAct.forward_reference


class Shape:
    """A module and the square images it takes: ``size`` pixels a side."""

    def shrunk(self, divisor: int):
        """The same on images of 1 / divisor of the side, rounded up."""
        return replace(self, size=-(-self.size // divisor))


@dataclass(frozen=True)
class Depthwise(Shape):
    """Depthwise convolution, BatchNorm, SiLU."""

    channels: int
    size: int
    kernel_size: int
    stride: int

    def __str__(self):
        return f"c{self.channels}-{self.size}px-k{self.kernel_size}-s{self.stride}"

    @property
    def in_channels(self):
        return self.channels

    @property
    def out_size(self):
        return conv_out_size(self.size, self.kernel_size, self.stride, "symmetric")

    def build(self, fused):
        cls = FusedDepthwiseConvBNAct if fused else PlainDepthwiseConvBNAct
        return cls(self.channels, self.kernel_size, self.stride)


@dataclass(frozen=True)
class SqueezeExciteLayer(Shape):
    """Squeeze-excite of ``channels`` through ``reduced`` channels."""

    channels: int
    reduced: int
    size: int

    def __str__(self):
        return f"c{self.channels}-r{self.reduced}-{self.size}px"

    @property
    def in_channels(self):
        return self.channels

    def build(self, fused):
        return (FusedSqueezeExcite if fused else SqueezeExcite)(self.channels, self.reduced)


@dataclass(frozen=True)
class Block(Shape):
    """One MBConv block; ``expanded`` and ``reduced`` channels are those of its depthwise convolution and squeeze-excite."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expand_ratio: float
    se_ratio: float
    expanded: int
    reduced: int
    size: int

    def __str__(self):
        return f"{self.in_channels}to{self.out_channels}-e{self.expand_ratio:g}-{self.size}px-k{self.kernel_size}-s{self.stride}"

    @property
    def out_size(self):
        return conv_out_size(self.size, self.kernel_size, self.stride, "symmetric")

    @property
    def residual(self):
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def depthwise(self):
        return Depthwise(self.expanded, self.size, self.kernel_size, self.stride)

    @property
    def squeeze_excite(self):
        return SqueezeExciteLayer(self.expanded, self.reduced, self.out_size)

    def build(self, fused):
        args = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.expand_ratio, self.se_ratio
        return (FusedMBConv if fused else MBConv)(*args)


@dataclass(frozen=True)
class Model(Shape):
    """A whole network, without dropout and drop-path (their random masks would differ from one variant to the next)."""

    name: str
    size: int
    in_channels: int = 3

    def __str__(self):
        return f"{self.name}-{self.size}px"

    def build(self, fused):
        return create_model(self.name, fused=fused, drop_rate=0.0, drop_path_rate=0.0)


def model(name: str) -> Model:
    """The network at the resolution it was made for."""
    return Model(name, EfficientNetConfig.from_name(name).resolution)


@functools.cache
def blocks(name: str, image_size: int | None = None) -> tuple[Block, ...]:
    """Every MBConv block of a network, in order, for square images (default: of its own resolution)."""
    network = create_model(name, fused=False, device="meta")
    size = conv_out_size(image_size or network.config.resolution, 3, 2, "symmetric")
    found = []
    for mbconv in (block for stage in network.blocks for block in stage):
        block = Block(
            mbconv.in_channels, mbconv.out_channels, mbconv.kernel_size, mbconv.stride, mbconv.expand_ratio, mbconv.se_ratio,
            mbconv.conv_dw.out_channels, mbconv.se.conv_reduce.out_channels, size,
        )  # fmt: skip
        found.append(block)
        size = block.out_size
    return tuple(found)


def depthwise_layers(name: str) -> list[Depthwise]:
    """The distinct depthwise layers of a network, in order."""
    return list(dict.fromkeys(block.depthwise for block in blocks(name)))


def squeeze_excite_layers(name: str) -> list[SqueezeExciteLayer]:
    """The distinct squeeze-excite layers of a network, in order."""
    return list(dict.fromkeys(block.squeeze_excite for block in blocks(name)))
