"""Times whole networks, B0 to B7, an inference and a training step of a batch each: the fused network against plain
PyTorch (NCHW and NHWC), torch.compile in each of its modes, and timm's and torchvision's networks with the same
weights.
"""

import pytest

from benchmarks.machine import clock
from benchmarks.plan import BATCH
from benchmarks.shapes import model

SHAPES = {name: [model(name)] for name in BATCH}


@pytest.mark.benchmark(timer=clock)
def test_model(gpu_benchmark):
    gpu_benchmark()
