"""Measured beside predicted: every launch of a step on this machine's GPU, and the simulator's constants that its times
decide.

``python -m benchmarks.fitted --model b0 --mode train --batch-size 256 --out FILE`` times the launches with
torch.profiler, prints each beside its prediction, fits the constants of effkernels/tools/simulator/machine.py that no
source decides, and says how far off the predictions are before and after. FILE is written after each part: what was
measured, the predictions beside it, and each constant that is fitted; the last within ``--seconds``, with what there is
by then. ``benchmarks.campaign`` does so for B0.
"""

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from pathlib import Path

import torch

from effkernels.configs.gpus import GPUS, gpu_of
from effkernels.tools import networks
from effkernels.tools.simulator import fit, steps
from effkernels.tools.simulator.machine import machine_of
from effkernels.tools.simulator.project import Launch


def measured(model: str, mode: str, batch: int, gpu: str) -> list[tuple[Launch, float]]:
    """(launch, measured seconds) of every launch of a step, in order, on the present GPU."""
    training = mode == "train"
    module, x = networks.network(model, training, batch)
    launches, _ = steps.step_launches(module, x, training, gpu)
    module, x = networks.network(model, training, batch, device="cuda")
    x.normal_()
    times = fit.kernel_times(steps.step_of(module, x, training), {launch.name for launch in launches})
    return fit.paired(launches, times)


def write(path: Path | None, result: dict) -> None:
    """Write what there is so far, as a file that is there as a whole or not at all."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        temporary.replace(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fitted", description="Measured beside predicted.")
    parser.add_argument("--model", default="b0", choices=networks.MODELS, help="default: b0")
    parser.add_argument("--mode", default="train", choices=networks.MODES, help="default: train")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was measured and fitted as JSON")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end the fit by then, with what it has (default: no limit)"
    )
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if not args.seconds > 0:
        parser.error(f"--seconds must be above 0, got {args.seconds}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if not torch.cuda.is_available():
        parser.error("this measures on a GPU; there is none")
    device = torch.cuda.get_device_name(torch.device("cuda", torch.cuda.current_device()))
    gpu = next((name for name, rates in GPUS.items() if rates is gpu_of(device)), None)
    if gpu is None:
        parser.error(f"no figures for {device}; known are {', '.join(GPUS)}")
    result = {"device": device, "model": args.model, "mode": args.mode, "batch": args.batch_size}
    result["machine"] = dataclasses.asdict(machine_of(gpu))
    pairs = measured(args.model, args.mode, args.batch_size, gpu)
    result["launches"] = [
        {"kernel": launch.name, "grid": list(launch.grid), "measured_us": 1e6 * seconds} for launch, seconds in pairs
    ]
    write(args.out, result)
    predictions = steps.predict_launches([launch for launch, _ in pairs], gpu)
    for row, prediction in zip(result["launches"], predictions, strict=True):
        row["predicted_us"] = 1e6 * prediction.time
        print(f"{row['kernel']:34} measured {row['measured_us']:9.1f} us, predicted {row['predicted_us']:9.1f} us")
    write(args.out, result)
    print(flush=True)
    found = fit.fit(
        pairs,
        gpu,
        report=lambda line: print(line, flush=True),
        keep=lambda so_far: write(args.out, result | so_far),
        deadline=deadline,
    )
    write(args.out, result | found)
    before, after = 100 * found["before"], 100 * found["after"]
    left = f"; the time was up with {found['left']} trials left" if found["left"] else ""
    print(
        f"predictions of the {found['compared']} longest launches are {before:.1f} % off, {after:.1f} % with what was "
        f"fitted: {found['constants'] or 'nothing'}{left}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
