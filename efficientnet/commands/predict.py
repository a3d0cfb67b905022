"""``efficientnet predict``."""

import argparse
import json
import os
import sys
from itertools import chain
from pathlib import Path

from efficientnet.commands.common import add_checkpoint_arguments, add_reading_arguments, checking_input, load
from efficientnet.errors import InputError

SUMMARY = "The most probable classes of images."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a file, a folder with images in any depth, or - for paths on stdin"
    )
    parser.add_argument("--topk", type=int, default=5, help="classes to print (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object an image")
    parser.add_argument(
        "--contact-sheet", metavar="FILE.png", help="also draw the images with their classes; 96 a page"
    )
    parser.add_argument("--batch-size", "-b", type=int, default=32)
    parser.add_argument("--num-workers", "-j", type=int, default=0, help="processes that load images")
    add_reading_arguments(parser)
    add_checkpoint_arguments(parser)


def run(args: argparse.Namespace) -> None:
    from efficientnet.commands.contact_sheet import ContactSheet
    from efficientnet.data.decoding import allow_pixels, decode_with, read_image
    from efficientnet.data.images import ImageSet
    from efficientnet.data.loading import Unreadable

    with checking_input():
        for name, minimum in (
            ("topk", 1),
            ("batch_size", 1),
            ("num_workers", 0),
            ("max_corrupt", 0),
            ("max_pixels", 1),
        ):
            if getattr(args, name) < minimum:
                raise ValueError(f"{name} must be an integer >= {minimum}, got {getattr(args, name)}")
        sheet = ContactSheet(args.contact_sheet, lines=1 + min(args.topk, 3)) if args.contact_sheet else None
        runner, model, classes, preprocess = load(args)
        if model.num_classes == 0:
            raise ValueError(f"checkpoint {args.checkpoint!r} has no classifier")
        paths = _paths(args.images)
        decode_with(args.decode, runner.device, args.num_workers)
    allow_pixels(args.max_pixels)
    limit, hint = args.max_corrupt, {}
    if limit >= len(paths):  # where no image can be read, that is the error
        limit, hint = len(paths) - 1, {"hint": ""}
    unreadable = Unreadable(limit, lambda text: print(text, file=sys.stderr), **hint)
    images = ImageSet(paths, range(len(paths)), preprocess)
    batches = runner.batches(images, args.batch_size, args.num_workers, unreadable=unreadable)
    problems = iter(unreadable.seen)
    for path, probabilities in _in_order(paths, runner, model, batches):
        row = {"image": path}
        if probabilities is None:
            row["error"] = next(problems)
        else:
            top = zip(*(t.tolist() for t in probabilities.topk(min(args.topk, model.num_classes))), strict=True)
            row["top"] = [{"class": classes[i] if classes else str(i), "index": i, "probability": p} for p, i in top]
        lines = [f"{100 * top['probability']:6.2f} %  {top['class']}" for top in row.get("top", ())] or ["unreadable"]
        if args.json:
            print(json.dumps(row))
        else:
            print(path, *(f"  {line}" for line in lines), sep="\n")
        if sheet:
            sheet.add(None if probabilities is None else read_image(path), path, *lines)
    if sheet:
        sheet.close()
        print("contact sheet", *sheet.pages, file=sys.stderr)


def _paths(names):
    """Every image that is meant, once. Raises FileNotFoundError or InputError."""
    from efficientnet.data.images import find_images, image_suffixes

    # Names of files are bytes, whatever the encoding of the text that comes and goes here.
    lines = map(os.fsdecode, getattr(sys.stdin, "buffer", sys.stdin)) if "-" in names else ()
    listed = [line.rstrip("\r\n") for line in lines]
    if "-" in names and not any(listed):
        raise InputError("standard input has no path; - wants one a line")
    paths = []
    for name in filter(None, chain.from_iterable(listed if name == "-" else [name] for name in names)):
        name = os.path.expanduser(name)
        if Path(name).is_dir():
            found = [str(path) for path in find_images(name)]
            if not found:
                raise InputError(f"folder {name!r} has no image ({', '.join(image_suffixes())})")
            paths += found
        else:
            Path(name).stat()
            paths.append(name)
    return list(dict.fromkeys(paths))


def _graphed(model, images):
    """The model behind a CUDA graph, where its blocks run fused."""
    from effkernels import explain, graphed

    return graphed(model, images) if images.is_cuda and explain(model, images).fused else model


def _in_order(paths, runner, model, batches):
    """(path, probabilities [classes], or None where the image cannot be read) of every path, in order."""
    import torch

    done, begun = 0, False
    for images, indices in batches:
        with torch.no_grad(), runner.autocast():
            if not begun and len(paths) > 4 * len(images):  # a capture takes as long as a few batches
                model = _graphed(model, images)
            begun = True
            probabilities = model(images).float().softmax(1).cpu()
        for index, row in zip(indices.tolist(), probabilities, strict=True):
            if row.isnan().any():
                raise InputError(
                    f"the model's logits of {paths[index]!r} are not finite: its weights are not, or --amp fp16 is too "
                    "narrow"
                )
            yield from ((path, None) for path in paths[done:index])
            yield paths[index], row
            done = index + 1
    yield from ((path, None) for path in paths[done:])
