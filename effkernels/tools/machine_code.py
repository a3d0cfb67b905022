"""The machine code of a launch: compiled for a named architecture with the compiler, ptxas and nvdisasm that Triton
ships, and read.

``Cost`` is what it says: registers, spills, shared memory, vector widths and the instructions of the hottest loop.
"""

import collections
import functools
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from effkernels.tools.launches import Launch

BINARIES = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")


@dataclass
class Cost:
    """Static cost of a compiled kernel. ``loop`` counts instructions by opcode in its largest innermost loop."""

    name: str
    constants: dict
    dtype: str
    arch: int
    registers: int
    spill_bytes: int
    shared: int
    instructions: int
    loop: dict = field(repr=False)
    opcodes: dict = field(repr=False)

    @property
    def loop_instructions(self) -> int:
        """Instructions of the hottest loop, 0 without one."""
        return sum(self.loop.values())

    def widths(self, op: str, opcodes: Iterable[str] | None = None) -> set[int]:
        """Bytes per thread of the global loads (``LDG``, and ``LDGSTS`` into shared memory) or stores (``STG``), e.g.
        {16}."""
        found = set()
        for code in self.opcodes if opcodes is None else opcodes:
            if code.split(".")[0] in (("LDG", "LDGSTS") if op == "LDG" else (op,)):
                bits = [int(p) for p in code.split(".")[1:] if p in ("64", "128")]
                small = 2 if ".U16" in code or ".S16" in code else 1 if ".U8" in code else 4
                found.add(bits[0] // 8 if bits else small)
        return found

    def loop_widths(self, op: str) -> set[int]:
        """``widths`` within the loop: the activation tensors, not the parameters."""
        return self.widths(op, self.loop)

    def count(self, *prefixes: str) -> int:
        """Instructions of the loop (of the whole kernel without one) that start with one of ``prefixes``, or all."""
        return sum(n for code, n in (self.loop or self.opcodes).items() if code.startswith(prefixes or ""))


def compile_launch(launch: Launch, arch: int = 90) -> triton.compiler.CompiledKernel:
    """Triton's compiled kernel of ``launch`` for CUDA compute capability ``arch`` (90 = sm_90)."""
    signature, constants, attributes = launch.specialization()
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
    # A loop is a backward branch; the hottest is the largest that holds no other, of those that load 16 bytes a thread
    # or multiply matrices if any does (a program's last steps may loop over partial sums).
    loops = []
    for i, text in enumerate(code):
        target = re.search(r"\bBRA\b.*?\(?(\.L_\w+)\)?", text)
        if target and labels.get(target[1], i) < i:
            loops.append((labels[target[1]], i))
    inner = [(a, b) for a, b in loops if not any((c, d) != (a, b) and a <= c and d <= b for c, d in loops)]
    wide = [(a, b) for a, b in inner if any(re.match(r"LDG.*\.128|HG?MMA", op) for op in opcodes[a : b + 1])]
    a, b = max(wide or inner, key=lambda ab: ab[1] - ab[0], default=(0, -1))
    return Cost(
        name=launch.name,
        constants=launch.constants,
        dtype=launch.dtype,
        arch=arch,
        registers=registers,
        spill_bytes=stack,
        shared=kernel.metadata.shared,
        instructions=len(code),
        loop=dict(collections.Counter(opcodes[a : b + 1])),
        opcodes=dict(collections.Counter(opcodes)),
    )


@functools.cache
def _binary(name: str) -> str:
    path = os.path.join(BINARIES, name)
    if not os.path.exists(path):
        raise RuntimeError(
            f"Triton {triton.__version__} does not carry {name} (looked for {path}); static costs need it"
        )
    return path


def _tool(name: str, *args: str) -> str:
    return subprocess.run([_binary(name), *args], check=True, capture_output=True, text=True).stdout
