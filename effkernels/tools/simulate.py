"""``python -m effkernels.tools.simulate``: how long a step of a network takes on a GPU, kernel by kernel, predicted
without one.

``--model b0 --mode train --batch-size 256 --gpu h200`` prints a table; docs/performance.md says how to read it, what is
behind it and what it leaves out. ``--timeline FILE.png --kernel NAME`` draws what one SM does in that kernel's longest
launch; ``--json FILE`` writes all of it. Nothing printed here was measured."""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path

import triton

from effkernels.tools.networks import MODELS, MODES, network, predict_step
from effkernels.tools.simulator import baselines, project
from effkernels.tools.simulator.launch import Prediction, predict
from effkernels.tools.simulator.steps import Step, step_launches


def rows(predictions: list[Prediction]) -> list[dict]:
    """One row a kernel, all its launches together, longest first."""
    groups: dict[str, list[Prediction]] = defaultdict(list)
    for prediction in predictions:
        groups[prediction.name].append(prediction)
    found = []
    for name, group in groups.items():
        time = sum(each.time for each in group)
        waits: dict[str, float] = defaultdict(float)
        for each in group:
            for reason, share in each.waits.items():
                waits[reason] += share * each.time
        found.append(
            {
                "kernel": name,
                "launches": len(group),
                "us": 1e6 * time,
                "bytes_us": 1e6 * sum(each.bytes_time for each in group),
                "l2_us": 1e6 * sum(each.floors["L2"] for each in group),
                "instructions_per_element": 32
                * sum(each.instructions for each in group)
                / max(1, sum(each.elements for each in group)),
                "instructions_per_clock": sum(each.instructions_per_clock * each.time for each in group) / time,
                "registers": max(each.registers for each in group),
                "programs_per_sm": min(each.resident for each in group),
                "barriers_per_tile": sum(each.barriers_per_tile * each.time for each in group) / time,
                "waits_for": max(waits, key=waits.get),
                "unknown": {name: count for each in group for name, count in each.unknown.items()},
            }
        )
    return sorted(found, key=lambda row: -row["us"])


def launch_row(prediction: Prediction) -> dict:
    """One launch, as ``rows`` has it."""
    return rows([prediction])[0] | {"grid": list(prediction.grid), "tail_us": 1e6 * prediction.tail}


def table(found: list[dict]) -> str:
    """The kernels of a step as text, a line each: launches, time, bytes and what they wait for."""
    lines = [
        f"{'kernel':34} {'launches':>8} {'us':>9} {'bytes':>9} {'share':>6} {'L2':>8} {'instr/elem':>10} "
        f"{'instr/clk':>9} {'regs':>5} "
        f"{'prog/SM':>7} {'bar/tile':>8} waits for"
    ]
    for row in found:
        lines.append(
            f"{row['kernel']:34} {row['launches']:8} {row['us']:9.1f} {row['bytes_us']:9.1f} "
            f"{100 * row['bytes_us'] / row['us']:5.0f}% "
            f"{row['l2_us']:8.1f} {row['instructions_per_element']:10.1f} {row['instructions_per_clock']:9.2f} "
            f"{row['registers']:5} "
            f"{row['programs_per_sm']:7} {row['barriers_per_tile']:8.1f} {row['waits_for']}"
            + (" *" if row["unknown"] else "")
        )
    notes = [
        f"* estimated from its loops: {row['kernel']}: {_counted(row['unknown'])}" for row in found if row["unknown"]
    ]
    return "\n".join(lines + notes)


def _counted(unknown: dict[str, int]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in unknown.items())


def document(step: Step, baseline: float) -> dict:
    """What ``--json`` writes. Times in milliseconds and microseconds, as their names say."""
    return {
        "model": step.model,
        "mode": step.mode,
        "batch": step.batch,
        "gpu": step.gpu,
        "source": "predicted, not measured",
        "predicted_ms": 1e3 * step.time,
        "bytes_ms": 1e3 * step.bytes_time,
        "torch_compile_ms": 1e3 * baseline,
        "kernels": rows(step.predictions),
        "launches": [launch_row(prediction) for prediction in step.predictions],
    }


