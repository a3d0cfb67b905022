"""Rows and the one fixture that runs them: skip with a reason, check against float64, then time.

A benchmark module names its ``SHAPES``, by model, and its test calls ``measure()``.
"""

import functools
import gc
import statistics
from typing import NamedTuple

import pytest
import torch

from benchmarks import shapes
from benchmarks.baselines import CHANNELS_LAST, OURS, Truth, Variant, variants
from benchmarks.machine import Machine, compiler_problem
from benchmarks.traffic import step_bytes

GPU_BATCH = {"b0": 256, "b4": 128}
CPU_BATCH = 4
COMPILED_ON_CPU = (shapes.blocks("b0")[1], False)


class Row(NamedTuple):
    model: str
    shape: shapes.Shape
    training: bool
    variant: Variant

    @property
    def case(self):
        model = "" if isinstance(self.shape, shapes.Model) else f"{self.model}-"
        return f"{model}{self.shape}-{'training' if self.training else 'inference'}"

    def problem(self, machine: Machine) -> str | None:
        """Why the row cannot be measured here, or None."""
        if machine.is_gpu:
            return None
        if self.model != "b0":
            return "needs a CUDA GPU: on a CPU only B0's shapes are measured"
        if self.variant.compile_mode is None:
            return None
        if (self.shape, self.training) != COMPILED_ON_CPU or self.variant.compile_mode != "default":
            return "needs a CUDA GPU: on a CPU one block is compiled, in the default mode (the rest takes minutes)"
        return compiler_problem()


def pytest_addoption(parser):
    group = parser.getgroup("effkernels benchmarks")
    group.addoption("--compile-mode", action="append", metavar="MODE", help="torch.compile mode to compare with; repeatable ('default')")
    group.addoption("--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU")
    group.addoption("--batch-size", type=int, metavar="N", help=f"images a step (default: {GPU_BATCH} on a GPU, {CPU_BATCH} on a CPU)")


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        columns = variants(metafunc.config.getoption("compile_mode") or ["default"])
        cases = [
            (model, shape, training) for model, found in metafunc.module.SHAPES.items() for shape in found for training in (False, True)
        ]
        rows = [Row(*case, variant) for case in cases for variant in columns]
        metafunc.parametrize("row", rows, ids=lambda row: f"{row.case}-{row.variant}")


@pytest.fixture(scope="session")
def machine(request):
    return Machine.here(request.config.getoption("dtype"))


@functools.lru_cache(maxsize=1)  # rows of one case follow one another
def truth_of(*args) -> Truth:
    return Truth.of(*args)


@pytest.fixture
def measure(request, benchmark, machine, row):
    """``measure()`` makes one line of the table, and its figures in ``extra_info`` (README.md explains them)."""
    if (problem := row.problem(machine)) is not None:
        benchmark.skipped = True
        pytest.skip(problem)
    batch = request.config.getoption("batch_size") or (GPU_BATCH[row.model] if machine.is_gpu else CPU_BATCH)
    shape = row.shape.shrunk(machine.size_divisor)

    def run():
        truth = truth_of(shape, row.training, batch, machine.device, machine.dtype)
        held = machine.memory_in_use()
        runner = truth.runner(row.variant)
        errors = truth.check(runner)

        rounds = machine.rounds_for(runner.step)
        if machine.is_gpu:
            torch.cuda.reset_peak_memory_stats()
        benchmark.params = {"case": row.case, "variant": row.variant.name}
        benchmark.group = f"{request.module.__name__.removeprefix('benchmarks.test_')} {row.case}"
        benchmark.pedantic(runner.step, setup=machine.before_round, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable
            return
        times = benchmark.stats.stats.data
        moved = step_bytes(shape, row.training, batch, machine.dtype.itemsize, sum(p.numel() for p in runner.parameters))
        benchmark.extra_info.update(
            model=row.model,
            shape=str(shape),
            step="training" if row.training else "inference",
            variant=row.variant.name,
            path=runner.path(),
            batch_size=batch,
            dtype=str(machine.dtype).removeprefix("torch."),
            **figures(times, batch, moved, machine.copy_bytes_per_s),
            errors=errors,
            eager_errors=truth.eager_errors,
            **machine.info,
        )
        if machine.is_gpu:
            benchmark.extra_info["peak_memory_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
        elif row.variant is OURS and isinstance(shape, (shapes.Block, shapes.Model)):
            benchmark.extra_info["time_over_plain"] = time_ratio(machine, runner.step, truth.runner(CHANNELS_LAST).step)

    yield run
    if row.variant.compile_mode is not None:
        torch.compiler.reset()
    if machine.is_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def time_ratio(machine: Machine, step, other) -> float:
    """Median ratio of the times of ``step`` and ``other``, taken in turns, either first in every second, under the same load."""
    ratios = []
    for i in range(max(30, machine.rounds_for(other))):
        first, second = (step, other) if i % 2 else (other, step)
        ratio = machine.seconds(first) / machine.seconds(second)
        ratios.append(ratio if i % 2 else 1 / ratio)
    return statistics.median(ratios)


def figures(times, batch: int, moved: int, copy_bytes_per_s: float) -> dict:
    """What ``times`` [s] of steps on ``batch`` images that move ``moved`` bytes say."""
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    median = statistics.median(times)
    return {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * p20,
        "p80_ms": 1e3 * p80,
        "images_per_s": batch / median,
        "schedule_mb": moved / 1e6,
        "gb_per_s": moved / median / 1e9,
        "share_of_copy": moved / median / copy_bytes_per_s,
    }
