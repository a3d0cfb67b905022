"""The machine under the benchmarks: its clock, its copy bandwidth, its versions. Nothing here runs at import."""

import ctypes
import gc
import os
import platform
import shutil
import statistics
import subprocess
import time
from dataclasses import dataclass, field

import torch

from effkernels.dispatch import interpreting, triton_problem

FLUSH_BYTES = 2**30  # far more than any L2, and long enough to write that the launches of a small kernel are queued meanwhile


class CudaInstant:
    """A point on the GPU's own time line; the difference of two is in seconds and waits for the later one only."""

    def __init__(self):
        self.event = torch.cuda.Event(enable_timing=True)
        self.event.record()

    def __sub__(self, earlier):
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def clock():
    """pytest-benchmark's timer: GPU time where there is a GPU, else CPU time of this process, which other processes do not change."""
    return CudaInstant() if torch.cuda.is_available() else time.process_time()


@dataclass
class Machine:
    """One GPU or, without any, the CPU; how much is measured on it and for how long."""

    device: torch.device
    dtype: torch.dtype
    size_divisor: int  # of the images' sides
    seconds_per_row: float
    rounds: tuple[int, int]
    info: dict = field(default_factory=dict)
    copy_bytes_per_s: float = 0.0
    _flush: torch.Tensor | None = None

    @classmethod
    def here(cls, dtype: str | None = None) -> "Machine":
        """The current CUDA device, or one thread of the CPU with small images. Raises RuntimeError under TRITON_INTERPRET."""
        if interpreting():
            raise RuntimeError("TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it to run benchmarks")
        gpu = torch.cuda.is_available()
        chosen = getattr(torch, dtype or ("bfloat16" if gpu else "float32"))
        if gpu:
            torch.backends.cudnn.benchmark = True  # the baselines' best algorithms
            machine = cls(torch.device("cuda", torch.cuda.current_device()), chosen, 1, 0.5, (10, 200))
            machine._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=machine.device)
        else:
            torch.set_num_threads(1)  # so that CPU time is what a step would take on an idle machine
            _keep_freed_memory()
            machine = cls(torch.device("cpu"), chosen, 2, 0.15, (7, 50))
        machine.copy_bytes_per_s = machine._measure_copy()
        machine.info = machine._versions()
        return machine

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def before_round(self):
        """Empty the GPU's L2, and keep it busy while the next step is being queued. On a CPU nothing."""
        if self._flush is not None:
            self._flush.zero_()

    def seconds(self, step) -> float:
        self.before_round()
        start = clock()
        step()
        return clock() - start

    def rounds_for(self, step) -> int:
        """How often to time ``step``, after running it often enough to be warm."""
        for _ in range(3):
            step()
        low, high = self.rounds
        return max(low, min(high, int(self.seconds_per_row / self.seconds(step))))

    def memory_in_use(self) -> int:
        """Bytes of GPU memory in live tensors; 0 on a CPU."""
        if not self.is_gpu:
            return 0
        gc.collect()
        return torch.cuda.memory_allocated()

    def _measure_copy(self) -> float:
        source = torch.ones(2**30 if self.is_gpu else 2**26, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        times = [self.seconds(lambda: target.copy_(source)) for _ in range(13)][3:]
        return 2 * source.numel() / statistics.median(times)

    def _versions(self) -> dict:
        if self.is_gpu:
            info = {"device": torch.cuda.get_device_name(self.device), "driver": _driver()}
            info |= {"cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
        else:
            info = {"device": f"one thread of {_cpu_name()}"}
        if triton_problem() is None:
            import triton

            info["triton"] = triton.__version__
        return info | {"torch": torch.__version__, "python": platform.python_version(), "copy_gb_per_s": self.copy_bytes_per_s / 1e9}


def compiler_problem() -> str | None:
    """Why torch.compile cannot build code for the CPU, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"


def _keep_freed_memory():
    """Tell glibc to reuse what is freed. Otherwise it may hand memory back after a step and fetch it page by page in the next, which
    makes some rows three times as slow as others that do the same."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30)


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
