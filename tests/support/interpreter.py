"""How Triton is loaded in the test process: it decides once, on import, whether it interprets kernels or compiles them.

Imported by tests/conftest.py before any test can import Triton: with TRITON_INTERPRET=1 where there is no GPU, and the
environment put back after, so that fused modules keep to their plain PyTorch path on the CPU, as for a user, except in
tests that take the fixture ``device`` of tests/effkernels. With a GPU the interpreter runs only if the user sets it.
"""

import dataclasses
import importlib
import importlib.util
import os
import pkgutil

import pytest
import torch

INTERPRET = os.environ.get("TRITON_INTERPRET", "0" if torch.cuda.is_available() else "1").strip().lower() in (
    "1",
    "true",
    "on",
)
HAS_TRITON = importlib.util.find_spec("triton") is not None

if HAS_TRITON:
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRITON_INTERPRET", str(int(INTERPRET)))
        kernels = importlib.import_module("effkernels.kernels")
        # Each kernel is one or the other from the import of its file on.
        for module in pkgutil.iter_modules(kernels.__path__):
            importlib.import_module(f"effkernels.kernels.{module.name}")


def _search_language_once_a_launch():
    """Triton's interpreter searches its own language again at each call of a helper in a kernel: a third of all
    time.
    """
    from triton.runtime import interpreter

    search, searched = interpreter._patch_lang, set()

    def patch(fn):
        if id(fn.__globals__) in searched:
            return None  # a helper's: only the launch, which comes first, uses what is returned
        scope = search(fn)
        if not searched:
            restore = scope.restore
            scope.restore = lambda: (searched.clear(), restore())
        searched.add(id(fn.__globals__))
        return scope

    interpreter._patch_lang = patch


def _look_up_dtypes_once():
    """It makes a dictionary of all NumPy dtypes to look one up, for every block."""
    from triton.runtime import interpreter

    make, known = interpreter._get_np_dtype, {}

    def dtype(of):
        scalar = of.scalar
        if scalar.is_ptr():
            return make(of)
        if scalar.name not in known:
            known[scalar.name] = make(scalar)
        return known[scalar.name]

    interpreter._get_np_dtype = dtype


def _describe_types_and_shapes_once():
    """It makes the type of every intermediate value anew, its shape of objects of the language, and again to compare
    it.
    """
    from triton.language import core

    make_type, types = core.block_type.__init__, {}
    make_tensor, tensors = core.tensor.__init__, {}

    def block_type(self, element_ty, shape):
        key = (element_ty.name, *(size if type(size) is int else size.value for size in shape))
        if key not in types:
            make_type(self, element_ty, shape)
            types[key] = dict(self.__dict__)
        self.__dict__.update(types[key])

    def tensor(self, handle, type):
        if type.name not in tensors:
            make_tensor(self, handle, type)
            tensors[type.name] = dict(self.__dict__)
        self.__dict__.update(tensors[type.name], handle=handle, type=type)

    equal = core.tuple.__eq__

    def equal_tuples(self, other):
        return core.constexpr(self.values == other.values) if type(other) is core.tuple else equal(self, other)

    core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__ = block_type, tensor, equal_tuples


def check_overflow(on: bool):
    """Whether every sum and product of integers is made a second time in int64, to compare: a third of all time.

    Only offsets beyond 2^31 can overflow; test_memory.py, which makes them, switches it on.
    """
    from triton.runtime import interpreter

    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=on)


if HAS_TRITON and INTERPRET:
    _search_language_once_a_launch()
    _look_up_dtypes_once()
    _describe_types_and_shapes_once()
    check_overflow(False)
