"""Memory order in the machine code of kernels whose programs meet, read without a GPU.

A program hands over what it stored by an atomic operation with release semantics at GPU scope, by one thread for all:
between the last store and that operation must stand a barrier of the program, and in the machine code after it a fence.
What others handed over is read after an atomic operation with acquire semantics and a barrier, by loads past L1. In the
sources such an operation names its semantics (``sem=``), and such a load its cache modifier ``.cg``; operations
that hand out numbers only have Triton's default.
"""

import ast
import functools
import json
import re
from pathlib import Path

import pytest

import effkernels
from support.interpreter import HAS_TRITON
from support.python import run_python

# Slow until their run on the present kernels has been seen whole.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")]

KERNELS = Path(effkernels.__file__).parent / "kernels"
# Of a block, the stem and the head in training: the first launch of every kernel that is given counters.
COMPILE = """
import json, tempfile
import torch
from effkernels.tools import machine_code, shipped

bf16 = torch.bfloat16
launches = shipped.mbconv_launches(bf16, 80, 80, 3, 1, 6, 14, training=True, drop_path=0.2)
launches += shipped.stem_and_head_launches(bf16, 32, 320, 1280, training=True)
first = {}
for launch in launches:
    if any(t.dtype == torch.int32 for t in launch.tensors.values()):
        first.setdefault(launch.name, launch)
code = {}
for name, launch in first.items():
    kernel = machine_code.compile_launch(launch, ARCH)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        sass = machine_code._tool("nvdisasm", "-c", "-g", file.name)
    code[name] = kernel.asm["ptx"], sass
print(json.dumps(code))
"""


@functools.cache
def compiled(arch):
    """{kernel: (PTX, SASS)}."""
    return json.loads(run_python(COMPILE.replace("ARCH", str(arch))))


@functools.cache
def semantics(file):
    """{line: "acq_rel", "release", "acquire", "relaxed" or None} of the atomic operations of a source file."""
    path, found = KERNELS / file, {}
    if not path.exists():
        return found
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and getattr(node.func, "attr", "").startswith("atomic_"):
            sem = [k.value.value for k in node.keywords if k.arg == "sem"]
            found.update(dict.fromkeys(range(node.lineno, node.end_lineno + 1), sem[0] if sem else None))
    return found


def events(code):
    """[(kind, line of text, source)] of PTX or SASS; source is the (file, line) it was compiled from.

    Kinds: label, branch, jump, end, store, barrier, fence, atomic, load (that passes by L1), other.
    """
    ptx = ".visible .entry" in code
    files = dict(re.findall(r'\.file\s+(\d+) "(.*?)"', code)) if ptx else {}
    source, inlined, listed = ("", 0), False, []
    for line in code[code.index("{") if ptx else code.index(".text.") :].splitlines():
        text = line.strip()
        if ptx and (place := re.match(r"\.loc\s+(\d+) (\d+)", text)):
            if place[2] != "0":
                source = Path(files[place[1]]).name, int(place[2])
        elif place := re.match(r'//## File "(.*?)", line (\d+)', text):
            source = source if inlined else (Path(place[1]).name, int(place[2]))
            inlined = "inlined at" in text
        elif label := re.match(r"(\$\w+|\.L_\w+):", text):
            listed.append(("label", label[1], source))
        else:
            text = re.sub(r"^/\*[0-9a-f]+\*/\s*", "", text).rstrip(";, ")
            guard, body = re.match(r"(@!?U?%?[pP]\w+\s+)?(.*)", text).groups()
            kind = kind_of(body, guard)
            if kind == "load" and source[1] in semantics(source[0]):
                kind = "atomic"  # the assembler makes a load of an addition of 0
            listed.append((kind, text, source))
    return listed


KINDS = {
    "branch": r"bra|BRA",
    "end": r"ret\b|EXIT",
    "store": r"st\.(?:volatile\.)?global|STG",
    "barrier": r"bar\.sync|barrier\.sync|barrier\.cta\.sync|BAR\.SYNC",
    "fence": r"MEMBAR\.(?:ALL|SC)\.(?:GPU|SYS)",
    "atomic": r"atom\.|red\.|ATOM|REDG?\.",
    "load": r"ld\.global\S*\.cg|LDG\S*\.STRONG\.GPU",
}


def kind_of(body, guard):
    kind = next((kind for kind, pattern in KINDS.items() if re.match(pattern, body)), "other")
    if kind == "branch" and not guard:
        return "jump"
    return "other" if kind == "end" and guard else kind


