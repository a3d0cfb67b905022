"""One program of a launch, carried out as far as its path and its addresses need: how often each instruction runs, for
which threads, and what every load and store touches.

Only the instructions that a branch, an address, a mask or a barrier's name depends on are carried out
(``flow.needed``), all threads of the program at once: a value is an int where all threads agree, else an int64 array
with a value in [0, 2^32) a thread. Each basic block becomes a Python function. Threads that part at a branch go on in
groups, the one furthest behind first, until they meet.

Memory is not there: a global load gives 0. An atomic addition before any other access to memory hands out tickets, in
the order of the programs; a later one gives ``AWAITED``, which equals no count of arrivals, and where the program
compares it, what it was compared with is kept, so that the program that comes last can be emulated as well
(``last=True``)."""

import re
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from effkernels.tools.simulator import flow
from effkernels.tools.simulator.encoding import BRANCHES, Code, Instruction
from effkernels.tools.simulator.project import SLOT_BITS

M = 0xFFFFFFFF
AWAITED = 0x5A170000
MOST_BLOCKS = 3_000_000  # of a path; a longer one is not a kernel of this kind
SAMPLES = 3  # executions of an instruction whose addresses are looked at, where not all are recorded
GLOBAL = {"LDG", "STG", "LDGSTS", "ATOMG", "RED", "REDG", "LD", "ST", "ATOM"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}


class EmulationError(RuntimeError):
    """The path depends on something that is not emulated; the message names the instruction."""


# ---- values: ints or int64 arrays ------------------------------------------------------------------------------------


def signed(x):
    return (x ^ 0x80000000) - 0x80000000


def wrap64(x):
    """An int as int64 holds it; arrays wrap by themselves."""
    return ((x + (1 << 63)) & 0xFFFFFFFFFFFFFFFF) - (1 << 63) if type(x) is int else x


def pair(low, high):
    return low | (signed(high) << 32)


def select(p, a, b):
    if p is True:
        return a
    if p is False:
        return b
    return np.where(p, a, b)


def truth(p):
    """A Python bool where all threads agree."""
    if type(p) is bool:
        return p
    if p.all():
        return True
    return p if p.any() else False


def _elementwise(function):
    """``function`` of ints, for arrays as well."""
    vector = np.frompyfunc(function, function.__code__.co_argcount, 1)

    def call(*values):
        if all(type(v) is int for v in values):
            return function(*values)
        return vector(*values).astype(np.int64)

    return call


@_elementwise
def popcount(x):
    return bin(x).count("1")


@_elementwise
def leading(x):
    return x.bit_length() - 1 & M


@_elementwise
def leading_signed(x):
    return (x ^ M if x >> 31 else x).bit_length() - 1 & M


@_elementwise
def reversed_bits(x):
    return int(f"{x:032b}"[::-1], 2)


@_elementwise
def permuted(a, selector, b):
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = source[nibble & 7]
        out |= (0xFF if byte >> 7 else 0) << 8 * k if nibble & 8 else byte << 8 * k
    return out


@_elementwise
def float_up(x):
    """Bits of the fp32 value of an unsigned integer, rounded up."""
    value = np.float32(x)
    return int((value if int(value) >= x else np.nextafter(value, np.float32(np.inf))).view(np.uint32))


@_elementwise
def float_of(x):
    return int(np.float32(x).view(np.uint32))


@_elementwise
def reciprocal(x):
    with np.errstate(divide="ignore"):
        return int((np.float32(1) / np.uint32(x).view(np.float32)).view(np.uint32))


@_elementwise
def truncated(x):
    value = float(np.uint32(x).view(np.float32))
    return 0 if not value > 0 else min(int(value), M) if value < float("inf") else M


def shifted_left(a, s):
    return a << np.minimum(s, 32) & M if isinstance(s, np.ndarray) or isinstance(a, np.ndarray) else a << min(s, 32) & M


def shifted_right(a, s):
    return a >> (np.minimum(s, 32) if isinstance(s, np.ndarray) else min(s, 32))


def funnel_high_left(a, s, b):
    """Upper word of {b, a} << s, for s in [0, 63]."""
    low, high = (np.minimum(s, 32), np.maximum(32 - s, 0)) if isinstance(s, np.ndarray) else (min(s, 32), max(32 - s, 0))
    far = shifted_left(a, np.maximum(s - 32, 0) if isinstance(s, np.ndarray) else max(s - 32, 0))
    return select(s < 32, (b << low & M) | (a >> high), far)


def funnel_low_right(a, s, b, arithmetic=False):
    """Lower word of {b, a} >> s, for s in [0, 63]."""
    near = np.minimum(s, 32) if isinstance(s, np.ndarray) else min(s, 32)
    far = np.maximum(s - 32, 0) if isinstance(s, np.ndarray) else max(s - 32, 0)
    top = signed(b) if arithmetic else b
    return select(s < 32, (a >> near) | (top << (32 - near) & M), top >> far & M)


# ---- code ------------------------------------------------------------------------------------------------------------


class _Unknown(Exception):
    """An instruction or operand that is not emulated."""


def _source(text: str, carry: bool = False) -> str:
    """A Python expression of a 32-bit operand. carry: a negative operand as 2^32 - x, whose sum shows the carry."""
    if text[0] == "-" and not text[1:2].isdigit():
        return f"(0x100000000 - {_source(text[1:])})" if carry else f"(-{_source(text[1:])} & M)"
    if text[0] == "~":
        return f"({_source(text[1:])} ^ M)"
    if text[0] == "|":
        inner = _source(text.strip("|"))
        return f"abs(signed({inner}))"
    if text in ("RZ", "URZ", "SRZ"):
        return "0"
    if match := re.fullmatch(r"(U?)R(\d+)", text):
        return f"{'U' if match[1] else 'R'}[{match[2]}]"
    if re.fullmatch(r"-?0x[0-9a-f]+|-?\d+", text):
        return str(int(text, 0) & M)
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        return f"C[{int(match[1], 16)}]"
    if match := re.fullmatch(r"c\[0x0\]\[(U?R\d+)\+?(-?0x[0-9a-f]+)?\]", text):
        return f"C[{_source(match[1])} + {int(match[2] or '0', 16)}]"
    if re.fullmatch(r"c\[0x[1-9a-f]\]\[.*\]", text):
        return "0"
    raise _Unknown(text)


