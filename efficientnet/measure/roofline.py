"""The least work of a step in the fused schedule, kernel by kernel: the bytes that device memory must move, and the
arithmetic.

A schedule lists the kernels of one step, and the whole tensors that each reads and writes, for one image. It is what
the kernels are to reach, not what they do today, and the same for every implementation. So an implementation's GB/s
ranks it, and its share of the copy bandwidth says how far it is from the schedule at full speed. Halos, per-channel
vectors and per-tile sums are not counted; weights are, once for each use.

The tensors of a block are x (its input), y1 (after the expand convolution), y2 (after the depthwise one), y3 (after the
project convolution) and out. In training each y is taken before its BatchNorm, in inference after BatchNorm and
activation. dq is the gradient after the gate, dz1 the one before BN1's activation. skip is the share of the residual;
it is empty where there is none.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from efficientnet.choices import height_width, image_size
from effkernels.configs.gpus import Gpu
from effkernels.geometry import conv_out_size


class Kernel(NamedTuple):
    """One kernel: the names of the tensors that it reads and writes, separated by spaces, and its arithmetic.

    products are the multiply-accumulates of dense convolutions (on tensor cores), taps those of depthwise convolutions
    (on fp32 units), activations the evaluations of an activation or its derivative (on special-function units). The
    names are those of ``block_sizes``; one that stands twice counts twice.
    """

    name: str
    reads: str
    writes: str = ""
    products: str = ""
    taps: str = ""
    activations: str = ""


BLOCK_INFERENCE = (
    Kernel("expand", "x", "y1", products="expand", activations="y1"),
    Kernel("depthwise", "y1", "y2", taps="taps", activations="y2"),  # the pooled sums in its epilogue
    Kernel("project", "y2 skip", "out", products="project"),  # the gate on load, the residual in its epilogue
)
BLOCK_TRAINING = (
    Kernel("expand", "x", "y1", products="expand"),
    Kernel("depthwise", "y1", "y2", taps="taps", activations="a1"),
    Kernel("pool", "y2", activations="y2"),
    Kernel("project", "y2", "y3", products="project", activations="y2"),
    Kernel("apply", "y3 skip", "out"),
    Kernel("BN3 sums", "dout y3"),
    Kernel("project backward", "dout y3 y2", "dq", products="project project", activations="y2"),
    Kernel("depthwise backward", "dq y2 y1", "dz1", taps="taps taps", activations="y2 a1"),
    Kernel("expand backward", "dz1 x", "dx", products="expand expand gram gram"),
    Kernel("residual backward", "skip"),  # whichever kernel writes dx also reads dout
)
ENDS_INFERENCE = (
    Kernel("stem", "image", "stem", products="stem_products", activations="stem"),
    Kernel("head", "features", products="head_products", activations="head"),  # pools in its epilogue
)
ENDS_TRAINING = (
    Kernel("stem", "image", "stem", products="stem_products"),
    Kernel("head", "features", "head", products="head_products"),
    Kernel("head pool", "head", activations="head"),
    Kernel("head backward", "head features", "dfeatures", products="head_products head_products", activations="head"),
    Kernel("stem backward", "image stem dstem", products="stem_products", activations="stem"),
)


@dataclass(frozen=True)
class BlockGeometry:
    """The sizes of an MBConv block on images of ``size``: the side of a square, or (height, width)."""

    in_channels: int
    out_channels: int
    kernel_size: int
    stride: int
    expanded: int
    size: int | tuple[int, int]
    residual: bool

    @property
    def out_size(self) -> int | tuple[int, int]:
        """Pixels of a side, or of both, after the block's stride."""
        return _after(self.size, self.kernel_size, self.stride)

    @property
    def expands(self) -> bool:
        """Whether the block begins with a 1x1 convolution to more channels."""
        return self.expanded != self.in_channels

    def __str__(self):
        return (
            f"{self.in_channels}-{self.expanded}-{self.out_channels} k{self.kernel_size} s{self.stride} {self.size}px"
        )


def _after(size, kernel_size, stride):
    """What a convolution with symmetric padding makes of a size."""
    return image_size([conv_out_size(side, kernel_size, stride, "symmetric") for side in height_width(size)])


class Work(NamedTuple):
    """One kernel on one image: the elements of activations and gradients that it moves, and its arithmetic as in
    ``Kernel``.
    """

    kernel: str
    block: BlockGeometry | None  # None: stem and head
    elements: int
    products: int
    taps: int
    activations: int


def block_sizes(block: BlockGeometry) -> dict[str, int]:
    """The elements of each tensor of a block, and its numbers of multiply-accumulates, for one image."""
    before, after = (math.prod(height_width(size)) for size in (block.size, block.out_size))  # pixels
    inputs, outputs = block.in_channels * before, block.out_channels * after
    e1, e2 = block.expanded * before, block.expanded * after
    expands = block.expanded != block.in_channels
    sizes = {
        "x": inputs,
        "dx": inputs,
        "y1": e1,
        "dz1": e1,
        "y2": e2,
        "dq": e2,
        "y3": outputs,
        "out": outputs,
        "dout": outputs,
    }
    sizes["skip"] = inputs if block.residual else 0
    sizes["a1"] = e1 if expands else 0  # elements that are normalised and activated before the depthwise convolution
    sizes["taps"] = block.kernel_size**2 * e2
    sizes |= {"expand": block.in_channels * e1, "gram": block.in_channels * inputs, "project": block.expanded * outputs}
    return sizes


