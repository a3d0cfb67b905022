"""The rows, and the one fixture that runs them: it skips with a reason, checks against float64, then times.

A benchmark module names its ``SHAPES``, by model, and its test calls ``gpu_benchmark()``. It may name the ``STEPS``
(training or not) that exist, and say that its rows are of ``LATENCY``: one image, replayed from a CUDA graph.
"""

import functools
import gc
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.utils import get_commit_info

from benchmarks import campaign, libraries, shapes
from benchmarks.machine import Machine, median_interval
from benchmarks.plan import BATCH
from benchmarks.rows import CPU_BATCH, rows_of
from benchmarks.schedule_bytes import step_bytes
from benchmarks.variants import CHANNELS_LAST, COMPILE_MODES, OURS, Truth, Variant, variants
from efficientnet.measure.timing import kernel_times, peak_memory, quantiles


def pytest_addoption(parser):
    group = parser.getgroup("effkernels benchmarks")
    group.addoption(
        "--compile-mode",
        action="append",
        metavar="MODE",
        help=f"torch.compile mode to compare with; repeatable ({', '.join(COMPILE_MODES)})",
    )
    group.addoption(
        "--compile-models", action="store_true", help="on a CPU too compile whole models, which takes minutes each"
    )
    group.addoption(
        "--save-rows",
        type=Path,
        metavar="DIR",
        help="write each row into a file of its own there as soon as it is measured",
    )
    group.addoption(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    group.addoption(
        "--batch-size", type=int, metavar="N", help=f"images a step (default: {BATCH} on a GPU, {CPU_BATCH} on a CPU)"
    )


def pytest_generate_tests(metafunc):
    if "row" in metafunc.fixturenames:
        rows = rows_of(metafunc.module, metafunc.config.getoption("compile_mode"))
        metafunc.parametrize("row", rows, ids=str)


def pytest_benchmark_update_machine_info(machine_info):
    machine_info.pop("node")  # results are published; what a row needs to know of its machine is in its extra_info


def pytest_benchmark_generate_commit_info():
    """The commit and whether files differ from it, without names of branches and folders."""
    info = get_commit_info()
    return {key: info[key] for key in ("id", "time", "dirty")}


@pytest.fixture(scope="session")
def machine(request):
    """The machine that is measured, asked once."""
    return Machine.here(request.config.getoption("dtype"))


@functools.lru_cache(maxsize=1)  # rows of one case follow one another
def truth_of(*args) -> Truth:
    return Truth.of(*args)


@pytest.fixture
def gpu_benchmark(request, benchmark, machine, row):
    """``gpu_benchmark()`` makes one line of the table, and its figures in ``extra_info`` (README.md explains them).

    It builds the module, compiles (and tunes) it by checking the results against float64, measures memory, warms up,
    times, and counts launches, in this order. A row whose results are wrong fails, and has no time.
    """
    if (problem := row.problem(machine, request.config.getoption("compile_models"))) is not None:
        benchmark.skipped = True
        pytest.skip(problem)
    latency = getattr(request.module, "LATENCY", False)
    batch = (
        1 if latency else request.config.getoption("batch_size") or (BATCH[row.model] if machine.is_gpu else CPU_BATCH)
    )
    shape = row.shape.shrunk(machine.size_divisor)

    def run():
        truth = truth_of(shape, row.training, batch, machine.device, machine.dtype)
        held = machine.memory_in_use()
        runner = truth.runner(row.variant)
        errors = truth.check(runner)

        on_gpu = {}
        if machine.is_gpu:
            for _ in range(3):  # the compiler's graphs are recorded in the second or third
                runner.step()
            on_gpu["peak_memory_mb"] = (peak_memory(runner.step, runner.graphs) - held) / 1e6
        timed, timing = machine.stopwatch.prepared(runner.step, row.timing, capturable=not runner.graphs)
        rounds = machine.rounds_for(timed)
        benchmark.params = {"case": row.case, "variant": row.variant.name}
        benchmark.group = f"{request.module.__name__.rpartition('.')[2].removeprefix('test_')} {row.case}"
        benchmark.pedantic(timed, setup=machine.stopwatch.before_round, rounds=rounds, warmup_rounds=2)
        if benchmark.stats is None:  # --benchmark-disable
            return
        if machine.is_gpu:  # last: a profiler may leave launches slower
            kernels = kernel_times(runner.step)
            on_gpu["launches"] = sum(count for count, _ in kernels.values())
            on_gpu["kernels_ms"] = {name: milliseconds for name, (_, milliseconds) in kernels.items()}
        times = benchmark.stats.stats.data
        moved = step_bytes(
            shape=shape,
            training=row.training,
            batch=batch,
            itemsize=machine.dtype.itemsize,
            parameters=sum(p.numel() for p in runner.parameters),
        )
        benchmark.extra_info.update(
            model=row.model,
            kind=benchmark.group.split()[0],
            shape=str(shape),
            step="training" if row.training else "inference",
            variant=row.variant.name,
            path=runner.path(),
            layout=row.variant.layout,
            batch_size=batch,
            dtype=str(machine.dtype).removeprefix("torch."),
            timing=timing,
            **figures(times, batch, moved, machine.copy_bytes_per_s),
            **on_gpu,
            errors=errors,
            eager_errors=truth.eager_errors,
            **machine.info,
        )
        if not machine.is_gpu and isinstance(shape, (shapes.Block, shapes.Model)):
            benchmark.extra_info["time_over"] = {
                str(other): time_ratio(machine, runner.step, truth.runner(other).step)
                for other in compared_on_cpu(row.variant, isinstance(shape, shapes.Model))
            }

    folder = request.config.getoption("save_rows")
    if folder:
        campaign.begin(folder, request.node.nodeid)
    started = time.monotonic()
    yield run
    if folder and benchmark.stats is not None and benchmark.extra_info:
        campaign.save_row(folder, request.node.nodeid, benchmark.extra_info | {"took_s": time.monotonic() - started})
    if row.variant.compile_mode is not None:
        torch.compiler.reset()
    if machine.is_gpu:
        gc.collect()
        torch.cuda.empty_cache()


def compared_on_cpu(variant: Variant, is_model: bool) -> list[Variant]:
    """The variants that a row is timed in turns with on a CPU, where the load changes from one row to the next.

    They are the plain channels_last modules, and for whole models the libraries' too.
    """
    if variant not in (CHANNELS_LAST, OURS) and variant.compile_mode is None:
        return []
    found = [] if variant == CHANNELS_LAST else [CHANNELS_LAST]
    if is_model:
        installed = [library for library in libraries.LIBRARIES if libraries.problem(library) is None]
        found += [other for other in variants([], installed) if other.library and other.layout == "NHWC"]
    return found


def time_ratio(machine: Machine, step: Callable[[], None], other: Callable[[], None]) -> dict:
    """How many times as long ``step`` takes as ``other``.

    The two are timed in turns, under the same load, and either comes first in every second pair.
    """
    ratios = []
    for i in range(max(60, machine.rounds_for(other))):
        first, second = (step, other) if i % 2 else (other, step)
        ratio = machine.stopwatch.seconds(first) / machine.stopwatch.seconds(second)
        ratios.append(ratio if i % 2 else 1 / ratio)
    return median_interval(ratios)


def figures(times: list[float], batch: int, moved: int, copy_bytes_per_s: float) -> dict:
    """What the ``times`` in seconds say of steps on ``batch`` images that move ``moved`` bytes."""
    median, p20, p80 = quantiles(times)
    return {
        "median_ms": 1e3 * median,
        "p20_ms": 1e3 * p20,
        "p80_ms": 1e3 * p80,
        "images_per_s": batch / median,
        "schedule_mb": moved / 1e6,
        "gb_per_s": moved / median / 1e9,
        "share_of_copy": moved / median / copy_bytes_per_s,
    }
