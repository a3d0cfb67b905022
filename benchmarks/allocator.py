"""What keeping freed memory is worth on a CPU: ``python -m benchmarks.allocator`` writes results/allocator.json.

Training steps of B0 at 128 pixels, with glibc as it is and as the command line tells it (efficientnet/memory.py), each
in a fresh process, in turns; with one thread and with two; of this library, and of torchvision's network where that is
installed. A ratio is that of the medians of a pair of processes: kept over not kept.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks import libraries
from benchmarks.conftest import median_interval
from efficientnet.measure.timing import versions
from efficientnet.memory import ENVIRONMENT, keep_freed_memory
from efficientnet.weights.factory import create_model

RESULTS = Path(__file__).parent / "results" / "allocator.json"
SIZE, BATCH = 128, 16
WARM, TIMED = 3, 6  # steps of one process


def measure(network: str, keep: bool, threads: int) -> dict:
    """Medians of a step of this process: milliseconds of the clock and of the CPU, page faults; its peak memory."""
    if keep and not keep_freed_memory():
        raise RuntimeError("this C library cannot be told to keep freed memory")
    if network == "torchvision" and (problem := libraries.problem(network)) is not None:
        raise RuntimeError(problem)
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = create_model("efficientnet_b0") if network == "ours" else libraries.build("torchvision", "b0")
    model = model.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    images = torch.randn(BATCH, 3, SIZE, SIZE).to(memory_format=torch.channels_last)
    labels = torch.arange(BATCH)
    steps = []
    for _ in range(WARM + TIMED):
        faults, clock, cpu = (
            resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
            time.perf_counter(),
            time.process_time(),
        )
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        took = time.perf_counter() - clock, time.process_time() - cpu
        steps.append((*took, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults))
    clock, cpu, faults = (statistics.median(column) for column in zip(*steps[WARM:], strict=True))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    return {"clock_ms": 1e3 * clock, "cpu_ms": 1e3 * cpu, "faults": faults, "peak_mb": peak}


def fresh(*arguments: object) -> dict:
    """``measure`` in a process of its own. Raises RuntimeError with its output if it fails."""
    environment = {name: value for name, value in os.environ.items() if name not in ENVIRONMENT}
    environment["GOMP_SPINCOUNT"] = "1000"  # as the command line sets it
    command = [sys.executable, "-m", "benchmarks.allocator", "--one", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def compared(network: str, threads: int, pairs: int) -> dict:
    """``pairs`` of processes in turns, either kind first in every second pair."""
    runs = {True: [], False: []}
    for i in range(pairs):
        for keep in (True, False) if i % 2 else (False, True):
            runs[keep].append(fresh(network, int(keep), threads))
    row = {"network": network, "threads": threads}
    for keep, name in ((False, "as it is"), (True, "kept")):
        row[name] = {key: round(statistics.median(run[key] for run in runs[keep]), 1) for key in runs[keep][0]}
    for key in ("clock_ms", "cpu_ms"):
        ratios = [kept[key] / other[key] for kept, other in zip(runs[True], runs[False], strict=True)]
        row[f"{key.removesuffix('_ms')} ratio"] = {
            name: round(value, 3) for name, value in median_interval(ratios).items()
        }
    return row


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.allocator", description=__doc__.split("\n\n")[0])
    parser.add_argument("--pairs", type=int, default=5, help="of processes (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=3, metavar=("NETWORK", "KEEP", "THREADS"), help="measure here, print JSON")
    args = parser.parse_args(argv)
    if args.one:
        network, keep, threads = args.one
        print(json.dumps(measure(network, bool(int(keep)), int(threads))))
        return
    networks = ["ours"] + (["torchvision"] if libraries.problem("torchvision") is None else [])
    document = {"step": f"training of B0, {BATCH} images of {SIZE} pixels, AdamW, channels_last", "rows": []}
    document |= versions(torch.device("cpu")) | libraries.versions()
    document |= {"date": datetime.now(timezone.utc).date().isoformat()}
    for network in networks:
        for threads in (1, 2):
            document["rows"].append(compared(network, threads, args.pairs) | {"load_average": os.getloadavg()[0]})
            args.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(document["rows"][-1]), flush=True)


if __name__ == "__main__":
    main()
