"""Machine code without a GPU: the table in git covers every shipped configuration, and compiling again gives what it
says.

Triton's own compiler runs in processes without the interpreter. A digest of sources, types, constants and compiler
tells whether a row is current, so only a sample is compiled; with another Triton than the table's, a part of the
configurations is compiled instead.
"""

import importlib
import importlib.metadata
import json
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from support.interpreter import HAS_TRITON

TABLE = Path(__file__).parents[2] / "effkernels/configs/static_sm90.json"
# Kernels that pass over activation tensors once, in a loop or as a whole: nothing else in the loop is loaded from
# memory.
STREAMING = {
    "depthwise_forward_kernel",
    "depthwise_backward_kernel",
    "statistics_kernel",
    "apply_kernel",
    "gradient_sums_kernel",
    "apply_backward_kernel",
    "pool_kernel",
}
# Their loops also load drop-path's mask, or the largest of them is over weights.
WITH_OTHERS = {"gradient_reduce_kernel"}
# Matrix products of activations with weights, which are fp32 and may be narrow.
MIXED = {
    "pointwise_forward_kernel",
    "expand_pass_kernel",
    "expand_data_kernel",
    "expand_weight_kernel",
}

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def inspect(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "effkernels.inspect", "--json", *args], capture_output=True, text=True, env=env
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def described(row):
    from effkernels.tools import cost_table

    return f"{row['digest']} {cost_table.described(row)}"


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """``inspect`` whose answers all workers of pytest-xdist share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent

    def ask(*args):
        answer = folder / f"inspect{''.join(args)}.json"
        with FileLock(f"{answer}.lock"):
            if not answer.exists():
                answer.write_text(json.dumps(inspect(*args)))
        return json.loads(answer.read_text())

    return ask


@pytest.fixture(scope="session")
def current():
    """The table in git, or None if it was made with another Triton than the one that is installed."""
    table = json.loads(TABLE.read_text())
    return table if table["triton"] == importlib.metadata.version("triton") else None


@pytest.fixture(scope="session")
def sm90(current, once):
    """Rows of every shipped configuration, or, without a current table, of a part of them compiled now."""
    return once("--fresh") if current is None else current["rows"]


def test_every_shipped_configuration_has_a_current_row(current, once):
    if current is None:
        pytest.skip("the table was made with another Triton; a part is compiled instead")
    answer = once("--check")
    outdated = {"without a current row": answer["missing"], "that ship no more": answer["stale"]}
    assert not any(outdated.values()), f"run python -m effkernels.inspect --update: {outdated}"


def test_compiling_again_gives_the_rows_of_the_table(current, once):
    """The shortest of each kernel, and a few others: a row edited by hand, or read off another way, is seen."""
    if current is None:
        pytest.skip("the table was made with another Triton; a part is compiled instead")
    rows = {row["digest"]: row for row in current["rows"]}
    compiled = once("--sample")
    for of in ("kernel", "dtype"):
        assert {row[of] for row in compiled} == {row[of] for row in current["rows"]}
    assert [(row, rows[row["digest"]]) for row in compiled if row != rows[row["digest"]]] == []


def test_every_kernel_is_in_the_table(sm90):
    import effkernels.kernels

    # The interpreter's stand-ins and the compiler's functions both carry the kernel's name.
    defined = set()
    for module in pkgutil.iter_modules(effkernels.kernels.__path__):
        defined |= {
            name
            for name in vars(importlib.import_module(f"effkernels.kernels.{module.name}"))
            if name.endswith("_kernel")
        }
    assert {row["kernel"] for row in sm90} == defined
    assert STREAMING | WITH_OTHERS | MIXED <= defined


def test_no_configuration_spills_on_sm90(sm90):
    assert [(described(row), row["spills"]) for row in sm90 if row["spills"]] == []


def test_activation_loads_are_16_bytes_wide_on_sm90(sm90):
    """For C % 8 == 0. Loads inside the loop are the activations; kernels without a loop also load narrow parameter
    vectors."""
    narrow = []
    for row in sm90:
        loads = row["loads"]
        if (row["kernel"] in STREAMING and row["loop"] and loads != [16]) or (
            row["kernel"] in STREAMING | WITH_OTHERS | MIXED and 16 not in loads
        ):
            narrow.append((described(row), loads))
    assert narrow == []


def test_depthwise_forward_keeps_to_its_goal_or_says_why_not(sm90):
    """Instructions an output: at stride 1 in bf16, as training runs it, within the goal; elsewhere a reason is
    printed."""
    from effkernels.tools.cost_table import goal_of

    goals = [(row, goal_of(row)) for row in sm90 if goal_of(row) is not None]
    kept = [row for row, (most, why) in goals if not why]
    assert {(row["constants"]["K"], "norm1" not in row["constants"]) for row in kept} == {
        (3, False),
        (3, True),
        (5, False),
        (5, True),
    }
    assert [
        (described(row), row["per_element"]) for row, (most, why) in goals if row["per_element"] > most and not why
    ] == []


def test_tanh_is_one_special_function_op_in_bf16_only(sm90):
    from effkernels.tools.cost_table import DEPTHWISE_FORWARD

    for row in sm90:
        fast, c = "TANH" in row["special"], row["constants"]
        if row["dtype"] != "bfloat16":
            assert not fast, described(row)
        elif row["kernel"] in DEPTHWISE_FORWARD:
            silu = ("norm1" not in c and c["ACT1"] == "silu") or ("norm2" not in c and c["ACT2"] == "silu")
            assert fast == silu, described(row)


@pytest.mark.parametrize("arch", [100, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 89))])
def test_one_configuration_per_kernel_on_other_architectures(arch, sm90):
    rows = inspect("--arch", str(arch), "--one-per-kernel")
    assert {row["kernel"] for row in rows} == {row["kernel"] for row in sm90}
    assert [(described(row), row["spills"]) for row in rows if row["spills"]] == []


# ---- digests and the floors
# ------------------------------------------------------------------------------------------------------

DIGESTS = """
import dataclasses, json, sys, types
import triton, triton.language as tl
from effkernels.tools import launches

