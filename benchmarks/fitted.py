"""Measured beside predicted: every launch of a step on this machine's GPU, and the simulator's constants that its times
decide.

``python -m benchmarks.fitted --model b0 --mode train --batch-size 256 --out FILE`` times the launches with
torch.profiler, prints each beside its prediction, fits the constants of effkernels/tools/simulator/machine.py that no
source decides, says how far off the predictions are before and after, and writes all of it. ``benchmarks.campaign``
does so for B0.
"""

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from effkernels.configs.gpus import GPUS, gpu_of
from effkernels.tools import networks
from effkernels.tools.simulator import fit, steps
from effkernels.tools.simulator.machine import machine_of


def measured_and_predicted(model: str, mode: str, batch: int, gpu: str) -> list[tuple]:
    """(launch, measured seconds, prediction) of every launch of a step, in order, on the present GPU."""
    training = mode == "train"
    module, x = networks.network(model, training, batch)
    launches, _ = steps.step_launches(module, x, training, gpu)
    predictions = steps.predict_launches(launches, gpu)
    module, x = networks.network(model, training, batch, device="cuda")
    x.normal_()
    times = fit.kernel_times(steps.step_of(module, x, training), {launch.name for launch in launches})
    pairs = fit.paired(launches, times)
    return [(*pair, prediction) for pair, prediction in zip(pairs, predictions, strict=True)]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fitted", description="Measured beside predicted.")
    parser.add_argument("--model", default="b0", choices=networks.MODELS, help="default: b0")
    parser.add_argument("--mode", default="train", choices=networks.MODES, help="default: train")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write what was measured and fitted as JSON")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if os.environ.get("TRITON_INTERPRET"):
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")
    if not torch.cuda.is_available():
        parser.error("this measures on a GPU; there is none")
    device = torch.cuda.get_device_name(torch.device("cuda", torch.cuda.current_device()))
    gpu = next((name for name, rates in GPUS.items() if rates is gpu_of(device)), None)
    if gpu is None:
        parser.error(f"no figures for {device}; known are {', '.join(GPUS)}")
    found = measured_and_predicted(args.model, args.mode, args.batch_size, gpu)
    for launch, seconds, prediction in found:
        print(f"{launch.name:34} measured {1e6 * seconds:9.1f} us, predicted {1e6 * prediction.time:9.1f} us")
    result = {"device": device, "model": args.model, "mode": args.mode, "batch": args.batch_size}
    result |= fit.fit([(launch, seconds) for launch, seconds, _ in found], gpu, report=print)
    result["machine"] = dataclasses.asdict(machine_of(gpu))
    result["launches"] = [
        {
            "kernel": launch.name,
            "grid": list(launch.grid),
            "measured_us": 1e6 * seconds,
            "predicted_us": 1e6 * prediction.time,
        }
        for launch, seconds, prediction in found
    ]
    before, after = 100 * result["before"], 100 * result["after"]
    print(f"predictions are {before:.1f} % off, {after:.1f} % with what was fitted: {result['constants'] or 'nothing'}")
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
