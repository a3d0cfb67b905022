"""A stand-in for a GPU, so that every line that is for one runs without: the CPU under the name "cuda".

``pytest -p support.fake_gpu`` or ``fake_gpu.install()`` in a process of its own. Tensors that are asked for on "cuda"
are made on the CPU; torch.cuda's events, streams, graphs, memory counters and torch.profiler keep the real ones' rules
where a mistake would show: two events are compared when both are recorded and the later was waited for, nothing waits
or asks for the time while a graph is captured, a graph is replayed when its capture has ended. Times and bytes mean
nothing. Kernels do not run: our modules run their plain layers.
"""

import contextlib
import functools
import time
from dataclasses import replace
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

CALLS = []  # what was asked of the GPU, in order
FLUSH_BYTES = 2**22
NAME = "NVIDIA H100 80GB HBM3"


class OnCpu(TorchFunctionMode):
    """Every argument that is a CUDA device becomes the CPU."""

    @staticmethod
    def _cpu(value):
        if isinstance(value, (torch.device, str)) and str(value).partition(":")[0] == "cuda":
            return torch.device("cpu")
        return value

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.device:
            return func(*args, **kwargs or {})
        return func(*map(self._cpu, args), **{name: self._cpu(value) for name, value in (kwargs or {}).items()})


capturing = False


def _waits(what):
    if capturing:
        raise RuntimeError(f"CUDA error: operation not permitted when stream is capturing ({what})")
    CALLS.append(what)


class Event:
    def __init__(self, enable_timing=False):
        self.timed, self.at, self.waited_for = enable_timing, None, False

    def record(self):
        assert not capturing
        self.at = time.perf_counter()

    def synchronize(self):
        _waits("event")
        self.waited_for = True

    def elapsed_time(self, end):
        assert self.timed and end.timed and None not in (self.at, end.at) and end.waited_for
        return 1e3 * (end.at - self.at)


class Stream:
    def wait_stream(self, other):
        assert isinstance(other, Stream) and other is not self
        CALLS.append("wait_stream")


MAIN = Stream()
current = MAIN


@contextlib.contextmanager
def stream(to):
    global current
    before, current = current, to
    yield
    current = before


class CUDAGraph:
    captured = False

    def replay(self):
        assert self.captured and not capturing
        CALLS.append("replay")


@contextlib.contextmanager
def graph(cuda_graph):
    global capturing
    _waits("capture")
    capturing = True
    try:
        yield
        cuda_graph.captured = True
    finally:
        capturing = False


class Profile(TorchDispatchMode):
    """Of torch.profiler: the operators that ran, as if they were kernels. (Its own would follow a bf16 convolution into
    400,000 pieces on a CPU that has none.)
    """

    def __init__(self, activities):
        super().__init__()
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        start = time.perf_counter()
        result = func(*args, **kwargs or {})
        took = SimpleNamespace(elapsed_us=functools.partial(float, 1e6 * (time.perf_counter() - start)))
        cuda = torch.autograd.DeviceType.CUDA
        self.found.append(SimpleNamespace(name=str(func), device_type=cuda, time_range=took, is_user_annotation=False))
        return result

    def events(self):
        return self.found


class Launches:
    """Of torch.profiler: the launches that fused modules would start, as if the n-th took n microseconds."""

    def __init__(self, activities):
        from effkernels.tools.simulator.steps import recorded

        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        self._recorded = recorded()

    def __enter__(self):
        from effkernels import dispatch

        self._plain, dispatch.without_triton_on_cpu = dispatch.without_triton_on_cpu, lambda: False
        self.launches, _ = self._recorded.__enter__()
        return self

    def __exit__(self, *error):
        from effkernels import dispatch

        dispatch.without_triton_on_cpu = self._plain
        return self._recorded.__exit__(*error)

    def events(self):
        times = [
            SimpleNamespace(start=n, elapsed_us=functools.partial(float, n)) for n in range(1, 1 + len(self.launches))
        ]
        events = [SimpleNamespace(name=launch.name) for launch in self.launches]
        for event, time_range in zip(events, times, strict=True):
            event.time_range = time_range
        return events[::-1]  # as torch.profiler's, in no order


AUTOCAST = torch.autocast


def compiled(model, *, mode, dynamic):
    """Of torch.compile, which would build code for a GPU: checks what it is given, and gives the model."""
    from torch._inductor import list_mode_options

    assert dynamic is False and (mode == "default" or mode in list_mode_options())
    CALLS.append(f"compile {mode}")
    return model


def install():
    from efficientnet.measure import timing

    assert not torch.cuda.is_available(), "a real GPU is at hand"
    timing.FLUSH_BYTES = FLUSH_BYTES
    torch.version.cuda, torch.backends.cudnn.version = "13.0", lambda: 91000
    memory = {"memory_allocated": 1000, "max_memory_allocated": 5_000_000, "memory_reserved": 9_000_000}
    for name, value in memory.items():
        setattr(torch.cuda, name, lambda value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        setattr(torch.cuda, name, lambda name=name: _waits(name))
    for name, value in (("is_available", True), ("current_device", 0), ("is_bf16_supported", True)):
        setattr(torch.cuda, name, lambda value=value: value)
    torch.cuda.get_device_name = lambda device: NAME if device.type == "cuda" else None
    torch.cuda.get_device_capability = lambda device=None: (9, 0)
    torch.cuda.Event, torch.cuda.Stream, torch.cuda.CUDAGraph, torch.cuda.graph = Event, Stream, CUDAGraph, graph
    torch.cuda.stream, torch.cuda.current_stream = stream, lambda: current
    torch.profiler.profile, torch.compile = Profile, compiled
    torch.compiler.reset = lambda: CALLS.append("compiler.reset")
    torch.compiler.cudagraph_mark_step_begin = lambda: CALLS.append("mark_step_begin")
    torch.autocast = lambda device, *args, **kwargs: AUTOCAST("cpu" if device == "cuda" else device, *args, **kwargs)
    timing._driver = lambda: "580.1"
    OnCpu().__enter__()


def pytest_configure(config):
    install()
    from benchmarks.machine import Machine

    here = Machine.here
    Machine.here = lambda dtype: replace(here(dtype), seconds_per_row=0.02, rounds=(3, 5))  # their times mean nothing
