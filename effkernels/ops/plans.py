"""What an operator does, decided once a shape and kept: its launches and PyTorch's own operators as one straight
function, without the Python that decided on them.

The first call with some shapes runs as it is written, and compiles. The second is recorded: every kernel that it
starts, with what Triton compiled for it, and every operator of PyTorch, as a ``torch.fx`` graph over the operator's
tensors. Later calls run that graph's code. A plan serves calls of the same ``key``: the same settings, and tensors of
the same dtypes, sizes, strides, devices and alignment of their addresses to 16 bytes, all that the choice of
configuration and Triton's specialisation depend on; and the same arguments are one tensor. Tensors are read where they
lie, so nothing goes stale; memory is freed where it was read last, as before.

Nothing is recorded or replayed where somebody watches launches or operators, asks for configurations by name, or where
several processes are normalised together. A call that does what a graph cannot hold is left as it is.
"""

import contextlib
import math
import operator
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from effkernels.configs import tables
from effkernels.ops import counters

MOST = 1024  # plans; with more shapes than that all are forgotten
_plans: dict[tuple, Callable | None | str] = {}
SMALL = 2**20  # bytes; larger memory is an allocation of its own, which is freed where it was read last
ALIGNMENT = 512
_SEEN = "seen once"
_ALLOCATIONS = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_PURE = (torch.empty, torch.empty_strided, torch.as_strided, operator.getitem)
tables.when_decisions_change(_plans.clear)


def possible() -> bool:
    """Whether kernels are compiled; Triton's interpreter starts none."""
    from effkernels.kernels.common import INTERPRET

    return not INTERPRET


def key_of(name: str, arguments: tuple) -> tuple | None:
    """What a plan of the operator ``name`` depends on, or None where none may be made or used."""
    from effkernels.kernels import common

    if not possible() or tables.disturbed() or torch._C._len_torch_dispatch_stack() or common.launches_watched():
        return None
    # Products are cast under autocast.
    cast = [torch.is_autocast_enabled(on) and torch.get_autocast_dtype(on) for on in ("cpu", "cuda")]
    key: list = [name, common.matmul_precision(), *cast]
    first: dict[int, int] = {}
    for i, value in enumerate(arguments):
        if isinstance(value, torch.Tensor):
            if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.is_meta:
                return None
            same = first.setdefault(id(value), i)  # a graph cannot tell two arguments that were one tensor
            key.append((same, value.dtype, value.shape, value.stride(), value.device, value.data_ptr() % 16))
        else:
            key.append(tuple(value) if isinstance(value, list) else value)
    return tuple(key)


def kept(key: tuple | None) -> Callable | None:
    """The plan of this key, if there is one. It takes the operator's arguments and returns (its results, memory that
    must live until then).
    """
    plan = None if key is None else _plans.get(key)
    return plan if callable(plan) else None


@contextlib.contextmanager
def written_down(key: tuple | None, arguments: tuple) -> Iterator[SimpleNamespace]:
    """Within: what an operator does becomes the plan of ``key``, if it is done for the second time.

    Yields what must be given the operator's results, as ``results``. What raises is not written down.
    """
    call = SimpleNamespace(results=None)
    known = None if key is None else _plans.get(key, "")
    if known == _SEEN:
        with _recording(arguments) as recorder:
            yield call
        _plans[key] = recorder.plan(call.results)
        return
    yield call
    if known == "":
        if len(_plans) >= MOST:
            _plans.clear()
        _plans[key] = _SEEN


