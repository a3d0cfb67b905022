"""The machine under the benchmarks: how long and in which dtype it measures, its copy bandwidth, its versions."""

import gc
import os
import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone

import torch

from benchmarks import libraries
from efficientnet.measure.timing import CudaInstant, Stopwatch, versions
from efficientnet.memory import keep_freed_memory
from effkernels.dispatch import interpreting


def clock() -> CudaInstant | float:
    """pytest-benchmark's timer: GPU time where there is a GPU, else this process's CPU time, which other processes do
    not change.
    """
    return CudaInstant() if torch.cuda.is_available() else time.process_time()


@dataclass
class Machine:
    """One GPU or, without any, the CPU; how much is measured on it, and for how long."""

    device: torch.device
    dtype: torch.dtype
    size_divisor: int  # of the images' sides
    seconds_per_row: float
    rounds: tuple[int, int]
    info: dict = field(default_factory=dict)
    copy_bytes_per_s: float = 0.0
    stopwatch: Stopwatch | None = None

    @classmethod
    def here(cls, dtype: str | None = None) -> "Machine":
        """The current CUDA device, or one thread of the CPU with small images. Raises RuntimeError under
        TRITON_INTERPRET.
        """
        if interpreting():
            raise RuntimeError(
                "TRITON_INTERPRET is set: the interpreter's times mean nothing; unset it to run benchmarks"
            )
        gpu = torch.cuda.is_available()
        chosen = getattr(torch, dtype or ("bfloat16" if gpu else "float32"))
        if gpu:
            torch.backends.cudnn.benchmark = True  # the baselines' best algorithms
            machine = cls(torch.device("cuda", torch.cuda.current_device()), chosen, 1, 0.5, (10, 200))
        else:
            torch.set_num_threads(1)  # so that CPU time is what a step would take on an idle machine
            keep_freed_memory()
            machine = cls(torch.device("cpu"), chosen, 2, 0.15, (7, 50))
        machine.stopwatch = Stopwatch(machine.device, time.process_time)
        machine.copy_bytes_per_s = machine.stopwatch.copy_bandwidth()
        machine.info = (
            versions(machine.device) | libraries.versions() | {"copy_gb_per_s": machine.copy_bytes_per_s / 1e9}
        )
        machine.info["date"] = datetime.now(timezone.utc).date().isoformat()
        if not gpu:
            machine.info["device"] = f"one thread of {machine.info['device']}"
        return machine

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def rounds_for(self, step: Callable[[], object]) -> int:
        """How often to time ``step``, after running it often enough to be warm."""
        for _ in range(3):
            step()
        low, high = self.rounds
        return max(low, min(high, int(self.seconds_per_row / self.stopwatch.seconds(step))))

    def memory_in_use(self) -> int:
        """The bytes of GPU memory in live tensors; 0 on a CPU."""
        if not self.is_gpu:
            return 0
        gc.collect()
        return torch.cuda.memory_allocated()


def compiler_problem() -> str | None:
    """Why torch.compile cannot build code for the CPU, or None."""
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler, and there is no {compiler}"


def median_interval(values: list[float]) -> dict:
    """The median and its 95 % confidence interval, whatever the distribution: by rank, 0.98 sqrt(n) from the middle."""
    values = sorted(values)
    ranks = 0.98 * len(values) ** 0.5
    low, high = max(0, int(len(values) / 2 - ranks)), min(len(values) - 1, int(len(values) / 2 + ranks))
    return {"median": statistics.median(values), "low": values[low], "high": values[high], "pairs": len(values)}