def build(source, name="toy_kernel", offset=0):
    path = f"{sys.argv[1]}/toy{abs(hash((source, offset)))}.py"
    open(path, "w").write("import triton\\nimport triton.language as tl\\n" + "\\n" * offset + source)
    module = types.ModuleType("toy")
    exec(compile(open(path).read(), path, "exec"), module.__dict__)
    return getattr(module, name)

BASE = '''
SCALE = tl.constexpr(2)

@triton.jit
def helper(x):
    "Twice x."
    return x * SCALE  # a comment

@triton.jit
def toy_kernel(x, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x + i, helper(tl.load(x + i, mask=i < n, other=0.0)), mask=i < n)
'''
import torch
x = torch.empty(64, device="meta")

def digest(source=BASE, offset=0, x=x, n=17, B=32, arch=90, **options):
    launches.source_digest.cache_clear()
    return launches.Launch(build(source, offset=offset), {"x": x, "n": n, "B": B}, options, (1,)).digest(arch)

same = [
    digest(), digest(offset=5), digest(n=19), digest(x=torch.empty(7, device="meta")),
    digest(BASE.replace("  # a comment", "").replace("Twice x.", "Doubled x.").replace("x * SCALE", "x  *  SCALE")),
]
other = [
    digest(BASE.replace("x * SCALE", "SCALE + x")), digest(BASE.replace("constexpr(2)", "constexpr(3)")),
    digest(BASE.replace("other=0.0", "other=1.0")), digest(n=32), digest(n=2**40),
    digest(x=x.bfloat16()), digest(B=64), digest(arch=80),
    digest(num_warps=8), digest(BASE.replace("    i = tl", "    if B > 1:\\n        n = n\\n    i = tl")),
]
triton.__version__ = "0"
other.append(digest())
print(json.dumps([same, other]))
"""


def test_digests_change_with_the_machine_code_only(tmp_path):
    """Not with comments, docstrings, lines or sizes; but with a helper's code or a constant, types, options and the
    compiler."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", DIGESTS, str(tmp_path)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    same, other = json.loads(done.stdout)
    assert len(set(same)) == 1
    assert len(set(other)) == len(other) and not set(same) & set(other)


def test_floors_by_hand():
    from effkernels.tools.cost_table import GPUS

    # bf16 read and written once at 4.3 TB/s; 27 instructions at 132 * 4 schedulers and 1.755 GHz take as long (design
    # of the kernels).
    floors = GPUS["h200"].floors({"per_element": 27.0, "fma": 9.0, "mufu": 1.0}, 4)
    assert floors == pytest.approx({"bytes": 0.930, "issue": 0.911, "FMA": 0.304, "SFU": 0.270}, abs=1e-3)
    assert GPUS["a100"].floors({"per_element": 0.0, "fma": 64.0, "mufu": 0.0}, 0)["FMA"] == pytest.approx(
        1e12 / (108 * 1.41e9)
    )


def test_update_compiles_what_is_missing_only(tmp_path, monkeypatch):
    from effkernels.tools import cost_table

    class Named(str):
        def digest(self, arch):
            return f"{self}{arch}"

    compiled = []

    def rows(launches, arch, processes):
        for launch in launches:
            compiled.append(launch)
            if launch == "stop":
                raise KeyboardInterrupt
            yield {
                "digest": launch.digest(arch),
                "kernel": launch,
                "dtype": "float32",
                "constants": {"K": 3},
                "instructions": len(launch),
            }

    monkeypatch.setattr(cost_table, "compiled_rows", rows)
    path = tmp_path / "tables" / "static.json"
    assert cost_table.update(path, [Named("a"), Named("b")], 90) == (2, 0)
    assert cost_table.update(path, [Named("b"), Named("c")], 90) == (1, 1)
    with pytest.raises(KeyboardInterrupt):
        cost_table.update(path, [Named("b"), Named("d"), Named("stop"), Named("e")], 90)
    assert compiled == ["a", "b", "c", "d", "stop"]
    assert [row["digest"] for row in cost_table.read_table(path)["rows"]] == ["b90", "d90"], "what was compiled is kept"
    assert len(path.read_text().splitlines()) == 4, "one row a line"
    path.write_text("{}")
    with pytest.raises(ValueError, match=f"{path} is not a table of static costs"):
        cost_table.read_table(path)
