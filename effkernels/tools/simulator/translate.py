"""Machine code as Python: a function for each basic block, of the instructions that an emulation needs.

``Program.function(block, masked)`` gives f(R, U, P, Q, C, E, A): the registers, uniform registers, predicates and
uniform predicates as lists, constant bank 0, the ``emulate.Emulator`` that keeps what is asked of it, and the threads
that run, where not all do (``masked``)."""

import re
from collections.abc import Callable

import numpy as np

from effkernels.tools.simulator import flow, values
from effkernels.tools.simulator.encoding import BRANCHES, Code, Instruction
from effkernels.tools.simulator.values import M

GLOBAL = {"LDG", "STG", "LDGSTS", "ATOMG", "RED", "REDG", "LD", "ST", "ATOM"}
SHARED = {"LDS", "STS", "LDSM", "STSM", "ATOMS"}
_SCOPE = {name: value for name, value in vars(values).items() if not name.startswith("_")} | {"MIN64": -(1 << 63)}


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


def _guard(i: Instruction) -> str:
    return _predicate(f"{'!' if i.guard[1] else ''}{i.guard[0]}") if i.guard else "True"


def _places(i: Instruction) -> list[str]:
    """The registers that an instruction writes, as blocks name them."""
    starts = (("Q", flow.UNIFORM_PREDICATE), ("P", flow.PREDICATE), ("U", flow.UNIFORM), ("R", 0))
    found = []
    for register in flow.written(i):
        letter, start = next((letter, start) for letter, start in starts if register >= start)
        found.append(f"{letter}[{register - start}]")
    return found


