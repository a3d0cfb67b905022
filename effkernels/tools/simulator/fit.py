"""Measured beside predicted, for when there is a GPU: kernel times from torch.profiler, and the few constants that they
decide. ``benchmarks.fitted`` is the command."""

import math
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Sequence

import torch

from effkernels.tools.simulator import steps
from effkernels.tools.simulator.machine import Machine, machine_of, with_constants
from effkernels.tools.simulator.project import Launch

# Constants of a machine that no source decides, and what they are tried at, as multiples of what they are; those that
# move the most launches come first, as the time may end.
FITTED = ("memory_share", "l2_bandwidth", "memory_latency", "l2_latency", "barrier", "l2_again", "program_start")
FACTORS = (0.5, 0.7, 0.85, 1.2, 1.5, 2.0)


def kernel_times(step: Callable[[], object], names: Collection[str], repeats: int = 5) -> dict[str, list[float]]:
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


def paired(launches: Iterable[Launch], measured: dict[str, list[float]]) -> list[tuple[Launch, float]]:
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


def distance(pairs: Collection[tuple[float, float]]) -> float:
    """How far predictions are off: of (predicted, measured) seconds, the root of the mean square of
    log(predicted / measured), weighted by the measured time. 0.1 is 10 %."""
    total = sum(measured for _, measured in pairs)
    return math.sqrt(sum(measured * math.log(predicted / measured) ** 2 for predicted, measured in pairs) / total)


def fit(
    pairs: Sequence[tuple[Launch, float]],
    gpu: str,
    most: int = 24,
    report: Callable[[str], None] = lambda line: None,
    keep: Callable[[dict], None] = lambda found: None,
    deadline: float = math.inf,
) -> dict:
    """The constants with which ``most`` launches, those that take the longest, are predicted best.

    A constant is tried at each of ``FACTORS``, and stays at the best while the next one is tried.

    Args:
        pairs: (launch, measured seconds) of a step, in order.
        report: is told each constant that is done.
        keep: is given what is found so far, first with no constant fitted, then after each.
        deadline: a value of time.monotonic at which it ends: no trial begins that would end later if it took as long as
            the longest before. A constant that was not tried at all factors stays as it was.

    Returns {"compared", "constants", "before", "after", "trials", "left"}: how many launches were compared, the
    constants that changed, the distances (``distance``), and how many trials were made and how many were left out.
    """
    machine = machine_of(gpu)
    held = steps.held_by_l2([launch for launch, _ in pairs], machine.l2_kept)
    distinct: dict[tuple, tuple] = {}
    for (launch, seconds), cached in sorted(zip(pairs, held, strict=True), key=lambda each: -each[0][1]):
        distinct.setdefault(steps.identity(launch, machine, cached), (launch, seconds, cached))
    launches, measured, held = zip(*list(distinct.values())[:most], strict=True)

    with steps.predictor(launches, gpu, held) as predict:

        def off(machine: Machine) -> float:
            return distance(list(zip((each.time for each in predict(machine)), measured, strict=True)))

        began = time.monotonic()
        best = off(machine)
        longest = time.monotonic() - began
        found = {"compared": len(launches), "constants": {}, "before": best, "after": best}
        found |= {"trials": 1, "left": len(FITTED) * len(FACTORS)}
        keep(dict(found))
        for name in FITTED:
            start, chosen, reached = getattr(machine, name), machine, best
            for factor in FACTORS:
                began = time.monotonic()
                if began + longest > deadline:
                    return found
                trial = with_constants(machine, **{name: type(start)(start * factor)})
                distance_of_trial = off(trial)
                longest = max(longest, time.monotonic() - began)
                found["trials"], found["left"] = found["trials"] + 1, found["left"] - 1
                if distance_of_trial < reached - 1e-4:
                    chosen, reached = trial, distance_of_trial
            if chosen is not machine:
                machine, best = chosen, reached
                found["constants"] = found["constants"] | {name: getattr(machine, name)}
                found["after"] = best
            keep(dict(found))
            report(f"{name}: {getattr(machine, name)}, {100 * best:.1f} % off")
    return found
