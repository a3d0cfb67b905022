"""Which registers an instruction reads and writes, and which instructions a set of questions about a program needs.

Registers are numbered in one row: R0-R255, UR0-UR63, P0-P6, UP0-UP6; RZ, PT and their like are none.
"""

import functools
import re
from collections.abc import Callable

from effkernels.tools.simulator.encoding import Code, Instruction

UNIFORM, PREDICATE, UNIFORM_PREDICATE = 256, 320, 328
_NAME = re.compile(r"(?<![\w.])(UR|UP|R|P)(\d+)((?:\.\w+)*)")
TWO_PREDICATES = {"ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3", "PSETP", "UPSETP", "FCHK"}
NO_RESULT = {
    "STG",
    "ST",
    "STS",
    "STL",
    "STSM",
    "RED",
    "REDG",
    "REDUX",
    "BAR",
    "LDGSTS",
    "LDGDEPBAR",
    "DEPBAR",
    "WARPSYNC",
    "BSSY",
    "BSYNC",
    "MEMBAR",
    "FENCE",
    "ERRBAR",
    "CGAERRBAR",
    "CCTL",
    "NOP",
    "WARPGROUP",
    "UTMALDG",
    "UTMASTG",
    "UTMAREDG",
    "UTMACMDFLUSH",
    "UTMACCTL",
    "UBLKCP",
    "UTMAPF",
    "NANOSLEEP",
    "YIELD",
    "BREAK",
    "BRA",
    "EXIT",
    "RET",
    "CALL",
    "BRX",
    "USETMAXREG",
    "ACQBULK",
    "PREEXIT",
    "CCTLL",
    "BPT",
    "KILL",
    "ARRIVES",
    "UCGABAR_ARV",
    "UCGABAR_WAIT",
    "PMTRIG",
    "JMP",
    "ENDCOLLECTIVE",
    "WARPGROUPSET",
}
# Values that only numbers with a fraction, or memory, decide: no address or trip count of these kernels comes from
# them, and where one does, it is named (``emulate``). Conversions and MUFU.RCP are not among them: a division of
# integers is made of them.
FLOATING = re.compile(
    r"(F(ADD|MUL|FMA|SEL|MNMX|SET|SETP|SWZADD|CHK)|H(ADD|MUL|FMA|MNMX|SET|SETP)2|D(ADD|MUL|FMA|MNMX|SETP)|F2F|F2FP|F2IP|HMMA|HGMMA|IMMA|IGMMA|QGMMA|DMMA|LDSM|"
    r"LDG|LD)\b"
)


def number(kind: str, index: int) -> int:
    """The place in the row of registers of one of a kind: "R", "UR", "P" or "UP"."""
    return {"R": 0, "UR": UNIFORM, "P": PREDICATE, "UP": UNIFORM_PREDICATE}[kind] + index


@functools.cache
def names(text: str) -> tuple[tuple[str, int, str], ...]:
    """(kind, index, suffixes) of the registers that an operand names."""
    return tuple((kind, int(index), suffix) for kind, index, suffix in _NAME.findall(text))


@functools.cache
def is_predicate(operand: str) -> bool:
    """Whether an operand is a predicate, negated or not, or PT."""
    return bool(re.fullmatch(r"!?U?P(\d|T)", operand))


def destinations(i: Instruction) -> int:
    """How many operands are written, first ones of the instruction."""
    if i.base in NO_RESULT or not i.operands or "[" in i.operands[0] and not i.operands[0].startswith("c["):
        return 0
    if i.base in TWO_PREDICATES:
        return 2
    if i.base == "R2P":
        return 1
    if i.base in (
        "SHFL",
        "ATOMG",
        "ATOM",
        "ATOMS",
        "VOTE",
        "VOTEU",
        "MATCH",
        "ELECT",
        "LOP3",
        "ULOP3",
    ) and is_predicate(i.operands[0]):
        return 1 if i.base in ("VOTE", "VOTEU") else 2
    if i.base in ("VOTE", "VOTEU"):
        return 2
    count = 1
    if i.base in ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD", "SHFL", "ATOMG", "VIADD", "MATCH"):
        while count < len(i.operands) - 2 and is_predicate(i.operands[count]):
            count += 1
    return count