def _pair(text: str) -> str:
    """A Python expression of a 64-bit operand, signed."""
    if text[0] == "-":
        return f"(-{_pair(text[1:])})"
    if text in ("RZ", "URZ"):
        return "0"
    if match := re.fullmatch(r"(U?)R(\d+)(\.64)?", text):
        name, n = "U" if match[1] else "R", int(match[2])
        return f"pair({name}[{n}], {name}[{n + 1}])"
    if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
        return f"pair(C[{int(match[1], 16)}], C[{int(match[1], 16) + 4}])"
    if re.fullmatch(r"-?0x[0-9a-f]+", text):
        return str(int(text, 16))
    raise _Unknown(text)


def _predicate(text: str) -> str:
    if text in ("PT", "UPT"):
        return "True"
    if text in ("!PT", "!UPT"):
        return "False"
    match = re.fullmatch(r"(!?)(U?)P(\d)", text)
    if not match:
        raise _Unknown(text)
    name = f"{'Q' if match[2] else 'P'}[{match[3]}]"
    return f"({name} ^ True)" if match[1] else name


def _address(text: str) -> str:
    """Of ``[R2.64+0x10]``, ``desc[UR4][R2.64]`` or ``[R3+UR5+0x200]``."""
    inside = re.findall(r"\[([^\[\]]*)\]", text)[-1]
    parts, wide = [], ".64" in inside
    for part in re.split(r"\+", inside):
        if not part:
            continue
        if match := re.fullmatch(r"(R\d+|RZ)\.X(4|8|16)", part):
            parts.append(f"{_source(match[1])} * {match[2]}")
        elif part.endswith(".64"):
            parts.append(_pair(part))
        elif part.endswith(".U32"):
            parts.append(_source(part[:-4]))
        elif re.fullmatch(r"-?0x[0-9a-f]+", part):
            parts.append(str(int(part, 16)))
        elif part.startswith("UR") and (wide or ".U32" in inside):
            parts.append(_pair(part))
        else:
            parts.append(_source(part))
    return " + ".join(parts) or "0"


_COMPARE = {"GE": ">=", "GT": ">", "LE": "<=", "LT": "<", "EQ": "==", "NE": "!="}
_LUTS = {
    0xC0: "({a} & {b})",
    0xFC: "({a} | {b})",
    0x3C: "({a} ^ {b})",
    0x33: "({b} ^ M)",
    0x0F: "({a} ^ M)",
    0x30: "({a} & ({b} ^ M))",
}


def _lut(table: int, a: str, b: str, c: str, ones: str) -> str:
    if table in _LUTS and ones == "M":
        return _LUTS[table].format(a=a, b=b)
    terms = []
    for index in range(8):
        if table >> index & 1:
            of = [name if index >> bit & 1 else f"({name} ^ {ones})" for name, bit in ((a, 2), (b, 1), (c, 0))]
            terms.append("(" + " & ".join(of) + ")")
    return f"({' | '.join(terms)})" if terms else ("0" if ones == "M" else "False")


