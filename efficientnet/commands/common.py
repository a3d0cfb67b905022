"""What several commands share: options of a checkpoint, reading it, tables."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from efficientnet.choices import AMP, DEVICES, MAX_PIXELS
from efficientnet.errors import InputError


@contextmanager
def checking_input() -> Iterator[None]:
    """Around code that reads what the user gave: a ValueError in it becomes an InputError, which ends the command in
    one line.

    Elsewhere a ValueError is a bug, and keeps its traceback.
    """
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def add_checkpoint_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of every command that runs a checkpoint on images."""
    sub.add_argument("--checkpoint", required=True, help=".safetensors, or a state_dict saved by torch (.pt, .pth)")
    sub.add_argument("--model", help="the model's name, for a file that does not say it")
    sub.add_argument("--img-size", type=int, help="pixels (default: as in training)")
    sub.add_argument("--device", default="auto", choices=DEVICES)
    sub.add_argument("--amp", default="none", choices=AMP)
    sub.add_argument(
        "--fused", action=argparse.BooleanOptionalAction, default=True, help="fused MBConv kernels where they can run"
    )


def add_reading_arguments(sub: argparse.ArgumentParser) -> None:
    """Add the options of a command that reads image files."""
    sub.add_argument(
        "--max-corrupt", type=int, default=10, help="unreadable images to skip before giving up (default: %(default)s)"
    )
    sub.add_argument(
        "--max-pixels",
        type=int,
        default=MAX_PIXELS,
        help="of an image file; larger ones are unreadable (default: %(default)s)",
    )


def load(args: argparse.Namespace) -> tuple:
    """Read --checkpoint. Returns (Runner, model in eval, class names or None, Preprocess)."""
    from dataclasses import replace

    from efficientnet.data.images import MODES, Preprocess
    from efficientnet.devices import pick_device
    from efficientnet.training.runner import Runner
    from efficientnet.weights.checkpoints import load_checkpoint, read_metadata

    runner = Runner(pick_device(args.device), args.amp)
    metadata = read_metadata(args.checkpoint)
    model = runner.place(load_checkpoint(args.model, args.checkpoint, fused=args.fused)).eval()
    if "preprocess" in metadata:
        stored = metadata["preprocess"]
        preprocess = Preprocess(**stored | {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
    else:
        cfg = model.pretrained_cfg
        preprocess = Preprocess(cfg["input_size"][-1], cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"])
    preprocess = preprocess.of_channels(model.in_chans)
    if model.in_chans != 3:
        print(
            f"images are read as {MODES[model.in_chans]}: the checkpoint's model has in_chans {model.in_chans}",
            file=sys.stderr,
        )
    if args.img_size is not None:
        preprocess = replace(preprocess, img_size=args.img_size)
    return runner, model, metadata.get("classes"), preprocess


def print_table(table: list[tuple], left: tuple[int, ...] = ()) -> None:
    """Print rows of cells in columns: numbers to the right, and the columns in ``left``, which are text, to the
    left.
    """
    widths = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for line in table:
        cells = (str(cell) for cell in line)
        print(
            *(c.ljust(w) if i in left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))),
            sep="  ",
        )


def print_stages(rows: list) -> None:
    """Print what ``profile.stage_table`` returned."""
    table = [
        (
            "stage",
            "operator",
            "kernel",
            "stride",
            "expand",
            "channels",
            "layers",
            "input",
            "output",
            "parameters",
            "MACs",
        )
    ]
    for i, row in enumerate(rows):
        sizes = (f"{height}x{width}" for height, width in (row.input_size, row.output_size))
        expand = "" if row.expand_ratio is None else f"{row.expand_ratio:g}"
        table.append(
            (
                i,
                row.operator,
                row.kernel_size,
                row.stride,
                expand,
                row.channels,
                row.repeats,
                *sizes,
                f"{row.params:,}",
                f"{row.macs:,}",
            )
        )
    print_table(table, left=(1,))
