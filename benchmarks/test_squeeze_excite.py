import pytest

from benchmarks.machine import clock
from benchmarks.shapes import squeeze_excite_layers

SHAPES = {name: squeeze_excite_layers(name) for name in ("b0", "b4")}


@pytest.mark.benchmark(timer=clock)
def test_squeeze_excite(gpu_benchmark):
    gpu_benchmark()
