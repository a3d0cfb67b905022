"""``python -m effkernels.tools.compile_time``: how many kernels a network needs, and how long they take to compile.

Without a GPU: a step's launches are noted on the ``meta`` device, and compiled for sm_90 into an empty cache by the
processes that ``effkernels.warm_up`` would use. What is printed is time of this machine's CPU."""

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import triton

from effkernels import dispatch
from effkernels.compilation import collected, compile_launches, cores
from effkernels.configs import tables
from effkernels.configs.gpus import GPUS
from effkernels.tools.networks import MODELS, MODES, network
from effkernels.tools.simulator.steps import step_of
from effkernels.tools.stand_in_driver import compiling_for_h100


def step_launches(model: str, mode: str, images: int, gpu: str) -> list[tuple]:
    """What ``effkernels.warm_up`` would collect of a step of a network, by name, with ``gpu``'s configurations."""
    module, x = network(model, mode == "train", images)
    with (
        mock.patch.object(dispatch, "platform_problem", lambda *device: None),
        tables.meta_is(GPUS[gpu]),
        collected() as launches,
    ):
        step_of(module, x, mode == "train")()
    return launches


def compile_cold(
    launches: list[tuple], processes: int | None = None, report: Callable[[int, int], None] | None = None
) -> dict:
    """Compile the kernels of ``launches`` into an empty cache: how many, their seconds, the slowest."""
    with (
        compiling_for_h100(),
        tempfile.TemporaryDirectory() as empty,
        mock.patch.object(triton.knobs.cache, "dir", empty),
    ):
        begin = time.perf_counter()
        seconds = compile_launches(launches, processes, report)
        wall = time.perf_counter() - begin
    return {
        "launches": len(launches),
        "kernels": len(seconds),
        "seconds": round(wall, 1),
        "cpu_seconds": round(sum(seconds), 1),
        "slowest_seconds": round(max(seconds, default=0), 1),
    }


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tools.compile_time",
        description="Time to compile a network's kernels, without a GPU.",
    )
    parser.add_argument("--model", default="b0", choices=MODELS, help="default: b0")
    parser.add_argument("--mode", default="train", choices=MODES, help="default: train")
    parser.add_argument("--batch-size", type=int, default=256, help="images (default: 256)")
    parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="whose configurations (default: h200)")
    parser.add_argument("--processes", type=int, help="that compile (default: one a core)")
    parser.add_argument("--count", action="store_true", help="count the kernels, and compile none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    for name in ("batch_size", "processes"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    launches = step_launches(args.model, args.mode, args.batch_size, args.gpu)
    if args.count:
        with compiling_for_h100():
            found = kernels(launches)
        print("\n".join(f"{count:4} {name}" for name, count in found.most_common()))
        print(f"{sum(found.values()):4} kernels, {len(launches)} launches: {args.model} {args.mode}")
        return 0

    def report(done, total):
        print(f"compiling kernels {done}/{total}", end="\n" if done == total else "\r", file=sys.stderr, flush=True)

    from efficientnet.measure.timing import versions

    found = compile_cold(launches, args.processes, report)
    figures = {
        "what": f"{args.model} {args.mode}, {args.batch_size} images, bf16, configurations of {args.gpu}, sm_90",
        "source": "measured on this CPU, with an empty cache",
        "processes": args.processes or cores(),
        **found,
        "machine": versions(torch.device("cpu")),
    }
    print(
        f"{args.model} {args.mode}: {found['kernels']} kernels of {found['launches']} launches in "
        f"{found['seconds']} s by {figures['processes']} processes, {found['cpu_seconds']} s of CPU, the slowest "
        f"{found['slowest_seconds']} s"
    )
    if args.json is not None:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    return 0


def kernels(launches: list[tuple]) -> Counter:
    """{kernel: how many different ones Triton compiles of it} of ``launches``."""
    from effkernels.compilation import Later

    later = Later()
    names, seen = Counter(), 0
    try:
        with triton.AsyncCompileMode(later, ignore_errors=True):
            for kernel, args, kwargs in launches:
                kernel.warmup(*args, grid=(1,), **kwargs)
                names[kernel.fn.__name__] += len(later.jobs) - seen
                seen = len(later.jobs)
            later.cancel()
    finally:
        for kernel, _, _ in launches:
            kernel.device_caches.clear()
    return names


if __name__ == "__main__":
    sys.exit(main())
