"""How steps are timed, on a GPU and on a CPU; shared by ``efficientnet benchmark`` and the benchmark suite. Nothing runs at import."""

import ctypes
import platform
import statistics
import subprocess
import time
from collections import defaultdict

import torch

from effkernels.dispatch import triton_problem

FLUSH_BYTES = 2**30  # far more than any L2, and a third of a millisecond for a GPU to write
GRAPH_BELOW = 100e-6  # s; kernels that take less are replayed from a CUDA graph
MOST_WRITES = 100  # of FLUSH_BYTES before a step: 30 ms, for launches that take the host as long


class CudaInstant:
    """A point on the GPU's own time line; the difference of two is in seconds and waits for the later one only."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


class Stopwatch:
    """Times steps on a device: on a GPU with events, after writes of FLUSH_BYTES that empty the L2 and keep the GPU busy while the
    step is being queued; on a CPU with ``cpu_clock``."""

    def __init__(self, device: torch.device, cpu_clock=time.perf_counter):
        self.device, self.is_gpu = torch.device(device), torch.device(device).type == "cuda"
        self.clock = CudaInstant if self.is_gpu else cpu_clock
        self.writes = 1
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if self.is_gpu else None

    def before_round(self):
        if self._flush is not None:
            for _ in range(self.writes):
                self._flush.zero_()

    def seconds(self, step) -> float:
        self.before_round()
        start = self.clock()
        step()
        return self.clock() - start

    def prepared(self, step, how: str = "step", capturable: bool = True):
        """(what to time instead of ``step``, what that measures): on a GPU

        - how "step": the step as a program runs it, with the time that the GPU waits for the host, if it does;
        - "kernels": the GPU's part alone: replayed from a graph if that takes less than GRAPH_BELOW, else queued ahead;
        - "graph": a graph's replay.

        ``step`` must have run before, so that everything is compiled. One that cannot be captured is queued ahead, and that is said;
        ``capturable`` False: it holds graphs of its own and need not be tried.
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
        """How many writes the GPU is busy with for half as long again as the host needs to queue ``step``."""
        start = self.clock()
        self._flush.zero_()
        write = self.clock() - start  # waits until the GPU is idle
        began = time.perf_counter()
        step()
        queued = time.perf_counter() - began
        torch.cuda.synchronize()
        return min(MOST_WRITES, 1 + int(1.5 * queued / write))

    def copy_bandwidth(self) -> float:
        """Bytes read plus bytes written a second by a large copy."""
        source = torch.ones(FLUSH_BYTES if self.is_gpu else 2**26, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(13)][3:]
        return 2 * source.numel() / statistics.median(times)


def capture(step):
    """A CUDA graph of ``step``, after three runs on a side stream."""
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


def tally(events) -> dict[str, tuple[int, float]]:
    """{kernel: (launches, milliseconds)} of a profile's events: what ran on the GPU, annotations aside."""
    found: dict[str, list] = defaultdict(lambda: [0, 0.0])
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CUDA and not getattr(event, "is_user_annotation", False):
            found[event.name][0] += 1
            found[event.name][1] += event.time_range.elapsed_us() / 1e3
    return {name: (count, milliseconds) for name, (count, milliseconds) in found.items()}


def kernel_times(step) -> dict[str, tuple[int, float]]:
    """``tally`` of one ``step`` on a GPU, copies and fills included."""
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    return tally(profiled.events())


def peak_memory(step, graphs: bool = False) -> int:
    """Bytes of GPU memory within one ``step`` at most: those of live tensors, and of a step that holds CUDA ``graphs`` of its own what
    these keep from everybody else, which no tensor owns while they are replayed."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated()
    if not graphs:
        return peak
    torch.cuda.empty_cache()  # of what remains reserved no tensor's, all but the rounding of segments belongs to the graphs
    return peak + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def quantiles(times) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile)."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return statistics.median(times), p20, p80


def versions(device: torch.device) -> dict:
    """GPU, driver, CUDA, cuDNN (on a CPU its name), Triton, torch, Python."""
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


def keep_freed_memory():
    """Tell glibc to reuse what is freed. Otherwise it may hand memory back after a step and fetch it page by page in the next, which
    makes some rows three times as slow as others that do the same."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30)
