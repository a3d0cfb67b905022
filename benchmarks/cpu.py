"""Inference on a CPU beside other libraries: ``python -m benchmarks.cpu`` writes results/cpu_inference.json.

Each row is a network, a batch, a number of threads and a dtype. All its variants are timed in turns, in rounds, in one
process: a call that is not timed, then one that is. A ratio is the median over the rounds of one variant's time over
another's in the same round, with its 95 % confidence interval; of the CPU's time and of the clock.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path

import torch

from benchmarks import libraries
from benchmarks.machine import median_interval
from efficientnet.measure.timing import versions
from efficientnet.weights.factory import create_model
from effkernels import accelerate

RESULTS = Path(__file__).parent / "results" / "cpu_inference.json"
SIZES = {"b0": 224, "b4": 380}
ROWS = 16  # of both networks and dtypes, with one thread and two, at two batches
SECONDS, ROUNDS = 40.0, (5, 60)  # that the rounds of a row may take, and how many they are at least and at most


@contextmanager
def environment(name: str, value: str):
    """Within: a variable has this value."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def plain(model: torch.nn.Module) -> Callable:
    """The model's call in plain PyTorch."""

    def call(x):
        with environment("EFFKERNELS_BACKEND", "reference"):
            return model(x)

    return call


def in_turns(calls: dict[str, Callable], over: dict[str, str], seconds: float = SECONDS) -> dict:
    """{variant: {cpu_ms, clock_ms: medians; over, cpu ratio, clock ratio, rounds}} of functions without arguments.

    over: {variant: the one its time is divided by}.
    """
    times, until = {name: [] for name in calls}, time.monotonic() + seconds
    with torch.inference_mode():
        for call in calls.values():
            call()
        while len(next(iter(times.values()))) < ROUNDS[0] or time.monotonic() < until:
            for name, call in calls.items():
                call()
                clock, cpu = time.perf_counter(), time.process_time()
                call()
                times[name].append((time.process_time() - cpu, time.perf_counter() - clock))
            if len(times[name]) >= ROUNDS[1]:
                break
    found = {}
    for name, measured in times.items():
        row = {"rounds": len(measured)}
        for i, key in enumerate(("cpu", "clock")):
            row[f"{key}_ms"] = round(1e3 * statistics.median(pair[i] for pair in measured), 2)
            if name in over:
                ratios = [a[i] / b[i] for a, b in zip(measured, times[over[name]], strict=True)]
                row[f"{key} ratio"] = {k: round(v, 3) for k, v in median_interval(ratios).items()}
        found[name] = row | ({"over": over[name]} if name in over else {})
    return found


def variants(name: str, dtype: torch.dtype, compiled: bool) -> tuple[dict[str, Callable], dict[str, str]]:
    """({variant: function of images}, {variant: the one to divide by}), of those libraries that are installed."""
    models = {"ours": create_model(f"efficientnet_{name}")}
    for library in libraries.LIBRARIES:
        if libraries.problem(library) is None:
            models[library] = libraries.build(library, name)
            models[f"accelerate({library})"] = accelerate(libraries.build(library, name))
    base = "torchvision" if "torchvision" in models else "plain"
    calls = {variant: model.eval().to(dtype, memory_format=torch.channels_last) for variant, model in models.items()}
    if base == "plain":
        calls["plain"] = plain(create_model(f"efficientnet_{name}").eval().to(dtype))
    if compiled:
        import torch._inductor.config as inductor

        inductor.freezing = True
        calls["torch.compile, freezing"] = torch.compile(
            create_model(f"efficientnet_{name}", fused=False).eval().to(dtype, memory_format=torch.channels_last)
        )
    over = {variant: base for variant in ("ours", "torch.compile, freezing") if variant in calls}
    over |= {v: v.removeprefix("accelerate(")[:-1] for v in calls if v.startswith("accelerate(")}
    return calls, over


def measure(name: str, batch: int, threads: int, dtype: torch.dtype, compiled: bool, seconds: float = SECONDS) -> dict:
    """One row."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    calls, over = variants(name, dtype, compiled)
    if dtype != torch.float32 and "torchvision" in calls:  # what bf16 is for: over fp32
        model = libraries.build("torchvision", name).eval().to(memory_format=torch.channels_last)
        calls["torchvision, float32"] = lambda x: model(x.float())
        over["ours"] = "torchvision, float32"
    size = SIZES[name]
    x = torch.randn(batch, 3, size, size).to(dtype, memory_format=torch.channels_last)
    steps = {variant: lambda call=call: call(x) for variant, call in calls.items()}
    return {
        "network": name,
        "pixels": size,
        "batch": batch,
        "threads": threads,
        "dtype": str(dtype).removeprefix("torch."),
        "variants": in_turns(steps, over, seconds),
        "load_average": round(os.getloadavg()[0], 2),
    }


def machine() -> dict:
    """CPU, versions and date."""
    about = versions(torch.device("cpu")) | libraries.versions()
    return about | {"date": datetime.now(timezone.utc).date().isoformat()}


def said(row: dict) -> str:
    """One line of ratios."""
    ratios = [
        "{0} / {1} {median:.2f} ({low:.2f} to {high:.2f})".format(name, found["over"], **found["cpu ratio"])
        for name, found in row["variants"].items()
        if "over" in found
    ]
    where = "{network}, batch {batch}, {threads} thread(s), {dtype}, load {load_average}".format(**row)
    return f"{where}: {'; '.join(ratios)}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu", description=__doc__.split("\n\n")[0])
    parser.add_argument("--networks", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8], metavar="N")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--compile", action="store_true", help="torch.compile with freezing too, which needs g++")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="of a row's rounds (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    document = {"rows": []} | machine()
    for name in args.networks:
        for dtype in args.dtypes:
            for threads in args.threads:
                for batch in args.batches:
                    row = measure(name, batch, threads, getattr(torch, dtype), args.compile, args.seconds)
                    torch.compiler.reset()
                    document["rows"].append(row)
                    args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
                    print(said(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
