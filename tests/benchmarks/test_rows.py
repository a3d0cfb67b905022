"""The benchmark suite as its user runs it, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.machine import Machine

ROOT = Path(__file__).parents[2]


def run(*args, **env):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rs", "--benchmark-only", *args]
    # pytest-benchmark measures nothing in a worker of pytest-xdist, and benchmarks refuse the interpreter.
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
    env = inherited | {"CUDA_VISIBLE_DEVICES": ""} | env
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_rows_without_a_gpu(tmp_path):
    done = run(
        "benchmarks/test_block.py", "-k", "192to192 and inference", "--compile-mode=max-autotune", f"--benchmark-json={tmp_path}/b.json"
    )
    assert done.returncode == 0, done.stdout
    assert "needs a CUDA GPU: on a CPU one block is compiled" in done.stdout
    rows = {row["extra_info"]["variant"]: row["extra_info"] for row in json.loads((tmp_path / "b.json").read_text())["benchmarks"]}
    assert set(rows) == {"eager", "channels_last", "ours"}
    for row in rows.values():
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["gb_per_s"] == pytest.approx(row["schedule_mb"] / row["median_ms"])
        assert row["share_of_copy"] == pytest.approx(row["gb_per_s"] / row["copy_gb_per_s"])
        assert row["dtype"] == "float32" and row["torch"] and row["device"]
        assert "peak_memory_mb" not in row
    assert rows["eager"]["path"] == "PyTorch" and "on the CPU" in rows["ours"]["path"]
    assert rows["ours"]["time_over_plain"] > 0 and "time_over_plain" not in rows["channels_last"]


def test_b4_is_skipped_without_a_gpu():
    done = run("benchmarks/test_model.py", "-k", "b4 and eager")
    assert done.returncode == 0, done.stdout
    assert "on a CPU only B0's shapes are measured" in done.stdout and "2 skipped" in done.stdout


def test_the_interpreter_is_not_timed(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        Machine.here()
