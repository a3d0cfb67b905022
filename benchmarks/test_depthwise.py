import pytest

from benchmarks.machine import clock
from benchmarks.shapes import depthwise_layers

SHAPES = {name: depthwise_layers(name) for name in ("b0", "b4")}


@pytest.mark.benchmark(timer=clock)
def test_depthwise(gpu_benchmark):
    gpu_benchmark()