def _sum(names: str, sizes: dict[str, int]) -> int:
    return sum(sizes[name] for name in names.split())


def _works(schedule, sizes, block=None) -> list[Work]:
    found = []
    for kernel in schedule:
        counts = (
            _sum(names, sizes)
            for names in (f"{kernel.reads} {kernel.writes}", kernel.products, kernel.taps, kernel.activations)
        )
        found.append(Work(kernel.name, block, *counts))
    return found


def block_works(block: BlockGeometry, training: bool) -> list[Work]:
    """The kernels of a block (a ``BlockGeometry``, or anything with its attributes), in order."""
    schedule = BLOCK_TRAINING if training else BLOCK_INFERENCE
    if block.expanded == block.in_channels:  # no expand convolution: the depthwise reads x and its backward writes dx
        schedule = [kernel for kernel in schedule if not kernel.name.startswith("expand")]
    return _works(schedule, block_sizes(block), block)


def end_works(
    first: BlockGeometry,
    last: BlockGeometry,
    in_chans: int,
    size: int | tuple[int, int],
    head_channels: int,
    training: bool,
) -> list[Work]:
    """The kernels of stem and head of a network, on images of ``size``, whose first and last blocks these are."""
    image, before, after = (math.prod(height_width(size)) for size in (size, first.size, last.out_size))  # pixels
    stem, features, head = first.in_channels * before, last.out_channels * after, head_channels * after
    sizes = {
        "image": in_chans * image,
        "stem": stem,
        "dstem": stem,
        "features": features,
        "dfeatures": features,
        "head": head,
    }
    sizes |= {"stem_products": 9 * in_chans * stem, "head_products": last.out_channels * head}
    return _works(ENDS_TRAINING if training else ENDS_INFERENCE, sizes)


def block_geometries(model: nn.Module, size: int | tuple[int, int]) -> list[BlockGeometry]:
    """Every MBConv block of an EfficientNet (ours, or one with its parameter names), in order, for images of a size."""
    found, size = [], _after(size, 3, 2)
    for block in (block for stage in model.blocks for block in stage):
        block = BlockGeometry(
            in_channels=block.in_channels,
            out_channels=block.out_channels,
            kernel_size=block.kernel_size,
            stride=block.stride,
            expanded=block.conv_dw.out_channels,
            size=size,
            residual=block.stride == 1 and block.in_channels == block.out_channels,
        )
        found.append(block)
        size = block.out_size
    return found


def model_works(model: nn.Module, training: bool, size: int | tuple[int, int] | None = None) -> list[Work]:
    """The kernels of one step of an EfficientNet on one image: those of the blocks in order, then stem and head."""
    size = size or model.config.resolution
    blocks = block_geometries(model, size)
    works = [work for block in blocks for work in block_works(block, training)]
    return works + end_works(
        first=blocks[0],
        last=blocks[-1],
        in_chans=model.in_chans,
        size=size,
        head_channels=model.num_features,
        training=training,
    )


def elements(works: Iterable[Work]) -> int:
    """The elements of activations and gradients that a step moves for one image."""
    return sum(work.elements for work in works)


def weight_bytes(parameters: int, training: bool, itemsize: int, optimizer: bool = False) -> int:
    """The bytes of weights that a step moves.

    Inference reads the weights once, in the compute dtype. Training reads fp32 weights in the forward and in the
    backward, and writes gradients. AdamW reads weight, gradient and both moments, and writes all but the gradient.
    """
    if not training:
        return parameters * itemsize
    return parameters * 4 * (3 + (7 if optimizer else 0))


def model_bytes(
    model: nn.Module,
    training: bool,
    batch: int,
    itemsize: int,
    size: int | tuple[int, int] | None = None,
    optimizer: bool = True,
) -> int:
    """The bytes that one step of an EfficientNet moves for ``batch`` images of ``itemsize`` bytes an element."""
    parameters = sum(p.numel() for p in model.parameters())
    moved = batch * itemsize * elements(model_works(model, training, size))
    return moved + weight_bytes(parameters, training, itemsize, optimizer)


RESOURCES = ("bytes", "matrix", "FMA", "SFU", "issue")


def floors(
    work: Work, gpu: Gpu, batch: int, dtype: torch.dtype, weights: int = 0, instructions: float = 0.0
) -> dict[str, float]:
    """The seconds that a kernel takes at least on ``batch`` images, for each resource of the GPU.

    An activation is one special function in bf16 and fp16 (tanh), and two in fp32 (exp and reciprocal), where matrix
    products run on the fp32 units too.

    Args:
        weights: elements that are read once, in the compute dtype.
        instructions: how many a thread issues for one image.
    """
    narrow = dtype.itemsize == 2
    return {
        "bytes": dtype.itemsize * (batch * work.elements + weights) / gpu.bandwidth,
        "matrix": 2 * batch * work.products / gpu.matrix if narrow else 0.0,
        "FMA": batch * (work.taps + (0 if narrow else work.products)) / gpu.per_second(gpu.fma),
        "SFU": batch * work.activations * (1 if narrow else 2) / gpu.per_second(16),
        "issue": batch * instructions / gpu.per_second(128),
    }
