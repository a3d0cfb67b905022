"""Times one MBConv block of B0, an inference and a training step each: the fused module against the same layers in
eager PyTorch (NCHW and NHWC) and under torch.compile in each of its modes. Of a block it is the time of the kernels
alone that counts.
"""

import pytest

from benchmarks.machine import clock
from benchmarks.shapes import blocks

# B0's: no expansion; 3 x 3 at stride 2, the most bytes of all; 5 x 5 at stride 1 with a residual; one of 7 x 7 pixels.
SHAPES = {"b0": [blocks("b0")[i] for i in (0, 1, 9, 12)]}


@pytest.mark.benchmark(timer=clock)
def test_block(gpu_benchmark):
    gpu_benchmark()
