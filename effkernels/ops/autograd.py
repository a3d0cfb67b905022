"""Custom operators: where kernels meet autograd, torch.compile and fake tensors. This file: what all of them share.

An ``Operator`` is described once, by the signature of its forward: from the names and types of its parameters come the
schema in the ``effkernels`` namespace, the fake implementations, what autograd keeps, and the schema of
``<name>_backward``. A parameter that is a NamedTuple (a BatchNorm, squeeze-excite, settings) is one argument here and
one for each of its fields in the schema, which knows tensors and plain values only.

Eager calls go through one ``torch.autograd.Function`` straight to the implementation (a custom operator costs about 60
us a call); the dispatcher (under torch.compile, opcheck, ...) enters the same Function from the Autograd key and
records the operators. ``torch.library.custom_op`` is not used because the forwards update running statistics in place,
which it does not allow together with an autograd formula. Tensors are NHWC and contiguous here. What is absent is
``None`` for an implementation, and a tensor of no elements where the dispatcher needs a tensor.
"""

import contextlib
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Annotated, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from effkernels.ops import plans
from effkernels.ops.counters import own_counters

LIB = torch.library.Library("effkernels", "DEF")

# A tensor that is kept for the backward, and has no gradient.
Constant = Annotated[Tensor | None, "constant"]
# A tensor that is added to the result last. Its gradient is the result's own, so the backward neither keeps it nor
# returns anything for it.
Shortcut = Annotated[Tensor | None, "shortcut"]
# Fields of a BatchNorm that a forward in training changes in place. They have no gradient, and its backward does not
# see them.
UPDATED = ("running_mean", "running_var", "num_batches_tracked")

_PLAIN = {str: "str", int: "int", float: "float", bool: "bool", float | None: "float?", torch.dtype: "ScalarType"}
_NOTHING = {"str": "", "int": 0, "float": 0.0, "bool": False}


def fp32_like(x: Tensor, *shape: int) -> Tensor:
    """Memory for statistics, sums and gates beside x."""
    return x.new_empty(shape, dtype=torch.float32)


class Leaf(NamedTuple):
    """One argument of an operator's schema: a parameter of the forward, or one field of a parameter that is a
    NamedTuple.
    """

    name: str
    parameter: str
    field: str | None
    type: str  # in the schema's language
    # "input" has a gradient; "constant" and "setting" are kept for the backward too; "updated" and "shortcut" are not.
    role: str

    @property
    def is_tensor(self) -> bool:
        """Whether the schema has a tensor here, or an optional one."""
        return self.type.startswith("Tensor")

    @property
    def reaches_backward(self) -> bool:
        """Whether the autograd node keeps it."""
        return self.role in ("input", "constant", "setting")


def _optional(hint) -> tuple[object, bool]:
    """(the type without None, whether None is allowed)."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        inner = [t for t in typing.get_args(hint) if t is not type(None)]
        if len(inner) == 1:
            return inner[0], True
    return hint, False


def _leaf(name: str, parameter: str, field: str | None, hint, optional: bool) -> Leaf:
    marks = hint.__metadata__ if typing.get_origin(hint) is Annotated else ()
    hint = typing.get_args(hint)[0] if marks else hint
    inner, may_be_none = _optional(hint)
    if inner is Tensor:
        role = "updated" if field in UPDATED else marks[0] if marks else "input"
        return Leaf(
            name=name,
            parameter=parameter,
            field=field,
            type="Tensor?" if optional or may_be_none else "Tensor",
            role=role,
        )
    if hint not in _PLAIN:
        raise TypeError(f"{name}: an operator's schema has no type for {hint}")
    return Leaf(name=name, parameter=parameter, field=field, type=_PLAIN[hint], role="setting")


def _leaves(function: Callable) -> tuple[list[Leaf], dict[str, type | None]]:
    """(every argument of the schema, {parameter: its NamedTuple class or None}) of a forward."""
    leaves, structures = [], {}
    hints = typing.get_type_hints(function, include_extras=True)
    for parameter in inspect.signature(function).parameters:
        cls, optional = _optional(hints[parameter])
        if not (isinstance(cls, type) and issubclass(cls, tuple)):
            structures[parameter] = None
            leaves.append(_leaf(name=parameter, parameter=parameter, field=None, hint=hints[parameter], optional=False))
            continue
        structures[parameter] = cls
        for field, hint in typing.get_type_hints(cls, include_extras=True).items():
            name = field if parameter == "settings" else f"{parameter}_{field}"
            leaves.append(_leaf(name=name, parameter=parameter, field=field, hint=hint, optional=optional))
    return leaves, structures


def _results(function: Callable) -> type | None:
    """The NamedTuple class that a forward returns, or None where it returns a tensor."""
    returned = typing.get_type_hints(function)["return"]
    return None if returned is Tensor else returned


@contextlib.contextmanager
def on_the_device_of(x: Tensor) -> Iterator[None]:
    """Kernels start on the current GPU: make that the tensor's own."""
    if not x.is_cuda:
        yield
    else:
        with torch.cuda.device(x.device):
            yield


