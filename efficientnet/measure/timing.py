"""How steps are timed, on a GPU and on a CPU, for ``efficientnet benchmark`` and for the benchmark suite. Nothing runs
at import.
"""

import platform
import statistics
import subprocess
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence

import torch

from effkernels.dispatch import triton_problem

FLUSH_BYTES = 2**30  # far more than any L2, and a third of a millisecond for a GPU to write
GRAPH_BELOW = 100e-6  # s; kernels that take less are replayed from a CUDA graph
MOST_WRITES = 100  # of FLUSH_BYTES before a step: 30 ms, for launches that take the host as long


class CudaInstant:
    """A point on the GPU's own time line. The difference of two is in seconds, and waits for the later one only."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Stopwatch:
    """Times steps on a device.

    On a GPU it uses events, after writes of FLUSH_BYTES that empty the L2 and keep the GPU busy while the step is being
    queued. On a CPU it uses ``cpu_clock``, which returns seconds.
    """

    def __init__(self, device: torch.device, cpu_clock: Callable[[], float] = time.perf_counter):
        self.device, self.is_gpu = torch.device(device), torch.device(device).type == "cuda"
        self.clock = CudaInstant if self.is_gpu else cpu_clock
        self.writes = 1
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.is_gpu else None

    def before_round(self) -> None:
        """Empty the GPU's L2."""
        if self._flush is not None:
            for _ in range(self.writes):
                self._flush.zero_()

    def seconds(self, step: Callable[[], object]) -> float:
        """How long ``step()`` takes."""
        self.before_round()
        start = self.clock()
        step()
        return self.clock() - start

    def prepared(
        self, step: Callable[[], object], how: str = "step", capturable: bool = True
    ) -> tuple[Callable[[], object], str]:
        """(what to time instead of ``step``, what that measures).

        On a CPU it is the step itself. On a GPU it depends on ``how``:

        - "step": the step as a program runs it, with the time that the GPU waits for the host, if it does;
        - "kernels": the GPU's part alone, replayed from a graph if that takes less than GRAPH_BELOW, else queued ahead;
        - "graph": the replay of a graph.

        ``step`` must have run before, so that everything is compiled. A step that cannot be captured is queued ahead,
        and that is said. ``capturable`` is False for one that holds graphs of its own, so that it is not tried.
        """
        self.writes = 1
        if not self.is_gpu:
            return step, "process"
        if how == "step":
            return step, "events"
        self.writes = self._writes_to_queue(step)
        why_not = "" if capturable else ", graphs of its own"
        if capturable and (how == "graph" or statistics.median(self.seconds(step) for _ in range(5)) < GRAPH_BELOW):
            try:
                replay = capture(step).replay
                self.writes = 1
                return replay, "graph"
            except RuntimeError as error:
                torch.cuda.synchronize()
                why_not = f", no graph: {str(error).splitlines()[0]}"
        return step, f"events, queued ahead{why_not}"

    def _writes_to_queue(self, step) -> int:
        """The number of writes that keep the GPU busy half as long again as the host needs to queue ``step``."""
        start = self.clock()
        self._flush.zero_()
        write = self.clock() - start  # waits until the GPU is idle
        began = time.perf_counter()
        step()
        queued = time.perf_counter() - began
        torch.cuda.synchronize()
        return min(MOST_WRITES, 1 + int(1.5 * queued / write))

    def copy_bandwidth(self) -> float:
        """The bytes read plus the bytes written in a second by a large copy."""
        source = torch.ones(FLUSH_BYTES if self.is_gpu else 2**26, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(13)][3:]
        return 2 * source.numel() / statistics.median(times)


def capture(step: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of ``step``, captured after three runs on a side stream."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def tally(events: Iterable) -> dict[str, tuple[int, float]]:
    """{kernel: (launches, milliseconds)} of a profile's events: all that ran on the GPU, without annotations."""
    found: dict[str, list] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.name][0] += 1
            found[event.name][1] += event.time_range.elapsed_us() / 1e3
    return {name: (count, milliseconds) for name, (count, milliseconds) in found.items()}


def kernel_times(step: Callable[[], object]) -> dict[str, tuple[int, float]]:
    """``tally`` of one ``step`` on a GPU, copies and fills included."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return tally(profiled.events())


def peak_memory(step: Callable[[], object], graphs: bool = False) -> int:
    """The most bytes of GPU memory in use within one ``step``.

    They are those of live tensors. A step that holds CUDA ``graphs`` of its own also counts what these keep from
    everybody else, which no tensor owns while they are replayed.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if not graphs:
        return peak
    # What is reserved now and is no tensor's belongs to the graphs, but for the rounding of segments.
    torch.cuda.empty_cache()
    return peak + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """(median, 20th percentile, 80th percentile)."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), p20, p80


def versions(device: torch.device) -> dict:
    """The names and versions of GPU, driver, CUDA and cuDNN, or the CPU's name; of Triton, torch and Python."""
    if device.type == "cuda":
        info = {"device": torch.cuda.get_device_name(device), "driver": _driver()}
        info |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    else:
        info = {"device": _cpu_name()}
    if triton_problem() is None:
        from importlib.metadata import version

        info["triton"] = version("triton")
    return info | {"torch": torch.__version__, "python": platform.python_version()}


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, check=True, capture_output=True, text=True, timeout=60).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None
