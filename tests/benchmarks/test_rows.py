"""The benchmark suite as its user runs it, on a machine without a GPU."""

import datetime
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import compare, conftest, rows
from benchmarks.machine import Machine
from benchmarks.results import load
from benchmarks.variants import COMPILE_MODES

ROOT = Path(__file__).parents[2]


def run(*args, **env):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--benchmark-only", *args]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and benchmarks refuse the interpreter.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env = inherited | {"CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def rows_of(path):
    return {row["extra_info"]["variant"]: row["extra_info"] for row in json.loads(path.read_text())["benchmarks"]}


def test_rows_without_a_gpu(tmp_path):
    done = run(
        "benchmarks/test_block.py",
        "benchmarks/test_latency.py",
        "benchmarks/test_model.py",
        "-k",
        "(32to16 and inference) or (b4 and eager) or (test_latency and b1 and ours)",
        "--compile-mode=max-autotune",
        f"--benchmark-json={tmp_path}/b.json",
        f"--save-rows={tmp_path}/saved",
    )
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA GPU: on a CPU one block and B0 in inference are compiled" in done.stdout
    assert "on a CPU only B0's shapes are measured" in done.stdout and "there are no graphs on a CPU" in done.stdout
    rows = rows_of(tmp_path / "b.json")
    assert set(rows) == {"eager", "channels_last", "ours"}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["schedule_mb"] / row["median_ms"])
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["dtype"] == "float32" and row["torch"] and row["device"] and row["timing"] == "process"
        assert "peak_memory_mb" not in row and "launches" not in row
    assert rows["eager"]["path"] == "PyTorch" and rows["ours"]["path"] == "fused kernels"
    assert [rows[name]["layout"] for name in ("eager", "channels_last", "ours")] == ["NCHW", "NHWC", "NHWC"]
    assert (
        set(rows["ours"]["time_over"]) == {"channels_last"} and rows["ours"]["time_over"]["channels_last"]["median"] > 0
    )
    document = json.loads((tmp_path / "b.json").read_text())
    assert "node" not in document["machine_info"] and set(document["commit_info"]) == {"id", "time", "dirty"}
    assert len(document["commit_info"]["id"]) == 40 or not (ROOT / ".git").exists()
    assert all(datetime.date.fromisoformat(row["date"]) and row["timm"] for row in rows.values())
    assert {row["variant"]: row["median_ms"] for row in load(tmp_path / "saved")} == {
        name: row["median_ms"] for name, row in rows.items()
    }


KERNELS = """
from dataclasses import dataclass

import pytest

from benchmarks.machine import clock
from benchmarks.shapes import Depthwise, FusedDepthwiseConvBNAct

class Kernel(FusedDepthwiseConvBNAct):
    how = "right"

    def forward(self, x):
        out = super().forward(x)
        if self.how == "wrong":
            out[:, 3] *= 1.001
        for _ in range(40 if self.how == "slower" else 0):
            out = out + 0
        return out

@dataclass(frozen=True)
class Changed(Depthwise):
    how: str = "right"

    def __str__(self):
        return self.how

    def build(self, fused):
        if not fused:
            return super().build(fused)
        kernel = Kernel(self.channels, self.kernel_size, self.stride)
        kernel.how = self.how
        return kernel

SHAPES = {"b0": [Changed(24, 28, 3, 1, how) for how in ("right", "wrong", "slower")]}
STEPS = (False,)

@pytest.mark.benchmark(timer=clock)
def test_kernel(gpu_benchmark):
    gpu_benchmark()
"""


def test_a_wrong_kernel_is_refused_and_a_slower_one_is_caught(tmp_path, capsys):
    """Wrong: one channel in 24 off by a thousandth. Slower: 40 more passes over the output."""
    suite, path = tmp_path / "test_kernels.py", tmp_path / "all.json"
    suite.write_text(KERNELS)
    how = (
        "-c",
        "pyproject.toml",
        f"--rootdir={ROOT}",
        "-p",
        "benchmarks.conftest",
        f"--benchmark-json={path}",
        "-k",
        "ours",
    )
    done = run(str(suite), *how)
    assert done.returncode == 1, done.stdout
    assert "out: relative L2 error" in done.stdout and "1 failed, 2 passed" in done.stdout
    timed = {row["extra_info"]["shape"]: row for row in json.loads(path.read_text())["benchmarks"]}
    assert set(timed) == {"right", "slower"}, "the wrong one is an error, not a number"
    for name, row in timed.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"benchmarks": [row | {"fullname": "kernel"}]}))
    right, slower = (str(tmp_path / f"{name}.json") for name in ("right", "slower"))
    assert compare.main([right, right]) == 0
    assert compare.main([right, slower, "--threshold", "0.5"]) == 1
    assert "worse   kernel: median_ms" in capsys.readouterr().out


def test_ratios_are_of_the_first_to_the_second_and_say_how_sure_they_are():
    """On a machine whose step "slow" takes 3 s and "fast" 2 s, one pair in five much longer."""
    calls, seconds = [], {"slow": 3.0, "fast": 2.0}

    def stopwatch(step):
        calls.append(step)
        return seconds[step] * (9 if len(calls) % 10 == 1 else 1)

    machine = SimpleNamespace(rounds_for=lambda step: 7, stopwatch=SimpleNamespace(seconds=stopwatch))
    assert conftest.time_ratio(machine, "slow", "fast") == {"median": 1.5, "low": 1.5, "high": 1.5, "pairs": 60}
    assert calls[:4] == ["fast", "slow", "slow", "fast"]
    interval = conftest.median_interval([i / 100 for i in range(100, 0, -1)])
    assert interval == {"median": 0.505, "low": 0.41, "high": 0.6, "pairs": 100}
    assert conftest.median_interval([1.0, 3.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "pairs": 2}


def test_the_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        Machine.here()


def test_every_group_holds_the_baselines():
    from benchmarks import test_block, test_latency, test_model, test_pointwise

    plain = {"eager", "channels_last", *(f"compile-{mode}" for mode in COMPILE_MODES)}
    for module, names in ((test_block, plain), (test_pointwise, plain), (test_model, plain)):
        cases = {}
        for row in rows.rows_of(module):
            cases.setdefault(row.case, set()).add(row.variant.name)
        for found in cases.values():
            libraries = (
                {f"{library}-{name}" for library in ("timm", "torchvision") for name in plain}
                if module is test_model
                else set()
            )
            assert found == names | libraries | {"ours"}
    assert (
        {row.model for row in rows.rows_of(test_model)}
        == {f"b{i}" for i in range(8)}
        == {row.model for row in rows.rows_of(test_latency)}
    )
    assert {row.variant.graph for row in rows.rows_of(test_latency)} == {True, False}, (
        "but for the mode that has graphs of its own"
    )