def walked(listed, start, step):
    """What holds before each event: ``start`` at the first, ``step(index, state)`` after one; where ways meet the
    worse, the larger in each component. Events that no way reaches are left out."""
    labels = {text: i for i, (kind, text, _) in enumerate(listed) if kind == "label"}
    before, todo = {0: start}, [0]
    while todo:
        i = todo.pop()
        kind, text, _ = listed[i]
        after = step(i, before[i])
        targets = [labels[t] for t in re.findall(r"\$\w+|\.L_\w+", text)] if kind in ("branch", "jump") else []
        if kind == "branch" and "atomic" in (between := [kind for kind, *_ in listed[i + 1 : targets[0]]]):
            if not {"label", "barrier", "store", "jump", "end"} & set(between):
                targets = []  # one thread does it for all
        if kind not in ("jump", "end"):
            targets.append(i + 1)
        for target in targets:
            if target < len(listed):
                worse = tuple(map(max, before.get(target, after), after))
                if before.get(target) != worse:
                    before[target] = worse
                    todo.append(target)
    return before


def faults(code):
    """(what is wrong, how many operations hand over, how many loads of what others handed over)."""
    listed, ptx, wrong = events(code), ".visible .entry" in code, []
    named = {i: semantics(source[0]).get(source[1]) for i, (kind, _, source) in enumerate(listed) if kind == "atomic"}

    def step(i, state):
        """(what was stored: 0 fenced, 1 before a barrier, 2 not; 0 acquired and a barrier, 1 acquired, 2 neither)"""
        stored, acquired = state
        kind = listed[i][0]
        if kind == "store":
            stored = 2
        elif kind == "barrier":
            stored, acquired = min(stored, 1), 0 if acquired < 2 else 2
        elif kind == "fence" and stored < 2:
            stored = 0
        elif kind == "atomic" and named[i] in ("acquire", "acq_rel"):
            acquired = 1
        return stored, acquired

    before = walked(listed, (1, 2), step)
    handed = [i for i in before if named.get(i) in ("release", "acq_rel")]
    loads = [i for i in before if listed[i][0] == "load"]
    for i in handed:
        if before[i][0] > (1 if ptx else 0):
            wrong.append(f"no barrier{'' if ptx else ' and fence'} before {listed[i]}")
    for i in loads:
        if before[i][1]:
            wrong.append(f"{('', 'no barrier', 'nothing acquired')[before[i][1]]} before {listed[i]}")
    for i in named:
        scope = re.search(r"\.gpu\.(\w+)\." if ptx else r"(STRONG\.GPU)", listed[i][1])
        if scope is None or (ptx and scope[1] != (named[i] or "acq_rel")):
            wrong.append(f"{named[i]} at GPU scope was asked for: {listed[i]}")
    return wrong, len(handed), len(loads)


@pytest.mark.parametrize("arch", [90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def test_what_is_handed_over_is_ordered(arch, capsys):
    from support.atomics import kernels_with_atomics

    code = compiled(arch)
    assert set(code) == set(kernels_with_atomics()), "every kernel with an atomic operation, and no other"
    for name, (ptx, sass) in code.items():
        found = [faults(text) for text in (ptx, sass)]
        with capsys.disabled():
            operations, loads = zip(*(counts for _, *counts in found), strict=True)
            print(f"\n{name} sm_{arch}, PTX and SASS: {operations} operations hand over, {loads} loads of what was")
        for wrong, handed, loads in found:
            assert wrong == [], name
            assert handed and loads, name
        assert found[0][1] == found[1][1], f"{name}: an operation that hands over is missing in PTX or SASS"


# What is changed in PTX and SASS of a kernel, and what must be said.
BARRIERS = r"(?:bar\.sync|BAR\.SYNC)[^;]*;"
FAULTS = {
    "no barrier": (BARRIERS, "", "no barrier"),
    "no fence": (r"@?!?U?P?\d?\s*MEMBAR[^;]*;", "", "and fence"),
    "a relaxed operation": (r"\.acq_rel\.", ".relaxed.", "acq_rel at GPU scope"),
    "a smaller scope": (r"\.gpu\.acq_rel|\.STRONG\.GPU PT", ".cta.acq_rel", "at GPU scope"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_changed_machine_code_is_seen(fault):
    pattern, instead, message = FAULTS[fault]
    codes = [code for code in compiled(90)["gradient_reduce_kernel"] if re.search(pattern, code)]
    assert codes
    for code in codes:
        assert any(message in wrong for wrong in faults(re.sub(pattern, instead, code))[0])


def test_a_load_before_the_wait_is_seen():
    for code in compiled(90)["gate_backward_kernel"]:
        listed = events(code)
        load = next(text for kind, text, _ in listed if kind == "load")
        first = next(text for kind, text, _ in listed if kind == "store")
        assert any("nothing acquired" in wrong for wrong in faults(code.replace(first, f"{load};\n{first}", 1))[0])