class _Recorder(TorchDispatchMode):
    """Writes operators and launches into a graph, while they run."""

    def __init__(self, arguments: tuple):
        super().__init__()
        self.graph, self.problem = torch.fx.Graph(), None
        self.nodes: dict[int, torch.fx.Node] = {}
        self.alive: list[torch.Tensor] = []  # so that no id is used again
        self.bases: dict[int, torch.Tensor] = {}  # of views
        for i, value in enumerate(arguments):
            node = self.graph.placeholder(f"argument{i}")
            if isinstance(value, torch.Tensor):
                self.know(value, node)

    def know(self, tensor: torch.Tensor, node: torch.fx.Node) -> None:
        self.nodes.setdefault(id(tensor), node)
        self.alive.append(tensor)

    def names(self, value: object) -> object:
        """``value`` with nodes in the place of tensors."""
        if isinstance(value, torch.Tensor):
            if id(value) not in self.nodes:
                self.problem = "a tensor comes from outside"
                return None
            return self.nodes[id(value)]
        if isinstance(value, (tuple, list)):
            return [*map(self.names, value)] if isinstance(value, list) else tuple(map(self.names, value))
        if isinstance(value, dict):
            return {name: self.names(member) for name, member in value.items()}
        return value

    def call(self, function: Callable, args: tuple, kwargs: dict, result: object) -> None:
        """Write down that ``function`` gave ``result``."""
        node = self.graph.call_function(function, self.names(tuple(args)), self.names(kwargs))
        if isinstance(result, torch.Tensor):
            self.know(result, node)
        elif isinstance(result, (tuple, list)):
            for i, member in enumerate(result):
                if isinstance(member, torch.Tensor):
                    self.know(member, self.graph.call_function(operator.getitem, (node, i)))

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        """An operator, or what does the same in less time."""
        result = function(*args, **(kwargs or {}))
        if function.namespace != "aten":
            self.problem = f"{function.namespace} is at work, processes that wait for each other, say"
        elif function is torch.ops.aten._local_scalar_dense.default:
            self.problem = "a number is read from a tensor, which may hold another in the next call"
        elif function.overloadpacket.__name__ in _ALLOCATIONS:
            like = {"dtype": result.dtype, "device": result.device}
            size = (tuple(result.shape),) if result.is_contiguous() else (tuple(result.shape), result.stride())
            self.call(torch.empty if result.is_contiguous() else torch.empty_strided, size, like, result)
        elif function.is_view and isinstance(result, torch.Tensor) and result.dtype == next(iter(args)).dtype:
            # Of the tensor that was allocated, not of another view, so that those in between are not made.
            of, *_ = args
            base = self.bases[id(result)] = self.bases.get(id(of), of)
            if id(base) not in self.nodes:
                self.problem = "a tensor comes from outside"
            elif self.nodes[id(base)].op != "placeholder":
                place = (tuple(result.shape), result.stride(), result.storage_offset())
                self.call(torch.as_strided, (base, *place), {}, result)
            elif function is torch.ops.aten.as_strided.default:
                self.problem = "a place in an argument's storage, where that begins elsewhere in the next call"
            else:
                self.call(function, args, kwargs or {}, result)
        else:
            self.call(function, args, kwargs or {}, result)
        return result

    def pointers(self, value: object) -> object:
        """A kernel's argument as it is handed to Triton's launcher: of tensors the address counts, so for a view that
        begins where its tensor does that tensor will do, and nothing for what is compiled into the kernel.
        """
        if isinstance(value, tuple):
            return tuple(map(self.pointers, value))
        if isinstance(value, torch.Tensor):
            base = self.bases.get(id(value), value)
            return base if base.data_ptr() == value.data_ptr() else value
        return value if isinstance(value, (int, float, bool)) else None

    def started(self, kernel: object, compiled: object, grid: tuple, args: tuple, kwargs: dict) -> None:
        given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
        names = [p.name for p in kernel.params]
        if compiled is None or any(name not in given for name in names):
            self.problem = "a launch that Triton finishes itself"
            return
        self.call(kernel.starter(compiled, grid), tuple(self.pointers(given[name]) for name in names), {}, None)

    def plan(self, results: object) -> Callable | None:
        """What was written down as a function that returns ``results``, or None where a graph cannot hold it."""
        found = self.names(results)
        if self.problem is not None:
            return None
        graph = self.graph
        output = graph.output((found, None))
        graph.eliminate_dead_code(_has_effects)
        ((found, _),) = output.args
        output.args = ((found, _share_memory(graph)),)
        return torch.fx.GraphModule(torch.nn.Module(), graph).forward


def _has_effects(node: torch.fx.Node) -> bool:
    """Whether a call may not be left out though nobody reads its result: launches, and operators that write."""
    if node.op != "call_function":
        return True
    schema = getattr(node.target, "_schema", None)
    return schema.is_mutable if schema is not None else node.target not in _PURE


def _share_memory(graph: torch.fx.Graph) -> torch.fx.Node | None:
    """Put what is small, and seen by launches alone, into one allocation, which is returned: it must live as long as
    the call. Those launches get addresses in the place of tensors; each begins at a multiple of ``ALIGNMENT`` bytes, as
    the allocator's own do.
    """

    def launches(nodes):
        return all(hasattr(node.target, "starts_kernel") for node in nodes)

    total, found = 0, []
    for node in graph.find_nodes(op="call_function", target=torch.empty):
        views = [user for user in node.users if user.target is torch.as_strided]
        (size,), itemsize = node.args, node.kwargs["dtype"].itemsize
        moved = itemsize * math.prod(size)
        seen = all(launches(view.users) for view in views) and launches(node.users.keys() - set(views))
        if seen and 0 < moved <= SMALL:
            found.append((node, views, total, itemsize))
            total += -(-moved // ALIGNMENT) * ALIGNMENT
    devices = {node.kwargs["device"] for node, *_ in found}
    if len(devices) != 1:
        return None
    *_, last = graph.find_nodes(op="placeholder")
    with graph.inserting_after(last):
        memory = graph.call_function(torch.empty, (total,), {"dtype": torch.uint8, "device": devices.pop()})
    with graph.inserting_after(memory):
        address = graph.call_function(torch.Tensor.data_ptr, (memory,))
    for node, views, offset, itemsize in found:
        for view in views:
            *_, elements = view.args
            with graph.inserting_before(view):
                there = graph.call_function(operator.add, (address, offset + itemsize * elements))
            view.replace_all_uses_with(there)
            graph.erase_node(view)
        with graph.inserting_before(node):
            node.replace_all_uses_with(graph.call_function(operator.add, (address, offset)))
        graph.erase_node(node)
    return memory


@contextlib.contextmanager
def _recording(arguments: tuple) -> Iterator[_Recorder]:
    """Within: operators and launches of this thread are written down."""
    from effkernels.kernels.common import Kernel

    recorder = _Recorder(arguments)
    Kernel.recorder.started, counters.recorder.made = recorder.started, recorder.call
    try:
        with recorder:
            yield recorder
    finally:
        Kernel.recorder.started = counters.recorder.made = None
