"""How torchvision is imported, so that it works next to any torch."""

import functools
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from efficientnet.errors import InputError


@functools.cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Let torchvision, and timm, which imports it, be imported although its compiled operators were built for another
    torch.

    On import torchvision gives two of them shape rules, and fails if they do not exist. Images need neither, so they
    are declared here. They live as long as what this returns, which the cache keeps.
    """
    spec = find_spec("torchvision")
    if spec is None or not spec.origin or hasattr(torch.ops.torchvision, "nms"):
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        return None
    except (ImportError, OSError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


def torchvision_module(name: str) -> ModuleType:
    """``torchvision.NAME``, also where torchvision's compiled operators cannot be loaded.

    Raises ModuleNotFoundError without torchvision, InputError for one that does not fit this torch.
    """
    declare_torchvision_operators()
    try:
        return import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            raise
        raise InputError(
            f"torchvision does not fit torch {torch.__version__} ({error}); pip install -U torchvision"
        ) from error
