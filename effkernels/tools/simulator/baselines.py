"""The same network as torch.compile would run it, by the same measure: an optimist's estimate, so that a ratio to it
flatters nobody.

The kernels that Inductor makes of channels-last modules in bf16, each with the whole tensors that it reads and writes:
convolutions are cuDNN's and cuBLAS's, all else is fused into Triton kernels between them. A fused kernel runs at 90 %
of the copy bandwidth, a product at 70 % of the matrix rate or its bytes, a depthwise convolution at its bytes. Small
kernels on vectors cost nothing here."""

from dataclasses import dataclass
from typing import Any

from effkernels.configs.gpus import Gpu
from effkernels.geometry import conv_out_size

FUSED_SHARE = 0.9  # of the copy bandwidth, of Triton kernels over whole tensors
PRODUCT_SHARE = 0.7  # of the matrix rate, of cuBLAS's products


@dataclass(frozen=True)
class Kernel:
    """elements moved and floating-point operations of the matrix units, of one image; kind: "fused", "product" or
    "depthwise"."""

    name: str
    kind: str
    elements: int
    flops: int = 0


def _block(block, training: bool) -> list[Kernel]:
    """Of one MBConv block."""
    channels, k = block.conv_dw.in_channels, block.conv_dw.kernel_size[0]
    size, stride = block.size, block.conv_dw.stride[0]
    after = conv_out_size(size, k, stride, "symmetric")
    inputs, outputs = block.in_channels, block.out_channels
    x, out = inputs * size**2, outputs * after**2
    e1 = channels * size**2 if channels != inputs else 0
    e2 = channels * after**2
    skip = x if block.residual else 0
    expand, project = 2 * inputs * e1, 2 * channels * out
    kernels = []
    if not training:
        if e1:
            kernels += [Kernel("expand", "product", x + e1, expand), Kernel("BN, act", "fused", 2 * e1)]
        kernels += [
            Kernel("depthwise", "depthwise", (e1 or x) + e2),
            Kernel("BN, act, pool", "fused", e2),
            Kernel("BN, act, gate", "fused", 2 * e2),
            Kernel("project", "product", e2 + out, project),
            Kernel("BN, add", "fused", 2 * out + skip),
        ]
        return kernels
    if e1:
        kernels.append(Kernel("expand", "product", x + e1, expand))
        kernels += [Kernel("BN sums", "fused", e1), Kernel("BN, act", "fused", 2 * e1)]
    kernels += [
        Kernel("depthwise", "depthwise", (e1 or x) + e2),
        Kernel("BN sums", "fused", e2),
        Kernel("BN, act, pool", "fused", e2),
        Kernel("BN, act, gate", "fused", 2 * e2),
        Kernel("project", "product", e2 + out, project),
        Kernel("BN sums", "fused", out),
        Kernel("BN, add", "fused", 2 * out + skip),
        Kernel("BN backward sums", "fused", 2 * out),
        Kernel("BN backward", "fused", 3 * out),
        Kernel("project dgrad", "product", out + e2, project),
        Kernel("project wgrad", "product", out + e2, project),
        Kernel("gate backward sums", "fused", 2 * e2),
        Kernel("BN backward sums", "fused", 2 * e2),
        Kernel("BN backward", "fused", 3 * e2),
        Kernel("depthwise dgrad", "depthwise", e2 + (e1 or x)),
        Kernel("depthwise wgrad", "depthwise", e2 + (e1 or x)),
    ]
    if e1:
        kernels += [
            Kernel("BN backward sums", "fused", 2 * e1),
            Kernel("BN backward", "fused", 3 * e1),
            Kernel("expand dgrad", "product", e1 + x, expand),
            Kernel("expand wgrad", "product", e1 + x, expand),
        ]
    if skip:
        kernels.append(Kernel("add of gradients", "fused", 2 * x))  # one of the two reads is fused
    return kernels


@dataclass(frozen=True)
class _Geometry:
    """A block of a network with the size of its images."""

    conv_dw: object
    in_channels: int
    out_channels: int
    residual: bool
    size: int


def _geometries(model, size: int) -> list[_Geometry]:
    found = []
    for stage in model.blocks:
        for block in stage:
            inputs, outputs, residual = (
                block.in_channels,
                block.out_channels,
                block.stride == 1 and block.in_channels == block.out_channels,
            )
            found.append(_Geometry(block.conv_dw, inputs, outputs, residual, size))
            size = conv_out_size(size, block.conv_dw.kernel_size[0], block.conv_dw.stride[0], "symmetric")
    return found


def kernels(model: Any, training: bool) -> list[Kernel]:
    """The kernels of one step of ``model``, an EfficientNet of the package efficientnet, for one image.

    This room does not know that package, so any module with its layers' names will do."""
    size = model.config.resolution
    image, half = 3 * size**2, conv_out_size(size, 3, 2, "symmetric")
    stem = model.conv_stem.out_channels * half**2
    blocks = _geometries(model, half)
    last = conv_out_size(blocks[-1].size, blocks[-1].conv_dw.kernel_size[0], blocks[-1].conv_dw.stride[0], "symmetric")
    features, head = model.conv_head.in_channels * last**2, model.conv_head.out_channels * last**2
    first_flops, last_flops = 2 * 27 * stem, 2 * model.conv_head.in_channels * head
    found = [Kernel("stem", "product", image + stem, first_flops)]
    found += [Kernel("BN sums", "fused", stem)] * training + [Kernel("BN, act", "fused", 2 * stem)]
    for block in blocks:
        found += _block(block, training)
    found.append(Kernel("head", "product", features + head, last_flops))
    found += [Kernel("BN sums", "fused", head)] * training + [Kernel("BN, act, pool", "fused", head)]
    if training:
        for name, size_of in (("head", head), ("stem", stem)):
            found += [
                Kernel(f"{name} BN backward sums", "fused", 2 * size_of),
                Kernel(f"{name} BN backward", "fused", 3 * size_of),
            ]
        found += [Kernel(f"head {part}", "product", features + head, last_flops) for part in ("dgrad", "wgrad")]
        found.append(Kernel("stem wgrad", "product", image + stem, first_flops))
    return found


def seconds(model: Any, training: bool, batch: int, gpu: Gpu, itemsize: int = 2) -> float:
    """The seconds of a step of ``batch`` images on ``gpu`` that torch.compile could reach: an optimist's estimate.

    itemsize: bytes of an element, 2 for bf16."""
    total = 0.0
    for kernel in kernels(model, training):
        moved = batch * itemsize * kernel.elements / gpu.bandwidth
        if kernel.kind == "fused":
            total += moved / FUSED_SHARE
        else:
            total += max(moved, batch * kernel.flops / (PRODUCT_SHARE * gpu.matrix))
    return total
