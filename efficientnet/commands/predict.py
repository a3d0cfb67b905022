"""``efficientnet predict``."""

import json

from efficientnet.commands.common import add_checkpoint_arguments, checking_input, load

SUMMARY = "The most probable classes of images."


def add_arguments(parser):
    parser.add_argument("images", nargs="+", metavar="IMAGE")
    parser.add_argument("--topk", type=int, default=5, help="classes to print (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="one JSON object an image")
    add_checkpoint_arguments(parser)


def run(args):
    import torch

    from efficientnet.data import read_image

    with checking_input():
        if args.topk < 1:
            raise ValueError(f"topk must be an integer >= 1, got {args.topk}")
        runner, model, classes, preprocess = load(args)
        if model.num_classes == 0:
            raise ValueError(f"checkpoint {args.checkpoint!r} has no classifier")
    for path in args.images:
        images = preprocess(read_image(path)).unsqueeze(0).to(runner.device, memory_format=runner.memory_format)
        with torch.no_grad(), runner.autocast():
            probabilities = model(images)[0].float().softmax(0)
        values, indices = (t.tolist() for t in probabilities.topk(min(args.topk, model.num_classes)))
        top = [(classes[i] if classes else str(i), p) for i, p in zip(indices, values, strict=True)]
        if args.json:
            print(json.dumps({"image": path, "top": [{"class": name, "probability": p} for name, p in top]}))
        else:
            print(path, *(f"  {100 * p:6.2f} %  {name}" for name, p in top), sep="\n")
