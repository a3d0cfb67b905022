"""Timing's parts that need no GPU: what a profile says, which step is captured, quantiles."""

from types import SimpleNamespace

import pytest
import torch

from efficientnet import timing
from efficientnet.timing import Stopwatch, quantiles, tally

CUDA, CPU = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU


def event(name, device, microseconds, annotation=False):
    span = SimpleNamespace(elapsed_us=lambda: microseconds)
    return SimpleNamespace(name=name, device_type=device, time_range=span, is_user_annotation=annotation)


def test_a_profile_is_added_up():
    events = [event("a", CUDA, 10), event("b", CUDA, 5), event("a", CUDA, 30), event("aten::add", CPU, 99), event("step", CUDA, 99, True)]
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


@pytest.mark.parametrize("seconds, asked, graph", [(20e-6, None, True), (2e-3, None, False), (2e-3, True, True), (20e-6, False, False)])
def test_short_steps_are_replayed(seconds, asked, graph, monkeypatch):
    captured = SimpleNamespace(replay=lambda: "replayed")
    monkeypatch.setattr(timing, "capture", lambda step: captured)
    timed, how = FakeGpu(seconds).prepared(lambda: "run", asked)
    assert (timed(), how) == (("replayed", "graph") if graph else ("run", "events"))


def test_a_step_that_cannot_be_captured_is_timed_and_says_so(monkeypatch):
    def fail(step):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(timing, "capture", fail)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    timed, how = FakeGpu(1e-6).prepared(lambda: "run")
    assert (timed(), how) == ("run", "events (no graph: operation not permitted when stream is capturing)")


def test_a_cpu_has_no_graphs():
    step = list
    assert Stopwatch("cpu").prepared(step, True) == (step, "process")
    assert Stopwatch("cpu", lambda: 1.0).seconds(step) == 0.0


def test_quantiles():
    assert quantiles([float(i) for i in range(101)]) == (50.0, 20.0, 80.0)


def test_versions_of_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(timing, "_driver", lambda: "580.1")
    found = timing.versions(torch.device("cuda"))
    assert (found["device"], found["driver"], found["torch"]) == ("a GPU", "580.1", torch.__version__) and "cudnn" in found
    assert "driver" not in timing.versions(torch.device("cpu"))
