"""Tables and plots of results: of none, of a GPU's, of a CPU's. The rows here are made up, and only here."""

import json

import pytest

from benchmarks import plan, report, shapes
from benchmarks.results import NOT_YET

GPU = {
    "device": "NVIDIA H200",
    "cuda": "13.0",
    "driver": "580",
    "cudnn": 9,
    "torch": "2.13",
    "triton": "3.7",
    "dtype": "bfloat16",
}
GPU |= {"copy_gb_per_s": 4300.0}


def model_row(name, step, variant, factor, **more):
    batch = plan.BATCH[name]
    milliseconds = factor * (1 + 3 * (step == "training")) * (1 + int(name[1]))
    row = {
        "kind": "model",
        "model": name,
        "shape": str(shapes.model(name)),
        "step": step,
        "variant": variant,
        "batch_size": batch,
    }
    row |= {
        "median_ms": milliseconds,
        "images_per_s": 1e3 * batch / milliseconds,
        "peak_memory_mb": 1e3 * factor,
        "share_of_copy": 0.5,
    }
    path = "fused kernels" if variant == "ours" else "PyTorch"
    return GPU | row | {"launches": 65, "gb_per_s": 2000.0, "path": path} | more


def kernels(count):
    return {
        f"{'a_rather_long_name_of_a_kernel_that_does_much' if i == 2 else 'kernel'}_{i}": 1.0 / (1 + i)
        for i in range(count)
    }


@pytest.fixture
def folder(tmp_path):
    """Results of B0 to B4 on an H200: ours 2, torch.compile 4 and 5, eager 8 ms and so on."""
    rows = []
    for name in ("b0", "b1", "b2", "b3", "b4"):
        for step in report.STEPS:
            rows.append(model_row(name, step, "ours", 2.0, kernels_ms=kernels(12)))
            rows.append(model_row(name, step, "channels_last", 8.0))
            rows += [
                model_row(name, step, f"compile-{mode}", factor)
                for mode, factor in (("default", 5.0), ("max-autotune", 4.0))
            ]
    rows.append(model_row("b0", "inference", "ours", 0.1) | {"kind": "latency", "batch_size": 1})
    layer = {"kind": "depthwise", "shape": str(shapes.blocks("b0")[0].depthwise), "step": "inference"}
    rows += [model_row("b0", "inference", name, f) | layer for name, f in (("ours", 0.02), ("eager", 0.08))]
    rows.append(
        {k: v for k, v in model_row("b0", "inference", "ours", 1e-6).items() if k != "cuda"}
        | {"device": "one thread of a CPU"}
    )
    (tmp_path / "results").mkdir()
    benchmarks = [{"fullname": str(i), "extra_info": row} for i, row in enumerate(rows)]
    (tmp_path / "results" / "all.json").write_text(json.dumps({"benchmarks": benchmarks}))
    return tmp_path / "results"


def readme(path, body="old"):
    path.write_text(f"# Title\n\n{report.MARKERS[0]}\n{body}\n{report.MARKERS[1]}\n\nrest\n")
    return path


def test_without_results(tmp_path, capsys):
    page = readme(tmp_path / "README.md")
    assert report.main([str(tmp_path / "none"), "--readme", str(page)]) == 0
    text = (tmp_path / "none" / "report.md").read_text()
    for line in text.splitlines():
        assert not (
            line.startswith(("| B", "| all", "GPU", "CPU:", "Speed", "Time", "Memory", "Tests")) and NOT_YET not in line
        ), line
    assert not any(
        character.isdigit()
        for line in text.splitlines()
        if line.startswith("| B")
        for character in line.split("|", 2)[2]
    )
    assert (
        page.read_text().count(NOT_YET) == 6 + 4
        and "old" not in page.read_text()
        and page.read_text().endswith("\nrest\n")
    )
    assert [path.name for path in (tmp_path / "none").glob("*.png")] == ["roofline.png"], "floors need no measurement"


def test_tables(folder, tmp_path, capsys):
    page = readme(tmp_path / "README.md")
    assert report.main([str(folder), "--readme", str(page)]) == 0
    text = (folder / "report.md").read_text()
    # 256 images in 2 ms; in 8 ms; in 4 ms, the better of two modes: 2 times as fast, half the memory.
    expected = "| B0 | 256 | 128,000 | 32,000 | 64,000 (compile-max-autotune) | 2.00 | 0.50 | 50% | 65 |"
    assert expected in text and "| B0 | 0.100 | not yet measured" in text and "| B7 | not yet measured |" in text
    assert "c32-112px-k3-s1, inference | 0.0200 | 0.0800 (eager) | 2,000 | 50% |" in text
    assert "NVIDIA H200, bfloat16, copy bandwidth 4,300 GB/s" in text and "driver 580, cuda 13.0, cudnn 9" in text
    assert "| B0 | 128,000 | 2.00 | 32,000 | 2.00 | 0.50 |" in page.read_text() and "B7" not in page.read_text()
    assert sorted(path.name for path in folder.glob("*.png")) == [
        "kernels.png",
        "memory.png",
        "roofline.png",
        "speed.png",
    ]
    before = page.read_text()
    assert report.main([str(folder), "--readme", str(page)]) == 0 and page.read_text() == before
    assert "updated" not in capsys.readouterr().out.splitlines()[-1]


