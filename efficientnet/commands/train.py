"""``efficientnet train``."""

import argparse
from dataclasses import fields

from efficientnet.commands.common import checking_input
from efficientnet.settings import AMP, DEVICES, TrainConfig

SUMMARY = "Train a model; write checkpoints, metrics and curves."


def add_arguments(parser):
    """One option for each field of TrainConfig, which owns the defaults and the checks."""

    def add(option, help, **kwargs):
        default = getattr(TrainConfig, option[2:].replace("-", "_"))
        shown = "" if default is None or isinstance(default, bool) else " (default: %(default)s)"
        parser.add_argument(option, default=default, help=help + shown, **kwargs)

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


def run(args):
    from efficientnet.train import Trainer

    with checking_input():
        trainer = Trainer(TrainConfig(**{field.name: getattr(args, field.name) for field in fields(TrainConfig)}))
    trainer.run()
