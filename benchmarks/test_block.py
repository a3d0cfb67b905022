import pytest

from benchmarks.machine import clock
from benchmarks.shapes import blocks

# B0's: no expansion; 3 x 3 at stride 2, the most bytes of all; 5 x 5 at stride 1 with a residual; late, at 7 x 7 pixels.
SHAPES = {"b0": [blocks("b0")[i] for i in (0, 1, 9, 12)]}


@pytest.mark.benchmark(timer=clock)
def test_block(gpu_benchmark):
    gpu_benchmark()
