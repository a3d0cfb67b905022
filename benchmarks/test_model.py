import pytest

from benchmarks.machine import clock
from benchmarks.plan import BATCH
from benchmarks.shapes import model

SHAPES = {name: [model(name)] for name in BATCH}


@pytest.mark.benchmark(timer=clock)
def test_model(gpu_benchmark):
    gpu_benchmark()
