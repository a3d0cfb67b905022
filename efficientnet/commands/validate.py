"""``efficientnet validate``."""

import argparse
import json
import math
import sys
from dataclasses import replace
from itertools import chain

from efficientnet.choices import INTERPOLATIONS
from efficientnet.commands.common import (
    add_checkpoint_arguments,
    add_reading_arguments,
    checking_input,
    load,
    print_table,
)
from efficientnet.errors import InputError

SUMMARY = "Loss and top-1 and top-5 accuracy of a checkpoint on a data set."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="digits", help="as for train (default: %(default)s)")
    parser.add_argument(
        "--split",
        default="val",
        choices=("val", "train", "all"),
        help="images to evaluate (default: the held-out ones)",
    )
    parser.add_argument(
        "--val-fraction", type=float, default=0.2, help="share held out, as in training (default: %(default)s)"
    )
    parser.add_argument("--batch-size", "-b", type=int, default=64)
    parser.add_argument("--num-workers", "-j", type=int, default=0, help="processes that load images")
    add_reading_arguments(parser)
    parser.add_argument(
        "--crop-pct", type=float, help="share of the shorter side that the model sees (default: as in training)"
    )
    parser.add_argument("--interpolation", choices=INTERPOLATIONS, help="of resized images (default: as in training)")
    parser.add_argument("--per-class", action="store_true", help="also a table of the classes")
    parser.add_argument(
        "--json", action="store_true", help="one JSON object, classes included; timm's names, accuracies in percent"
    )
    add_checkpoint_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Evaluate a checkpoint. Under torchrun each process takes its share of the images, and the first one prints."""
    from efficientnet.devices import pick_device
    from efficientnet.training.distributed import join, leave

    try:
        with checking_input():
            processes = join(pick_device(args.device).type)
        _validate(args, processes)
    finally:
        leave()


def _validate(args, processes):
    from efficientnet.data.decoding import allow_pixels, decode_with
    from efficientnet.data.loading import Unreadable
    from efficientnet.data.sets import load_data
    from efficientnet.model.profile import count_parameters

    with checking_input():
        for name, minimum in (("batch_size", 1), ("num_workers", 0), ("max_corrupt", 0), ("max_pixels", 1)):
            if getattr(args, name) < minimum:
                raise ValueError(f"{name} must be an integer >= {minimum}, got {getattr(args, name)}")
        runner, model, classes, preprocess = load(args)
        runner.processes = processes
        given = {name: getattr(args, name) for name in ("crop_pct", "interpolation") if getattr(args, name) is not None}
        preprocess = replace(preprocess, **given)
        allow_pixels(args.max_pixels)
        decode_with(args.decode, runner.device, args.num_workers)
        shards = {}
        if args.data.startswith("webdataset:"):
            shards = {"val_data": args.data, "num_classes": model.num_classes, "classes": classes}
        data = load_data(args.data, preprocess.img_size, args.val_fraction, **shards)
        if classes is None and len(data.classes) != model.num_classes:
            raise InputError(
                f"data {args.data!r} has {len(data.classes)} classes, but the checkpoint has {model.num_classes}"
            )
        if classes is not None and classes != data.classes:
            raise InputError(
                f"data {args.data!r} has classes {_short(data.classes)}, but the checkpoint has {_short(classes)}"
            )
    unreadable = Unreadable(args.max_corrupt, lambda text: print(text, file=sys.stderr))
    parts = {"val": [data.val], "train": [data.train], "all": [data.train, data.val]}[args.split]
    for part in parts:
        part.preprocess = preprocess
    batches = (runner.batches(part, args.batch_size, args.num_workers, unreadable=unreadable) for part in parts)
    result = runner.evaluate(model, chain.from_iterable(batches))

    if not math.isfinite(result.loss):
        raise InputError(
            f"the loss is {result.loss}: the model's logits are not finite; its weights are not, or --amp fp16 is too "
            "narrow"
        )
    problems = processes.gather(unreadable.seen)
    if not processes.first:
        return
    percent = {"top1": 100 * result.accuracy, "top5": 100 * result.accuracy5}
    if args.json:
        row = {
            "model": model.config.name,
            "checkpoint": args.checkpoint,
            "data": args.data,
            "split": args.split,
            "images": result.total,
        }
        row |= {"loss": result.loss, **percent, **{f"{key}_err": 100 - value for key, value in percent.items()}}
        row |= {
            "param_count": count_parameters(model) / 1e6,
            "img_size": preprocess.img_size,
            "crop_pct": preprocess.crop_pct,
        }
        row |= {
            "interpolation": preprocess.interpolation,
            "unreadable": [problem for part in problems for problem in part],
        }
        names = zip(data.classes, result.per_class, strict=True)
        row["per_class"] = [
            {"class": name, "images": total, "top1": 100 * hit / total if total else None}
            for name, (hit, total) in names
        ]
        print(json.dumps(row))
        return
    print(f"{'held-out' if args.split == 'val' else args.split} loss: {result.loss:.4f}")
    (height, width), crop = preprocess.hw, preprocess.crop_pct
    print(
        f"images: {result.total}, {height} x {width} pixels, {100 * crop:g} % of the shorter side, "
        f"{preprocess.interpolation}"
    )
    if args.per_class:
        table = [("class", "images", "right", "top-1 %")]
        for name, (hit, total) in zip(data.classes, result.per_class, strict=True):
            table.append((name, total, hit, f"{100 * hit / total:.2f}" if total else "-"))
        print_table(table, left=(0,))
    print(f"top-5 accuracy: {percent['top5']:.2f} % ({result.correct5}/{result.total})")
    print(f"test accuracy: {result}")


def _short(names):
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
