"""What is measured: layers, blocks and models, with their sizes read off the networks themselves."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import nn

from efficientnet import MBConv, create_model
from efficientnet.model.config import EfficientNetConfig
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, dispatch
from effkernels.geometry import conv_out_size
from effkernels.modules.squeeze_excite import SqueezeExcite
from effkernels.reference import activate


class PlainDepthwiseConvBNAct(FusedDepthwiseConvBNAct):
    """The same layers, always in plain PyTorch."""

    forward = FusedDepthwiseConvBNAct.forward_reference


class Shape:
    """A module and the square images that it takes, ``size`` pixels a side."""

    def shrunk(self, divisor: int) -> "Shape":
        """The same on images of 1 / divisor of the side, rounded up."""
        return replace(self, size=-(-self.size // divisor))


@dataclass(frozen=True)
class Depthwise(Shape):
    """A depthwise convolution with BatchNorm and SiLU."""

    channels: int
    size: int
    kernel_size: int
    stride: int

    def __str__(self):
        return f"c{self.channels}-{self.size}px-k{self.kernel_size}-s{self.stride}"

    @property
    def in_channels(self) -> int:
        return self.channels

    @property
    def out_size(self) -> int:
        return conv_out_size(self.size, self.kernel_size, self.stride, "symmetric")

    def build(self, fused: bool) -> nn.Module:
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
    def in_channels(self) -> int:
        return self.channels

    def build(self, fused: bool) -> nn.Module:
        return (FusedSqueezeExcite if fused else SqueezeExcite)(self.channels, self.reduced)


@dataclass(frozen=True)
class Block(Shape):
    """One MBConv block. ``expanded`` and ``reduced`` are the channels of its depthwise convolution and of its
    squeeze-excite.
    """

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
        channels = f"{self.in_channels}to{self.out_channels}-e{self.expand_ratio:g}"
        return f"{channels}-{self.size}px-k{self.kernel_size}-s{self.stride}"

    @property
    def out_size(self) -> int:
        return conv_out_size(self.size, self.kernel_size, self.stride, "symmetric")

    @property
    def residual(self) -> bool:
        return self.stride == 1 and self.in_channels == self.out_channels

    @property
    def depthwise(self) -> Depthwise:
        return Depthwise(self.expanded, self.size, self.kernel_size, self.stride)

    @property
    def squeeze_excite(self) -> SqueezeExciteLayer:
        return SqueezeExciteLayer(self.expanded, self.reduced, self.out_size)

    def build(self, fused: bool) -> nn.Module:
        args = self.in_channels, self.out_channels, self.kernel_size, self.stride, self.expand_ratio, self.se_ratio
        return (FusedMBConv if fused else MBConv)(*args)


class FusedPointwise(nn.Module):
    """A 1x1 convolution and BatchNorm.

    In inference it is one launch of the kernel that an MBConv block runs for them; elsewhere it is plain.
    """

    def __init__(self, inputs: int, outputs: int, act: str, gated: bool, fused: bool):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.act, self.fused = act, fused
        self._gates = None
        if gated:  # squeeze-excite's gate, the same for every image
            self.register_buffer("gate", torch.linspace(0.1, 0.9, inputs))
        else:
            self.gate = None

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernel will serve x, else the reason why not."""
        if not self.fused or self.training:
            return "the fused schedule has this layer alone in inference only" if self.fused else "plain"
        return dispatch.why_not_fused(x, (("conv_pw", self.conv), ("bn", self.bn)), self.conv.out_channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused and self.why_not_fused(x) is None:
            from effkernels.kernels.norm import BatchNorm
            from effkernels.kernels.pointwise_forward import pointwise_forward
            from effkernels.kernels.weight_copies import forward_weights

            bn = self.bn
            (weight,) = forward_weights([(self.conv.weight, x[:, 0].numel(), self.gate is not None)], x.dtype)
            out, _ = pointwise_forward(
                x.permute(0, 2, 3, 1),
                weight,
                gates=self._gate_of(len(x)),
                act2=self.act,
                epilogue=BatchNorm(bn.weight, bn.bias, bn.running_mean, var=bn.running_var, eps=bn.eps),
            )
            return out.permute(0, 3, 1, 2)
        if self.gate is not None:
            x = x * self.gate.to(x.dtype)[:, None, None]
        return activate(self.bn(self.conv(x)), self.act)

    def _gate_of(self, images):
        """The gate as squeeze-excite hands it over, fp32 [N, C]. It is made once, outside of what is timed."""
        if self.gate is not None and (self._gates is None or len(self._gates) != images):
            self._gates = self.gate.float().expand(images, -1).contiguous()
        return self._gates


@dataclass(frozen=True)
class Pointwise(Shape):
    """A 1x1 convolution of a block with its BatchNorm: "expand" with SiLU after it, "project" with the gate before
    it.
    """

    kind: str
    in_channels: int
    out_channels: int
    size: int

    def __str__(self):
        return f"{self.kind}-{self.in_channels}to{self.out_channels}-{self.size}px"

    def build(self, fused: bool) -> nn.Module:
        expands = self.kind == "expand"
        return FusedPointwise(
            inputs=self.in_channels,
            outputs=self.out_channels,
            act="silu" if expands else "identity",
            gated=not expands,
            fused=fused,
        )


@dataclass(frozen=True)
class Model(Shape):
    """A whole network, without dropout and drop-path, whose random masks would differ from one variant to the next."""

    name: str
    size: int
    in_channels: int = 3

    def __str__(self):
        return f"{self.name}-{self.size}px"

    def build(self, fused: bool, device: torch.device | str | None = None) -> nn.Module:
        return create_model(self.name, fused=fused, drop_rate=0.0, drop_path_rate=0.0, device=device)


def model(name: str) -> Model:
    """The network at the resolution that it was made for."""
    return Model(name, EfficientNetConfig.from_name(name).resolution)


@functools.cache
def blocks(name: str, image_size: int | None = None) -> tuple[Block, ...]:
    """Every MBConv block of a network, in order, for square images; None is the network's own resolution."""
    network = create_model(name, fused=False, device="meta")
    size = conv_out_size(image_size or network.config.resolution, 3, 2, "symmetric")
    found = []
    for mbconv in (block for stage in network.blocks for block in stage):
        block = Block(
            in_channels=mbconv.in_channels,
            out_channels=mbconv.out_channels,
            kernel_size=mbconv.kernel_size,
            stride=mbconv.stride,
            expand_ratio=mbconv.expand_ratio,
            se_ratio=mbconv.se_ratio,
            expanded=mbconv.conv_dw.out_channels,
            reduced=mbconv.se.conv_reduce.out_channels,
            size=size,
        )
        found.append(block)
        size = block.out_size
    return tuple(found)


def depthwise_layers(name: str) -> list[Depthwise]:
    """The distinct depthwise layers of a network, in order."""
    return list(dict.fromkeys(block.depthwise for block in blocks(name)))


def squeeze_excite_layers(name: str) -> list[SqueezeExciteLayer]:
    """The distinct squeeze-excite layers of a network, in order."""
    return list(dict.fromkeys(block.squeeze_excite for block in blocks(name)))


def kernel_of(name: str, block: Block) -> Shape | None:
    """The layer that a kernel of the inference schedule runs in ``block`` (anything with a Block's attributes), or
    None.
    """
    if name == "expand":
        return Pointwise("expand", block.in_channels, block.expanded, block.size)
    if name == "project":
        return Pointwise("project", block.expanded, block.out_channels, block.out_size)
    return Depthwise(block.expanded, block.size, block.kernel_size, block.stride) if name == "depthwise" else None


def pointwise_layers(name: str) -> list[Pointwise]:
    """The distinct 1x1 convolutions of a network's blocks, in order."""
    found = []
    for block in blocks(name):
        kinds = ("expand", "project") if block.expanded != block.in_channels else ("project",)
        found += [kernel_of(kind, block) for kind in kinds]
    return list(dict.fromkeys(found))
