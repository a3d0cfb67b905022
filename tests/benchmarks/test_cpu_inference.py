"""What benchmarks.cpu and benchmarks.paper compare and write, with networks that are small and a clock that is told."""

import json

import pytest
import torch

from benchmarks import cpu, libraries, paper


def test_ratios_are_of_pairs_in_turns(monkeypatch):
    """Of two variants whose times double from round to round, one always three times the other's."""
    clock, order = [0.0], []
    monkeypatch.setattr(cpu.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(cpu.time, "process_time", lambda: clock[0] / 2)

    def call(name, factor):
        def step():
            order.append(name)
            clock[0] += factor * 2 ** (len(order) // 4)

        return step

    monkeypatch.setattr(cpu, "ROUNDS", (5, 5))
    found = cpu.in_turns({"a": call("a", 1.0), "b": call("b", 3.0)}, {"b": "a"}, seconds=0)
    assert order[2:] == ["a", "a", "b", "b"] * 5
    assert found["b"]["over"] == "a" and found["b"]["rounds"] == 5 and "over" not in found["a"]
    assert found["b"]["clock_ms"] == pytest.approx(2 * found["b"]["cpu_ms"], rel=0.01)
    assert 3 <= found["b"]["clock ratio"]["median"] <= 6


def test_a_row(monkeypatch, tmp_path, capsys):
    """Without other libraries: over plain PyTorch, with the same path told from the other by the environment."""
    monkeypatch.setattr(libraries, "problem", lambda library: "left out")
    monkeypatch.setattr(cpu, "SIZES", {"b0": 32})
    monkeypatch.setattr(cpu, "ROUNDS", (5, 5))
    threads = torch.get_num_threads()
    try:
        options = ["--networks", "b0", "--batches", "1", "--threads", "1", "--dtypes", "float32", "--seconds", "0"]
        assert cpu.main([*options, "--out", str(tmp_path / "out.json")]) == 0
    finally:
        torch.set_num_threads(threads)
    (row,) = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert set(row["variants"]) == {"ours", "plain"} and row["variants"]["ours"]["over"] == "plain"
    assert "b0, batch 1, 1 thread(s), float32" in capsys.readouterr().out


def test_plain_is_plain(monkeypatch):
    seen = []
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    cpu.plain(lambda x: seen.append((x, cpu.os.environ["EFFKERNELS_BACKEND"])))(3)
    assert seen == [(3, "reference")] and cpu.os.environ["EFFKERNELS_BACKEND"] == "auto"


def test_sizes_beside_the_paper():
    """B1's parameters and multiply-adds, counted as the paper counts."""
    from efficientnet import create_model

    size = paper.size_of(create_model("efficientnet_b1").eval(), 240)
    (_, parameters, macs, _) = paper.GROUPS[0][1]["efficientnet_b1"]
    assert size["parameters_m"] == pytest.approx(parameters, abs=0.1) and size["macs_b"] == pytest.approx(
        macs, rel=0.05
    )


def test_paper_without_timm(monkeypatch, capsys):
    monkeypatch.setattr(libraries, "problem", lambda library: "timm is not installed")
    assert paper.main([]) == 2
    assert "timm is not installed" in capsys.readouterr().err
