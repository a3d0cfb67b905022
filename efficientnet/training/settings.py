"""What a training run depends on. No torch here: the command line makes its options, with defaults and checks, from
this file.
"""

import math
from dataclasses import dataclass, field, fields
from numbers import Real

from efficientnet.choices import AMP, DECODERS, DEVICES, INTERPOLATIONS, MAX_PIXELS, image_size
from efficientnet.errors import InputError

OPTIMIZERS = ("adamw", "adam", "rmsproptf", "sgd")
SCHEDULES = ("cosine", "step", "plateau")
SAMPLERS = ("shuffled", "balanced")
FREEZE_BN = ("all", "weights", "none")
DIST_BN = ("reduce", "broadcast")


def option(default: object, help: str, *aliases: str, **argparse) -> object:
    """A field of TrainConfig and the option made from it: ``--field-name`` and its ``aliases``, timm's name where it
    differs.
    """
    return field(default=default, metadata={"help": help, "aliases": aliases, "argparse": argparse})


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a training run depends on. The defaults are tuned for ``data="digits"`` on two CPU cores.

    An update of one process takes ``grad_accum_steps`` batches of ``batch_size`` images; an update of the run takes
    those of all processes.

    Raises InputError (a ValueError) that names the field, its value and what is accepted.
    """

    data: str = option(
        "digits", "digits[:CLASSES], imagefolder:PATH, cifar10:ROOT (and other sets of torchvision), webdataset:SHARDS"
    )
    val_data: str | None = option(
        None, "held-out images, as --data (default: a share of --data, or its own held-out part)"
    )
    val_fraction: float = option(0.2, "share of each class to hold out, where --data has no held-out part")
    download: bool = option(False, "let torchvision fetch a data set of its own", "--dataset-download")
    max_corrupt: int = option(10, "unreadable images to skip before giving up")
    max_pixels: int = option(MAX_PIXELS, "of an image file; larger ones are unreadable")
    decode: str = option(
        "cpu",
        "where JPEG files are decoded: by Pillow, or by nvJPEG on the GPU (cuda), which needs --num-workers 0",
        choices=DECODERS,
    )
    train_num_samples: int | None = option(None, "images of an epoch of webdataset (default: counted, if local)")
    num_classes: int | None = option(None, "classes of webdataset (default: counted, if local)")
    num_workers: int = option(0, "processes that load images", "--workers", "-j")

    model: str = option("efficientnet_b0", "a name that `efficientnet info` lists")
    in_chans: int = option(3, "channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA)")
    img_size: int | tuple | None = option(
        None,
        "pixels, or height and width: 224, 192 256 or 192x256 (default: 32 for digits, else the model's own)",
        metavar="PIXELS",
    )
    drop_rate: float | None = option(None, "dropout before the classifier (default: the model's own)", "--drop")
    drop_path_rate: float | None = option(
        None, "stochastic depth of the last block (default: the model's own)", "--drop-path"
    )
    pretrained: str | None = option(
        None,
        "start from these weights: 'default', a tag of the model, a checkpoint of any layout, a URL or a Hub id",
        metavar="WEIGHTS",
        nargs="?",
        const="default",
    )
    freeze_until: str | None = option(
        None, "leave the layers up to this one as they are: stem, a stage from 0 to 6, or head"
    )
    freeze_bn: str = option(
        "all", "of their BatchNorm stay: all, weights (statistics follow the images), none", choices=FREEZE_BN
    )
    layer_decay: float = option(1.0, "learning rate of each block as a share of the next one's")
    bn_momentum: float | None = option(None, "of BatchNorm, as PyTorch has it (default: the model's own)")
    bn_eps: float | None = option(None, "of BatchNorm (default: the model's own)")

    epochs: int = option(10, "passes over the training images")
    batch_size: int = option(64, "images of one process at a time", "-b")
    global_batch_size: int | None = option(
        None, "images of an update, all processes and accumulated batches; sets --batch-size"
    )
    grad_accum_steps: int = option(1, "batches added up for an update")
    auto_batch: bool = option(False, "halve the batch, and accumulate more of them, until a step fits the memory")
    opt: str = option("adamw", "optimizer", choices=OPTIMIZERS)
    opt_eps: float | None = option(None, "of the optimizer (default: adamw and adam 1e-8, rmsproptf 1e-3)")
    momentum: float = option(0.9, "of rmsproptf and sgd")
    alpha: float = option(0.9, "decay of rmsproptf's mean square")
    weight_decay: float = option(0.01, "not on biases and BatchNorm")
    clip_grad: float | None = option(None, "largest norm of the gradient (default: any)")
    lr: float = option(6e-3, "peak learning rate")
    lr_base: float | None = option(
        None, "learning rate at --lr-base-size images an update, scaled to the update's; overrides --lr"
    )
    lr_base_size: int = option(256, "see --lr-base")
    sched: str = option(
        "cosine",
        "after the warm-up: half a cosine to zero, or x decay_rate every decay_epochs (step), or x decay_rate after "
        "patience_epochs "
        "without a better held-out accuracy (plateau)",
        choices=SCHEDULES,
    )
    warmup_epochs: float = option(2.0, "of a learning rate that grows linearly")
    decay_epochs: float = option(2.4, "see --sched step")
    decay_rate: float = option(0.97, "see --sched step and plateau", "--dr")
    patience_epochs: int = option(10, "see --sched plateau")
    early_stop: int | None = option(
        None, "epochs without a better held-out accuracy that end the run (default: none do)", metavar="EPOCHS"
    )
    model_ema: bool = option(False, "also average the weights exponentially; the average is evaluated and kept")
    model_ema_decay: float = option(0.9999, "of the average, less in the first updates: (1 + updates) / (10 + updates)")

    class_weights: str | None = option(
        None,
        "of the training loss: balanced (as many images of a class there are, as little each counts), or a number a "
        "class: 1,2.5,1",
    )
    sampler: str = option(
        "shuffled", "of training images: each once, or as many of each class (balanced)", choices=SAMPLERS
    )
    label_smoothing: float = option(0.1, "of the training loss", "--smoothing")
    aa: str | None = option(None, "auto (AutoAugment) or rand[-mMAGNITUDE][-nOPERATIONS] (RandAugment)")
    scale: tuple | None = option(
        None, "crops of this share of the image's area (default: the data set's own crop)", type=float, nargs=2
    )
    hflip: float = option(0.5, "share of the images mirrored, with --scale")
    reprob: float = option(0.0, "share of the images with a random rectangle erased")
    mixup: float = option(0.0, "alpha of mixup, 0 for none")
    cutmix: float = option(0.0, "alpha of cutmix, 0 for none")
    progressive_size: int | None = option(
        None, "pixels of the first of the progressive stages; the last has --img-size"
    )
    progressive_stages: int = option(4, "see --progressive-size")
    interpolation: str = option("bilinear", "of resized images", choices=INTERPOLATIONS)
    crop_pct: float = option(1.0, "share of the image that evaluation sees")

    device: str = option("auto", f"one of {', '.join(DEVICES)}", choices=DEVICES)
    amp: str = option("none", f"autocast: one of {', '.join(AMP)}", choices=AMP)
    tf32: bool = option(False, "TF32 products of fp32 on the GPU")
    fused: bool = option(True, "fused MBConv kernels where they can run (default: yes)")
    channels_last: bool = option(True, "NHWC memory format (default: yes)")
    compile: bool = option(False, "torch.compile the model", "--torchcompile")
    cuda_graphs: bool = option(False, "replay the forward and backward pass as one CUDA graph")
    dist_timeout: float = option(600.0, "seconds that processes wait for each other")
    sync_bn: bool = option(False, "BatchNorm over the batches of all processes")
    dist_bn: str = option("reduce", "running statistics of processes: averaged, or those of the first", choices=DIST_BN)

    output: str = option("runs/train", "folder for checkpoints, metrics and curves")
    resume: str | None = option(
        None, "continue from this file, or 'auto': from the newest whole one in --output", metavar="FILE|auto"
    )
    checkpoint_interval: int | None = option(
        None, "updates between checkpoints within an epoch (default: only at its end)", "--recovery-interval"
    )
    checkpoint_hist: int = option(3, "checkpoints to keep, besides the best weights")
    skip_nonfinite: int = option(
        0, "updates with a loss or gradient that is NaN or infinite to leave out before giving up"
    )
    log_interval: int = option(10, "updates between rows of steps.jsonl")
    tensorboard: bool = option(False, "also log to OUTPUT/tensorboard")
    seed: int = option(0, "of weights, order and augmentation")

    def __post_init__(self):
        def check(name, accepted, ok):
            value = getattr(self, name)
            try:
                fine = ok(value)
            except TypeError:  # a value that cannot be compared
                fine = False
            if not fine:
                raise InputError(f"{name} must be {accepted}, got {value!r}")

        def integer(minimum, **names):
            for name in names:
                check(
                    name,
                    f"an integer >= {minimum}",
                    lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= minimum,
                )

        def number(accepted, ok, *names):
            for name in names:
                check(name, accepted, lambda v: isinstance(v, Real) and not isinstance(v, bool) and ok(v))

        given = {f.name: True for f in fields(self) if getattr(self, f.name) is not None}

        def optional(*names):
            return {name: True for name in names if name in given}

        integer(
            1,
            epochs=1,
            grad_accum_steps=1,
            lr_base_size=1,
            checkpoint_hist=1,
            log_interval=1,
            progressive_stages=1,
            patience_epochs=1,
        )
        integer(
            1,
            **optional(
                "checkpoint_interval", "train_num_samples", "global_batch_size", "progressive_size", "early_stop"
            ),
        )
        integer(2, batch_size=1, **optional("num_classes"))
        integer(1, in_chans=1, max_pixels=1)
        integer(0, seed=1, num_workers=1, max_corrupt=1, skip_nonfinite=1)
        number("a finite number > 0", lambda v: 0 < v < math.inf, "lr", "decay_epochs", "dist_timeout")
        number("a finite number > 0", lambda v: 0 < v < math.inf, *optional("lr_base", "clip_grad", "opt_eps"))
        number("a finite number >= 0", lambda v: 0 <= v < math.inf, "weight_decay", "warmup_epochs", "mixup", "cutmix")
        number("in [0, 1)", lambda v: 0 <= v < 1, "label_smoothing", "momentum", "alpha", "model_ema_decay")
        number("in [0, 1]", lambda v: 0 <= v <= 1, "hflip", "reprob")
        number("in (0, 1]", lambda v: 0 < v <= 1, "decay_rate", "crop_pct", "layer_decay")
        for name, choices in (
            ("amp", AMP),
            ("opt", OPTIMIZERS),
            ("sched", SCHEDULES),
            ("dist_bn", DIST_BN),
            ("freeze_bn", FREEZE_BN),
            ("interpolation", INTERPOLATIONS),
            ("sampler", SAMPLERS),
            ("decode", DECODERS),
        ):
            check(name, f"one of {', '.join(choices)}", lambda v, choices=choices: v in choices)
        until = ("stem", *map(str, range(7)), "head")
        if self.freeze_until is not None:
            check("freeze_until", f"one of {', '.join(until)}", lambda v: v in until)
        elif self.freeze_bn != "all":
            raise InputError(
                f"freeze_bn {self.freeze_bn} is about layers that freeze_until freezes: give --freeze-until too"
            )
        if self.img_size is not None:
            try:
                object.__setattr__(self, "img_size", image_size(self.img_size))
            except ValueError as error:
                raise InputError(str(error)) from error
        if isinstance(self.img_size, tuple) and self.progressive_size is not None:
            raise InputError(
                f"progressive_size is for square images, and img_size is {self.img_size[0]} x {self.img_size[1]}"
            )
        if self.scale is not None:
            object.__setattr__(self, "scale", tuple(self.scale))  # a list, from a recipe
            check("scale", "two numbers, 0 < smallest <= largest <= 1", lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1)


def unused(config: TrainConfig) -> dict[str, str]:
    """Settings that others leave without an effect: {name: those others}."""
    of = {
        "momentum": ("opt", ("sgd", "rmsproptf")),
        "alpha": ("opt", ("rmsproptf",)),
        "opt_eps": ("opt", ("adamw", "adam", "rmsproptf")),
        "decay_epochs": ("sched", ("step",)),
        "decay_rate": ("sched", ("step", "plateau")),
        "patience_epochs": ("sched", ("plateau",)),
    }
    found = {name: f"{by} {getattr(config, by)}" for name, (by, ones) in of.items() if getattr(config, by) not in ones}
    without = {"hflip": "scale", "progressive_stages": "progressive_size", "lr_base_size": "lr_base"}
    found |= {name: f"no {by}" for name, by in without.items() if getattr(config, by) is None}
    if not config.model_ema:
        found["model_ema_decay"] = "no model_ema"
    if config.lr_base is not None:
        found["lr"] = "lr_base"
    return found


def option_names(name: str) -> list[str]:
    """The names of a field's option on the command line, its own first."""
    return ["--" + name.replace("_", "-"), *TrainConfig.__dataclass_fields__[name].metadata["aliases"]]
