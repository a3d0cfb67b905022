"""Times the answer to one image, of B0 to B7, replayed from a CUDA graph: the fused network against plain PyTorch in
NHWC, eager and under torch.compile (modes default and reduce-overhead).
"""

import pytest

from benchmarks.machine import clock
from benchmarks.plan import BATCH
from benchmarks.shapes import model

SHAPES = {name: [model(name)] for name in BATCH}
STEPS = (False,)
LATENCY = True  # one image, replayed from a CUDA graph


@pytest.mark.benchmark(timer=clock)
def test_latency(gpu_benchmark):
    gpu_benchmark()