def test_launches_beside_their_predictions(folder, tmp_path):
    """A kernel's launches together; how far off they are, and what was fitted."""
    names, times = ("a_kernel", "b_kernel", "a_kernel"), ((10.0, 5.0), (40.0, 44.0), (20.0, 16.0))
    launches = [
        {"kernel": name, "grid": [1], "measured_us": measured, "predicted_us": predicted}
        for name, (measured, predicted) in zip(names, times, strict=True)
    ]
    found = {"device": "NVIDIA H200", "model": "b0", "mode": "train", "batch": 256, "launches": launches}
    found |= {"before": 0.25, "after": 0.125, "constants": {"barrier": 36}}
    (folder / "fitted-train.json").write_text(json.dumps(found))
    assert report.main([str(folder), "--no-readme"]) == 0
    text = (folder / "report.md").read_text()
    assert "B0 train, 256 images, NVIDIA H200:" in text
    assert "| b_kernel | 40 | 44 | 1.10 |\n| a_kernel | 30 | 21 | 0.70 |" in text
    assert "Predictions are 25 % off, 12 % with what was fitted: {'barrier': 36}." in text
    assert "trials left" not in text
    (folder / "fitted-train.json").write_text(json.dumps(found | {"left": 7}))
    unfitted = {name: value for name, value in found.items() if name not in ("before", "after", "constants")}
    bare = [{name: value for name, value in launch.items() if name != "predicted_us"} for launch in launches]
    (folder / "fitted-infer.json").write_text(json.dumps(unfitted | {"mode": "infer", "launches": bare}))
    assert report.main([str(folder), "--no-readme"]) == 0
    text = (folder / "report.md").read_text()
    assert "{'barrier': 36}. The time was up with 7 trials left." in text and "B0 infer, 256 images" in text


def test_devices_dtypes_and_batches_are_not_mixed(folder):
    rows = report.results.load(folder)
    others = [
        model_row("b0", "inference", "ours", 1e-3, **other) for other in ({"device": "another"}, {"dtype": "float32"})
    ]
    assert {(row["device"], row["dtype"]) for row in report.gpu_rows([*others, *rows, *others])} == {
        ("NVIDIA H200", "bfloat16")
    }
    assert report.gpu_rows([row for row in rows if "cuda" not in row]) == []
    small = [
        model_row("b0", "inference", "compile-default", 1e-3, batch_size=8),
        model_row("b0", "inference", "channels_last", 1, batch_size=8),
    ]
    on_gpu = report.gpu_rows(rows)
    assert report.model_lines([*on_gpu, *small], "inference")[0] == report.model_lines(on_gpu, "inference")[0]


def test_ours_on_plain_layers_says_so(folder):
    rows = report.results.load(folder)
    assert "Not by fused kernels" not in report.readme_table(rows) + report.report(folder, rows, {})
    rows[0]["path"] = "PyTorch: Triton is not installed"
    line = "Not by fused kernels (PyTorch: Triton is not installed): model b0 inference."
    assert line in report.readme_table(rows) and line in report.report(folder, rows, {})


CPU = {
    "kind": "model",
    "shape": "b0-112px",
    "step": "training",
    "variant": "ours",
    "median_ms": 100.0,
    "device": "one thread of a CPU",
}
CPU |= {"dtype": "float32", "batch_size": 4, "torch": "2.13", "torchvision": "0.28", "date": "2026-11-24"}


def test_ratios_on_a_cpu(folder):
    ratio = {"median": 1.014, "low": 0.987, "high": 1.046, "pairs": 30}
    rows = [CPU | {"time_over": {"channels_last": ratio, "torchvision-channels_last": ratio | {"median": 0.98}}}]
    table = report.cpu_table(rows)
    shown = f"| b0-112px training, ours | 1.01 (0.99 to 1.05) | 0.98 (0.99 to 1.05) | {NOT_YET} |"
    assert shown in table and report.cpu_table([CPU, GPU]).count(NOT_YET) == 3
    line = report.cpu_line(rows)
    assert line.startswith("CPU: one thread of a CPU, float32, batch 4; torch 2.13, torchvision 0.28; 2026-11-24.")
    both = report.readme_table(rows + report.results.load(folder))
    assert shown in both and line in both and "NVIDIA H200" in both


@pytest.mark.parametrize("text", ["no markers", "{1}\n{0}", "{0}\n{0}\n{1}"])
def test_a_readme_without_markers(text, folder, tmp_path, capsys):
    page = tmp_path / "README.md"
    page.write_text(text.format(*report.MARKERS))
    assert report.main([str(folder), "--readme", str(page)]) == 2
    assert "must hold the markers" in capsys.readouterr().err and page.read_text() == text.format(*report.MARKERS)


def test_the_projects_readme_holds_what_its_results_say():
    rows = report.results.load(report.README.parent / "benchmarks" / "results")
    text = report.README.read_text(encoding="utf-8")
    shown = text.split(report.MARKERS[0])[1].split(report.MARKERS[1])[0].strip("\n")
    assert shown == report.readme_table(rows), "run python -m benchmarks.report benchmarks/results"


@pytest.mark.parametrize("step", report.STEPS)
def test_on_a_cpu_the_projects_results_are_no_slower_than_torchvision(step):
    rows = report.results.load(report.README.parent / "benchmarks" / "results")
    row = report.find(report.cpu_rows(rows), step=step, variant="ours")
    assert row["time_over"]["torchvision-channels_last"]["low"] <= 1, "slower, and not by chance"
