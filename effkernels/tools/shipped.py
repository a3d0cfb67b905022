"""The launches of every configuration that the package ships: what the table of static costs has a row for."""

import functools
import itertools

import torch

from effkernels.geometry import LARGEST_KERNEL_SIZE
from effkernels.parameters import BatchNormParams, SqueezeExciteParams
from effkernels.tools.launches import Launch, call_launches


def _meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")


def _parameter(*shape):
    return torch.nn.Parameter(_meta(*shape))


def _norm(channels, training):
    """A BatchNorm that does not count its batches."""
    return BatchNormParams(
        _parameter(channels), _parameter(channels), _meta(channels), _meta(channels), momentum=0.1, training=training
    )


def _squeeze_excite(channels, reduced, act="silu"):
    return SqueezeExciteParams(
        _parameter(reduced, channels, 1, 1),
        _parameter(reduced),
        _parameter(channels, reduced, 1, 1),
        _parameter(channels),
        act=act,
    )


def block_launches(
    dtype: torch.dtype,
    kernel_size: int,
    stride: int,
    *,
    channels: int = 96,
    size: int = 56,
    images: int = 64,
    reduced: int = 8,
    expands: bool = True,
    squeeze: bool = True,
    training: bool = True,
    act: str = "silu",
) -> list[Launch]:
    """Launches of one depthwise block (forward and backward, or inference) at a shape of an MBConv network."""
    from effkernels import functional

    weight = _parameter(channels, 1, kernel_size, kernel_size)

    def block(x):
        return functional.depthwise_conv_bn_act(
            x,
            weight,
            _norm(channels, training),
            stride=stride,
            act=act,
            pre_norm=_norm(channels, training) if expands else None,
            pre_act=act if expands else "identity",
            squeeze_excite=_squeeze_excite(channels, reduced, act) if squeeze else None,
        )

    return call_launches(block, _meta(images, channels, size, size, dtype=dtype), training)


def norm_launches(
    dtype: torch.dtype, *, channels: int = 40, size: int = 28, images: int = 64, training: bool = True
) -> list[Launch]:
    """Launches of BN + drop-path + residual, the end of a block, and of squeeze-excite alone."""
    from effkernels import functional

    x = _meta(images, channels, size, size, dtype=dtype)

    def norm(x):
        scale = _meta(images) if training else None
        return functional.bn_act_add(x, _norm(channels, training), branch_scale=scale, residual=torch.empty_like(x))

    launches = call_launches(norm, x, training)
    if training:
        launches += call_launches(lambda x: functional.squeeze_excite(x, _squeeze_excite(channels, 10)), x, True)
    return launches


