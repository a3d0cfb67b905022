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
