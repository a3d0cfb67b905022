"""Times depthwise convolution, BatchNorm and SiLU, of every distinct depthwise layer of B0 and B4, an inference and a
training step each: the fused module against the same layers in eager PyTorch (NCHW and NHWC) and under torch.compile
in each of its modes.
"""

import pytest

from benchmarks.machine import clock
from benchmarks.shapes import depthwise_layers

SHAPES = {name: depthwise_layers(name) for name in ("b0", "b4")}


@pytest.mark.benchmark(timer=clock)
def test_depthwise(gpu_benchmark):
    gpu_benchmark()
