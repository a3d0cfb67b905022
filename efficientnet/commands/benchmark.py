"""``efficientnet benchmark``."""

import argparse
import re
import sys

from efficientnet.choices import DEVICES
from efficientnet.commands.common import add_size_arguments, check_channels, checking_input

SUMMARY = "Speed and memory of models on this machine, under the keys of timm's benchmark.py and more."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", nargs="+", default=["b0"], metavar="NAME", help="b0, b0..b7 for all these, l2 (default: b0)"
    )
    parser.add_argument(
        "--mode", default="infer", choices=("infer", "train"), help="a forward, or a whole training step with AdamW"
    )
    baselines = ("eager", "eager-nchw", "compile", "compile-max-autotune", "compile-reduce-overhead")
    parser.add_argument(
        "--baseline", choices=baselines, help="also measure the plain network so, at the same batch size"
    )
    parser.add_argument(
        "--batch-size", type=int, help="images a step, fewer if memory is short (default: 256, on a CPU 16)"
    )
    add_size_arguments(parser, "the model's own")
    parser.add_argument(
        "--data",
        metavar="PATH",
        help="also measure how fast one core prepares images of this folder or data set (as for train), and how many "
        "cores would feed the network",
    )
    parser.add_argument("--num-classes", type=int, default=1000)
    parser.add_argument("--device", default="auto", choices=DEVICES)
    dtypes = ("auto", "bfloat16", "float16", "float32")
    parser.add_argument(
        "--dtype", default="auto", choices=dtypes, help="training autocasts to it (default: bfloat16, on a CPU float32)"
    )
    parser.add_argument("--num-warm-iter", type=int, help="steps before timing (default: 10, on a CPU 2)")
    parser.add_argument("--num-bench-iter", type=int, help="timed steps (default: 40, on a CPU 10)")
    parser.add_argument(
        "--cuda-graph", action="store_true", help="replay inference from a CUDA graph (latency of small batches)"
    )
    parser.add_argument("--results-format", default="md", choices=("md", "json", "csv"), help="default: md")
    parser.add_argument(
        "--results-file", metavar="FILE", help="write there too, after each model (a whole file at every moment)"
    )


def _names(given):
    """The names that are meant: "b0..b7" is eight of them."""
    for name in given:
        found = re.fullmatch(r"(\w*b)(\d)\.\.\w*b(\d)", name)
        if found and found[2] <= found[3]:
            yield from (f"{found[1]}{i}" for i in range(int(found[2]), int(found[3]) + 1))
        else:
            yield name


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from tqdm import tqdm

    from efficientnet.devices import pick_device
    from efficientnet.errors import InputError
    from efficientnet.files import replacing
    from efficientnet.measure.loader import Loader, cores
    from efficientnet.measure.model_benchmark import Benchmark, BenchmarkConfig, WrongOutputs, formatted

    device = pick_device(args.device)
    if args.cuda_graph and device.type != "cuda":
        raise InputError("--cuda-graph needs a CUDA device, and the device is a CPU")
    if args.results_file and not Path(args.results_file).resolve().parent.is_dir():
        raise InputError(f"--results-file {args.results_file!r}: no such folder")
    cpu = {"batch_size": 16, "num_warm_iter": 2, "num_bench_iter": 10} if device.type == "cpu" else {}
    given = {name: getattr(args, name) for name in ("batch_size", "img_size", "num_warm_iter", "num_bench_iter")}
    fields = {
        "mode": args.mode,
        "dtype": args.dtype,
        "num_classes": args.num_classes,
        "cuda_graph": args.cuda_graph,
    } | cpu
    with checking_input():
        check_channels(args, 3)
        fields |= {name: value for name, value in given.items() if value is not None}
        configs = [BenchmarkConfig(model=name, **fields) for name in _names(args.model)]
        loaders = {}  # made before anything is measured, so that a name which is wrong costs no time
        if args.data is not None:
            data = f"imagefolder:{args.data}" if Path(args.data).is_dir() else args.data
            loaders = {config: Loader(data, config.img_size, config.training) for config in configs}

    def progress(total, name):
        return tqdm(total=total, desc=name, unit="step", file=sys.stderr, leave=False, dynamic_ncols=True)

    benchmark = Benchmark(device, progress, lambda line: print(line, file=sys.stderr))
    records = []
    for config in configs:
        try:
            measured = benchmark.run(config, args.baseline)
            if config in loaders:
                loading = loaders[config].measure()
                for record in measured:
                    speed = record[f"{config.mode}_samples_per_sec"]
                    record |= loading | {"loader_cores": cores(loading, speed)}
            records += measured
        except (InputError, WrongOutputs) as error:  # too large for the memory, or wrong: the others go on
            records.append({"model": config.model, "error": str(error)})
        if args.results_file:
            with replacing(Path(args.results_file)) as temporary:
                Path(temporary).write_text(formatted(records, args.results_format), encoding="utf-8")
    failed = [f"{record['model']}: {record['error']}" for record in records if "error" in record]
    if len(failed) < len(records):
        print(formatted(records, args.results_format), end="")
    if failed:
        raise InputError("; ".join(failed))
