"""``efficientnet {train,validate,predict,info}``: what the user typed, to the Python API. Bad input ends in one line and exit code 2."""

import argparse
import json
import os
import signal
import sys
import threading
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

from efficientnet.settings import AMP, DEVICES, InputError, TrainConfig

# Waiting OpenMP threads spin for microseconds, not milliseconds: as fast on an idle machine, several times as fast on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# Import name -> package of the extra [train].
OPTIONAL = {"sklearn": "scikit-learn", "PIL": "pillow", "tqdm": "tqdm", "safetensors": "safetensors", "matplotlib": "matplotlib"}
OPTIONAL |= {"tensorboard": "tensorboard"}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. An unexpected error keeps its traceback."""
    args = _parser().parse_args(argv)
    with _leaving_at_once(getattr(args, "output", None)):
        try:
            args.run(args)
        except (InputError, OSError) as error:
            _fail(error)
        except ModuleNotFoundError as error:
            package = OPTIONAL.get((error.name or "").partition(".")[0])
            if package is None:
                raise
            _fail(f'{package} is not installed; pip install "effkernels[train]"')
    return 0


def train(args):
    from efficientnet.train import Trainer

    with _checking_input():
        trainer = Trainer(TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)}))
    trainer.run()


def validate(args):
    from efficientnet.data import ImageSet, load_data

    with _checking_input():
        runner, model, classes, preprocess = _load(args)
        data = load_data(args.data, preprocess.img_size, args.val_fraction)
        if classes is None and len(data.classes) != model.num_classes:
            raise InputError(f"data {args.data!r} has {len(data.classes)} classes, but the checkpoint has {model.num_classes}")
        if classes is not None and classes != data.classes:
            raise InputError(f"data {args.data!r} has classes {_short(data.classes)}, but the checkpoint has {_short(classes)}")
    held_out = ImageSet(data.val.images, data.val.labels, preprocess)
    result = runner.evaluate(model, runner.batches(held_out, args.batch_size, args.num_workers))
    print(f"held-out loss: {result.loss:.4f}\ntest accuracy: {result}")


def predict(args):
    import torch

    from efficientnet.data import read_image

    with _checking_input():
        if args.topk < 1:
            raise ValueError(f"topk must be an integer >= 1, got {args.topk}")
        runner, model, classes, preprocess = _load(args)
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


def info(args):
    from efficientnet.config import list_models

    if args.name is None:
        print(*list_models(), sep="\n")
        return
    from efficientnet.model import create_model
    from efficientnet.profile import count_macs, count_parameters, stage_table

    with _checking_input():
        model = create_model(args.name, num_classes=args.num_classes, fused=False, device="meta")
        rows = stage_table(model, args.img_size)
    table = [("stage", "operator", "kernel", "stride", "expand", "channels", "layers", "input", "output", "parameters", "MACs")]
    for i, row in enumerate(rows):
        sizes = (f"{height}x{width}" for height, width in (row.input_size, row.output_size))
        expand = "" if row.expand_ratio is None else f"{row.expand_ratio:g}"
        table.append(
            (i, row.operator, row.kernel_size, row.stride, expand, row.channels, row.repeats, *sizes, f"{row.params:,}", f"{row.macs:,}")
        )
    widths = [max(len(str(line[column])) for line in table) for column in range(len(table[0]))]
    for line in table:
        cells = [str(cell).rjust(width) for cell, width in zip(line, widths, strict=True)]
        cells[1] = str(line[1]).ljust(widths[1])
        print(*cells, sep="  ")
    size = args.img_size or model.config.resolution
    gmacs = count_macs(model, args.img_size) / 1e9
    print(f"\n{model.config.name}: {count_parameters(model):,} parameters, {gmacs:.3f} GMACs at {size} x {size}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        _fail(message)


def _parser():
    parser = _Parser(prog="efficientnet", description="EfficientNet on fused MBConv kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="{train,validate,predict,info}")

    def command(run, summary):
        sub = commands.add_parser(run.__name__, help=summary, description=summary, allow_abbrev=False)
        sub.set_defaults(run=run)
        return sub

    _add_train_arguments(command(train, "Train a model; write checkpoints, metrics and curves."))

    sub = command(validate, "Loss and accuracy of a checkpoint on the held-out images of a data set.")
    sub.add_argument("--data", default="digits", help="'digits' or 'imagefolder:PATH' (default: %(default)s)")
    sub.add_argument("--val-fraction", type=float, default=0.2, help="share held out, as in training (default: %(default)s)")
    sub.add_argument("--batch-size", type=int, default=64)
    sub.add_argument("--num-workers", type=int, default=0)
    _add_checkpoint_arguments(sub)

    sub = command(predict, "The most probable classes of images.")
    sub.add_argument("images", nargs="+", metavar="IMAGE")
    sub.add_argument("--topk", type=int, default=5, help="classes to print (default: %(default)s)")
    sub.add_argument("--json", action="store_true", help="one JSON object an image")
    _add_checkpoint_arguments(sub)

    sub = command(info, "Stages, parameters and multiply-accumulates of a model; without a name, the known models.")
    sub.add_argument("name", nargs="?", metavar="NAME")
    sub.add_argument("--img-size", type=int, help="pixels (default: the model's own)")
    sub.add_argument("--num-classes", type=int, default=1000)
    return parser


def _add_train_arguments(sub):
    """One option for each field of TrainConfig, which owns the defaults and the checks."""

    def add(option, help, **kwargs):
        default = getattr(TrainConfig, option[2:].replace("-", "_"))
        shown = "" if default is None or isinstance(default, bool) else " (default: %(default)s)"
        sub.add_argument(option, default=default, help=help + shown, **kwargs)

    add("--data", "'digits' (scikit-learn's) or 'imagefolder:PATH'")
    add("--model", "a name that `efficientnet info` lists")
    add("--img-size", "pixels (default: 32 for digits, else the model's own)", type=int)
    add("--epochs", "passes over the training images", type=int)
    add("--batch-size", "images a step", type=int)
    add("--lr", "peak learning rate of AdamW", type=float)
    add("--weight-decay", "not on biases and BatchNorm", type=float)
    add("--warmup-epochs", "linear, before the cosine", type=float)
    add("--label-smoothing", "of the training loss", type=float)
    add("--drop-rate", "dropout before the classifier (default: the model's own)", type=float)
    add("--drop-path-rate", "stochastic depth of the last block (default: the model's own)", type=float)
    add("--seed", "of weights, order and augmentation", type=int)
    add("--device", f"one of {', '.join(DEVICES)}", choices=DEVICES)
    add("--amp", f"autocast: one of {', '.join(AMP)}", choices=AMP)
    add("--fused", "fused MBConv kernels where they can run (default: yes)", action=argparse.BooleanOptionalAction)
    add("--channels-last", "NHWC memory format (default: yes)", action=argparse.BooleanOptionalAction)
    add("--num-workers", "processes that load images", type=int)
    add("--val-fraction", "share of each class to hold out", type=float)
    add("--output", "folder for checkpoints, metrics and curves")
    add("--resume", "continue the run that wrote this file", metavar="LAST.TRAIN.PT")
    add("--tensorboard", "also log to OUTPUT/tensorboard", action="store_true")


def _add_checkpoint_arguments(sub):
    sub.add_argument("--checkpoint", required=True, help=".safetensors, or a state_dict saved by torch (.pt, .pth)")
    sub.add_argument("--model", help="the model's name, for a file that does not say it")
    sub.add_argument("--img-size", type=int, help="pixels (default: as in training)")
    sub.add_argument("--device", default="auto", choices=DEVICES)
    sub.add_argument("--amp", default="none", choices=AMP)
    sub.add_argument("--fused", action=argparse.BooleanOptionalAction, default=True, help="fused MBConv kernels where they can run")


def _load(args):
    """(runner, model in eval, class names or None, preprocess) of --checkpoint."""
    from dataclasses import replace

    from efficientnet.checkpoints import load_checkpoint, read_metadata
    from efficientnet.data import Preprocess
    from efficientnet.train import Runner, pick_device

    runner = Runner(pick_device(args.device), args.amp)
    metadata = read_metadata(args.checkpoint)
    model = runner.place(load_checkpoint(args.model, args.checkpoint, fused=args.fused)).eval()
    if "preprocess" in metadata:
        stored = metadata["preprocess"]
        preprocess = Preprocess(**stored | {"mean": tuple(stored["mean"]), "std": tuple(stored["std"])})
    else:
        cfg = model.pretrained_cfg
        preprocess = Preprocess(cfg["input_size"][-1], cfg["mean"], cfg["std"], cfg["interpolation"], cfg["crop_pct"])
    if args.img_size is not None:
        preprocess = replace(preprocess, img_size=args.img_size)
    return runner, model, metadata.get("classes"), preprocess


def _short(names):
    return f"{len(names)} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"


@contextmanager
def _checking_input():
    """Around code that reads what the user gave: there a ValueError is about that, elsewhere it would be a bug."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error


def _fail(error):
    # A worker of the data loader sends its whole traceback; the last line is the error.
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    print(f"efficientnet: error: {line.removeprefix('efficientnet.settings.InputError: ')}", file=sys.stderr)
    sys.exit(2)


@contextmanager
def _leaving_at_once(output):
    """Ctrl-C and SIGTERM end the process there and then: every file is whole at every moment, so nothing needs tidying up."""
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    pid = os.getpid()

    def leave(signum, frame):
        if os.getpid() == pid:  # a worker of the data loader inherits the handler and leaves in silence
            last = Path(output or ".") / "last.train.pt"
            hint = f"; continue with --resume {last}" if output and last.is_file() else ""
            os.write(2, f"\nefficientnet: stopped by {signal.Signals(signum).name}{hint}\n".encode())
        os._exit(128 + signum)

    before = {signum: signal.signal(signum, leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
