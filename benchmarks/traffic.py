"""Bytes that device memory must move, counted from the fused schedule: the numerator of every GB/s.

A schedule lists the kernels of one step and the whole tensors each reads and writes, per image. It is what the kernels are to
reach, not what they do today, and the same for every variant: a variant's GB/s ranks it, and the share of the copy bandwidth
says how far it is from the schedule at full speed. Halos, per-channel vectors and per-tile sums are not counted; weights are,
once for each use.

Tensors of a block: x (input), y1 (after the expand convolution), y2 (after the depthwise), y3 (after the project convolution),
out; each before its BatchNorm in training, after BatchNorm and activation in inference. dq is the gradient after the gate, dz1
the one before BN1's activation; skip is the residual's share (empty where there is no residual).
"""

from typing import NamedTuple

from benchmarks import shapes
from efficientnet.config import EfficientNetConfig


class Kernel(NamedTuple):
    """One kernel: the names of the tensors it reads and writes, separated by spaces."""

    name: str
    reads: str
    writes: str = ""


DEPTHWISE_INFERENCE = (Kernel("depthwise", "x", "out"),)
DEPTHWISE_TRAINING = (
    Kernel("depthwise", "x", "y"),
    Kernel("apply", "y", "out"),
    Kernel("BN sums", "dout y"),
    Kernel("depthwise backward", "dout y x", "dx"),
)
SQUEEZE_EXCITE_INFERENCE = (Kernel("pool", "x"), Kernel("scale", "x", "out"))
SQUEEZE_EXCITE_TRAINING = (*SQUEEZE_EXCITE_INFERENCE, Kernel("gate sums", "dout x"), Kernel("scale backward", "dout", "dx"))
BLOCK_INFERENCE = (
    Kernel("expand", "x", "y1"),
    Kernel("depthwise", "y1", "y2"),  # the pooled sums in its epilogue
    Kernel("project", "y2 skip", "out"),  # the gate on load, the residual in its epilogue
)
BLOCK_TRAINING = (
    Kernel("expand", "x", "y1"),
    Kernel("depthwise", "y1", "y2"),
    Kernel("pool", "y2"),
    Kernel("project", "y2", "y3"),
    Kernel("apply", "y3 skip", "out"),
    Kernel("BN3 sums", "dout y3"),
    Kernel("project backward", "dout y3 y2", "dq"),
    Kernel("depthwise backward", "dq y2 y1", "dz1"),
    Kernel("expand backward", "dz1 x", "dx"),
    Kernel("residual backward", "skip"),  # whichever kernel writes dx also reads dout
)
STEM_AND_HEAD_INFERENCE = (Kernel("stem", "image", "stem"), Kernel("head", "features"))  # the head pools in its epilogue
STEM_AND_HEAD_TRAINING = (
    Kernel("stem", "image", "stem"),
    Kernel("head", "features", "head"),
    Kernel("head pool", "head"),
    Kernel("head backward", "head features", "dfeatures"),
    Kernel("stem backward", "image stem dstem"),
)


def _elements(schedule, sizes) -> int:
    return sum(sizes[tensor] for kernel in schedule for tensor in f"{kernel.reads} {kernel.writes}".split())


def _block_elements(block: shapes.Block, training: bool) -> int:
    inputs, outputs = block.in_channels * block.size**2, block.out_channels * block.out_size**2
    e1, e2 = block.expanded * block.size**2, block.expanded * block.out_size**2
    schedule = BLOCK_TRAINING if training else BLOCK_INFERENCE
    sizes = {"x": inputs, "dx": inputs, "y1": e1, "dz1": e1, "y2": e2, "dq": e2, "y3": outputs, "out": outputs, "dout": outputs}
    sizes["skip"] = inputs if block.residual else 0
    if block.expanded == block.in_channels:  # no expand convolution: the depthwise reads x and its backward writes dx
        schedule = [kernel for kernel in schedule if not kernel.name.startswith("expand")]
    return _elements(schedule, sizes)


def _model_elements(model: shapes.Model, training: bool) -> int:
    blocks = shapes.blocks(model.name, model.size)
    first, last = blocks[0], blocks[-1]
    stem, features = first.in_channels * first.size**2, last.out_channels * last.out_size**2
    sizes = {"image": model.in_channels * model.size**2, "stem": stem, "dstem": stem, "features": features, "dfeatures": features}
    sizes["head"] = EfficientNetConfig.from_name(model.name).head_channels * last.out_size**2
    ends = _elements(STEM_AND_HEAD_TRAINING if training else STEM_AND_HEAD_INFERENCE, sizes)
    return ends + sum(_block_elements(block, training) for block in blocks)


def activation_elements(shape: shapes.Shape, training: bool) -> int:
    """Elements of activations and gradients that one image's step reads and writes."""
    if isinstance(shape, shapes.Model):
        return _model_elements(shape, training)
    if isinstance(shape, shapes.Block):
        return _block_elements(shape, training)
    inputs = shape.channels * shape.size**2
    if isinstance(shape, shapes.Depthwise):
        outputs = shape.channels * shape.out_size**2
        schedule = DEPTHWISE_TRAINING if training else DEPTHWISE_INFERENCE
    else:
        outputs = inputs
        schedule = SQUEEZE_EXCITE_TRAINING if training else SQUEEZE_EXCITE_INFERENCE
    return _elements(schedule, {"x": inputs, "dx": inputs, "y": outputs, "out": outputs, "dout": outputs})


def weight_bytes(parameters: int, training: bool, itemsize: int, optimizer: bool = False) -> int:
    """Inference reads weights once, in the compute dtype. Training reads fp32 weights forward and backward and writes gradients;
    AdamW reads weight, gradient and both moments and writes all but the gradient."""
    if not training:
        return parameters * itemsize
    return parameters * 4 * (3 + (7 if optimizer else 0))


def step_bytes(shape: shapes.Shape, training: bool, batch: int, itemsize: int, parameters: int) -> int:
    """Bytes of one step on ``batch`` images with ``itemsize`` bytes an element; models train with AdamW."""
    weights = weight_bytes(parameters, training, itemsize, optimizer=isinstance(shape, shapes.Model))
    return batch * itemsize * activation_elements(shape, training) + weights
