"""Timing's parts that need no GPU: what a profile says, which step is captured, quantiles."""

import time
from types import SimpleNamespace

import pytest
import torch

from efficientnet.measure import timing
from efficientnet.measure.timing import Stopwatch, quantiles, tally

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def event(name, device, microseconds, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)


def test_a_profile_is_added_up():
    events = [
        event("a", CUDA, 10),
        event("b", CUDA, 5),
        event("a", CUDA, 30),
        event("aten::add", CPU, 99),
        event("step", CUDA, 99, True),
    ]
    assert tally(events) == {"a": (2, 0.04), "b": (1, 0.005)}


def test_a_cpu_profile_has_nothing_of_a_gpu():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.ones(3).add(1)
    assert len(profile.events()) > 0 and tally(profile.events()) == {}


class FakeGpu(Stopwatch):
    """A GPU whose steps take ``step_seconds``."""

    def __init__(self, step_seconds):
        super().__init__("cpu")
        self.is_gpu, self.step_seconds = True, step_seconds

    def seconds(self, step):
        return self.step_seconds

    def _writes_to_queue(self, step):
        return 7


@pytest.mark.parametrize(
    "seconds, how, expected, writes",
    [
        (20e-6, "kernels", ("replayed", "graph"), 1),
        (2e-3, "kernels", ("run", "events, queued ahead"), 7),
        (2e-3, "graph", ("replayed", "graph"), 1),
        (20e-6, "step", ("run", "events"), 1),
    ],
)
def test_short_kernels_are_replayed(seconds, how, expected, writes, monkeypatch):
    monkeypatch.setattr(timing, "capture", lambda step: SimpleNamespace(replay=lambda: "replayed"))
    gpu = FakeGpu(seconds)
    timed, measured = gpu.prepared(lambda: "run", how)
    assert (timed(), measured, gpu.writes) == (*expected, writes)
    gpu.prepared(lambda: "run", "step")
    assert gpu.writes == 1


def test_a_step_that_cannot_be_captured_is_timed_and_says_so(monkeypatch):
    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "capture", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timed, how = FakeGpu(1e-6).prepared(lambda: "run", "kernels")
    assert (timed(), how) == ("run", "events, queued ahead, no graph: operation not permitted when stream is capturing")
    monkeypatch.setattr(timing, "capture", lambda step: pytest.fail("captured"))
    assert FakeGpu(1e-6).prepared(list, "kernels", capturable=False) == (
        list,
        "events, queued ahead, graphs of its own",
    )


@pytest.mark.parametrize("queued, writes", [(0.0, 1), (1e-3, 6), (10.0, timing.MOST_WRITES)])
def test_the_gpu_is_busy_for_longer_than_queueing_takes(queued, writes, monkeypatch):
    """A write takes the GPU 0.3 ms; the host queues a step for ``queued`` seconds."""
    instants, host = iter([0.0, 0.3e-3]), [5.0]
    monkeypatch.setattr(time, "perf_counter", lambda: host[0])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    gpu = Stopwatch("cpu")
    gpu.clock, gpu._flush = (lambda: next(instants)), torch.empty(1)

    def step():
        host[0] += queued

    assert gpu._writes_to_queue(step) == writes
    written = []
    gpu.writes, gpu._flush = writes, SimpleNamespace(zero_=lambda: written.append(1))
    gpu.before_round()
    assert len(written) == writes


def test_a_cpu_has_no_graphs():
    step = list
    assert Stopwatch("cpu").prepared(step, "graph") == (step, "process")
    assert Stopwatch("cpu", lambda: 1.0).seconds(step) == 0.0


def test_quantiles():
    assert quantiles([float(i) for i in range(101)]) == (50.0, 20.0, 80.0)


def test_versions_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(timing, "_driver", lambda: "580.1")
    found = timing.versions(torch.device("cuda"))
    assert (found["device"], found["driver"], found["torch"]) == (
        "a GPU",
        "580.1",
        torch.__version__,
    ) and "cudnn" in found
    assert "driver" not in timing.versions(torch.device("cpu"))