@functools.cache
def family_blocks(width: float) -> list[tuple]:
    """(in, out channels, kernel size, stride, expand ratio, image size) of the different blocks of an EfficientNet (Tan
    & Le, 2019, table 1) of a width coefficient: 1 is B0 and B1, 1.4 B4, 2 B7, 4.3 L2."""

    def rounded(channels):
        multiple = max(8, int(channels * width + 4) // 8 * 8)
        return multiple + 8 if multiple < 0.9 * channels * width else multiple

    blocks, inputs, size = [], rounded(32), 112
    for ratio, channels, k, stride in (
        (1, 16, 3, 1),
        (6, 24, 3, 2),
        (6, 40, 5, 2),
        (6, 80, 3, 2),
        (6, 112, 5, 1),
        (6, 192, 5, 2),
        (6, 320, 3, 1),
    ):
        blocks.append((inputs, rounded(channels), k, stride, ratio, size))
        inputs, size = rounded(channels), size // stride
        blocks.append((inputs, inputs, k, 1, ratio, size))
    return blocks


def mbconv_launches(
    dtype: torch.dtype,
    inputs: int,
    outputs: int,
    k: int,
    stride: int,
    ratio: float,
    size: int,
    *,
    training: bool,
    frozen: bool = False,
    images: int = 64,
    **how,
) -> list[Launch]:
    """Launches of one whole MBConv block; frozen: training with running statistics."""
    from effkernels import FusedMBConv

    block = FusedMBConv(inputs, outputs, kernel_size=k, stride=stride, expand_ratio=ratio, device="meta", **how).train(
        training and not frozen
    )
    block.why_not_fused = lambda x=None: None  # meta tensors are no reason here
    return call_launches(block, _meta(images, inputs, size, size, dtype=dtype), training)


def stem_and_head_launches(
    dtype: torch.dtype, channels: int, inputs: int, features: int, *, training: bool, images: int = 64
) -> list[Launch]:
    """Launches of a network's first convolution, on normalised images of the compute dtype, in training also as its
    first block's, and of its last."""
    from effkernels import FusedMBConv, functional

    def norm(channels):
        return BatchNormParams.of(torch.nn.BatchNorm2d(channels, device="meta").train(training))

    weight, first = torch.nn.Parameter(_meta(channels, 3, 3, 3)), norm(channels)
    pixels = _meta(images, 3, 224, 224, dtype=dtype)
    launches = call_launches(lambda x: functional.stem(x, weight, first), pixels, training)
    if training:
        block = FusedMBConv(channels, channels // 2, kernel_size=3, stride=1, expand_ratio=1, device="meta")
        launches += call_launches(lambda x: block.fused(x, stem=(weight, first), stem_stride=2), pixels, True)
    last, conv = norm(features), torch.nn.Parameter(_meta(features, inputs, 1, 1))
    return launches + call_launches(
        lambda x: functional.head(x, conv, last), _meta(images, inputs, 7, 7, dtype=dtype), training
    )


def shipped_launches(full: bool = False) -> list[Launch]:
    """One launch for every configuration the package uses with SiLU on channel counts divisible by 8: blocks of B0
    (and B1, of the same widths) in every dtype and of B4 and B7 in bf16, with and without residual, drop-path and
    squeeze-excite, and single layers of every k. Other widths differ in the channel counts that kernels of 1x1
    convolutions are compiled for.

    Without ``full`` what the table in git holds, and compiles in minutes: blocks of B0 in bf16, layers that do not
    expand in bf16 only, k >= 7 in training only, in bf16 and fp32 only (fp16 shares bf16's configuration).
    """
    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    launches = []
    networks = [(1.0, bf16)]
    if full:
        networks += [(1.4, bf16), (2.0, bf16), (1.0, fp16), (1.0, fp32)]
    for width, dtype in networks:
        for inputs, outputs, k, stride, ratio, size in family_blocks(width):
            shape = {"inputs": inputs, "outputs": outputs, "k": k, "stride": stride, "ratio": ratio, "size": size}
            drop_paths = (0.0, 0.2) if stride == 1 and inputs == outputs else (0.0,)
            for drop_path in drop_paths:
                launches += mbconv_launches(dtype, **shape, training=True, drop_path=drop_path)
            launches += mbconv_launches(dtype, **shape, training=False)
    for dtype, training in itertools.product((bf16, fp16, fp32) if full else (bf16,), (True, False)):
        launches += mbconv_launches(
            dtype=dtype, inputs=24, outputs=40, k=3, stride=2, ratio=6, size=56, training=training, se_ratio=0.0
        )
        for channels, inputs, features in ((32, 320, 1280), (64, 640, 2560)):
            launches += stem_and_head_launches(dtype, channels, inputs, features, training=training)
        if training:
            for how in ({"memory": "recompute"}, {"frozen": True}, {"frozen": True, "memory": "recompute"}):
                launches += mbconv_launches(
                    dtype=dtype, inputs=40, outputs=40, k=5, stride=1, ratio=6, size=28, training=True, **how
                )
    for dtype, k, stride in itertools.product((bf16, fp16, fp32), range(3, LARGEST_KERNEL_SIZE + 1, 2), (1, 2)):
        if full or k <= 5 or dtype != fp16:
            launches += block_launches(dtype, k, stride)
        if full or k <= 5:
            launches += block_launches(dtype, k, stride, training=False)
        if full or (k <= 5 and dtype == bf16):
            launches += block_launches(dtype, k, stride, expands=False)
            launches += block_launches(dtype, k, stride, expands=False, training=False)
    for dtype in (bf16, fp16, fp32) if full else (bf16,):
        for stride in (1, 2):
            launches += block_launches(dtype, 3, stride, squeeze=False) + block_launches(
                dtype, 3, stride, squeeze=False, training=False
            )
    for dtype in (bf16, fp16, fp32):
        launches += norm_launches(dtype) + norm_launches(dtype, training=False)
    # Bottleneck widths of B0 (small) to L2 (large).
    for channels, reduced in ((144, 6), (1152, 48), (3840, 160), (8256, 344)):
        launches += block_launches(bf16, 3, 1, channels=channels, size=14, reduced=reduced)
    return list({launch.key(): launch for launch in launches}.values())
