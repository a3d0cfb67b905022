"""Kernel launches as data: recorded instead of started, so that a launch can be looked at without a GPU.

``record_launches`` runs any launcher on tensors of the ``meta`` device and keeps the kernels it would have started,
with their arguments. A ``Launch`` knows its configuration, how Triton would specialise it, and a digest of all that its
machine code depends on.
"""

import contextlib
import functools
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import triton

from effkernels.configs import tables
from effkernels.configs.gpus import Gpu

POINTER_TYPES = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
}


def members(name: str, value: object) -> dict:
    """{path: value} of a kernel argument: itself under its name, or what a tuple holds, as "norm.weight" or
    "terms.0"."""
    if not isinstance(value, tuple):
        return {name: value}
    fields = getattr(value, "_fields", range(len(value)))
    return {
        path: v
        for field, member in zip(fields, value, strict=True)
        for path, v in members(f"{name}.{field}", member).items()
    }


ROW_FORMAT = 2  # raised when a row's fields or their meaning change


@dataclass(frozen=True)
class Launch:
    """One kernel start: the jitted function, its arguments by name, compiler options and grid."""

    fn: object
    arguments: dict
    options: dict
    grid: tuple

    @property
    def name(self) -> str:
        """The kernel's name."""
        return self.fn.__name__

    @property
    def constants(self) -> dict:
        """Compile-time arguments by name, and with them, as None, the optional arguments that are absent."""
        return {
            p.name: self.arguments[p.name] for p in self.fn.params if p.is_constexpr or self.arguments[p.name] is None
        }

    @property
    def tensors(self) -> dict:
        """Its tensors by the path of their argument, those in tuples too."""
        found = {path: v for name, value in self.arguments.items() for path, v in members(name, value).items()}
        return {path: v for path, v in found.items() if isinstance(v, torch.Tensor)}

    @property
    def threads(self) -> int:
        """Threads of a program."""
        return 32 * self.options.get("num_warps", 4)

    @property
    def dtype(self) -> str:
        """The dtype of the first tensor, which is that of the computation: "bfloat16", say."""
        return next(str(v.dtype).removeprefix("torch.") for v in self.tensors.values())

    def key(self) -> tuple:
        """The configuration: kernel, compile-time arguments, pointer types and options (sizes do not count)."""
        pointers = tuple((path, POINTER_TYPES[v.dtype]) for path, v in self.tensors.items())
        return self.name, tuple(self.constants.items()), pointers, tuple(sorted(self.options.items()))

    def specialization(self) -> tuple[dict, dict, dict]:
        """Triton's (signature, constants, attributes) of this launch; the latter two by position: (argument, member) in
        a tuple."""
        signature, constants, attributes = {}, {}, {}

        def specialized(value, path, hints: bool):
            if isinstance(value, tuple):
                types = [specialized(member, (*path, i), hints) for i, member in enumerate(value)]
                return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
            if value is None:
                constants[path] = None
                return "constexpr"
            if len(path) > 1 and isinstance(value, int) and (value == 1 or value % 16 == 0):
                raise TypeError(
                    f"{self.name}: Triton compiles again for a size of {value} in a tuple; give it as an argument of "
                    "its own"
                )
            if hints and _hint(value):
                attributes[path] = [["tt.divisibility", 16]]
            return _type_of(value)

        for i, param in enumerate(self.fn.params):
            value = self.arguments[param.name]
            if param.is_constexpr:
                signature[param.name], constants[(i,)] = "constexpr", value
            else:
                signature[param.name] = specialized(value, (i,), not param.do_not_specialize)
        return signature, constants, attributes

    def digest(self, arch: int = 90) -> str:
        """Of all that the machine code depends on: sources of the kernel and of what it calls, types, constants,
        options, compiler."""
        signature, constants, attributes = self.specialization()
        parts = (
            ROW_FORMAT,
            triton.__version__,
            arch,
            source_digest(self.fn),
            signature,
            constants,
            attributes,
            sorted(self.options.items()),
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def activation_bytes(self) -> int:
        """Bytes of its tensors, each once: what a launch that reads or writes all of them must move at least."""
        return sum(t.numel() * t.element_size() for t in {id(v): v for v in self.tensors.values()}.values())


def normal_form(source: str) -> str:
    """The tokens of Python source without comments, docstrings and layout."""
    kept, line = [], []
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NEWLINE:
            if any(kind != tokenize.STRING for kind, _ in line):
                kept += [text for _, text in line] + ["\n"]
            line = []
        elif token.type in (tokenize.INDENT, tokenize.DEDENT):
            kept.append("{" if token.type == tokenize.INDENT else "}")
        elif token.type not in (tokenize.COMMENT, tokenize.NL, tokenize.ENDMARKER):
            line.append((token.type, token.string))
    return " ".join(kept)


def _names(code) -> set[str]:
    """Names that compiled Python refers to, those of nested functions too."""
    return set(code.co_names).union(*(_names(c) for c in code.co_consts if hasattr(c, "co_names")))


@functools.cache
def source_digest(fn: triton.JITFunction) -> str:
    """Of a jitted function's source, comments and place in the file aside, with the jitted functions and constants it
    reaches.

    (``JITFunction.cache_key`` changes with the line a function stands on.)
    """
    jitted, todo, found = triton.JITFunction, [fn], {}
    while todo:
        function = todo.pop()
        if (key := (function.fn.__module__, function.fn.__qualname__)) in found:
            continue
        constants = {}
        for name in sorted(_names(function.fn.__code__)):
            value = function.fn.__globals__.get(name)
            if isinstance(value, jitted):
                todo.append(value)
            elif isinstance(value, (triton.language.constexpr, int, float, str)):
                constants[name] = repr(value)
        found[key] = normal_form(function.src), constants
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return POINTER_TYPES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    if isinstance(value, float):
        return "fp32"
    raise TypeError(f"a kernel argument must be a tensor, int, float or bool, got {type(value).__name__}")


def _hint(value) -> bool:
    """Whether Triton would tell the compiler that 16 divides the value (pointers from the allocator are 512-byte
    aligned)."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


@contextlib.contextmanager
def record_launches(gpu: Gpu | None = None) -> Iterator[list[Launch]]:
    """Within: kernels are recorded in the list this yields instead of started, so launchers run on ``meta`` tensors.

    Configurations are those of ``gpu``, from its table too; without one the rules', whatever tables there are.
    """
    launches: list[Launch] = []

    def run(self, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(Launch(self, arguments, options, tuple(grid)))

    cls = triton.runtime.jit.JITFunction
    original, cls.run = cls.run, run
    try:
        with tables.rules_only() if gpu is None else tables.meta_is(gpu):
            yield launches
    finally:
        cls.run = original


def call_launches(call: Callable, x: torch.Tensor, backward: bool) -> list[Launch]:
    """Launches of ``call(x)`` on x [N, C, H, W] of the ``meta`` device, and of its backward."""
    with record_launches() as launches, torch.set_grad_enabled(backward):
        out = call(x.to(memory_format=torch.channels_last).requires_grad_(backward))
        if backward:
            out.backward(torch.empty_like(out))
    return launches
