"""The bytes that device memory must move, counted from the fused schedule (efficientnet/measure/roofline.py): what
every GB/s is computed from.
"""

from benchmarks import shapes
from efficientnet.measure.roofline import Kernel, Work, block_works, elements, end_works, weight_bytes
from efficientnet.model.config import EfficientNetConfig

DEPTHWISE_INFERENCE = (Kernel("depthwise", "x", "out"),)
DEPTHWISE_TRAINING = (
    Kernel("depthwise", "x", "y"),
    Kernel("apply", "y", "out"),
    Kernel("BN sums", "dout y"),
    Kernel("depthwise backward", "dout y x", "dx"),
)
SQUEEZE_EXCITE_INFERENCE = (Kernel("pool", "x"), Kernel("scale", "x", "out"))
SQUEEZE_EXCITE_TRAINING = (
    *SQUEEZE_EXCITE_INFERENCE,
    Kernel("gate sums", "dout x"),
    Kernel("scale backward", "dout", "dx"),
)


def _elements(schedule, sizes) -> int:
    return sum(sizes[tensor] for kernel in schedule for tensor in f"{kernel.reads} {kernel.writes}".split())


def works(shape: shapes.Block | shapes.Model, training: bool) -> list[Work]:
    """The kernels of one step of a block or a network on one image."""
    if isinstance(shape, shapes.Block):
        return block_works(shape, training)
    blocks = shapes.blocks(shape.name, shape.size)
    head_channels = EfficientNetConfig.from_name(shape.name).head_channels
    found = [work for block in blocks for work in block_works(block, training)]
    return found + end_works(
        first=blocks[0],
        last=blocks[-1],
        in_chans=shape.in_channels,
        size=shape.size,
        head_channels=head_channels,
        training=training,
    )


def activation_elements(shape: shapes.Shape, training: bool) -> int:
    """The elements of activations and gradients that a step reads and writes for one image."""
    if isinstance(shape, shapes.Block | shapes.Model):
        return elements(works(shape, training))
    if isinstance(shape, shapes.Pointwise):
        inputs, outputs = (channels * shape.size**2 for channels in (shape.in_channels, shape.out_channels))
        if training:
            raise ValueError("a 1x1 convolution alone is measured in inference only")
        return inputs + outputs
    inputs = shape.channels * shape.size**2
    if isinstance(shape, shapes.Depthwise):
        outputs = shape.channels * shape.out_size**2
        schedule = DEPTHWISE_TRAINING if training else DEPTHWISE_INFERENCE
    else:
        outputs = inputs
        schedule = SQUEEZE_EXCITE_TRAINING if training else SQUEEZE_EXCITE_INFERENCE
    return _elements(schedule, {"x": inputs, "dx": inputs, "y": outputs, "out": outputs, "dout": outputs})


def step_bytes(shape: shapes.Shape, training: bool, batch: int, itemsize: int, parameters: int) -> int:
    """The bytes of one step on ``batch`` images with ``itemsize`` bytes an element. Models train with AdamW."""
    weights = weight_bytes(parameters, training, itemsize, optimizer=isinstance(shape, shapes.Model))
    return batch * itemsize * activation_elements(shape, training) + weights
