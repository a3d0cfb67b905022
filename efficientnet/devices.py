"""Where a model runs: the device by its name, and which kernels its blocks run there."""

import sys
from collections import Counter

import torch

from efficientnet.choices import DEVICES
from efficientnet.errors import InputError
from effkernels import explain, warm_up


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA where there is a GPU. Raises InputError for "cuda" where there is
    none.
    """
    if name not in DEVICES:
        raise InputError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def use_tf32(yes: bool) -> None:
    """Say whether CUDA's fp32 products and convolutions may be computed in TF32.

    It is set so that both of torch's interfaces can read it: after the newer one (``fp32_precision``) alone the older
    one raises an error, and libraries read the older one.
    """
    torch.set_float32_matmul_precision("high" if yes else "highest")
    torch.backends.cudnn.allow_tf32 = yes


def describe_backend(model: torch.nn.Module, images: torch.Tensor) -> str:
    """In one line, which kernels the model's MBConv blocks run for such images, and why not the fused ones."""
    reasons = explain(model, images)
    plain = dict.fromkeys(reasons.plain, "a plain block (built with fused=False)")
    counts = Counter(reason for reason in (reasons | plain).values() if reason is not None)
    parts = [f"triton for {reasons.fused} of {len(reasons)} MBConv blocks"]
    parts += [f"PyTorch reference for {count}: {reason}" for reason, count in counts.most_common()]
    return "; ".join(parts)


def compile_kernels(model: torch.nn.Module, images: torch.Tensor, training: bool) -> int:
    """Compile the kernels of a step on such images in parallel, with a line of progress; how many there were.

    Call it under the autocast to come. Where no block runs fused there is nothing to compile.
    """
    if not explain(model, images).fused:
        return 0

    def report(done, total):
        if done == total or sys.stderr.isatty():
            end = "\n" if done == total else "\r"
            print(f"compiling kernels {done}/{total}", end=end, file=sys.stderr, flush=True)

    return warm_up(model, images, training, report=report)


def out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the host did not suffice, so that a smaller batch may help."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    said = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in said or "can't allocate memory" in said)


def describe_device(device: torch.device) -> str:
    """The GPU's name, or "the CPU, N threads"."""
    return (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"the CPU, {torch.get_num_threads()} threads"
    )
