"""Times inference of B0 on a CPU thread beside other libraries' networks, all in turns; ``python -m benchmarks.cpu``
measures more.
"""

import time

import pytest
import torch

from benchmarks import cpu
from efficientnet import create_model

SHAPES: dict = {}  # no rows of networks, for a campaign
SECONDS = 20.0  # of the rounds of a row


@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.benchmark(timer=time.process_time)
def test_cpu(batch, benchmark):
    row = cpu.measure(name="b0", batch=batch, threads=1, dtype=torch.float32, compiled=False, seconds=SECONDS)
    print("\n" + cpu.said(row))
    benchmark.extra_info.update(row | cpu.machine())
    model = create_model("efficientnet_b0").eval()
    x = torch.randn(batch, 3, 224, 224).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        benchmark.pedantic(model, (x,), rounds=5, warmup_rounds=2)
