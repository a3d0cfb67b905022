"""What several commands share: options of a checkpoint, reading it, tables."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from efficientnet.choices import AMP, DECODERS, DEVICES, MAX_PIXELS, image_size
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


def size_argument(text: str) -> int | tuple[int, int]:
    """The value of --img-size. ``cli`` has joined the two numbers of ``--img-size H W``, which argparse could not tell
    from the image's name that may follow.
    """
    try:
        return image_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("img_size ")) from error


class _InputSize(argparse.Action):
    """timm's three numbers: what --in-chans and --img-size say."""

    def __call__(self, parser, namespace, values, option_string=None):
        channels, *hw = values
        if min(values) < 1:
            parser.error(f"argument --input-size: must be channels, height and width, got {' '.join(map(str, values))}")
        namespace.in_chans, namespace.img_size = channels, image_size(hw)


def add_size_arguments(sub: argparse.ArgumentParser, otherwise: str) -> None:
    """--img-size and --input-size. ``otherwise`` says what counts where neither is given."""
    help = f"pixels, or height and width: 224, 192 256 or 192x256 (default: {otherwise})"
    sub.add_argument("--img-size", type=size_argument, metavar="PIXELS", help=help)
    add_input_size(sub)


def add_input_size(sub: argparse.ArgumentParser) -> None:
    """--input-size, which sets what --img-size and --in-chans set."""
    sub.add_argument(
        "--input-size",
        type=int,
        nargs=3,
        action=_InputSize,
        metavar=("CHANNELS", "HEIGHT", "WIDTH"),
        default=argparse.SUPPRESS,
        help="--in-chans and --img-size in one, as timm has it",
    )


def check_channels(args: argparse.Namespace, in_chans: int) -> None:
    """Raise InputError where --input-size names other channels than the model's."""
    if getattr(args, "in_chans", in_chans) != in_chans:
        raise InputError(f"input_size has {args.in_chans} channels, but the model has in_chans {in_chans}")


def add_checkpoint_arguments(sub: argparse.ArgumentParser) -> None:
    """The options of every command that runs a checkpoint on images."""
    sub.add_argument("--checkpoint", required=True, help=".safetensors, or a state_dict saved by torch (.pt, .pth)")
    sub.add_argument("--model", help="the model's name, for a file that does not say it")
    add_size_arguments(sub, "as in training")
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
    sub.add_argument(
        "--decode",
        default="cpu",
        choices=DECODERS,
        help="where JPEG files are decoded: by Pillow, or by nvJPEG on the GPU, which needs --num-workers 0 "
        "(default: %(default)s)",
    )


def load(args: argparse.Namespace) -> tuple:
    """Read --checkpoint. Returns (Runner, model in eval, class names or None, Preprocess)."""
    from dataclasses import replace

    from efficientnet.data.decoding import MODES
    from efficientnet.data.images import Preprocess
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
        preprocess = Preprocess(
            img_size=tuple(cfg["input_size"][-2:]),
            mean=cfg["mean"],
            std=cfg["std"],
            interpolation=cfg["interpolation"],
            crop_pct=cfg["crop_pct"],
        )
    check_channels(args, model.in_chans)
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
