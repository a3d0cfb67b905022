"""The rows of the suite: which there are, and why one cannot be measured on a machine."""

import itertools
from collections.abc import Sequence
from types import ModuleType
from typing import NamedTuple

from benchmarks import libraries, shapes
from benchmarks.machine import Machine, compiler_problem
from benchmarks.variants import COMPILE_MODES, Variant, latency_variants, variants

CPU_BATCH = 4
# In inference: B0 takes 100 s to compile, its training step 140.
COMPILED_ON_CPU = (shapes.blocks("b0")[1], shapes.model("b0"))


class Row(NamedTuple):
    """One line of the table: a shape of a model, in training or in inference, in one variant."""

    model: str
    shape: shapes.Shape
    training: bool
    variant: Variant

    def __str__(self):
        return f"{self.case}-{self.variant}"

    @property
    def case(self) -> str:
        """What is measured, without the variant."""
        model = "" if isinstance(self.shape, shapes.Model) else f"{self.model}-"
        return f"{model}{self.shape}-{'training' if self.training else 'inference'}"

    @property
    def timing(self) -> str:
        """What is timed on a GPU, as ``Stopwatch.prepared`` names it.

        Of a layer or block it is its kernels, of a network a step as a program runs it, of its latency a CUDA graph.
        The mode reduce-overhead has graphs of its own.
        """
        if self.variant.graph:
            return "graph"
        return "step" if isinstance(self.shape, shapes.Model) and self.variant.graph is None else "kernels"

    def problem(self, machine: Machine, compile_models: bool = False) -> str | None:
        """Why the row cannot be measured here, or None."""
        if self.variant.library and (problem := libraries.problem(self.variant.library)) is not None:
            return problem
        if machine.is_gpu:
            return None
        if self.variant.graph is not None:
            return "needs a CUDA GPU: there are no graphs on a CPU"
        if self.model != "b0":
            return "needs a CUDA GPU: on a CPU only B0's shapes are measured"
        if self.variant.compile_mode is None:
            return None
        usual = self.shape in COMPILED_ON_CPU and not self.training and self.variant.library is None
        asked = compile_models and isinstance(self.shape, shapes.Model)
        if not (usual or asked) or self.variant.compile_mode != "default":
            return (
                "needs a CUDA GPU: on a CPU one block and B0 in inference are compiled, in the default mode (the rest "
                "takes minutes)"
            )
        return compiler_problem()


def rows_of(module: ModuleType, compile_modes: Sequence[str] | None = None) -> list[Row]:
    """The rows of a benchmark module: its SHAPES by model, in its STEPS (default: inference and training), in every
    variant.
    """
    rows = []
    for model, found in module.SHAPES.items():
        for shape, training in itertools.product(found, getattr(module, "STEPS", (False, True))):
            columns = latency_variants()
            if not getattr(module, "LATENCY", False):
                whole = isinstance(shape, shapes.Model)
                columns = variants(compile_modes or COMPILE_MODES, libraries.LIBRARIES if whole else ())
            rows += [Row(model, shape, training, variant) for variant in columns]
    return rows