def summary(step: Step, baseline: float) -> str:
    """A step in words: predicted time, the time that its bytes take, images a second, PyTorch's own operators."""
    images = step.batch / step.time
    return (
        f"{step.model} {step.mode}, {step.batch} images, {project.GPUS[step.gpu].name}, bf16: {1e3 * step.time:.2f} "
        "ms, its bytes "
        f"{1e3 * step.bytes_time:.2f} ms, {images:,.0f} images/s: predicted, not measured\n"
        f"of which {len(step.operators)} operators of PyTorch, at their bytes, products of matrices at "
        f"{baselines.PRODUCT_SHARE:.0%} of the matrix rate at most: {1e3 * step.operators_time:.3f} ms\n"
        f"torch.compile, an optimist's estimate by the same bandwidth: {1e3 * baseline:.2f} ms, "
        f"{baseline / step.time:.2f} times ours"
    )


def draw(path: Path, kernel: str, args: argparse.Namespace) -> None:
    """The timeline of the longest launch of ``kernel``."""
    from effkernels.tools.simulator import timeline

    module, x = network(args.model, args.mode == "train", args.batch_size)
    launches, _ = step_launches(module, x, args.mode == "train", args.gpu)
    mine = [launch for launch in launches if launch.name == kernel]
    if not mine:
        names = ", ".join(sorted({launch.name for launch in launches}))
        raise ValueError(f"--kernel must be one of {names}, got {kernel!r}")
    longest = max(mine, key=lambda launch: launch.activation_bytes())
    prediction = predict(longest, args.gpu, timeline=True)
    timeline.draw(
        path,
        prediction,
        f"{kernel}, {args.model} {args.mode}, {args.batch_size} images, {project.GPUS[args.gpu].name}, predicted",
    )


def main(argv: list[str] | None = None) -> int:
    """The command's exit code, after it printed what it predicts."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tools.simulate",
        description="The time of one step of a network on a GPU, kernel by kernel, predicted from the machine code "
        "without a GPU. Nothing that is printed was measured.",
        epilog="docs/performance.md says how to read the table, what is behind it and what it leaves out. Only GPUs "
        "whose pipes and latencies are in effkernels/tools/simulator/machine.py are predicted: of NVIDIA, sm_80, sm_89 "
        "and sm_90; AMD's machine code is not read. The exit code is 2 where an argument or a kernel cannot be "
        "predicted.",
    )
    parser.add_argument("--model", default="b0", choices=MODELS, help="network, at its own resolution (default: b0)")
    parser.add_argument(
        "--mode", default="train", choices=MODES, help="a training step or inference, bf16 (default: train)"
    )
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--gpu", default="h200", choices=tuple(project.GPUS), help="GPU to predict (default: h200)")
    parser.add_argument(
        "--each", action="store_true", help="a line for every launch, in order, instead of one for every kernel"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the prediction here as well, each launch too")
    parser.add_argument(
        "--timeline",
        type=Path,
        metavar="PNG",
        help="instead of the table, draw one SM in the longest launch of --kernel: issue slots, pipes, waiting",
    )
    parser.add_argument("--kernel", help="with --timeline: the kernel's name")
    parser.add_argument("--processes", type=int, help="worker processes (default: one per core)")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        parser.error(f"--batch-size must be at least 1, got {args.batch_size}")
    if args.processes is not None and args.processes < 1:
        parser.error(f"--processes must be at least 1, got {args.processes}")
    if (args.timeline is None) != (args.kernel is None):
        parser.error("--timeline and --kernel go together")
    if args.timeline is not None and (args.json is not None or args.each):
        parser.error("--timeline draws one launch; --json and --each are for the table of all")
    if args.json is not None and not args.json.parent.is_dir():
        parser.error(f"--json must be a file in a folder that exists, got {args.json}")
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the interpreter compiles nothing; unset it")

    def report(done, total):
        if sys.stderr.isatty():
            print(f"\r{done}/{total} launches", end="" if done < total else "\r", file=sys.stderr, flush=True)

    try:
        if args.timeline is not None:
            draw(args.timeline, args.kernel, args)
            print(f"{args.timeline}: drawn")
            return 0
        step = predict_step(
            model=args.model,
            mode=args.mode,
            batch=args.batch_size,
            gpu=args.gpu,
            processes=args.processes,
            report=report,
        )
    except (ValueError, RuntimeError) as error:
        print(f"python -m effkernels.tools.simulate: {error}", file=sys.stderr)
        return 2
    module, _ = network(args.model, args.mode == "train", 1)
    baseline = baselines.seconds(module, args.mode == "train", args.batch_size, project.GPUS[args.gpu])
    print(table([launch_row(each) for each in step.predictions] if args.each else rows(step.predictions)))
    print(summary(step, baseline))
    if args.json is not None:
        args.json.write_text(json.dumps(document(step, baseline), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
