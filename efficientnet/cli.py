"""``efficientnet COMMAND``: from what the user typed to the Python API. Bad input ends in one line and exit code 2."""

import argparse
import codecs
import difflib
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from efficientnet.errors import InputError, Interrupted, TrainingStopped
from efficientnet.memory import keep_freed_memory

# The modules of efficientnet.commands, in the order of --help.
COMMANDS = ("train", "validate", "predict", "info", "scale", "export", "convert", "benchmark")

# Let OpenMP's waiting threads spin for microseconds, not milliseconds. That is as fast on an idle machine, and several
# times as fast on a busy one.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

# What other programs call an option.
MEANT = {
    "--learning-rate": "--lr",
    "--lr-scheduler": "--sched",
    "--scheduler": "--sched",
    "--optimizer": "--opt",
    "--wd": "--weight-decay",
}
MEANT |= {
    "--arch": "--model",
    "--data-dir": "--data",
    "--data-path": "--data",
    "--dataset": "--data",
    "--bs": "--batch-size",
}
MEANT |= {
    "--image-size": "--img-size",
    "--imgsz": "--img-size",
    "--num-epochs": "--epochs",
}
MEANT |= {
    "--patience": "--early-stop",
    "--early-stopping": "--early-stop",
    "--ema": "--model-ema",
    "--output-dir": "--output",
}
MEANT |= {
    "--weights": "--checkpoint",
    "--checkpoint-path": "--checkpoint",
    "--channels": "--in-chans",
    "--gpu": "--device",
}

# Import name -> package of the extra [train], or of [export].
OPTIONAL = {
    "sklearn": "scikit-learn",
    "PIL": "pillow",
    "tqdm": "tqdm",
    "safetensors": "safetensors",
    "matplotlib": "matplotlib",
}
OPTIONAL |= {"tensorboard": "tensorboard", "huggingface_hub": "huggingface_hub"}
OPTIONAL |= {"torchvision": "torchvision", "webdataset": "webdataset"}
EXPORT = ("onnx", "onnxscript", "onnxruntime")


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code. An unexpected error keeps its traceback."""
    _print_every_name()
    args, unknown = _parser().parse_known_args(_joined_sizes(sys.argv[1:] if argv is None else argv))
    if unknown:
        name = unknown[0].partition("=")[0]
        near = [MEANT[name]] if MEANT.get(name) in args.options else difflib.get_close_matches(name, args.options, n=1)
        _fail(f"unrecognized arguments: {' '.join(unknown)}{f'; did you mean {near[0]}?' if near else ''}")
    with _leaving_at_once(getattr(args, "output", None)), _warnings_in_one_line():
        try:
            if args.keep_memory:
                keep_freed_memory()
            args.run(args)
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough: the end of this program too, in silence
            # Otherwise Python would complain, at its end, of what it cannot write.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except (InputError, OSError) as error:
            _fail(error)
        except Interrupted as stop:
            print(
                f"\nefficientnet: stopped by {signal.Signals(stop.signum).name}; continue with --resume "
                f"{stop.checkpoint}",
                file=sys.stderr,
            )
            return 128 + stop.signum
        except TrainingStopped as error:
            _fail(error, code=1)
        except ModuleNotFoundError as error:
            name = (error.name or "").partition(".")[0]
            if name not in (*OPTIONAL, *EXPORT):
                raise
            _fail(
                f"{OPTIONAL.get(name, name)} is not installed; pip install "
                f'"effkernels[{"export" if name in EXPORT else "train"}]"'
            )
    return 0


def _joined_sizes(argv):
    """``--img-size H W`` -> ``--img-size HxW``. A second number that is the name of a file to predict stays one."""
    joined = []
    for word in argv:
        sides = joined[-1:] + [word]
        if joined[-2:-1] == ["--img-size"] and all(side.isascii() and side.isdigit() for side in sides):
            if argv[0] != "predict" or not os.path.exists(word):
                word = f"{joined.pop()}x{word}"
        joined.append(word)
    return joined


def _print_every_name():
    """File names that are no text in this encoding, and encodings that lack a letter, are no reason to stop: bytes of a
    name come out as they came in, letters that cannot be written as their number.
    """

    def as_it_was(error):
        if isinstance(error, UnicodeEncodeError) and error.encoding.lower().replace("-", "") == "utf8":
            letters = error.object[error.start : error.end]
            if all("\udc80" <= letter <= "\udcff" for letter in letters):
                return bytes(ord(letter) - 0xDC00 for letter in letters), error.end
        return codecs.backslashreplace_errors(error)

    codecs.register_error("efficientnet", as_it_was)
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="efficientnet")


@contextmanager
def _warnings_in_one_line():
    """Within, a warning is printed without the place in the code, which says nothing to who typed a command."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *where: f"efficientnet: warning: {message}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        _fail(message)


def _parser():
    parser = _Parser(prog="efficientnet", description="EfficientNet on fused MBConv kernels.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(COMMANDS)}}}")
    for name in COMMANDS:
        command = import_module(f"efficientnet.commands.{name}")
        sub = commands.add_parser(name, help=command.SUMMARY, description=command.SUMMARY, allow_abbrev=False)
        sub.set_defaults(run=command.run)
        command.add_arguments(sub)
        sub.add_argument(
            "--keep-memory",
            action=argparse.BooleanOptionalAction,
            default=True,
            help="keep freed memory of the CPU for the next tensors, which saves time (default: yes; glibc only)",
        )
        sub.set_defaults(options=list(sub._option_string_actions))
    return parser


def _fail(error, code=2):
    # A worker of the data loader sends its whole traceback; the last line is the error.
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    print(f"efficientnet: error: {line.removeprefix('efficientnet.errors.InputError: ')}", file=sys.stderr)
    sys.exit(code)


@contextmanager
def _leaving_at_once(output):
    """Within, Ctrl-C and SIGTERM end the process at once.

    Every file is whole at every moment, so nothing needs tidying up.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals belong to the main thread
        return
    pid = os.getpid()

    def leave(signum, frame):
        if os.getpid() == pid:  # a worker of the data loader inherits the handler and leaves in silence
            saved = output and any((Path(output) / "checkpoints").glob("step-*.train.pt"))
            hint = "; continue with --resume auto" if saved else ""
            os.write(2, f"\nefficientnet: stopped by {signal.Signals(signum).name}{hint}\n".encode())
        os._exit(128 + signum)

    before = {signum: signal.signal(signum, leave) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
