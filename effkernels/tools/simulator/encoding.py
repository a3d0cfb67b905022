"""The machine code of a compiled kernel: instructions with their scheduling fields, basic blocks, parameters and
resources.

``read(cubin, ...)`` disassembles with the tools that Triton ships and gives a ``Code``. Listings are kept in a folder
by the digest of the binary, as disassembling takes longer than everything else: ``EFFKERNELS_SIMULATOR_CACHE``, by
default ``~/.cache/effkernels/simulator``.

The upper 64 bits of an instruction hold what ptxas decided for the scheduler (Jia et al., "Dissecting the NVIDIA Volta
GPU architecture via microbenchmarking", 2018, section 2.1; the fields are where they were on every architecture since):
bits 41-44 clocks to stall, bit 45 yield, bits 46-48 the scoreboard that the result releases, 49-51 the one that the
operands release, 52-57 the scoreboards to wait for."""

import gzip
import hashlib
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from effkernels.tools.simulator import project

NO_SCOREBOARD = 7
BRANCHES = {"BRA", "EXIT", "RET", "CALL", "BRX", "JMP", "BRXU"}
FORMAT = 1  # of a cached listing; raised when its fields change


@dataclass(frozen=True)
class Instruction:
    """One instruction. guard: (predicate, negated) or None; operands as they are printed, ``.reuse`` removed."""

    address: int
    opcode: str
    guard: tuple[str, bool] | None
    operands: tuple[str, ...]
    stall: int
    sets: int
    releases: int
    waits: int
    target: int | None  # address of a branch

    @cached_property
    def base(self) -> str:
        """The opcode without modifiers, e.g. "LDG"."""
        return self.opcode.split(".")[0]

    @cached_property
    def modifiers(self) -> tuple[str, ...]:
        """What follows the opcode's points, e.g. ("E", "128")."""
        return tuple(self.opcode.split(".")[1:])

    @cached_property
    def width(self) -> int:
        """Bytes a thread of a load or store, or registers' bytes of an integer operation."""
        for size in ("128", "64", "U16", "S16", "U8", "S8", "16", "8"):
            if size in self.modifiers:
                return int(size.lstrip("US")) // 8
        return 4

    def __str__(self):
        guard = f"@{'!' if self.guard[1] else ''}{self.guard[0]} " if self.guard else ""
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclass(frozen=True)
class Parameter:
    """One kernel parameter: its place and size in bytes within the parameters."""

    ordinal: int
    offset: int
    size: int


@dataclass
class Code:
    """A kernel's machine code. ``blocks``: (first, last) instruction of each basic block, inclusive; registers a
    thread, spilled bytes a thread, shared bytes and warps of a program; parameters, and where they start in constant
    bank 0."""

    name: str
    arch: int
    instructions: list[Instruction]
    blocks: list[tuple[int, int]]
    registers: int
    spills: int
    shared: int
    warps: int
    parameters: list[Parameter]
    parameter_base: int
    digest: str = ""
    memo: dict = field(default_factory=dict, repr=False)  # what others derive from the code

    @cached_property
    def block_of_address(self) -> dict[int, int]:
        """{address of its first instruction: basic block}."""
        return {self.instructions[first].address: i for i, (first, _) in enumerate(self.blocks)}

    @cached_property
    def successors(self) -> list[list[int]]:
        """Of each block, the blocks that may follow (a call's are its target, and for a return every block after a
        call)."""
        after_calls = [i + 1 for i, (_, last) in enumerate(self.blocks[:-1]) if self.instructions[last].base == "CALL"]
        found = []
        for i, (_, last) in enumerate(self.blocks):
            end = self.instructions[last]
            following = []
            if end.base == "RET":
                following += after_calls
            elif end.target is not None and end.base in BRANCHES:
                following.append(self.block_of_address[end.target])
            falls = end.guard is not None or end.base not in BRANCHES or (end.base == "BRA" and len(end.operands) > 1)
            if falls and i + 1 < len(self.blocks):
                following.append(i + 1)
            found.append(following)
        return found

    @cached_property
    def loops(self) -> dict[int, frozenset[int]]:
        """{first block of a loop: its blocks}, of natural loops; those of one first block are one loop."""
        predecessors = [[] for _ in self.blocks]
        for block, following in enumerate(self.successors):
            for other in following:
                predecessors[other].append(block)
        found: dict[int, set[int]] = {}
        for block, following in enumerate(self.successors):
            if self.instructions[self.blocks[block][1]].base in ("RET", "CALL"):
                continue
            for head in following:
                if head > block:
                    continue
                inside, todo = {head}, [block]
                while todo:
                    at = todo.pop()
                    if at not in inside:
                        inside.add(at)
                        todo += [p for p in predecessors[at] if p >= head]
                found.setdefault(head, set()).update(inside)
        return {head: frozenset(inside) for head, inside in found.items()}


