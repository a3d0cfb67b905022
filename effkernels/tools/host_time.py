"""``python -m effkernels.tools.host_time``: the time that Python needs to start a network's kernels, without a GPU.

A step runs on CPU tensors as on a GPU, gate, operators and Triton's launcher included, down to a driver that starts
nothing. PyTorch's products of matrices are left out: on a CPU they would compute. The time is this machine's; on a GPU
the queries of the current stream and device come on top."""

import argparse
import importlib
import json
import pkgutil
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch

import effkernels.kernels
from efficientnet import create_model
from efficientnet.measure.timing import quantiles, versions
from efficientnet.memory import keep_freed_memory
from effkernels import dispatch
from effkernels.ops import plans
from effkernels.tools.networks import MODELS, MODES
from effkernels.tools.stand_in_driver import standing_in


def step_of(name: str, training: bool, images: int) -> Callable[[], None]:
    """A forward, and in training a backward, of a network without its classifier, in bf16."""
    model = create_model(name, num_classes=0, dtype=None if training else torch.bfloat16).train(training)
    if training:
        for layer in (model.conv_head, model.bn2):
            layer.to(torch.bfloat16)
    size = model.config.resolution
    x = torch.zeros(images, 3, size, size, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    dout = torch.ones(images, model.bn2.num_features, dtype=torch.bfloat16)
    parameters = list(model.parameters())

    def step():
        with torch.set_grad_enabled(training):
            out = model(x)
            if training:
                for parameter in parameters:
                    parameter.grad = None
                out.backward(dout)

    return step


def _without_products(stack: ExitStack) -> None:
    for module in pkgutil.iter_modules(effkernels.kernels.__path__):
        found = importlib.import_module(f"effkernels.kernels.{module.name}")
        if hasattr(found, "product"):
            stack.enter_context(mock.patch.object(found, "product", lambda a, b, out: out))


def measure(name: str, training: bool, images: int, *, repeats: int, planned: bool = True) -> dict:
    """{launches, microseconds of CPU a launch: median, least, p20, p80} of a step. planned: by the operators' plans,
    or as they are written.
    """
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)
        for function, value in (("platform_problem", None), ("without_triton_on_cpu", False)):
            stack.enter_context(mock.patch.object(dispatch, function, lambda *args, value=value: value))
        if not planned:
            stack.enter_context(mock.patch.object(plans, "possible", lambda: False))
        _without_products(stack)
        started = stack.enter_context(standing_in())
        step = step_of(name, training, images)
        for _ in range(3):
            step()
        before = started()
        step()
        launches = started() - before
        times = []
        for _ in range(repeats):
            begin = time.process_time()
            step()
            times.append(1e6 * (time.process_time() - begin) / launches)
    median, p20, p80 = quantiles(times)
    figures = {"median": median, "least": min(times), "p20": p20, "p80": p80}
    return {"launches": launches, "us_a_launch": {name: round(value, 1) for name, value in figures.items()}}


def main(argv: list[str] | None = None) -> int:
    """The command; its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m effkernels.tools.host_time", description="Python's time to start kernels, without a GPU."
    )
    parser.add_argument("--model", default="b0", choices=MODELS, help="default: b0")
    parser.add_argument("--mode", nargs="+", default=MODES, choices=MODES, help="default: train infer")
    parser.add_argument("--batch-size", type=int, default=4, help="images (default: 4)")
    parser.add_argument("--repeats", type=int, default=100, help="steps that are timed (default: 100)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here as well")
    args = parser.parse_args(argv)
    for name, least in (("batch_size", 1), ("repeats", 2)):
        if getattr(args, name) < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, got {getattr(args, name)}")
    keep_freed_memory()
    rows = []
    try:
        for mode in args.mode:
            for planned in (False, True):
                found = measure(args.model, mode == "train", args.batch_size, repeats=args.repeats, planned=planned)
                rows.append({"model": args.model, "mode": mode, "planned": planned, **found})
                us = found["us_a_launch"]
                how = "by its plans" if planned else "as written"
                print(
                    f"{args.model} {mode}, {how}: {found['launches']} launches, "
                    f"{us['median']} us each (the fastest step {us['least']})"
                )
    except RuntimeError as error:
        print(f"python -m effkernels.tools.host_time: {error}", file=sys.stderr)
        return 2
    if args.json is not None:
        document = {
            "what": f"host time of {args.batch_size} images, bf16, of a launch from the model's call to the driver",
            "source": "measured on this CPU, above a driver that starts nothing",
            "machine": versions(torch.device("cpu")),
            "rows": rows,
        }
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
