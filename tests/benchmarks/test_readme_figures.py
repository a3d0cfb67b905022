"""Figures in the README's text are those of the result files in git."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def test_launches_and_bytes_kept():
    static = json.loads((ROOT / "benchmarks/static.json").read_text(encoding="utf-8"))
    inference, training = (static["networks"][f"b0 {step}"]["launches"] for step in ("inference", "training"))
    assert f"B0 takes {inference} launches in inference and {training} in a training step" in README
    small, recomputed, large = (
        static["kept"][f"b0, {key}"]["of_plain"] for key in ("64 pixels, keep", "64 pixels, recompute", "224 pixels, keep")
    )
    assert f"{large:.2f} at 224 pixels and {small:.2f} at 64; {recomputed:.2f} at 64 with recomputation" in README


def test_accuracy_on_digits():
    runs = json.loads((ROOT / "benchmarks/results/digits.json").read_text(encoding="utf-8"))["seeds"]
    accuracies, seconds = (sorted(run[key] for run in runs.values()) for key in ("accuracy", "cpu_s"))
    measured = f"{100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f} % held-out accuracy (seeds 0 to {len(runs) - 1})"
    assert f"{measured} in {seconds[0]:.0f} to {seconds[-1]:.0f} s of CPU time" in README


@pytest.mark.parametrize("row", ["digits 0 to 4, until 3", "random, until 3", "random, until head", "digits 0 to 4, until head"])
def test_transfer(row):
    runs = json.loads((ROOT / "benchmarks/results/digits.json").read_text(encoding="utf-8"))["transfer"]
    trunk, until = row.split(", until ")
    trained = "classifier" if until == "head" else "stages 4 to 6, head, classifier"
    how = " (`--freeze-until head`)" if row == "digits 0 to 4, until head" else ""
    trunk = trunk if trunk == "random" else f"of {trunk}"
    assert f"| {trunk} | {trained}{how} | {', '.join(f'{100 * run[row]:.1f} %' for run in runs.values())} |" in README
