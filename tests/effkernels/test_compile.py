"""Machine code without a GPU: every shipped configuration compiled by Triton's own compiler, in processes without the interpreter."""

import json
import os
import subprocess
import sys

import pytest
from filelock import FileLock

# Kernels that read or write activation tensors; the others see only fp32 vectors, tiles of statistics and weights.
ACTIVATION_KERNELS = {
    "depthwise_forward_kernel",
    "depthwise_backward_kernel",
    "statistics_kernel",
    "apply_kernel",
    "gradient_sums_kernel",
    "apply_backward_kernel",
    "pool_kernel",
}


def inspect(*args):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-m", "effkernels.inspect", "--json", *args], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def described(row):
    c = row["constants"]
    settings = {k: c[k] for k in ("K", "STRIDE", "TW", "S", "BC", "BR", "RB", "PROLOGUE", "EPILOGUE", "BN1") if k in c}
    return f"sm_{row['arch']} {row['name']} {row['dtype']} {settings}"


@pytest.fixture(scope="session")
def sm90(tmp_path_factory):
    """The table of every shipped configuration, compiled once for all workers of pytest-xdist."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    table = folder / "sm90.json"
    with FileLock(folder / "sm90.lock"):
        if not table.exists():
            table.write_text(json.dumps(inspect("--arch", "90")))
    return json.loads(table.read_text())


def test_every_kernel_is_in_the_table(sm90):
    import importlib

    # The interpreter's stand-ins and the compiler's functions both carry the kernel's name.
    defined = set()
    for module in ("depthwise", "batchnorm", "squeeze_excite"):
        defined |= {name for name in vars(importlib.import_module(f"effkernels.kernels.{module}")) if name.endswith("_kernel")}
    assert {row["name"] for row in sm90} == defined
    assert ACTIVATION_KERNELS <= defined


def test_no_configuration_spills_on_sm90(sm90):
    assert [(described(row), row["spill_bytes"]) for row in sm90 if row["spill_bytes"]] == []


def test_activation_loads_are_16_bytes_wide_on_sm90(sm90):
    """For C % 8 == 0. Loads inside the loop are the activations; kernels without a loop also load narrow parameter vectors."""
    narrow = []
    for row in sm90:
        if row["name"] in ACTIVATION_KERNELS:
            widths = row["load_bytes"]
            if widths != [16] if row["loop"] else 16 not in widths:
                narrow.append((described(row), widths))
    assert narrow == []


def test_tanh_is_one_special_function_op_in_bf16_only(sm90):
    for row in sm90:
        fast = any(code.startswith("MUFU.TANH") for code in row["opcodes"])
        if row["dtype"] != "bfloat16":
            assert not fast, described(row)
        elif row["name"] == "depthwise_forward_kernel":
            assert fast == ("silu" in (row["constants"]["ACT1"] if row["constants"]["PROLOGUE"] else "", row["constants"]["ACT2"])
                            and (row["constants"]["PROLOGUE"] or row["constants"]["EPILOGUE"])), described(row)  # fmt: skip


@pytest.mark.parametrize("arch", [80, 89, 100])
def test_one_configuration_per_kernel_on_other_architectures(arch, sm90):
    rows = inspect("--arch", str(arch), "--one-per-kernel")
    assert {row["name"] for row in rows} == {row["name"] for row in sm90}
    assert [(described(row), row["spill_bytes"]) for row in rows if row["spill_bytes"]] == []
