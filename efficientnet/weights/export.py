"""A trained network as a program of another runtime: ONNX, TorchScript, torch.export. Each is read back and run before
it is kept.
"""

import json
import os
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from efficientnet.choices import height_width
from efficientnet.errors import InputError
from efficientnet.files import replacing
from efficientnet.model.scaling import check_count

EXPORT_FORMATS = ("onnx", "torchscript", "torch-export")
METADATA_KEY = "efficientnet"  # in ONNX's metadata_props; the file efficientnet.json in the archives of the other two
MIN_OPSET = 18  # what torch.onnx writes without converting down


class Difference(NamedTuple):
    """Between the logits of a program and of its model: the largest difference, and the largest logit."""

    absolute: float
    largest_logit: float


def export_model(
    model: nn.Module,
    path: str | os.PathLike,
    format: str,
    *,
    image_size: int | tuple[int, int],
    in_chans: int = 3,
    batch_size: int = 1,
    dynamic_batch: bool = False,
    opset: int | None = None,
    metadata: dict | None = None,
    tolerance: float = 1e-4,
) -> Difference:
    """Write the model in eval, in fp32, as a program images [N, in_chans, H, W] -> logits [N, num_classes].

    The file is written aside, read back, run on random images and compared with the model. Only then does it take its
    name, so ``path`` is never half a file nor a wrong one. The inputs and outputs of an ONNX file are named "images"
    and "logits".

    Args:
        model: of plain layers (``fused=False``), on the CPU.
        format: "onnx" (needs onnx, onnxscript, onnxruntime), "torchscript" or "torch-export".
        image_size: H = W, or (H, W).
        batch_size: N, unless dynamic_batch: then N is free, and N = 1 and N = 3 are checked.
        opset: of ONNX, 18 or more. None: torch's choice.
        metadata: JSON values to keep in the file under METADATA_KEY, such as class names and how images are prepared.
        tolerance: the accepted difference, relative to the largest logit.

    Returns the difference that the check found.

    Raises InputError for a wrong argument, a failed export, or a difference beyond the tolerance; ModuleNotFoundError
    for a missing package, before any work.
    """
    path = Path(path)
    check_format(format, opset)
    height, width = height_width(image_size)
    check_count("img_size", height)
    check_count("img_size", width)
    check_count("batch_size", batch_size)
    if path.is_dir() or not path.parent.is_dir():
        raise InputError(f"output {str(path)!r} must be a file in a folder that exists")
    write, read = {"onnx": (_write_onnx, _read_onnx), "torchscript": (_write_torchscript, _read_torchscript)}.get(
        format, (_write_torch_export, _read_torch_export)
    )
    model = model.eval()
    generator = torch.Generator().manual_seed(0)

    def images(n):
        return torch.randn(n, in_chans, height, width, generator=generator)

    difference = Difference(0.0, 0.0)
    with torch.no_grad(), replacing(path) as temporary:
        with _failing_as(f"export to {format} failed"):
            write(
                model,
                images(2 if dynamic_batch else batch_size),
                temporary,
                dynamic_batch,
                opset,
                json.dumps(metadata or {}),
            )
        for n in (1, 3) if dynamic_batch else (batch_size,):
            batch = images(n)
            expected = model(batch)
            with _failing_as(f"the exported {format} program does not run on {n} images"):
                logits = read(temporary)(batch)
            if logits.shape != expected.shape:
                raise InputError(
                    f"the exported {format} program gives {tuple(logits.shape)} instead of {tuple(expected.shape)}"
                )
            off, largest = (logits - expected).abs().max().item(), expected.abs().max().item()
            if not off <= tolerance * largest:
                raise InputError(
                    f"the exported {format} program differs from the model by {off:.3g} "
                    f"where logits reach {largest:.3g} (accepted: {tolerance:g} of that)"
                )
            difference = max(difference, Difference(off, largest))
    return difference


def check_format(format: str, opset: int | None = None) -> None:
    """Raise InputError unless the format (and ONNX's opset) can be written here; ModuleNotFoundError names a missing
    package.
    """
    if format not in EXPORT_FORMATS:
        raise InputError(f"format must be one of {', '.join(EXPORT_FORMATS)}, got {format!r}")
    if format == "onnx":
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401

        newest = onnx.defs.onnx_opset_version()
        if opset is not None and not MIN_OPSET <= opset <= newest:
            raise InputError(f"opset must be from {MIN_OPSET} to {newest}, got {opset}")
    elif opset is not None:
        raise InputError(f"opset is for format onnx, not for {format}")


@contextmanager
def _failing_as(what):
    """Within, any error becomes an InputError that begins with ``what``.

    Exporters and runtimes raise whatever they like, and their deprecations and notes on tracing say nothing to the
    user.
    """
    try:
        with warnings.catch_warnings():
            for category in (FutureWarning, DeprecationWarning, torch.jit.TracerWarning):
                warnings.simplefilter("ignore", category)
            yield
    except Exception as error:
        line = (str(error).strip().splitlines() or [""])[0]
        raise InputError(f"{what} ({type(error).__name__}: {line})") from error


def _write_onnx(model, images, path, dynamic_batch, opset, metadata):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=shapes,
        opset_version=opset,
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    written = program.model.opset_imports[""]
    if opset is not None and written != opset:
        raise RuntimeError(f"torch wrote opset {written} instead of {opset}")
    program.model.metadata_props[METADATA_KEY] = metadata
    # Write one file: save() puts large weights beside it. Protocol buffers fail at 2 GiB.
    path.write_bytes(program.model_proto.SerializeToString())


def _read_onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0])


def _write_torchscript(model, images, path, dynamic_batch, opset, metadata):
    # The checks of sizes are traced as what they gave: they hold for the sizes that the program is for.
    torch.jit.trace(model, images).save(str(path), _extra_files={f"{METADATA_KEY}.json": metadata})


def _read_torchscript(path):
    return torch.jit.load(str(path))


def _write_torch_export(model, images, path, dynamic_batch, opset, metadata):
    shapes = ({0: torch.export.Dim("batch")},) if dynamic_batch else None
    program = torch.export.export(model, (images,), dynamic_shapes=shapes)
    with open(path, "wb") as file:  # given a path, torch wants it to end in .pt2
        torch.export.save(program, file, extra_files={f"{METADATA_KEY}.json": metadata})


def _read_torch_export(path):
    with open(path, "rb") as file:
        return torch.export.load(file).module()