def _stored(i: Instruction) -> int:
    """The registers, as bits, whose values a store or atomic writes."""
    bits = 0
    for at, operand in enumerate(i.operands):
        if "[" not in operand and at >= flow.destinations(i) and not flow.is_predicate(operand):
            for kind, index, _ in flow.names(operand):
                for word in range(max(1, i.width // 4)):
                    bits |= 1 << flow.number(kind, index + word)
    return bits


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
    if base in ("P2R", "UP2UR"):  # predicates to bits of a register; the second is of uniform ones
        mask, letter, source = int(ops[2], 16), *(("P", "PR") if base == "P2R" else ("Q", "UPR"))
        bits = " | ".join(f"({letter}[{bit}] * {1 << bit})" for bit in range(7) if mask >> bit & 1) or "0"
        if any(m.startswith("B") for m in mods) or ops[0] != source:
            raise _Unknown(str(i))
        return [f"({_source(ops[1])} & {~mask & M}) | {bits}"]
    if base == "R2P":
        if ops and "." in i.operands[1]:
            raise _Unknown(str(i))
        return [
            f"({_source(i.operands[1])} >> {bit} & 1) == 1" for bit in range(7) if int(i.operands[2], 16) >> bit & 1
        ]
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
    guard = _guard(i)
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
        if i.base in ("RED", "REDG") and full:
            lines.append(f"E.reduce({_address(where)}, {_source(operands[-1])}, {guard})")
        return lines
    if i.base in SHARED and full:
        lines.append(f"E.touch_shared({k}, {_address(where)}, {guard})")
    return lines


def _assignments(i: Instruction, values: list[str], masked: bool) -> list[str]:
    """Lines that write ``values`` to the destinations, under the guard and the threads that run."""
    guard = _guard(i) if i.guard else None
    if masked:
        guard = f"({guard} & A)" if guard else "A"
    places = _places(i)
    kept, at = [], 0  # values whose destination is RZ or PT are dropped
    for target in i.operands[: flow.destinations(i)]:
        count = len(values) if i.base == "R2P" else 1 if flow.is_predicate(target) else flow.registers_written(i)
        if target not in ("RZ", "URZ", "PT", "UPT"):
            kept += values[at : at + count]
        at += count
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


def conditions(i: Instruction) -> list[tuple[str, bool]]:
    """(predicate, negated) of a branch, all of which must hold."""
    found = [i.guard] if i.guard else []
    for operand in i.operands[:-1]:
        if flow.is_predicate(operand) and not operand.endswith("T"):
            found.append((operand.lstrip("!"), operand.startswith("!")))
    return found


def expects(i: Instruction) -> bool:
    """Whether it announces tensor copies to a barrier in shared memory (mbarrier.arrive.expect_tx)."""
    return i.base == "SYNCS" and "ARRIVE" in i.modifiers and "TRANS64" in i.modifiers and len(i.operands) == 3


class Program:
    """Code of a kernel made ready: a Python function a basic block, with (``full``) or without its addresses."""

    def __init__(self, code: Code, full: bool):
        self.code, self.full = code, full
        self.unknown: dict[str, int] = {}
        tainted, facts = flow.floating(code), flow.effects(code)
        stored = [_stored(i) for i in code.instructions]

        def root(k: int, i: Instruction, passed_on: bool) -> int:
            """The registers that are asked for: by branches, and with ``full`` by addresses and masks. passed_on: also
            what is stored for other threads to read, unless it comes from fractions or memory."""
            reads, data = facts[k][1], stored[k]
            if i.base in BRANCHES:
                return reads
            if i.base in ("STS", "STL") and passed_on and not data & tainted[k]:
                return reads
            if i.base in ("ATOMG", "ATOM", "RED", "REDG") and full and not data & tainted[k]:
                return reads
            if expects(i) or i.base in ("UTMASTG", "UTMAREDG"):
                return reads if full else 0
            return reads & ~data if full and i.base in GLOBAL | SHARED else 0

        self.needed = flow.needed(code, lambda k, i: root(k, i, False))
        passes_on = any(code.instructions[k].base in ("LDS", "LDL") for k in self.needed)
        if passes_on:
            self.needed = flow.needed(code, lambda k, i: root(k, i, True))
        self.stores = {
            k
            for k, i in enumerate(code.instructions)
            if passes_on and i.base in ("STS", "STL") and not stored[k] & tainted[k]
        }
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

    def function(self, block: int, masked: bool) -> Callable[..., None]:
        """The function of a basic block, made once; the module says what it takes."""
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
                lines.append(f"# {i}: {error}")
                for place in _places(i):
                    lines.append(f"{place} = {'False' if place[0] in 'PQ' else '0'}")
        body = "\n ".join(lines) or "pass"
        scope = dict(_SCOPE)
        exec(f"def block(R, U, P, Q, C, E, A):\n {body}\n", scope)
        return scope["block"]

    def _lines(self, k: int, i: Instruction, wanted: bool, masked: bool) -> list[str]:
        lines = []
        if i.base in GLOBAL or i.base in SHARED:
            lines += _memory(k, i, self.full, wanted)
        if i.base in ("STS", "STL") and k in self.stores:
            guard = _guard(i)
            words = max(1, i.width // 4)
            data = i.operands[-1]
            values = (
                [_source(data)] if words == 1 or data == "RZ" else [f"R[{int(data[1:]) + w}]" for w in range(words)]
            )
            values = values * words if len(values) < words else values
            kind = "local" if i.base == "STL" else "shared"
            lines.append(f"E.store_{kind}({_address(i.operands[0])}, {i.width}, [{', '.join(values)}], {guard})")
        if self.full and expects(i):
            guard = _guard(i)
            lines.append(f"E.expect({k}, {_source(i.operands[-1])}, {guard})")
        if self.full and i.base in ("UTMASTG", "UTMAREDG"):
            guard = _guard(i)
            lines.append(f"E.copy_out({k}, {guard})")
        if not wanted or i.base in BRANCHES:
            return lines
        if i.base in ("ATOMG", "ATOM"):
            target = i.operands[1] if flow.is_predicate(i.operands[0]) else i.operands[0]
            if target != "RZ":
                lines += _assignments(i, (["True"] if flow.is_predicate(i.operands[0]) else []) + ["t"], masked)
        elif i.base == "LDG" and not flow.is_floating(i):
            lines.append(f"t = E.observe({_address(i.operands[-1]) if self.full else '0'})")
            lines += _assignments(i, ["t"], masked)
        elif flow.is_floating(i):
            places = i.operands[: flow.destinations(i)]
            values = ["False"] * len(places) if flow.is_predicate(places[0]) else ["0"] * flow.registers_written(i)
            lines += _assignments(i, values, masked)
        elif i.base in ("LDS", "LDL"):
            kind = "local" if i.base == "LDL" else "shared"
            words = max(1, i.width // 4)
            lines.append(
                f"t = E.load_{kind}({_address(i.operands[-1])}, {i.width}, "
                f"{'S8' in i.modifiers or 'S16' in i.modifiers})"
            )
            lines += _assignments(i, [f"t[{w}]" for w in range(words)], masked)
        else:
            lines += _assignments(i, _result(i), masked)
        return lines


def prepared(code: Code, full: bool) -> Program:
    """The code's ``Program``, made once."""
    if ("program", full) not in code.memo:
        code.memo["program", full] = Program(code, full)
    return code.memo["program", full]
