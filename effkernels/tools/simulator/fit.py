"""Measured beside predicted, for when there is a GPU: kernel times from torch.profiler, and the few constants that they
decide. ``benchmarks.fitted`` is the command."""

import math
from collections import defaultdict

import torch

from effkernels.tools.simulator import steps
from effkernels.tools.simulator.machine import machine_of, with_constants

# Constants of a machine that no source decides, and what they are tried at, as multiples of what they are.
FITTED = ("memory_share", "l2_bandwidth", "memory_latency", "l2_latency", "barrier", "l2_again", "program_start")
FACTORS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.5, 2.0)


def kernel_times(step, names, repeats: int = 5) -> dict[str, list[float]]:
    """{kernel: seconds of each of its launches, in order, the least of ``repeats``} of a step on a GPU.

    step: runs it once. names: the kernels that are asked for; PyTorch's own are left out.
    """
    runs = []
    for _ in range(repeats + 1):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            step()
            torch.cuda.synchronize()
        found: dict[str, list[float]] = defaultdict(list)
        for event in sorted(profile.events(), key=lambda event: event.time_range.start):
            if event.name in names:
                found[event.name].append(event.time_range.elapsed_us() / 1e6)
        runs.append(found)
    return {name: [min(times) for times in zip(*(run[name] for run in runs[1:]), strict=True)] for name in runs[0]}


def paired(launches, measured: dict[str, list[float]]) -> list[tuple]:
    """(launch, measured seconds) in order. ValueError where a kernel ran more or less often than it was recorded."""
    recorded = defaultdict(list)
    for launch in launches:
        recorded[launch.name].append(launch)
    for name, mine in recorded.items():
        if len(measured.get(name, ())) != len(mine):
            raise ValueError(f"{name} ran {len(measured.get(name, ()))} times, {len(mine)} launches were recorded")
    at = dict.fromkeys(recorded, 0)
    found = []
    for launch in launches:
        found.append((launch, measured[launch.name][at[launch.name]]))
        at[launch.name] += 1
    return found


def distance(pairs) -> float:
    """Root of the mean square of log(predicted / measured), weighted by the measured time: 0.1 is 10 % off."""
    total = sum(measured for _, measured in pairs)
    return math.sqrt(sum(measured * math.log(predicted / measured) ** 2 for predicted, measured in pairs) / total)


def fit(pairs, gpu: str, most: int = 24, report=lambda line: None) -> dict:
    """The constants with which ``most`` launches, those that take the longest, are predicted best.

    pairs: (launch, measured seconds) of a step, in order. Returns {"constants", "before", "after"}: the constants that
    changed and the distances.
    """
    machine = machine_of(gpu)
    held = steps.held_by_l2([launch for launch, _ in pairs], machine.l2_kept)
    distinct: dict[tuple, tuple] = {}
    for (launch, seconds), cached in sorted(zip(pairs, held, strict=True), key=lambda each: -each[0][1]):
        distinct.setdefault(steps.identity(launch, machine, cached), (launch, seconds, cached))
    launches, measured, held = zip(*list(distinct.values())[:most], strict=True)

    def off(machine):
        predictions = steps.predict_launches(launches, gpu, machine=machine, held=held)
        return distance([(each.time, seconds) for each, seconds in zip(predictions, measured, strict=True)])

    before = best = off(machine)
    constants: dict[str, float] = {}
    for name in FITTED:
        start = getattr(machine, name)
        for factor in FACTORS:
            value = type(start)(start * factor)
            trial = off(with_constants(machine, **{name: value}))
            if trial < best - 1e-4:
                best, constants[name] = trial, value
        if name in constants:
            machine = with_constants(machine, **{name: constants[name]})
        report(f"{name}: {getattr(machine, name)}, {100 * best:.1f} % off")
    return {"constants": constants, "before": before, "after": best}
