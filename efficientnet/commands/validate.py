"""``efficientnet validate``."""

from efficientnet.commands.common import add_checkpoint_arguments, checking_input, load
from efficientnet.settings import InputError

SUMMARY = "Loss and accuracy of a checkpoint on the held-out images of a data set."


def add_arguments(parser):
    parser.add_argument("--data", default="digits", help="'digits' or 'imagefolder:PATH' (default: %(default)s)")
    parser.add_argument("--val-fraction", type=float, default=0.2, help="share held out, as in training (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--num-workers", type=int, default=0)
    add_checkpoint_arguments(parser)


def run(args):
    from efficientnet.data import ImageSet, load_data

    with checking_input():
        runner, model, classes, preprocess = load(args)
        data = load_data(args.data, preprocess.img_size, args.val_fraction)
        if classes is None and len(data.classes) != model.num_classes:
            raise InputError(f"data {args.data!r} has {len(data.classes)} classes, but the checkpoint has {model.num_classes}")
        if classes is not None and classes != data.classes:
            raise InputError(f"data {args.data!r} has classes {_short(data.classes)}, but the checkpoint has {_short(classes)}")
    held_out = ImageSet(data.val.images, data.val.labels, preprocess)
    result = runner.evaluate(model, runner.batches(held_out, args.batch_size, args.num_workers))
    print(f"held-out loss: {result.loss:.4f}\ntest accuracy: {result}")


def _short(names):
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
