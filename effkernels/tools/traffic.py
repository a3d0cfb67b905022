"""What launches read and write, counted without a GPU: every address Triton's interpreter touches, each byte once a
launch.

The distinct bytes of a launch are what DRAM must serve, so a schedule's byte budget can be tested:

    with count_traffic() as launches:
        kernel[grid](...)
    launches[0].arguments  ->  {"x": (bytes read, bytes written), ...}

Each tensor argument, and each tensor in a tuple ("norm.weight"), gets a range of addresses of its own while the kernel
runs, so that accesses are told apart although arguments may share memory, and one outside its tensor's storage raises
IndexError. PyTorch's own operators in between are recorded too, as "aten::name": each is a launch on a GPU.
"""

import contextlib
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_SLOT_BITS = 44  # 16 TB of addresses an argument, its tensor in the middle: masked lanes may point before or behind it


@dataclass
class LaunchTraffic:
    """One launch: distinct bytes (read, written) by argument, for those it touches, and the sizes of these tensors in
    bytes.

    ``requested``: the bytes of every access, so often as it is made. ``read`` and ``written`` count a byte of memory
    once although several arguments see it.
    """

    name: str
    grid: tuple = ()
    arguments: dict[str, tuple[int, int]] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    requested: dict[str, tuple[int, int]] = field(default_factory=dict)
    read: int = 0
    written: int = 0

    @property
    def total(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class _Argument:
    """A tensor argument during a launch: its storage's bytes, and which of them were read and written."""

    def __init__(self, name: str, slot: int, tensor):
        tensor = getattr(tensor, "base", tensor)  # triton.runtime.jit.TensorWrapper
        storage = tensor.untyped_storage()
        self.name, self.address, self.bytes = name, storage.data_ptr(), storage.nbytes()
        self.size = tensor.numel() * tensor.element_size()
        # The same position within 4096 bytes: alignment is as it was.
        self.virtual = ((slot + 1) << _SLOT_BITS) + (1 << (_SLOT_BITS - 1)) + self.address % 4096
        self.seen = {"read": None, "written": None}
        self.requested = {"read": 0, "written": 0}

    def mark(self, kind: str, offsets: np.ndarray, width: int, kernel: str):
        """offsets: int64, from the storage's first byte; every lane is active."""
        if offsets.min() < 0 or offsets.max() + width > self.bytes:
            raise IndexError(f"{kernel}: '{self.name}' is {kind} outside of its storage of {self.bytes} bytes")
        self.requested[kind] += offsets.size * width
        if self.seen[kind] is None:
            self.seen[kind] = np.zeros(-(-self.bytes // 8) * 8, np.uint8)
        if (offsets % width).any():
            for byte in range(width):
                self.seen[kind][offsets + byte] = 1
        else:
            self.seen[kind].view(f"u{width}")[offsets // width] = int.from_bytes(b"\1" * width, "little")

    def count(self, kind: str) -> int:
        return 0 if self.seen[kind] is None else int(np.count_nonzero(self.seen[kind]))


class _Recorder:
    def __init__(self):
        self.records: list[LaunchTraffic] = []
        self.open: list[_Argument] = []
        self.names: list[str] | None = None
        self.kernel = ""

    @contextlib.contextmanager
    def launch(self, name: str, grid, names: list[str]):
        if self.names is not None:
            raise RuntimeError(f"{name} was launched within {self.kernel}")
        self.kernel, self.names, self.open = name, names, []
        try:
            yield
            self.records.append(self._finished(grid))
        finally:
            self.names, self.open = None, []

    def _finished(self, grid) -> LaunchTraffic:
        record = LaunchTraffic(self.kernel, grid)
        storages: dict[tuple[int, str], np.ndarray] = {}
        for argument in self.open:
            counts = argument.count("read"), argument.count("written")
            if any(counts):
                record.arguments[argument.name] = counts
                record.sizes[argument.name] = argument.size
                record.requested[argument.name] = tuple(argument.requested.values())
            for kind, seen in argument.seen.items():
                if seen is not None:
                    key = argument.address, kind
                    storages[key] = seen if key not in storages else storages[key] | seen
        for (_, kind), seen in storages.items():
            setattr(record, kind, getattr(record, kind) + int(np.count_nonzero(seen)))
        return record

    def pointer(self, name: str, tensor) -> int:
        """The address that stands for ``tensor``'s first element."""
        argument = _Argument(name, len(self.open), tensor)
        self.open.append(argument)
        return argument.virtual + tensor.data_ptr() - argument.address

    def real(self, pointers: np.ndarray, active, width: int, kinds) -> np.ndarray:
        """The memory that ``pointers`` stand for; lanes of ``active`` are recorded. Inactive lanes may come out as
        anything."""
        if self.names is None:
            return pointers
        # Some masks are integers inside the interpreter.
        active = np.broadcast_to(np.asarray(active, bool), pointers.shape)
        result = pointers.copy()
        lanes = pointers[active]
        if lanes.size == 0:
            return result
        slots = lanes >> np.uint64(_SLOT_BITS)
        for slot in (slots[:1] if (slots == slots[0]).all() else np.unique(slots)).tolist():
            if not 1 <= slot <= len(self.open):
                raise IndexError(f"{self.kernel}: an access that belongs to no argument")
            argument = self.open[slot - 1]
            mine = active & (pointers >> np.uint64(_SLOT_BITS) == np.uint64(slot))
            offsets = pointers[mine].astype(np.int64) - argument.virtual
            for kind in kinds:
                argument.mark(kind, offsets, width, self.kernel)
            result[mine] = (offsets + argument.address).astype(np.uint64)
        return result


class Operator(NamedTuple):
    """One call of an operator of PyTorch: its name, bytes read and written, and floating-point operations of a product
    of matrices (0 of all else)."""

    name: str
    read: int
    written: int
    flops: int

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.read + self.written


class Operators(TorchDispatchMode):
    """Calls ``record(Operator(...))`` for every operator of PyTorch that would start a kernel: not for views, nor for
    those with a part of ``free`` in their names."""

    sees_kernels = True  # launches are counted beside it, so it is no reason for plain PyTorch

    def __init__(self, record: Callable, free: tuple[str, ...] = ("empty",)):
        super().__init__()
        self.record, self.free = record, free

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        name = function._schema.name
        if not any(part in name for part in self.free):
            given, made = (
                [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)] for tree in ((args, kwargs), out)
            )
            storages = {t.untyped_storage()._cdata for t in given}
            written = (
                made if function._schema.is_mutable else [t for t in made if t.untyped_storage()._cdata not in storages]
            )
            if any(t.numel() for t in written):
                results = tree_leaves((kwargs or {}).get("out"))
                read = [t for t in given if not any(t is result for result in results)]
                moved = (sum(t.numel() * t.element_size() for t in tensors) for tensors in (read, written))
                flops = 2 * given[0].numel() * given[1].shape[1] if name == "aten::mm" else 0
                self.record(Operator(name, *moved, flops))
        return out


def _width(pointers) -> int:
    """Bytes of what a TensorHandle of pointers points to."""
    return max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextlib.contextmanager
def count_traffic() -> Iterator[list[LaunchTraffic]]:
    """Within: every launch and every PyTorch operator is recorded, in order, in the list of ``LaunchTraffic`` this
    yields.

    Kernels must run in the interpreter (TRITON_INTERPRET=1 before Triton is imported), or RuntimeError is raised. Bytes
    that a launch reads after it has written them itself count on both sides.
    """
    from effkernels.kernels import common
    from effkernels.tools.launches import members

    if not common.INTERPRET:
        raise RuntimeError(
            "count_traffic needs Triton's interpreter: set TRITON_INTERPRET=1 before anything imports Triton"
        )
    from triton.runtime import interpreter

    recorder = _Recorder()
    executor, builder = interpreter.GridExecutor, interpreter.InterpreterBuilder
    hooked = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "create_atomic_cas")
    load, store, rmw, cas = (getattr(builder, name) for name in hooked)
    run, convert = executor.__call__, interpreter._implicit_cvt

    def call(self, *args, **kwargs):
        # The order in which the interpreter converts the arguments that are not compile-time constants.
        given = inspect.getcallargs(self.fn, *args, **{k: v for k, v in kwargs.items() if k in self.arg_names})
        names = [path for name in given if name not in self.constexprs for path in members(name, given[name])]
        grid = self.grid(given) if callable(self.grid) else self.grid
        with recorder.launch(self.fn.__name__, tuple(grid), names), torch._C._DisableTorchDispatch():
            return run(self, *args, **kwargs)

    def implicit_cvt(arg):
        converted = convert(arg)  # of a tuple: its members come here first, in order
        if recorder.names is None or isinstance(arg, tuple):
            return converted
        name = recorder.names.pop(0)
        if hasattr(arg, "data_ptr"):
            converted.handle.data = np.array([recorder.pointer(name, arg)], np.uint64)
        return converted

    def translated(pointers, active, kinds):
        return type(pointers)(recorder.real(pointers.data, active, _width(pointers), kinds), pointers.dtype)

    def masked_load(self, ptrs, mask, *rest, **named):
        return load(self, translated(ptrs, mask.data, ("read",)), mask, *rest, **named)

    def masked_store(self, ptrs, value, mask, *rest, **named):
        return store(self, translated(ptrs, mask.data, ("written",)), value, mask, *rest, **named)

    def atomic_rmw(self, op, ptr, val, mask, *rest):
        return rmw(self, op, translated(ptr, mask.data, ("read", "written")), val, mask, *rest)

    def atomic_cas(self, ptr, *rest):
        return cas(self, translated(ptr, np.True_, ("read", "written")), *rest)

    patches = [(executor, "__call__", call, run), (interpreter, "_implicit_cvt", implicit_cvt, convert)]
    patches += zip(
        [builder] * 4, hooked, (masked_load, masked_store, atomic_rmw, atomic_cas), (load, store, rmw, cas), strict=True
    )
    try:
        for owner, name, replacement, _ in patches:
            setattr(owner, name, replacement)
        with Operators(
            lambda found: recorder.records.append(LaunchTraffic(found.name, read=found.read, written=found.written))
        ):
            yield recorder.records
    finally:
        for owner, name, _, original in patches:
            setattr(owner, name, original)


def count_steps(module: nn.Module, x: torch.Tensor) -> dict[str, list[LaunchTraffic]]:
    """The launches of a training step's "forward" and "backward" and of the "inference" of a module on x, which
    requires a gradient."""
    with count_traffic() as forward:
        out = module(x)
    gradient = torch.randn_like(out)
    with count_traffic() as backward:
        out.backward(gradient)
    with torch.no_grad(), count_traffic() as inference:
        module.eval()(x)
    return {"forward": forward, "backward": backward, "inference": inference}


def passes(launches: list[LaunchTraffic], e1_bytes: int, e2_bytes: int) -> tuple[float, float]:
    """How often ``launches`` pass over the expanded tensors before and after the depthwise: reads and writes, a whole
    tensor is 1.

    Tensors are told by their size in bytes; where both have the same (stride 1) all passes are in the first number.
    """
    moved = dict.fromkeys((e2_bytes, e1_bytes), 0)
    for launch in launches:
        for name, counts in launch.arguments.items():
            if launch.sizes[name] in moved:
                moved[launch.sizes[name]] += sum(counts)
    return moved[e1_bytes] / e1_bytes, 0.0 if e1_bytes == e2_bytes else moved[e2_bytes] / e2_bytes


def summary(launches: list[LaunchTraffic]) -> str:
    """A table of launches: programs, bytes read and written, and by argument."""
    lines = [f"{'launch':32} {'programs':>8} {'read':>10} {'written':>10}"]
    for launch in launches:
        parts = [f"{name} {read}+{written}" for name, (read, written) in launch.arguments.items()]
        lines.append(
            f"{launch.name:32} {math.prod(launch.grid):8} {launch.read:10} {launch.written:10}  {', '.join(parts)}"
        )
    return "\n".join(lines)
