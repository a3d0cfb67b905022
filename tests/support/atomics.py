"""The kernels whose programs meet: those whose source, or that of a function they call, has an atomic operation."""

import importlib
import inspect
import pkgutil
import re


def kernel_modules():
    path = importlib.import_module("effkernels.kernels").__path__
    return [importlib.import_module(f"effkernels.kernels.{module.name}") for module in pkgutil.iter_modules(path)]


def kernels_with_atomics():
    """{name: jitted (or interpreted) function}."""
    jitted = type(importlib.import_module("effkernels.kernels.common").last_to_arrive)

    def functions(namespace):
        return {name: f for name, f in namespace.items() if isinstance(f, jitted)}

    def reaches(function, seen):
        seen.add(function.fn)
        source = inspect.getsource(function.fn)
        called = [f for name, f in functions(function.fn.__globals__).items() if re.search(rf"\b{name}\(", source)]
        return "tl.atomic_" in source or any(reaches(f, seen) for f in called if f.fn not in seen)

    found = [item for module in kernel_modules() for item in functions(vars(module)).items()]
    return {name: f for name, f in found if name.endswith("_kernel") and reaches(f, set())}
