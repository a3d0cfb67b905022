"""What a launch costs, known without a GPU: compile it for a named architecture and read the machine code.

``record_launches`` runs any launcher on tensors of the ``meta`` device and keeps the kernels it would have started, with their
arguments; ``compile_launch`` compiles one for sm_80/89/90/100 with the compiler, ptxas and nvdisasm that Triton ships;
``Cost`` is what the machine code says: registers, spills, shared memory, vector widths and the instructions of the hottest loop.
"""

import collections
import contextlib
import functools
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

POINTER_TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16", torch.int64: "*i64", torch.float64: "*fp64"}
BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass(frozen=True)
class Launch:
    """One kernel start: the jitted function, its arguments by name, compiler options and grid."""

    fn: object
    arguments: dict
    options: dict
    grid: tuple

    @property
    def name(self) -> str:
        return self.fn.__name__

    def key(self):
        """Everything that decides the machine code, so that equal keys need compiling once."""
        described = tuple((k, _type_of(v), _hint(v)) if not self._is_constant(k) else (k, v) for k, v in self.arguments.items())
        return self.name, described, tuple(sorted(self.options.items()))

    def _is_constant(self, name: str) -> bool:
        return self.fn.params[self.fn.arg_names.index(name)].is_constexpr


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
    """Whether Triton would tell the compiler that 16 divides the value (pointers from the allocator are 512-byte aligned)."""
    return isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)


@contextlib.contextmanager
def record_launches():
    """Within: kernels are recorded in the list this yields instead of started, so launchers run on ``meta`` tensors."""
    launches: list[Launch] = []

    def run(self, *args, grid, warmup=False, **kwargs):
        arguments = dict(zip(self.arg_names, args, strict=False))
        arguments.update({k: v for k, v in kwargs.items() if k in self.arg_names})
        options = {k: v for k, v in kwargs.items() if k not in self.arg_names}
        launches.append(Launch(self, arguments, options, tuple(grid)))

    cls = triton.runtime.jit.JITFunction
    original, cls.run = cls.run, run
    try:
        yield launches
    finally:
        cls.run = original


@dataclass
class Cost:
    """Static cost of a compiled kernel. ``loop`` counts instructions by opcode in the hottest innermost loop."""

    name: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    instructions: int
    loop: dict = field(repr=False)
    opcodes: dict = field(repr=False)

    @property
    def loop_instructions(self) -> int:
        return sum(self.loop.values())

    def widths(self, op: str) -> set[int]:
        """Bytes per thread of the global loads (``LDG``, and ``LDGSTS`` into shared memory) or stores (``STG``), e.g. {16}."""
        found = set()
        for code in self.opcodes:
            if code.split(".")[0] in (("LDG", "LDGSTS") if op == "LDG" else (op,)):
                bits = [int(p) for p in code.split(".")[1:] if p in ("64", "128")]
                small = 2 if ".U16" in code or ".S16" in code else 1 if ".U8" in code else 4
                found.add(bits[0] // 8 if bits else small)
        return found

    def loop_widths(self, op: str) -> set[int]:
        return Cost(self.name, self.arch, 0, 0, 0, 0, {}, self.loop).widths(op)


def compile_launch(launch: Launch, arch: int = 90):
    """Triton's compiled kernel of ``launch`` for CUDA compute capability ``arch`` (90 = sm_90)."""
    signature, constants, attributes = {}, {}, {}
    for i, param in enumerate(launch.fn.params):
        value = launch.arguments[param.name]
        if param.is_constexpr or value is None:
            signature[param.name], constants[param.name] = "constexpr", value
        else:
            signature[param.name] = _type_of(value)
            if _hint(value):
                attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.fn, signature, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", arch, 32), options=launch.options)


def cost_of(launch: Launch, arch: int = 90) -> Cost:
    """Compile ``launch`` and read its machine code."""
    kernel = compile_launch(launch, arch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(kernel.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "-res-usage", f.name)
        sass = _tool("nvdisasm", "-c", f.name)
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
            code.append(instruction[1])
    opcodes = [re.sub(r"^@!?U?P\w+\s+", "", text).split()[0] for text in code]
    # A loop is a backward branch; the hottest is the largest that holds no other with loads in it.
    loops = []
    for i, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?\(?(\.L_\w+)\)?", text)
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    a, b = max(inner, key=lambda ab: ab[1] - ab[0], default=(0, -1))
    return Cost(
        launch.name, arch, registers, stack, kernel.metadata.shared, len(code),
        dict(collections.Counter(opcodes[a : b + 1])), dict(collections.Counter(opcodes)),
    )  # fmt: skip


@functools.cache
def _binary(name: str) -> str:
    path = os.path.join(BINARIES, name)
    if not os.path.exists(path):
        raise RuntimeError(f"Triton {triton.__version__} does not carry {name} (looked for {path}); static costs need it")
    return path


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_binary(name), *args], check=True, capture_output=True, text=True).stdout
