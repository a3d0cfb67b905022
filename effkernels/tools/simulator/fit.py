"""Measured beside predicted, for when there is a GPU: kernel times from torch.profiler, and the few constants that they
decide.

``python -m effkernels.tools.simulator.fit --model b0 --mode train --batch-size 256 --out FILE`` runs a step on this
machine's GPU, prints each launch's measured and predicted time, fits the constants of ``machine.py`` that are assumed,
and writes all of it."""

import argparse
import dataclasses
import json
import math
import sys
from collections import defaultdict
from pathlib import Path

import torch

from effkernels.configs.gpus import gpu_of
from effkernels.tools.simulator import network, project
from effkernels.tools.simulator.launch import predict
from effkernels.tools.simulator.machine import ARCHITECTURES, machine_of, with_constants

# Constants of a machine that no source decides, and what they are tried at, as multiples of what they are.
FITTED = ("memory_latency", "l2_latency", "barrier", "l2_again", "program_start")
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

    pairs: (launch, measured seconds). Returns {"constants", "before", "after"}: the constants that changed and the
    distances."""
    distinct = {}
    for launch, seconds in sorted(pairs, key=lambda pair: -pair[1]):
        distinct.setdefault((launch.digest(machine_of(gpu).arch), launch.grid), (launch, seconds))
    chosen = list(distinct.values())[:most]

    def off(machine):
        return distance([(predict(launch, gpu, machine=machine).time, seconds) for launch, seconds in chosen])

    machine = machine_of(gpu)
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


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tools.simulator.fit", description="Measured beside predicted."
    )
    parser.add_argument("--model", default="b0", choices=network.MODELS, help="default: b0")
    parser.add_argument("--mode", default="train", choices=network.MODES, help="default: train")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was measured and fitted as JSON")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        parser.error("this measures on a GPU; there is none")
    device = torch.cuda.get_device_name()
    rates = gpu_of(device)
    gpu = next((name for name in ARCHITECTURES if project.GPUS[name] is rates), None)
    if gpu is None:
        parser.error(f"no figures for {device}; known are {', '.join(ARCHITECTURES)}")
    training = args.mode == "train"
    launches, _ = network.step_launches(*network.network(args.model, training, args.batch_size), training)
    module, x = network.network(args.model, training, args.batch_size, device="cuda")
    x.normal_()
    step = network.step_of(module, x, training)
    pairs = paired(launches, kernel_times(step, {launch.name for launch in launches}))
    predictions = network.predict_launches(launches, gpu)
    for (launch, seconds), prediction in zip(pairs, predictions, strict=True):
        print(f"{launch.name:34} measured {1e6 * seconds:9.1f} us, predicted {1e6 * prediction.time:9.1f} us")
    result = fit(pairs, gpu, report=print) | {"device": device, "machine": dataclasses.asdict(machine_of(gpu))}
    result["launches"] = [
        {
            "kernel": launch.name,
            "grid": list(launch.grid),
            "measured_us": 1e6 * seconds,
            "predicted_us": 1e6 * prediction.time,
        }
        for (launch, seconds), prediction in zip(pairs, predictions, strict=True)
    ]
    print(f"{100 * result['before']:.1f} % off before, {100 * result['after']:.1f} % after: {result['constants']}")
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