def registers_written(i: Instruction) -> int:
    """Of the first general destination."""
    if i.base in ("LDG", "LD", "LDS", "LDC", "ULDC", "LDL", "ATOMG", "ATOM", "ATOMS", "LDCU", "SYNCS"):
        return max(1, i.width // 4)
    if i.base == "LDSM":
        return next((int(m) for m in i.modifiers if m in ("4", "2")), 1)
    if i.base == "HMMA":
        return 4 if "F32" in i.modifiers else 2
    if i.base == "HGMMA":
        return int(i.modifiers[0].split("x")[1]) // (2 if "F32" in i.modifiers else 4)
    if i.base == "CS2R":
        return 1 if "32" in i.modifiers else 2
    wide = "WIDE" in i.modifiers or "64" in i.modifiers or i.base in ("DADD", "DMUL", "DFMA")
    if (
        i.base in ("F2I", "I2I")
        and any(m in ("U64", "S64") for m in i.modifiers)
        or i.base in ("F2F", "I2F")
        and "F64" in i.modifiers
    ):
        wide = True
    return 2 if wide else 1


def written(i: Instruction) -> list[int]:
    """The registers that an instruction writes."""
    found = []
    for operand in i.operands[: destinations(i)]:
        if i.base == "R2P":
            return [PREDICATE + bit for bit in range(7) if int(i.operands[2], 16) >> bit & 1]
        for kind, index, _ in names(operand):
            count = registers_written(i) if kind in ("R", "UR") else 1
            found += [number(kind, index + k) for k in range(count)]
    return found


def read(i: Instruction) -> list[int]:
    """The registers that ``emulate`` needs for an instruction; pairs where it takes 64 bits. (More than is read does no
    harm.)"""
    found = []
    if i.guard and not i.guard[0].endswith("T"):
        kind = "UP" if i.guard[0].startswith("U") else "P"
        found.append(number(kind, int(i.guard[0][len(kind) :])))
    wide = i.base in ("STG", "STS", "STL", "ST", "REDG", "RED", "ATOMG") and i.width // 4 or 1
    if "64" in i.modifiers and i.base.startswith("U") or i.base in ("RET", "UTMALDG", "UTMASTG", "UBLKCP"):
        wide = 2
    for at, operand in enumerate(i.operands):
        if at < destinations(i):
            continue
        for kind, index, suffix in names(operand):
            count = 1
            if kind in ("R", "UR"):
                count = wide if "[" not in operand else 1
                if ".64" in suffix or (kind == "UR" and "[" in operand):
                    count = 2
                if (
                    i.base in ("IMAD", "UIMAD")
                    and at == destinations(i) + 2
                    and ("WIDE" in i.modifiers or "HI" in i.modifiers)
                ):
                    count = 2
                if any(m in ("U64", "S64", "F64") for m in i.modifiers):
                    count = 2
            found += [number(kind, index + k) for k in range(count)]
    if i.base in ("P2R", "UP2UR"):
        first = PREDICATE if i.base == "P2R" else UNIFORM_PREDICATE
        found += [first + bit for bit in range(7) if int(i.operands[-1], 16) >> bit & 1]
    return found


def _bits(registers) -> int:
    mask = 0
    for register in registers:
        mask |= 1 << register
    return mask


def effects(code: Code) -> list[tuple[int, int]]:
    """(registers written, registers read) of each instruction, as bits."""
    if "effects" not in code.memo:
        code.memo["effects"] = [(_bits(written(i)), _bits(read(i))) for i in code.instructions]
    return code.memo["effects"]


def needed(code: Code, root: Callable[[int, Instruction], int]) -> set[int]:
    """The instructions whose results are used, directly or through others, by what ``root(index, instruction)`` says is
    asked for: the registers, as bits, that the instruction itself must know."""
    facts = effects(code)
    roots = [root(k, i) for k, i in enumerate(code.instructions)]
    wanted_in = [0] * len(code.blocks)
    found: set[int] = set()
    predecessors = [[] for _ in code.blocks]
    for block, following in enumerate(code.successors):
        for other in following:
            predecessors[other].append(block)
    todo = list(range(len(code.blocks)))
    queued = set(todo)
    while todo:
        block = todo.pop()
        queued.discard(block)
        first, last = code.blocks[block]
        wanted = 0
        for other in code.successors[block]:
            wanted |= wanted_in[other]
        for k in range(last, first - 1, -1):
            writes, reads = facts[k]
            if writes & wanted:
                found.add(k)
                if code.instructions[k].guard is None:
                    wanted &= ~writes
                if not is_floating(code.instructions[k]):
                    wanted |= reads
            wanted |= roots[k]
        if wanted != wanted_in[block]:
            wanted_in[block] = wanted
            for other in predecessors[block]:
                if other not in queued:
                    queued.add(other)
                    todo.append(other)
    return found


def is_constant(i: Instruction) -> bool:
    """A floating-point operation of zeros by which ptxas makes a constant."""
    return i.base in ("HFMA2", "HADD2") and [operand.strip("-") for operand in i.operands[1:3]] == ["RZ", "RZ"]


def is_floating(i: Instruction) -> bool:
    """Whether a result comes from numbers with a fraction or from memory, so that ``emulate`` takes it for 0."""
    if i.base == "MUFU":
        return "RCP" not in i.modifiers
    if i.base == "LDG" and "STRONG" in i.modifiers and i.width == 4:  # it may be a count that a program waits for
        return False
    return bool(FLOATING.match(i.base)) and not is_constant(i)


def floating(code: Code) -> list[int]:
    """Before each instruction, the registers, as bits, that hold what comes from fractions or from memory.

    A write under a guard counts as a write: where it does not happen, nobody is to ask.
    """
    if "floating" in code.memo:
        return code.memo["floating"]
    facts = effects(code)
    entering = [0] * len(code.blocks)
    before = [0] * len(code.instructions)
    todo = list(range(len(code.blocks)))
    while todo:
        block = todo.pop(0)
        tainted = entering[block]
        first, last = code.blocks[block]
        for k in range(first, last + 1):
            writes, reads = facts[k]
            before[k] = tainted
            i = code.instructions[k]
            if is_floating(i) or (reads & tainted and i.base != "LDS"):
                tainted |= writes
            else:
                tainted &= ~writes
        for other in code.successors[block]:
            if tainted & ~entering[other]:
                entering[other] |= tainted
                if other not in todo:
                    todo.append(other)
    code.memo["floating"] = before
    return before