def _present(results, x: Tensor) -> list[Tensor]:
    return [x.new_empty(0, dtype=torch.float32) if t is None else t for t in results]


OPERATORS: dict[str, "Operator"] = {}


class Operator:
    """A custom operator, called as its forward is.

    Args:
        name: in the ``effkernels`` namespace.
        forward: the implementation, whose annotations describe the operator. It returns a tensor, or a NamedTuple of
            tensors (None for what is absent) of which the first is the result and the others are kept for the backward.
        fake: takes the same, returns tensors of the same shapes without computing.
        backward: called as ``backward(dout, saved=..., needs=..., **parameters)`` with the forward's parameters by name
            (without what it updated), its results, and the names of the arguments whose gradients are wanted; returns
            {name: gradient or None}. None: the operator has no gradient, and updates nothing.
    """

    def __init__(self, name: str, forward: Callable, fake: Callable, backward: Callable | None = None):
        self.name, self.forward, self.fake, self.backward = name, forward, fake, backward
        self.leaves, self.structures = _leaves(forward)
        self.results = _results(forward)
        self.inputs = [leaf.name for leaf in self.leaves if leaf.role == "input"]
        self.kept = [leaf for leaf in self.leaves if leaf.reaches_backward]
        self._define()
        OPERATORS[name] = self
        self.node = None if backward is None else _node_of(self)
        if backward is not None:
            LIB.impl(name, lambda *flat: self.node.apply(True, *flat), "Autograd")

    def __call__(self, *args, **kwargs) -> Tensor:
        """The forward's result: recorded by torch.compile, straight to the implementation in eager mode."""
        flat = self.flatten(*args, **kwargs)
        if torch.compiler.is_compiling():
            results = getattr(torch.ops.effkernels, self.name)(*flat)
        elif self.node is None:
            return self._run(*flat)
        else:
            results = self.node.apply(False, *flat)
        return results if self.results is None else results[0]

    def flatten(self, *args, **kwargs) -> list:
        """The schema's arguments from the forward's."""
        given = dict(zip(self.structures, args, strict=False))
        given.update(kwargs)
        flat = []
        for leaf in self.leaves:
            value = given[leaf.parameter]
            if leaf.field is not None:
                value = getattr(value, leaf.field) if value is not None else _NOTHING.get(leaf.type)
            flat.append(value)
        return flat

    def structured(self, flat: Iterable, leaves: list[Leaf] | None = None) -> dict:
        """The forward's arguments by name from the schema's; fields that are not among ``leaves`` are None."""
        values = {parameter: None if cls is None else {} for parameter, cls in self.structures.items()}
        for leaf, value in zip(self.leaves if leaves is None else leaves, flat, strict=True):
            if leaf.field is None:
                values[leaf.parameter] = value
            else:
                values[leaf.parameter][leaf.field] = value
        for parameter, cls in self.structures.items():
            if cls is not None:
                fields = values[parameter]
                first = cls._fields[0]
                absent = fields.get(first) is None and first in fields
                values[parameter] = None if absent else cls(**dict.fromkeys(cls._fields) | fields)
        return values

    def _run(self, *flat):
        return self._planned(self.name, self._run_as_written, flat)

    def _planned(self, name, implementation, flat):
        """``implementation(*flat)`` on the device of its first tensor, by the plan that was made of an earlier call."""
        with on_the_device_of(flat[0]):
            key = plans.key_of(name, flat)
            plan = plans.kept(key)
            if plan is not None:
                results, _ = plan(*flat)
                return results
            with plans.written_down(key, flat) as call:
                call.results = implementation(*flat)
            return call.results

    def _run_as_written(self, *flat):
        results = self.forward(**self.structured(flat))
        return results if self.results is None else tuple(_present(results, flat[0]))

    def _run_backward(self, dout: Tensor, *flat):
        return self._planned(f"{self.name}_backward", self._run_backward_as_written, (dout, *flat))

    def _run_backward_as_written(self, dout: Tensor, *flat):
        *flat, needs = flat
        kept, saved = flat[: len(self.kept)], flat[len(self.kept) :]
        saved = [None if t.numel() == 0 else t for t in saved]
        result = self.results._fields[0]
        gradients = self.backward(
            dout,
            saved=self.results(**{result: None}, **dict(zip(self.results._fields[1:], saved, strict=True))),
            needs=frozenset(needs),
            **self.structured(kept, self.kept),
        )
        return tuple(_present([gradients.get(name) if name in needs else None for name in self.inputs], dout))

    def _fake(self, *flat):
        results = self.fake(**self.structured(flat))
        return results if self.results is None else tuple(_present(results, flat[0]))

    def _fake_backward(self, dout: Tensor, *flat):
        """A gradient lies as its tensor does."""
        *flat, needs = flat
        tensors = {leaf.name: value for leaf, value in zip(self.kept, flat[: len(self.kept)], strict=True)}
        return tuple(
            _present([torch.empty_like(tensors[name]) if name in needs else None for name in self.inputs], dout)
        )

    def _define(self) -> None:
        def argument(i, leaf):
            kind = leaf.type
            if leaf.role == "updated" and self.backward is not None:
                kind = kind.replace("Tensor", f"Tensor(a{i}!)")
            return f"{kind} {leaf.name}"

        def outputs(names):
            return f"({', '.join(f'Tensor {name}' for name in names)})"

        returned = "Tensor" if self.results is None else outputs(self.results._fields)
        LIB.define(f"{self.name}({', '.join(argument(i, leaf) for i, leaf in enumerate(self.leaves))}) -> {returned}")
        self._register(self.name, self._run, self._fake)
        if self.backward is not None:
            kept = ", ".join(f"{leaf.type} {leaf.name}" for leaf in self.kept)
            saved = "".join(f", Tensor {name}" for name in self.results._fields[1:])
            gradients = outputs(f"d_{name}" for name in self.inputs)
            LIB.define(f"{self.name}_backward(Tensor dout, {kept}{saved}, str[] needs) -> {gradients}")
            self._register(f"{self.name}_backward", self._run_backward, self._fake_backward)

    @staticmethod
    def _register(name, implementation, fake) -> None:
        for key in ("CPU", "CUDA"):
            LIB.impl(name, own_counters(implementation), key)
        torch.library.register_fake(f"effkernels::{name}", fake, lib=LIB)