def cache_folder() -> Path:
    """Where listings, compiled kernels and predictions are kept."""
    return Path(os.environ.get("EFFKERNELS_SIMULATOR_CACHE") or Path.home() / ".cache" / "effkernels" / "simulator")


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([project.binary(tool), *arguments], check=True, capture_output=True, text=True).stdout


def _disassembled(cubin: bytes) -> dict:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = _run("nvdisasm", "-hex", "-c", file.name)
        usage = _run("cuobjdump", "-res-usage", file.name)
        headers = _run("cuobjdump", "-elf", file.name)
    parameters = re.findall(r"Ordinal : 0x([0-9a-f]+)\s+Offset\s+: 0x([0-9a-f]+)\s+Size\s+: 0x([0-9a-f]+)", headers)
    base = re.search(r"EIATTR_PARAM_CBANK[\s\S]*?Value:\s+\S+\s+(0x[0-9a-f]+)", headers)
    return {
        "listing": listing,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": int(re.search(r"STACK:(\d+)", usage)[1]),
        "parameters": sorted([int(field, 16) for field in parameter] for parameter in parameters),
        "base": int(base[1], 16) & 0xFFFF if base else None,
    }


def cached(name: str, make: Callable[[], dict]) -> dict:
    """The JSON of a cached file, made by ``make()`` where it is not there. Two processes may make it at once: the last
    one's stays."""
    path = cache_folder() / f"{name}.json.gz"
    try:
        return json.loads(gzip.decompress(path.read_bytes()))
    except (OSError, ValueError, EOFError):  # not there, or not whole
        document = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(gzip.compress(json.dumps(document).encode(), 3))
    os.replace(file.name, path)
    return document


def read(cubin: bytes, name: str, arch: int, shared: int, warps: int) -> Code:
    """Of a binary with one kernel. shared: its dynamic shared memory in bytes."""
    digest = hashlib.sha256(cubin).hexdigest()[:32]
    return _code(cached(f"listing-{FORMAT}-{digest}", lambda: _disassembled(cubin)), name, arch, shared, warps, digest)


def compiled(key: str, compile_kernel: Callable[[], tuple[bytes, dict]]) -> tuple[bytes, dict]:
    """(binary, metadata) of a kernel, cached under ``key``, a digest of all that it depends on. compile_kernel() ->
    (binary, metadata)."""

    def make():
        binary, metadata = compile_kernel()
        return {"binary": binary.hex(), "metadata": metadata}

    document = cached(f"kernel-{FORMAT}-{key}", make)
    return bytes.fromhex(document["binary"]), document["metadata"]


def _split(text: str) -> tuple[str, ...]:
    """Operands, separated by commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "[(") - (letter in "])")
        if letter == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    parts.append(text[start:])
    return tuple(part.strip().replace(".reuse", "") for part in parts if part.strip())


def _instruction(address: int, text: str, high: int, labels: dict[str, int]) -> Instruction:
    guard = None
    if match := re.match(r"@(!?)(U?P\w+)\s+", text):
        guard = None if (match[2] in ("PT", "UPT") and not match[1]) else (match[2], bool(match[1]))
        text = text[match.end() :]
    opcode, _, rest = text.partition(" ")
    target = None
    if label := re.search(r"`\(([^)]+)\)", rest):
        target = labels.get(label[1])
    return Instruction(
        address,
        opcode,
        guard,
        _split(rest),
        high >> 41 & 15,
        high >> 46 & 7,
        high >> 49 & 7,
        high >> 52 & 63,
        target if opcode.split(".")[0] in BRANCHES and opcode.split(".")[0] != "RET" else None,
    )


def _code(document: dict, name: str, arch: int, shared: int, warps: int, digest: str) -> Code:
    found, labels, pending, waiting = [], {}, [], None
    for line in document["listing"].splitlines():
        if label := re.match(r"\s*([.$\w]+):\s*$", line):
            pending.append(label[1])
        elif head := re.match(r"\s*/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/", line):
            waiting = int(head[1], 16), head[2]
            labels |= dict.fromkeys(pending, waiting[0])
            pending = []
        elif waiting and (word := re.match(r"\s+/\* 0x([0-9a-f]{16}) \*/\s*$", line)):
            found.append((*waiting, int(word[1], 16)))
            waiting = None
    instructions = [_instruction(*parts, labels) for parts in found]
    starts = {0} | {i + 1 for i, each in enumerate(instructions) if each.base in BRANCHES}
    index = {each.address: i for i, each in enumerate(instructions)}
    starts |= {index[each.target] for each in instructions if each.target is not None}
    starts |= {index[address] for address in labels.values() if address in index}
    ordered = sorted(start for start in starts if start < len(instructions))
    blocks = [(a, b - 1) for a, b in zip(ordered, [*ordered[1:], len(instructions)], strict=True)]
    parameters = [Parameter(*fields) for fields in document["parameters"]]
    base = document["base"] or (0x210 if arch >= 90 else 0x160)
    return Code(
        name,
        arch,
        instructions,
        blocks,
        document["registers"],
        document["spills"],
        shared,
        warps,
        parameters,
        base,
        digest,
    )
