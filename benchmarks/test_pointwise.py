import pytest

from benchmarks.machine import clock
from benchmarks.shapes import pointwise_layers

SHAPES = {name: pointwise_layers(name) for name in ("b0", "b4")}
STEPS = (False,)  # in training the kernels of these layers have no layer of their own


@pytest.mark.benchmark(timer=clock)
def test_pointwise(gpu_benchmark):
    gpu_benchmark()