def _result(i: Instruction) -> list[str]:
    """Python expressions of the destinations of an instruction, in the order in which they are written."""
    base, mods = i.base, i.modifiers
    n = flow.destinations(i)
    out, ops = i.operands[:n], i.operands[n:]
    plain = base.removeprefix("U") if base.startswith("U") and base not in ("UCLEA",) else base
    if plain in ("MOV", "MOV32I"):
        return [_source(ops[0])]
    if plain == "IMOV":
        return [_source(ops[0])]
    if plain in ("IADD3", "IADD", "VIADD") and "64" in mods:
        total = " + ".join(_pair(op) for op in ops)
        return [f"({total}) & M", f"(({total}) >> 32) & M"]
    if plain in ("IADD3", "IADD", "VIADD"):
        count = 3 if plain == "IADD3" else 2
        carries = len(out) > 1
        sources = [_source(op, carry=carries and "X" not in mods) for op in ops[:count]]
        total = " + ".join(sources + ([_predicate(op) for op in ops[count:]] if "X" in mods else []))
        if not carries:
            return [f"({total}) & M"]
        carry = [f"(({total}) >> 32) >= {k}" if out[k] not in ("PT", "UPT") else "True" for k in range(1, len(out))]
        return [f"({total}) & M", *carry]
    if plain == "IMAD":
        if "WIDE" in mods or "HI" in mods:
            a, b = (_source(op) for op in ops[:2])
            product = f"wrap64({a} * {b})" if "U32" in mods else f"(signed({a}) * signed({b}))"
            total = f"wrap64({product} + {_pair(ops[2])})"
            if "HI" in mods:
                return [f"({total} >> 32) & M"]
            result = [f"{total} & M", f"({total} >> 32) & M"]
            if len(out) > 1:
                unsigned = f"(({total}) ^ MIN64) < ({_pair(ops[2])} ^ MIN64)"
                result.append(unsigned)
            return result
        a, b, c = (_source(op) for op in ops[:3])
        carry = f" + {_predicate(ops[3])}" if "X" in mods and len(ops) > 3 else ""
        if b == "0" or a == "0":
            return [f"({c}{carry}) & M" if carry else c]
        if len(out) > 1:
            raise _Unknown("carry of IMAD")
        return [f"(({a} * {b} & M) + {c}{carry}) & M"]
    if plain == "LEA":
        a = _source(ops[0])
        if "HI" in mods:
            shift = int(ops[2 if "SX32" in mods else 3], 0)
            b = _source(ops[1], carry=len(out) > 1)
            rest = ops[3 if "SX32" in mods else 4 :]
            if "SX32" in mods:
                top = f"((signed({a}) << {shift}) >> 32 & M)"
            else:
                top = f"funnel_high_left({a}, {shift}, {_source(ops[2])})"
            total = f"{top} + {b}" + (f" + {_predicate(rest[0])}" if "X" in mods else "")
        else:
            total = f"({a} << {int(ops[2], 0)} & M) + {_source(ops[1], carry=len(out) > 1)}"
        return [f"({total}) & M", *([f"(({total}) >> 32) >= 1"] if len(out) > 1 else [])]
    if plain == "LOP3" or plain == "LOP":
        a, b, c = (_source(op) for op in ops[:3])
        value = _lut(int(ops[3], 0), a, b, c, "M")
        return [f"{value} != 0", value] if len(out) > 1 else [value]
    if plain == "PLOP3":
        a, b, c = (_predicate(op) for op in ops[:3])
        return [_lut(int(table, 0), a, b, c, "True") for table in ops[3:5]]
    if plain == "SHF":
        if mods[0] == "L":
            if "HI" in mods:
                return [f"funnel_high_left({_source(ops[0])}, {_source(ops[1])}, {_source(ops[2])})"]
            return [f"shifted_left({_source(ops[0])}, {_source(ops[1])})"]
        arithmetic = "S32" in mods or "S64" in mods
        if "HI" in mods:
            value = f"signed({_source(ops[2])})" if arithmetic else _source(ops[2])
            return [f"shifted_right({value}, {_source(ops[1])}) & M"]
        return [f"funnel_low_right({_source(ops[0])}, {_source(ops[1])}, {_source(ops[2])}, {arithmetic})"]
    if plain in ("SHL", "SHR"):
        return [f"shifted_{'left' if plain == 'SHL' else 'right'}({_source(ops[0])}, {_source(ops[1])})"]
    if plain == "ISETP":
        compare = mods[0]
        a, b = (_source(op) for op in ops[:2])
        if compare in ("EQ", "NE") and "EX" not in mods:
            test = f"E.{'equal' if compare == 'EQ' else 'differ'}({a}, {b})"
        elif compare in ("T", "F"):
            test = str(compare == "T")
        else:
            left, right = (a, b) if "U32" in mods or compare in ("EQ", "NE") else (f"signed({a})", f"signed({b})")
            test = f"({left} {_COMPARE[compare]} {right})"
            if "EX" in mods:
                lower = _predicate(ops[3])
                if compare == "NE":
                    test = f"({test} | {lower})"
                elif compare == "EQ":
                    test = f"({test} & {lower})"
                else:
                    test = f"(({left} {_COMPARE[compare][0]} {right}) | (({left} == {right}) & {lower}))"
        joined = {"AND": "&", "OR": "|", "XOR": "^"}[next(m for m in mods if m in ("AND", "OR", "XOR"))]
        other = _predicate(ops[2])
        if other == "True" and joined == "&":
            return [test, f"({test} ^ True)"]
        return [f"({test}) {joined} {other}", f"({test} ^ True) {joined} {other}"]
    if plain in ("SEL", "FSEL"):
        return [f"select({_predicate(ops[2])}, {_source(ops[0])}, {_source(ops[1])})"]
    if plain == "PRMT":
        return [f"permuted({_source(ops[0])}, {_source(ops[1])}, {_source(ops[2])})"]
    if plain == "IABS":
        return [f"abs(signed({_source(ops[0])}))"]
    if plain in ("IMNMX", "VIMNMX", "VIADDMNMX"):
        last = ops[3] if plain == "VIADDMNMX" else ops[2]
        a, b = (_source(op) for op in ops[:2])
        if plain == "VIADDMNMX":
            a, b = f"(({a} + {b}) & M)", _source(ops[2])
        less = f"{a} < {b}" if "U32" in mods else f"signed({a}) < signed({b})"
        return [f"select(({less}) ^ ({_predicate(last)} ^ True), {a}, {b})"]
    if plain == "SGXT":
        width = ops[1]
        if not width.startswith("0x"):
            raise _Unknown(width)
        width = int(width, 16)
        if "U32" in mods:
            return [f"{_source(ops[0])} & {(1 << width) - 1}"]
        sign = 1 << (width - 1)
        return [f"((({_source(ops[0])} & {(1 << width) - 1}) ^ {sign}) - {sign}) & M"]
    if plain == "BMSK":
        return [f"shifted_left(shifted_left(1, {_source(ops[1])}) - 1, {_source(ops[0])}) & M"]
    if plain == "POPC":
        return [f"popcount({_source(ops[0])})"]
    if plain == "FLO":
        return [f"{'leading' if 'U32' in mods else 'leading_signed'}({_source(ops[0])})"]
    if plain == "BREV":
        return [f"reversed_bits({_source(ops[0])})"]
    if plain == "I2F" and ("U64" not in mods and "S64" not in mods):
        return [f"float_up({_source(ops[0])})"] if "RP" in mods else [f"float_of({_source(ops[0])})"]
    if plain == "I2FP":
        return [f"float_of({_source(ops[0])})"]
    if plain == "MUFU" and "RCP" in mods:
        return [f"reciprocal({_source(ops[0])})"]
    if plain == "F2I" and "U32" in mods and "TRUNC" in mods:
        return [f"truncated({_source(ops[0])})"]
    if base in ("HFMA2", "HADD2") and ops[0].strip("-") == "RZ" and ops[1].strip("-") == "RZ":
        values = ops[-2:]
        bits = [int(np.float16(float(v.replace("QNAN", "nan").replace("INF", "inf"))).view(np.uint16)) for v in values]
        return [str(bits[0] << 16 | bits[1])]
    if base in ("S2R", "S2UR"):
        return [f"E.special[{ops[0]!r}]"]
    if base == "CS2R":
        value = "0" if ops[0] == "SRZ" else f"E.special[{ops[0]!r}]"
        return [value] if "32" in mods else [value, "0"]
    if base in ("LDC", "ULDC", "LDCU"):
        words = max(1, i.width // 4)
        text = ops[0]
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            return [f"C[{int(match[1], 16) + 4 * k}]" for k in range(words)]
        return [_source(text)] if words == 1 else ["0"] * words
    if base == "R2UR":
        return [f"E.uniform({_source(ops[-1])})"]
    if base == "P2R":
        mask = int(ops[2], 16)
        bits = " | ".join(f"(P[{bit}] * {1 << bit})" for bit in range(7) if mask >> bit & 1) or "0"
        if any(m.startswith("B") for m in mods) or ops[0] != "PR":
            raise _Unknown(str(i))
        return [f"({_source(ops[1])} & {~mask & M}) | {bits}"]
    if base == "R2P":
        if ops and "." in i.operands[1]:
            raise _Unknown(str(i))
        return [f"({_source(i.operands[1])} >> {bit} & 1) == 1" for bit in range(7) if int(i.operands[2], 16) >> bit & 1]
    if base == "SHFL":
        return ["True", f"E.shuffle({mods[0]!r}, {_source(ops[0])}, {_source(ops[1])}, {_source(ops[2])})"]
    if base in ("VOTE", "VOTEU"):
        asked = _predicate(ops[-1])
        voted = f"E.vote({mods[0]!r}, {asked})"
        return [voted] if flow.is_predicate(out[0]) else [f"E.ballot({asked})", voted]
    if base == "ELECT":
        return ["E.elected()", "0"]
    if base == "SYNCS":
        return ["True"] if out and flow.is_predicate(out[0]) else ["0"] * len(flow.written(i))
    raise _Unknown(base)


def _memory(k: int, i: Instruction, full: bool, wanted: bool) -> list[str]:
    """Lines for a load, store or atomic; ``wanted``: its result is needed."""
    guard = _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else "True"
    n = flow.destinations(i)
    operands = i.operands[n:]
    where = next((op for op in operands if "[" in op and not op.startswith("c[")), None)
    lines = []
    if i.base in GLOBAL:
        if i.base == "LDGSTS":
            source = next(op for op in reversed(operands) if "[" in op)
            valid = _predicate(operands[-1]) if flow.is_predicate(operands[-1]) else "True"
            if full:
                lines.append(f"E.touch({k}, {_address(source)}, {guard} & {valid})")
                lines.append(f"E.touch_shared({k}, {_address(operands[0])}, {guard})")
        elif full:
            lines.append(f"E.touch({k}, {_address(where)}, {guard})")
        if wanted and i.base in ("ATOMG", "ATOM"):
            value = operands[-1]
            at = _address(where) if full else "0"
            lines.append(f"t = E.atomic({k}, {at}, {_source(value) if full else '0'}, {guard})")
        elif not full:
            lines.append("E.accesses += 1")
        return lines
    if i.base in SHARED and full:
        lines.append(f"E.touch_shared({k}, {_address(where)}, {guard})")
    return lines


def _assignments(i: Instruction, values: list[str], masked: bool) -> list[str]:
    """Lines that write ``values`` to the destinations, under the guard and the threads that run."""
    guard = _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else None
    if masked:
        guard = f"({guard} & A)" if guard else "A"
    places = []
    for register in flow.written(i):
        for name, start in (("Q", flow.UNIFORM_PREDICATE), ("P", flow.PREDICATE), ("U", flow.UNIFORM), ("R", 0)):
            if register >= start:
                places.append(f"{name}[{register - start}]")
                break
    targets = [operand for operand in i.operands[: flow.destinations(i)]] if i.base != "R2P" else []
    kept = []  # values whose destination is RZ or PT are dropped
    if i.base == "R2P":
        kept = list(values)
    else:
        at = 0
        for target in targets:
            count = flow.registers_written(i) if not flow.is_predicate(target) else 1
            chosen = values[at : at + count]
            at += count
            if target not in ("RZ", "URZ", "PT", "UPT"):
                kept += chosen
    if len(kept) != len(places):
        raise _Unknown(f"{i.opcode} with {len(kept)} results for {len(places)} registers")
    temporaries = [f"v{j}" for j in range(len(kept))]
    lines = [f"{name} = {value}" for name, value in zip(temporaries, kept, strict=True)]
    if guard:
        lines.append(f"g = truth({guard})")
        lines += [f"{place} = select(g, {name}, {place})" for place, name in zip(places, temporaries, strict=True)]
    else:
        lines += [f"{place} = {name}" for place, name in zip(places, temporaries, strict=True)]
    return lines


def expects(i: Instruction) -> bool:
    """Whether it announces tensor copies to a barrier in shared memory (mbarrier.arrive.expect_tx)."""
    return i.base == "SYNCS" and "ARRIVE" in i.modifiers and "TRANS64" in i.modifiers and len(i.operands) == 3


class Program:
    """Code of a kernel made ready: a Python function a basic block, with (``full``) or without its addresses."""

    def __init__(self, code: Code, full: bool):
        self.code, self.full = code, full
        self.unknown: dict[str, int] = {}
        tainted = flow.floating(code)
        facts = flow.effects(code)

        def root(k, i: Instruction) -> int:
            reads = facts[k][1]
            if i.base in BRANCHES:
                return reads
            if i.base in ("ATOMG", "ATOM") and not full:
                return 0
            if not full:
                return 0
            if expects(i) or i.base in ("UTMASTG", "UTMAREDG"):
                return reads
            if i.base in GLOBAL | SHARED:
                data = 0
                for at, operand in enumerate(i.operands):
                    if "[" not in operand and at >= flow.destinations(i) and not flow.is_predicate(operand):
                        for kind, index, _ in flow.names(operand):
                            for word in range(max(1, i.width // 4)):
                                data |= 1 << flow.number(kind, index + word)
                if i.base in ("STS", "ATOMG", "ATOM") and not data & tainted[k]:
                    data = 0
                return reads & ~data
            return 0

        def with_shared(k, i):
            reads = facts[k][1]
            if full:
                return root(k, i)
            if i.base in ("STS", "STL", "ATOMG"):
                data = reads
                return 0 if any_tainted(i, k) else data
            return root(k, i)

        def any_tainted(i, k):
            data = 0
            for at, operand in enumerate(i.operands):
                if "[" not in operand and at >= flow.destinations(i) and not flow.is_predicate(operand):
                    for kind, index, _ in flow.names(operand):
                        for word in range(max(1, i.width // 4)):
                            data |= 1 << flow.number(kind, index + word)
            return bool(data & tainted[k])

        self.needed = flow.needed(code, root)
        shared = any(code.instructions[k].base in ("LDS", "LDL") for k in self.needed)
        if shared and not full:  # what travels through shared or local memory: its stores are needed too
            self.needed = flow.needed(code, with_shared)
        self.stores = {k for k, i in enumerate(code.instructions) if i.base in ("STS", "STL") and shared and not any_tainted(i, k)}
        self._functions: dict[tuple[int, bool], object] = {}
        self.blocks_with_nothing = self._idle()
        for k, i in enumerate(code.instructions):
            if i.base in BRANCHES and i.base != "RET" and facts[k][1] & tainted[k]:
                self.unknown[f"{str(i).strip()} depends on values in memory"] = 1

    def _idle(self) -> set[int]:
        """Blocks of which nothing is carried out."""
        return {
            b
            for b, (first, last) in enumerate(self.code.blocks)
            if not any(
                k in self.needed or k in self.stores or self.code.instructions[k].base in GLOBAL or self.full
                for k in range(first, last + 1)
            )
        }

    def function(self, block: int, masked: bool):
        key = block, masked
        if key not in self._functions:
            self._functions[key] = self._compiled(block, masked)
        return self._functions[key]

    def _compiled(self, block: int, masked: bool):
        first, last = self.code.blocks[block]
        lines = []
        for k in range(first, last + 1):
            i = self.code.instructions[k]
            wanted = k in self.needed
            try:
                lines += self._lines(k, i, wanted, masked)
            except (_Unknown, IndexError, StopIteration, ValueError) as error:
                self.unknown[i.opcode] = self.unknown.get(i.opcode, 0) + 1
                name = str(error)
                lines.append(f"# {i}: {name}")
                for register in flow.written(i):
                    for letter, start in (
                        ("Q", flow.UNIFORM_PREDICATE),
                        ("P", flow.PREDICATE),
                        ("U", flow.UNIFORM),
                        ("R", 0),
                    ):
                        if register >= start:
                            lines.append(f"{letter}[{register - start}] = {'False' if letter in 'PQ' else '0'}")
                            break
        body = "\n ".join(lines) or "pass"
        scope = dict(_SCOPE)
        exec(f"def block(R, U, P, Q, C, E, A):\n {body}\n", scope)
        return scope["block"]

    def _lines(self, k: int, i: Instruction, wanted: bool, masked: bool) -> list[str]:
        lines = []
        if i.base in GLOBAL or i.base in SHARED:
            lines += _memory(k, i, self.full, wanted)
        if i.base in ("STS", "STL") and k in self.stores:
            guard = _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else "True"
            words = max(1, i.width // 4)
            data = i.operands[-1]
            values = [_source(data)] if words == 1 or data == "RZ" else [f"R[{int(data[1:]) + w}]" for w in range(words)]
            values = values * words if len(values) < words else values
            kind = "local" if i.base == "STL" else "shared"
            lines.append(f"E.store_{kind}({_address(i.operands[0])}, {i.width}, [{', '.join(values)}], {guard})")
        if self.full and expects(i):
            guard = _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else "True"
            lines.append(f"E.expect({k}, {_source(i.operands[-1])}, {guard})")
        if self.full and i.base in ("UTMASTG", "UTMAREDG"):
            guard = _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else "True"
            lines.append(f"E.copy_out({k}, {guard})")
        if not wanted or i.base in BRANCHES:
            return lines
        if i.base in ("ATOMG", "ATOM"):
            target = i.operands[1] if flow.is_predicate(i.operands[0]) else i.operands[0]
            if target != "RZ":
                lines += _assignments(i, (["True"] if flow.is_predicate(i.operands[0]) else []) + ["t"], masked)
        elif flow.is_floating(i):
            places = i.operands[: flow.destinations(i)]
            values = ["False"] * len(places) if flow.is_predicate(places[0]) else ["0"] * flow.registers_written(i)
            lines += _assignments(i, values, masked)
        elif i.base in ("LDS", "LDL"):
            kind = "local" if i.base == "LDL" else "shared"
            words = max(1, i.width // 4)
            lines.append(f"t = E.load_{kind}({_address(i.operands[-1])}, {i.width}, {'S8' in i.modifiers or 'S16' in i.modifiers})")
            lines += _assignments(i, [f"t[{w}]" for w in range(words)], masked)
        else:
            lines += _assignments(i, _result(i), masked)
        return lines


_SCOPE = {
    name: globals()[name]
    for name in (
        "M signed wrap64 pair select truth popcount leading leading_signed reversed_bits permuted float_up float_of reciprocal truncated "
        "shifted_left shifted_right funnel_high_left funnel_low_right"
    ).split()
} | {"MIN64": -(1 << 63)}


@dataclass
class Requests:
    """What an instruction that touches memory did in one program: executions, those with an active thread, and active
    threads in all.

    Of ``sampled`` executions: the warps that carried it out, the 32-byte sectors of every warp, those of the program
    each once, the 128-byte lines of every warp, and the passes of an average warp through the shared memory's banks;
    ``tensors``: slots of addresses. ``addresses``: those of the active threads of every execution, an array each, where
    they are recorded."""

    executions: int = 0
    active: int = 0
    threads: int = 0
    group_warps: int = 0
    sampled: int = 0
    sectors: int = 0
    unique: int = 0
    lines: int = 0
    passes: float = 0.0
    tensors: set = field(default_factory=set)
    addresses: list = field(default_factory=list)


@dataclass
class Copies:
    """Of an instruction that announces tensor copies, or starts one from shared memory: how often, of how many bytes in
    all, and in which warp."""

    executions: int = 0
    bytes: int = 0
    warp: int = 0


@dataclass
class Path:
    """What one program did. ``events``: (block, warps or None for all of them), in order; requests by instruction;
    ``awaited``: whether it compared a count of arrivals, so that it may come last; ``unknown``: instructions that were
    not carried out."""

    program: int
    warps: int
    events: list
    requests: dict[int, Requests]
    shared: dict[int, Requests]
    copies: dict[int, Copies]
    awaited: dict[int, int]
    unknown: dict[str, int]

    def of_warp(self, warp: int) -> list[int]:
        return [block for block, who in self.events if who is None or warp in who]

    def classes(self) -> list[list[int]]:
        """Warps that take the same path, together."""
        if all(who is None for _, who in self.events):
            return [list(range(self.warps))]
        found: dict[tuple, list[int]] = {}
        for warp in range(self.warps):
            found.setdefault(tuple(self.of_warp(warp)), []).append(warp)
        return list(found.values())


class Emulator:
    """State of one program while it runs. constants: {offset in constant bank 0: 32-bit word}."""

    def __init__(
        self,
        program: Program,
        constants: dict[int, int],
        block: tuple[int, int, int],
        linear: int,
        record=False,
        arrivals=None,
        counters=None,
    ):
        code = program.code
        self.program, self.code, self.record = program, code, record
        self.warps, self.threads = code.warps, 32 * code.warps
        lanes = np.arange(self.threads, dtype=np.int64)
        self.lanes = lanes
        self.special = defaultdict(int)
        self.special |= {
            "SR_TID.X": lanes,
            "SR_LANEID": lanes & 31,
            "SR_CTAID.X": block[0],
            "SR_CTAID.Y": block[1],
            "SR_CTAID.Z": block[2],
            "SR_LTMASK": (1 << (lanes & 31)) - 1,
            "SR_LEMASK": (2 << (lanes & 31)) - 1,
            "SR_EQMASK": 1 << (lanes & 31),
            "SR_CLOCKLO": 0,
            "SR_VIRTID": 0,
        }
        self.constants = constants
        self.linear, self.arrivals, self.counters = linear, arrivals, counters
        self.mask = None
        self.accesses = 0
        self.atomics: dict[int, int] = defaultdict(int)
        self.compared: dict[int, int] = {}
        self.tickets: dict[int, int] = {}
        self.requests: dict[int, Requests] = defaultdict(Requests)
        self.shared: dict[int, Requests] = defaultdict(Requests)
        self.copies: dict[int, Copies] = defaultdict(Copies)
        self.stored = 0  # bytes in shared memory since the last copy from there
        self.memory = np.zeros(1 << 18, np.uint8)
        self.local: dict = {}
        self.last_atomic = -1

    # -- what blocks call

    def _active(self, guard):
        if self.mask is not None:
            guard = guard & self.mask
        return truth(guard)

    def touch(self, k: int, address, guard):
        active = self._active(guard)
        self.accesses += 1
        of = self.requests[k]
        of.executions += 1
        if active is False:
            return
        of.active += 1
        of.threads += self.threads if active is True else int(np.count_nonzero(active))
        if self.counters and self.code.instructions[k].base == "STG":
            for place in np.unique(address):
                if int(place) in self.counters:  # the last one leaves a counter at 0
                    self.counters[int(place)] = 0
        if self.record:
            lanes = np.broadcast_to(address, self.threads) if active is True else np.broadcast_to(address, self.threads)[active]
            of.addresses.append(np.array(lanes, np.int64))
        if of.sampled < SAMPLES or self.record:
            self._sample(of, address, active, self.code.instructions[k].width)

    def _sample(self, of: Requests, address, active, width: int):
        addresses = np.broadcast_to(address, self.threads).astype(np.int64)
        sectors = (addresses >> 5).reshape(self.warps, 32)
        if active is not True:
            sectors = np.where(active.reshape(self.warps, 32), sectors, -1)
        ordered = np.sort(sectors, axis=1)
        first = np.ones_like(ordered, bool)
        first[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        first &= ordered >= 0
        of.sectors += int(first.sum())
        lines = ordered >> 2
        new = np.ones_like(ordered, bool)
        new[:, 1:] = lines[:, 1:] != lines[:, :-1]
        new &= ordered >= 0
        of.lines += int(new.sum())
        found = np.unique(ordered)
        of.unique += int((found >= 0).sum())
        of.tensors.update(np.unique(found[found >= 0] >> (SLOT_BITS - 5)).tolist())
        of.group_warps += self.warps if self.mask is None else int(self.mask.reshape(self.warps, 32).any(1).sum())
        of.sampled += 1

    def copy_out(self, k: int, guard):
        """A thread starts a tensor copy of what was stored to shared memory since the one before."""
        if self._active(guard) is not False:
            of = self.copies[k]
            of.executions += 1
            of.bytes += self.stored
            self.stored = 0

    def touch_shared(self, k: int, address, guard):
        active = self._active(guard)
        i = self.code.instructions[k]
        of = self.shared[k]
        of.executions += 1
        if active is False:
            return
        of.active += 1
        of.threads += self.threads if active is True else int(np.count_nonzero(active))
        if i.base in ("STS", "STSM"):
            count = self.threads if active is True else int(np.count_nonzero(active))
            self.stored += count * (i.width if i.base == "STS" else 4 * max(int(m) for m in (*i.modifiers, "1") if m in ("1", "2", "4")))
        if of.sampled < 1:
            of.passes += self._passes(address, active, i)
            of.sampled += 1

    def _passes(self, address, active, i: Instruction) -> float:
        """Passes of an average warp through the 32 banks of 4 bytes."""
        addresses = np.broadcast_to(address, self.threads).reshape(self.warps, 32)
        active = np.broadcast_to(active, self.threads).reshape(self.warps, 32)
        if i.base in ("LDSM", "STSM"):  # a thread gives the address of a row of 16 bytes, eight of them are a matrix
            matrices = next((int(m) for m in i.modifiers if m in ("4", "2")), 1)
            groups, words = [slice(8 * m, 8 * m + 8) for m in range(matrices)], 4
        else:
            words = max(1, i.width // 4)
            groups = [slice(g * 32 // words, (g + 1) * 32 // words) for g in range(words)]
        total = 0
        for warp in range(self.warps):
            for group in groups:
                at = addresses[warp, group][active[warp, group]]
                if at.size:
                    word = np.unique(((at >> 2)[:, None] + np.arange(words)).ravel())
                    total += int(np.bincount(word & 31).max())
        return total / self.warps

    def expect(self, k: int, amount, guard):
        """A thread announces the bytes of the tensor copies that a barrier in shared memory waits for."""
        active = self._active(guard)
        if active is False:
            return
        thread = 0 if active is True else int(np.flatnonzero(active)[0])
        amount = amount if type(amount) is int else int(amount[thread])
        if amount:
            of = self.copies[k]
            of.executions += 1
            of.bytes += amount
            of.warp = thread // 32

    def atomic(self, k: int, address, value, guard):
        """What an atomic addition finds."""
        active = self._active(guard)
        if active is False:
            return 0
        if self.counters is not None:
            return self._added(address, value, active)
        again = self.last_atomic == k and self.atomics[k] > 0
        self.last_atomic = k
        self.atomics[k] += 1
        if k in self.tickets or (self.accesses <= 1 and not self.atomics.keys() - {k}):
            self.tickets[k] = self.linear
            return self.linear
        if self.arrivals and k in self.arrivals:
            return self.arrivals[k]
        if again and k in self.compared:  # it waits in a loop for the value that it was compared with
            return self.compared[k]
        return AWAITED

    def _added(self, address, value, active):
        """The same where the programs run one after the other: the counters' true values."""
        threads = np.flatnonzero(np.broadcast_to(active, self.threads))
        at, amounts = (np.broadcast_to(x, self.threads) for x in (address, value))
        found = np.zeros(self.threads, np.int64)
        for thread in threads.tolist():
            place = int(at[thread])
            found[thread] = self.counters.get(place, 0)
            self.counters[place] = int(found[thread] + amounts[thread]) & M
        return found

    def _compares(self, a, b):
        """Keep what a count of arrivals is compared with."""
        for one, other in ((a, b), (b, a)):
            values = one if type(one) is int else int(one.flat[0]) if getattr(one, "size", 0) else 0
            if abs(values - AWAITED) <= 8 and self.last_atomic >= 0:
                count = other if type(other) is int else int(other.flat[0])
                self.compared[self.last_atomic] = (count - (values - AWAITED)) & M

    def equal(self, a, b):
        self._compares(a, b)
        return a == b

    def differ(self, a, b):
        self._compares(a, b)
        return a != b

    def uniform(self, x):
        if type(x) is int:
            return x
        rows = x.reshape(self.warps, 32)
        if self.mask is not None:
            first = self.mask.reshape(self.warps, 32).argmax(1)
            values = rows[np.arange(self.warps), first]
            running = self.mask.reshape(self.warps, 32).any(1)
            kept = values[running]
        else:
            values = kept = rows[:, 0]
        if kept.size and (kept == kept[0]).all():
            return int(kept[0])
        return np.repeat(values, 32)

    def shuffle(self, how: str, x, lane, mask):
        if type(x) is int:
            return x
        clamp = mask & 31 if type(mask) is int else 31
        me = self.lanes & 31
        segment = (mask >> 8 & 31) if type(mask) is int else 0
        source = {"IDX": lane, "BFLY": me ^ lane, "UP": me - lane, "DOWN": me + lane}[how]
        source = np.broadcast_to(np.asarray(source, np.int64), me.shape)
        if how == "UP":
            source = np.where(source < (me & segment), me, source)
        else:
            source = np.where(source > np.maximum(clamp, me & segment), me, source) if how != "IDX" else source & 31
        return x[(self.lanes & ~31) + (source & 31)]

    def ballot(self, p):
        bits = np.broadcast_to(p, self.threads)
        if self.mask is not None:
            bits = bits & self.mask
        rows = (bits.reshape(self.warps, 32).astype(np.int64) << np.arange(32)).sum(1)
        return int(rows[0]) if (rows == rows[0]).all() else np.repeat(rows, 32)

    def vote(self, how: str, p):
        if type(p) is bool:
            return p
        bits = p if self.mask is None else (p & self.mask if how == "ANY" else p | ~self.mask)
        rows = bits.reshape(self.warps, 32)
        result = rows.any(1) if how == "ANY" else rows.all(1)
        return truth(np.repeat(result, 32))

    def elected(self):
        if self.mask is None:
            return (self.lanes & 31) == 0
        first = self.mask.reshape(self.warps, 32).argmax(1)
        return (self.lanes & 31) == np.repeat(first, 32)

    def _lanes_of(self, address, guard):
        active = self._active(guard)
        at = np.broadcast_to(np.asarray(address, np.int64), self.threads) & (len(self.memory) - 1)
        return at, active

    def store_shared(self, address, width: int, values, guard):
        at, active = self._lanes_of(address, guard)
        if active is False:
            return
        view = self.memory.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
        size = min(width, 4)
        for w, value in enumerate(values):
            value = np.broadcast_to(np.asarray(value, np.int64), self.threads) & ((1 << 8 * size) - 1)
            where = at // size + w
            if active is True:
                view[where] = value
            else:
                view[where[active]] = value[active]

    def load_shared(self, address, width: int, negative: bool):
        size = min(width, 4)
        view = self.memory.view({1: np.uint8, 2: np.uint16}.get(width, np.uint32))
        if type(address) is int:
            at = (address & (len(self.memory) - 1)) // size
            return [int(view[at + w]) for w in range(max(1, width // 4))]
        at = (address & (len(self.memory) - 1)) // size
        found = [view[at + w].astype(np.int64) for w in range(max(1, width // 4))]
        if negative:
            top = 1 << (8 * size - 1)
            found = [((value ^ top) - top) & M for value in found]
        return found

    def store_local(self, address, width: int, values, guard):
        if type(address) is not int:
            raise EmulationError("a store to local memory at an address of its own in every thread")
        active = self._active(guard)
        for w, value in enumerate(values):
            self.local[address + 4 * w] = select(active, value, self.local.get(address + 4 * w, 0))

    def load_local(self, address, width: int, negative: bool):
        if type(address) is not int:
            raise EmulationError("a load from local memory at an address of its own in every thread")
        return [self.local.get(address + 4 * w, 0) for w in range(max(1, width // 4))]

    # -- the run

    def run(self) -> Path:
        code, program = self.code, self.program
        state = [0] * 256, [0] * 64, [False] * 8, [False] * 8
        events: list = []
        groups: dict[int, np.ndarray | None] = {0: None}
        everyone = np.ones(self.threads, bool)
        idle = program.blocks_with_nothing
        successors, steps = [], 0
        for first, last in code.blocks:
            del first
            end = code.instructions[last]
            successors.append((end, end.base in BRANCHES))
        while groups:
            block = min(groups) if len(groups) > 1 else next(iter(groups))
            mask = groups.pop(block)
            if block >= len(code.blocks):
                continue
            self.mask = mask
            if mask is None:
                events.append((block, None))
            else:
                events.append((block, frozenset(np.flatnonzero(mask.reshape(self.warps, 32).any(1)).tolist())))
            steps += 1
            if steps > MOST_BLOCKS:
                raise EmulationError(f"more than {MOST_BLOCKS} basic blocks in one program: a wait that never ends?")
            if block not in idle:
                program.function(block, mask is not None)(*state, self.constants, self, mask)
            end, branches = successors[block]
            if not branches:
                self._go(groups, block + 1, mask, everyone)
                continue
            taken = self._taken(end, state)
            if mask is not None and taken is not True:
                taken = truth(taken & mask) if taken is not False else False
            target = self._target(end, state)
            if taken is True:
                self._go(groups, target, mask, everyone)
            elif taken is False:
                self._go(groups, block + 1, mask, everyone)
            else:
                self._go(groups, target, taken, everyone)
                rest = ~taken if mask is None else mask & ~taken
                if rest.any():
                    self._go(groups, block + 1, rest, everyone)
        awaited = {k: value for k, value in self.compared.items() if k not in self.tickets}
        unknown = dict(program.unknown)
        return Path(self.linear, self.warps, events, dict(self.requests), dict(self.shared), dict(self.copies), awaited, unknown)

    def _taken(self, end: Instruction, state):
        _, _, P, Q = state
        taken = True
        if end.guard:
            name, negated = end.guard
            value = Q[int(name[2:])] if name.startswith("U") else P[int(name[1:])]
            taken = value ^ True if negated else value
        if end.base == "BRA" and len(end.operands) > 1:
            first = end.operands[0]
            if "DIV" in end.modifiers or "CONV" in end.modifiers:
                return False
            if flow.is_predicate(first):
                value = eval(_predicate(first), {}, {"P": P, "Q": Q})
                taken = taken & value
        return truth(taken)

    def _target(self, end: Instruction, state) -> int:
        if end.base in ("EXIT", "KILL"):
            return len(self.code.blocks)
        if end.base == "RET":
            address = state[0][int(re.match(r"R(\d+)", end.operands[0])[1])]
            address = address if type(address) is int else int(address.flat[0])
            if address not in self.code.block_of_address:
                raise EmulationError(f"{end}: no block starts at {address:#x}")
            return self.code.block_of_address[address]
        if end.target is None:
            raise EmulationError(f"{end} is not emulated")
        return self.code.block_of_address[end.target]

    def _go(self, groups, block: int, mask, everyone):
        if block >= len(self.code.blocks):
            return
        if block in groups:
            other = groups[block]
            mask = None if mask is None or other is None else mask | other
        if mask is not None and mask.all():
            mask = None
        groups[block] = mask


def prepared(code: Code, full: bool) -> Program:
    if ("program", full) not in code.memo:
        code.memo["program", full] = Program(code, full)
    return code.memo["program", full]


def run(
    code: Code,
    constants: dict[int, int],
    grid: tuple,
    linear: int,
    *,
    full=True,
    record=False,
    arrivals=None,
    counters=None,
) -> Path:
    """Emulate the program of number ``linear`` of a grid.

    record: keep every address. arrivals: {atomic: the count that it finds}, as the program that comes last would
    (``Path.awaited`` of another program). counters: {address: value} of the atomics, shared by programs that run one
    after the other."""
    x, y = grid[0], grid[1] if len(grid) > 1 else 1
    block = linear % x, linear // x % y, linear // (x * y)
    return Emulator(prepared(code, full), constants, block, linear, record, arrivals, counters).run()
