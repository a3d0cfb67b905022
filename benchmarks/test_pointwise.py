"""Times the 1x1 convolutions of B0's and B4's blocks in inference, the expanding ones with BatchNorm and SiLU, the
projecting ones with the gate and BatchNorm: the fused kernel against the same layers in eager PyTorch (NCHW and NHWC)
and under torch.compile.
"""

import pytest

from benchmarks.machine import clock
from benchmarks.shapes import pointwise_layers

SHAPES = {name: pointwise_layers(name) for name in ("b0", "b4")}
STEPS = (False,)  # in training the kernels of these layers have no layer of their own


@pytest.mark.benchmark(timer=clock)
def test_pointwise(gpu_benchmark):
    gpu_benchmark()
