"""What a GPU does in a second, at best: the rates that floors are computed with."""

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """Rates that bound a kernel's time: DRAM bytes/s, streaming multiprocessors, sustained clock in Hz, 16-bit matrix
    FLOP/s; and the compute capability that its kernels are compiled for.

    Of an SM of all four: 4 schedulers of one instruction for 32 threads a clock, 128 fp32 fused multiply-adds and 16
    special functions a clock (CUDA C programming guide, arithmetic instructions, compute capability 8.0: 64 FMA; 8.9
    and 9.0: 128).
    """

    name: str
    bandwidth: float
    processors: int
    clock: float
    matrix: float
    capability: tuple[int, int] = (9, 0)
    fma: int = 128

    def per_second(self, threads: int) -> float:
        """Operations a second of a unit that serves ``threads`` threads of an SM a clock."""
        return threads * self.processors * self.clock

    def floors(self, row: dict, bytes_per_element: float) -> dict[str, float]:
        """Picoseconds an element takes at least, by resource; ``row`` is one of effkernels.inspect's table."""
        return {
            "bytes": 1e12 * bytes_per_element / self.bandwidth,
            "issue": 1e12 * row["per_element"] / self.per_second(128),
            "FMA": 1e12 * row["fma"] / self.per_second(self.fma),
            "SFU": 1e12 * row["mufu"] / self.per_second(16),
        }


# Compute capabilities, as in sm_90, that the tests and ``effkernels.inspect`` compile kernels for.
ARCHITECTURES = (80, 86, 89, 90, 100)

# Bandwidth: that of a copy, measured on an H200; elsewhere 0.9 of the data sheet's, as there. Matrix: dense bf16,
# measured on an H200; elsewhere 0.8 of the data sheet's, as there. Clock: under load, Hopper's (boost 1.98 GHz).
GPUS = {
    "h200": Gpu(name="H200", bandwidth=4.3e12, processors=132, clock=1.755e9, matrix=790e12),
    "h100": Gpu(name="H100 SXM", bandwidth=0.9 * 3.35e12, processors=132, clock=1.755e9, matrix=790e12),
    "a100": Gpu(
        name="A100 80 GB SXM",
        bandwidth=0.9 * 2.039e12,
        processors=108,
        clock=1.41e9,
        matrix=0.8 * 312e12,
        capability=(8, 0),
        fma=64,
    ),
    "rtx4090": Gpu(
        name="RTX 4090", bandwidth=0.9 * 1.008e12, processors=128, clock=2.52e9, matrix=0.8 * 165e12, capability=(8, 9)
    ),
}


def gpu_of(device: str) -> Gpu | None:
    """The GPU that CUDA calls ``device`` ("NVIDIA H100 80GB HBM3"), or None if it is none of ``GPUS``."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    found = (gpu for name, gpu in GPUS.items() if name.removeprefix("rtx") in words)
    return None if "laptop" in words else next(found, None)
