"""Which counters a launch gets: one buffer a stream, but none that a CUDA graph or a compiled graph could share with
others.
"""

from types import SimpleNamespace

import pytest
import torch

from effkernels.ops import counters
from effkernels.ops.counters import own_counters, zeroed_counters
from support.truth import on_gpu


class OnGpu:
    """As much of a CUDA tensor as is asked for, whose new tensors lie on the CPU."""

    is_cuda, device = True, SimpleNamespace(type="cuda", index=0)

    @staticmethod
    def new_zeros(n, dtype):
        return torch.zeros(n, dtype=dtype)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU to ask: ``stream`` and ``capturing`` can be set."""
    state = SimpleNamespace(stream=1, capturing=False)
    monkeypatch.setattr(counters, "_buffers", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=state.stream))
    return state


def test_one_buffer_a_stream(gpu):
    first = zeroed_counters(OnGpu, 100)
    assert first.dtype == torch.int32 and first.numel() >= 100 and not first.any()
    assert zeroed_counters(OnGpu, 50) is first
    gpu.stream = 2
    assert zeroed_counters(OnGpu, 50) is not first
    gpu.stream = 1
    assert zeroed_counters(OnGpu, 50) is first
    larger = zeroed_counters(OnGpu, first.numel() + 1)
    assert larger.numel() > first.numel() and zeroed_counters(OnGpu, 50) is larger


def test_captures_and_compiled_graphs_have_their_own(gpu):
    shared = zeroed_counters(OnGpu, 8)
    gpu.capturing = True
    captured = [zeroed_counters(OnGpu, 8) for _ in range(2)]
    gpu.capturing = False
    compiled = [own_counters(lambda: zeroed_counters(OnGpu, 8))() for _ in range(2)]
    assert len({id(t) for t in (shared, *captured, *compiled)}) == 5
    assert zeroed_counters(OnGpu, 8) is shared

    def fails():
        raise KeyError

    with pytest.raises(KeyError):
        own_counters(fails)()
    assert zeroed_counters(OnGpu, 8) is shared, "also after an operator that failed"


def test_the_interpreter_gets_new_ones():
    """A launch that was interrupted half-way leaves counts behind."""
    x = torch.empty(1)
    first = zeroed_counters(x, 8)
    first.fill_(3)
    assert not zeroed_counters(x, 8).any()


@on_gpu
def test_counters_are_left_at_zero(device):
    from effkernels import FusedMBConv

    block = FusedMBConv(16, 16, 3, 1, 6, 0.25).to(device)
    x = torch.randn(4, 16, 14, 14, device=device, requires_grad=True)
    for _ in range(3):
        block(x).square().sum().backward()
    torch.cuda.synchronize()
    assert counters._buffers and not any(t.any() for t in counters._buffers.values())
