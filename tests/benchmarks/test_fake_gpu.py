"""Everything that is for a GPU, on a stand-in for one (support/fake_gpu.py): no line of it may wait for a GPU to run
for the first time.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import report, results
from benchmarks.results import NOT_YET

ROOT = Path(__file__).parents[2]
PATHS = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"

TINY = "efficientnet_d0.1_w0.1_r32"  # seven blocks
SUITE = """
import pytest

from benchmarks.machine import clock
from benchmarks.shapes import Depthwise, Model
from efficientnet import create_model


class Shallow(Model):
    def build(self, fused, device=None):
        settings = {{"fused": fused, "drop_rate": 0.0, "drop_path_rate": 0.0, "device": device}}
        return create_model("{TINY}", **settings)


SHAPES = {{"b0": [{shape}]}}
STEPS = {steps}
LATENCY = {latency}


@pytest.mark.benchmark(timer=clock)
def test_{kind}(gpu_benchmark):
    gpu_benchmark()
"""
FEW = "not timm and not torchvision and not (test_model and (eager or default))"
INHERITED = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET" and not k.startswith("PYTEST_")}
ENVIRONMENT = INHERITED | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}


def run_suite(folder):
    """A layer's, a network's and its latency's rows on the stand-in, each saved as a campaign does. The network is a
    tiny one.
    """
    suites = {
        "depthwise": {"shape": "Depthwise(8, 9, 3, 2)", "steps": (False, True), "latency": False},
        "model": {"shape": 'Shallow("b0", 32)', "steps": (True,), "latency": False},
        "latency": {"shape": 'Shallow("b0", 32)', "steps": (False,), "latency": True},
    }
    for kind, what in suites.items():
        (folder / f"test_{kind}.py").write_text(SUITE.format(kind=kind, TINY=TINY, **what))
    plugins = (
        "-c",
        str(ROOT / "pyproject.toml"),
        f"--rootdir={ROOT}",
        "-p",
        "support.fake_gpu",
        "-p",
        "benchmarks.conftest",
    )
    how = (
        "--benchmark-only",
        "-p",
        "no:cacheprovider",
        f"--save-rows={folder / 'out'}",
        f"--benchmark-json={folder}/all.json",
    )
    command = [sys.executable, "-m", "pytest", "-q", *plugins, *how, "--batch-size=2", "-k", FEW, str(folder)]
    done = subprocess.run(command, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr


def rows_of(folder, kind):
    """{step and variant: row}"""
    rows = [row["extra_info"] for row in json.loads((folder / "all.json").read_text())["benchmarks"]]
    return {(row["step"], row["variant"]): row for row in rows if row["kind"] == kind}


def check(row):
    assert row["peak_memory_mb"] == (13.998 if re.search("max-autotune|reduce-overhead", row["variant"]) else 4.999)
    assert row["launches"] > 0 and sum(row["kernels_ms"].values()) > 0 and "time_over" not in row
    assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
    assert (row["device"], row["driver"], row["cuda"], row["cudnn"]) == (
        "NVIDIA H100 80GB HBM3",
        "580.1",
        "13.0",
        91000,
    )
    assert row["copy_gb_per_s"] > 0 and set(row["errors"]) == set(row["eager_errors"])


def test_the_suite_and_its_report(tmp_path):
    run_suite(tmp_path)
    check_layer(tmp_path)
    check_network_and_latency(tmp_path)
    check_report(tmp_path)


def check_layer(folder):
    rows = rows_of(folder, "depthwise")
    assert len(rows) == 2 * 6
    for (_, variant), row in rows.items():
        check(row)
        graphs = re.search("max-autotune|reduce-overhead", variant)
        assert row["timing"] == ("events, queued ahead, graphs of its own" if graphs else row["timing"]), (
            "never captured twice"
        )
        assert row["timing"].startswith(("graph", "events, queued ahead")) and row["dtype"] == "bfloat16"
    assert set(rows["training", "ours"]["errors"]) == {"out", "dx", "weights"}


def check_network_and_latency(folder):
    rows, latency = rows_of(folder, "model"), rows_of(folder, "latency")
    assert len(rows) == 4 and {row["timing"] for row in rows.values()} == {"events"}
    timings = {variant: row["timing"] for (_, variant), row in latency.items()}
    graphs = {"channels_last": "graph", "compile-default": "graph", "ours": "graph"}
    assert timings == graphs | {"compile-reduce-overhead": "events, queued ahead, graphs of its own"}
    for row in (*rows.values(), *latency.values()):
        check(row)
    assert {row["batch_size"] for row in latency.values()} == {1}


def check_report(folder):
    assert len(results.load(folder / "out")) == 12 + 4 + 4
    readme = folder / "README.md"
    readme.write_text("\n".join(report.MARKERS))
    assert report.main([str(folder / "out"), "--readme", str(readme)]) == 0
    text = (folder / "out" / "report.md").read_text()
    assert "NVIDIA H100 80GB HBM3, bfloat16, copy bandwidth" in text and "driver 580.1, cuda 13.0, cudnn 91000" in text
    assert re.search(rf"\| B0 \| {NOT_YET} \| {NOT_YET} \| [\d,]+ \| [\d.]+ \| [\d.]+ \|", readme.read_text())
    assert {path.name for path in (folder / "out").glob("*.png")} == {
        "roofline.png",
        "speed.png",
        "kernels.png",
        "memory.png",
    }


COMMAND = """
import json, sys
from support import fake_gpu
fake_gpu.install()
from efficientnet import cli
code = cli.main(sys.argv[1:])
print(json.dumps(fake_gpu.CALLS), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.parametrize(
    "arguments, timing, baseline_timing",
    [
        (
            "--mode infer --cuda-graph --baseline compile-reduce-overhead",
            "graph",
            "events, queued ahead, graphs of its own",
        ),
        ("--mode train --baseline compile", "events", "events"),
    ],
)
def test_the_command(arguments, timing, baseline_timing):
    sizes = "--img-size 32 --batch-size 2 --num-warm-iter 1 --num-bench-iter 3 --device cuda --results-format json"
    command = [sys.executable, "-c", COMMAND, "benchmark", "--model", TINY, *arguments.split(), *sizes.split()]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    ours, other = json.loads(done.stdout)
    mode = arguments.split()[1]
    assert (ours["timing"], other["timing"]) == (timing, baseline_timing)
    for record in (ours, other):
        assert (
            record[f"{mode}_launches"] > 0
            and record["dtype"] == "bfloat16"
            and record["device"] == "NVIDIA H100 80GB HBM3"
        )
    assert ours[f"{mode}_peak_memory_mb"] == 5.0 and ours[f"{mode}_memory_ratio"] in (1.0, 0.357)
    calls = json.loads(done.stderr.splitlines()[-1])
    assert (
        calls.count("compiler.reset") == 1
        and f"compile {arguments.split('compile')[1].lstrip('-') or 'default'}" in calls
    )


FITTED = """
import sys
import torch
from support import fake_gpu
fake_gpu.install()
torch.profiler.profile = fake_gpu.Launches
from effkernels.tools.simulator import fit
fit.FITTED, fit.FACTORS = ("barrier", "program_start"), (2.0,)
from benchmarks import fitted
kept, write = [], fitted.write
def keep(path, result):
    write(path, result)
    kept.append(("predicted_us" in result["launches"][0], result.get("left")))
fitted.write = keep
import atexit
atexit.register(lambda: print(kept, file=sys.stderr))
sys.exit(fitted.main(sys.argv[1:]))
"""


def test_measured_beside_predicted(tmp_path):
    """B0's inference on the stand-in, where its n-th launch takes n microseconds."""
    pytest.importorskip("triton")
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", FITTED, "--mode", "infer", "--batch-size", "1", "--out", str(tmp_path / "f.json")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "f.json").read_text())
    assert [launch["measured_us"] for launch in result["launches"]] == pytest.approx(
        range(1, 1 + len(result["launches"]))
    )
    assert {launch["kernel"] for launch in result["launches"]} >= {"stem_forward_kernel", "depthwise_forward_kernel"}
    assert all(0.1 < launch["predicted_us"] < 1000 for launch in result["launches"])
    assert set(result["constants"]) <= {"barrier", "program_start"} and result["after"] <= result["before"]
    assert (result["trials"], result["left"], result["compared"]) == (3, 0, 24)
    assert result["device"] == "NVIDIA H100 80GB HBM3" and result["machine"]["arch"] == 90
    assert done.stdout.count("measured ") == len(result["launches"]) and "% off" in done.stdout
    written = done.stderr.splitlines()[-1]  # after each part: what was measured, predictions, none and each constant
    assert written == str([(False, None), (True, None), (True, 2), (True, 1), (True, 0), (True, 0)])
