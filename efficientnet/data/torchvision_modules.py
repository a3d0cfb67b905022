"""How torchvision is imported, so that it works next to any torch."""

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch

from efficientnet.errors import InputError

_libraries = []  # declared operators live as long as this does


def torchvision_module(name: str) -> ModuleType:
    """``torchvision.NAME``, also where torchvision's compiled operators were built for another torch and cannot be
    loaded.

    On import it gives two of them shape rules, and fails if they do not exist. Images need neither, so they are
    declared here.

    Raises ModuleNotFoundError without torchvision, InputError for one that does not fit this torch.
    """
    spec = find_spec("torchvision")
    if spec is not None and spec.origin and not hasattr(torch.ops.torchvision, "nms"):
        try:
            torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        except (ImportError, OSError):
            library = torch.library.Library("torchvision", "DEF")
            library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _libraries.append(library)
    try:
        return import_module(f"torchvision.{name}")
    except (ImportError, RuntimeError) as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "torchvision":
            raise
        raise InputError(f"torchvision does not fit torch {torch.__version__} ({error}); pip install -U torchvision") from error