def _below_autograd(name, implementation, dispatched, args):
    """The operator below autograd when the call came through the dispatcher, else its implementation at once."""
    if not dispatched:
        return implementation(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.effkernels, name)(*args)


def _node_of(operator: Operator) -> type[torch.autograd.Function]:
    """The autograd node: a gradient for the first result, none for the others, which are kept."""
    tensors = [leaf.name for leaf in operator.kept if leaf.is_tensor]
    shortcuts = [leaf.name for leaf in operator.leaves if leaf.role == "shortcut"]
    names = [leaf.name for leaf in operator.leaves]
    kept_names = [leaf.name for leaf in operator.kept]
    settings = [leaf.name for leaf in operator.kept if not leaf.is_tensor]

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, dispatched, *flat):
            results = _below_autograd(operator.name, operator._run, dispatched, flat)
            out, *saved = results
            given = dict(zip(names, flat, strict=True))
            ctx.save_for_backward(*(given[name] for name in tensors), *saved)
            ctx.settings = {name: given[name] for name in settings}
            ctx.shortcut_dtypes = {name: given[name].dtype for name in shortcuts if given[name] is not None}
            ctx.dispatched = dispatched
            ctx.mark_non_differentiable(*saved)
            ctx.set_materialize_grads(False)
            return tuple(results)

        @staticmethod
        @once_differentiable
        def backward(ctx, dout, *unused):
            wanted = {name for name, needed in zip(names, ctx.needs_input_grad[1:], strict=True) if needed}
            gradients = {}
            needs = [name for name in operator.inputs if name in wanted]
            if dout is not None and needs:
                unpacked = ctx.saved_tensors  # asked for once: activation checkpointing refuses a second time
                kept = dict(zip(tensors, unpacked, strict=False)) | ctx.settings
                saved = unpacked[len(tensors) :]
                args = (dout.contiguous(), *(kept[name] for name in kept_names), *saved, needs)
                found = _below_autograd(f"{operator.name}_backward", operator._run_backward, ctx.dispatched, args)
                gradients = {
                    name: gradient for name, gradient in zip(operator.inputs, found, strict=True) if name in wanted
                }
            if dout is not None:
                gradients |= {name: dout.to(dtype) for name, dtype in ctx.shortcut_dtypes.items() if name in wanted}
            return None, *map(gradients.get, names)

    Node.__name__ = Node.__qualname__ = operator.name.title().replace("_", "")
    return Node
