"""All that the simulator takes from the rest of the project, and how a launch's arguments become a kernel's
parameters."""

import ast
import functools
import hashlib
import struct
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from effkernels.configs.gpus import GPUS, Gpu
from effkernels.tools.launches import Launch, members, record_launches
from effkernels.tools.machine_code import _binary as binary
from effkernels.tools.machine_code import compile_launch

__all__ = [
    "GPUS",
    "Gpu",
    "Launch",
    "binary",
    "compile_launch",
    "compiled_parts",
    "constants",
    "record_launches",
    "tensors",
    "version",
]


# What decides the time of a launch. Whoever records launches, compares, prints or draws is not here.
_PARTS = ("emulate", "encoding", "flow", "launch", "machine", "project", "sm", "trace", "translate", "values")


def deciding(source: str) -> str:
    """What of Python source decides what it computes: no comments, docstrings, layout, types of arguments and results,
    and no imports that only types need.

    So a page of documentation makes no prediction stale, and a changed figure makes all of them so.
    """
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            node.returns = None
            arguments = node.args
            for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
                each.annotation = None
            for each in filter(None, (arguments.vararg, arguments.kwarg)):
                each.annotation = None
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [child for child in body if not _says_nothing(child)] or [ast.Pass()]
    return ast.unparse(tree)


def _says_nothing(node: ast.stmt) -> bool:
    """Whether a statement is a docstring, or an import of types."""
    if isinstance(node, ast.Expr):
        return isinstance(node.value, ast.Constant)
    return isinstance(node, ast.ImportFrom) and node.module in ("typing", "collections.abc")


@functools.cache
def version() -> str:
    """A digest of the simulator itself: of what decides a prediction in its sources (``deciding``)."""
    sources = [Path(__file__).with_name(f"{part}.py").read_text(encoding="utf-8") for part in _PARTS]
    return hashlib.sha256("\n".join(map(deciding, sources)).encode()).hexdigest()[:16]


# Bits of an address within a storage: 16 TB, of which the storage starts in the middle, as masked threads may point
# before or behind it.
SLOT_BITS = 44


def arguments(launch: Launch) -> list[tuple[str, object]]:
    """(path, value) of every parameter of the compiled kernel, in order: what tuples hold too, and nothing that is
    absent."""
    found = []
    for parameter in launch.fn.params:
        if not parameter.is_constexpr:
            found += members(parameter.name, launch.arguments[parameter.name]).items()
    return [(path, value) for path, value in found if value is not None and type(value).__name__ != "constexpr"]


@dataclass(frozen=True)
class Tensor:
    """A tensor argument: the slot of addresses of its storage, its first element's virtual address, its bytes and its
    storage's."""

    name: str
    slot: int
    address: int
    bytes: int
    storage_bytes: int
    storage: int  # identifies the storage among all launches


def tensors(launch: Launch, apart: bool = False) -> list[Tensor]:
    """The tensor arguments; those of one storage share its slot, unless each is to have its own (``apart``)."""
    found, slots = [], {}
    for name, value in arguments(launch):
        value = getattr(value, "base", value)
        if isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            slot = slots.setdefault(len(slots) if apart else storage._cdata, len(slots) + 1)
            offset = value.storage_offset() * value.element_size()
            address = (slot << SLOT_BITS) + (1 << (SLOT_BITS - 1)) + offset
            size = value.numel() * value.element_size()
            found.append(Tensor(name, slot, address, size, max(storage.nbytes(), size), storage._cdata))
    return found


def constants(launch: Launch, code: Any, apart: bool = False) -> dict[int, int]:
    """Constant bank 0 of a launch: {offset: 32-bit word}; ``apart`` as for ``tensors``.

    code: the launch's ``encoding.Code``, whose file imports this one. TypeError, naming the argument, for one that is
    neither a tensor nor a number."""
    words: dict[int, int] = defaultdict(int)
    words[0], words[4], words[8] = 32 * code.warps, 1, 1
    grid = (*launch.grid, 1, 1)[:3]
    words[12], words[16], words[20] = grid
    at = iter(tensors(launch, apart))
    for (name, value), parameter in zip(arguments(launch), code.parameters, strict=False):
        offset = code.parameter_base + parameter.offset
        if isinstance(getattr(value, "base", value), torch.Tensor):
            bits = next(at).address
        elif isinstance(value, float):
            bits = struct.unpack(
                "<I" if parameter.size == 4 else "<Q", struct.pack("<f" if parameter.size == 4 else "<d", value)
            )[0]
        elif isinstance(value, (bool, int)):
            bits = int(value)
        else:
            raise TypeError(
                f"{launch.name}: argument '{name}' is a {type(value).__name__}; tensors, numbers and tuples of them "
                "are known"
            )
        for word in range(max(1, parameter.size // 4)):
            words[offset + 4 * word] = bits >> 32 * word & 0xFFFFFFFF
    return words


def compiled_parts(launch: Launch, arch: int) -> tuple[bytes, dict]:
    """(cubin, metadata) of a launch compiled for an architecture."""
    kernel = compile_launch(launch, arch)
    return kernel.asm["cubin"], {
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "name": launch.name,
    }
