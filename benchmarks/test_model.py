import pytest

from benchmarks.machine import clock
from benchmarks.shapes import model

SHAPES = {name: [model(name)] for name in ("b0", "b4")}


@pytest.mark.benchmark(timer=clock)
def test_model(measure):
    measure()
