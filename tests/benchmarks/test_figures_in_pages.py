"""Figures in the text of README and docs are those of the result files in git."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]


def words(page: str) -> str:
    """A page as one line."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


def test_launches_and_bytes_kept():
    static = json.loads((ROOT / "benchmarks/static.json").read_text(encoding="utf-8"))
    inference, training = (static["networks"][f"b0 {step}"]["launches"] for step in ("inference", "training"))
    page = words("docs/kernels.md")
    assert f"B0 takes {inference} launches in inference and {training} in a training step" in page
    small, recomputed, large = (
        static["kept"][f"b0, {key}"]["of_plain"]
        for key in ("64 pixels, keep", "64 pixels, recompute", "224 pixels, keep")
    )
    assert f"{large:.2f} at 224 pixels and {small:.2f} at 64; {recomputed:.2f} at 64 with recomputation" in page


def test_predicted_times():
    """The column "now" of docs/performance.md: what was predicted for B0's steps, and for kernels that stand alone."""
    predicted = json.loads((ROOT / "benchmarks/static.json").read_text(encoding="utf-8"))["predicted"]
    page = (ROOT / "docs/performance.md").read_text(encoding="utf-8")
    table = page[page.index("## Where B0 stands") : page.index("## What is behind it")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    now = {row[0]: (row[2], row[3]) for row in rows[2:]}
    for row, step in (("all", "b0 train 256 h200"), ("inference", "b0 infer 256 h200")):
        exact = (1e3 * predicted[step]["predicted_ms"], 1e3 * predicted[step]["bytes_ms"])
        assert all(abs(int(figure) - us) < 1 for figure, us in zip(now[row], exact, strict=True)), (row, exact)
    kernels = {"depthwise backward": "depthwise_backward_kernel", "BatchNorm 3's sums": "gradient_reduce_kernel"}
    for row, kernel in kernels.items():
        assert now[row][0] == f"{predicted[f'b0 train 256 h200: {kernel}']['predicted_us']:.0f}", row
    parts = [
        sum(int(figure) for figure in column)
        for column in zip(*(now[row] for row in now if row not in ("all", "inference")), strict=True)
    ]
    assert all(abs(part - int(whole)) <= len(now) for part, whole in zip(parts, now["all"], strict=True))


def test_images_on_a_cpu():
    rows = json.loads((ROOT / "benchmarks/results/images.json").read_text(encoding="utf-8"))["benchmarks"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row in (row["extra_info"] for row in rows):
        ratios = (
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**row["time_over"][f"torchvision v{v}"]) for v in (1, 2)
        )
        name = {"500x375": "500 x 375", "12-megapixels": "12 megapixels"}[row["shape"]]
        assert f"| {name} | {row['step']} | {row['median_ms']:.1f} | {' | '.join(ratios)} |" in page
    assert len(rows) == 4


def test_memory_on_a_cpu():
    rows = json.loads((ROOT / "benchmarks/results/allocator.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row in (row for row in rows if row["network"] == "ours"):
        ratios = ("{median:.2f} ({low:.2f} to {high:.2f})".format(**row[f"{key} ratio"]) for key in ("cpu", "clock"))
        pairs = (f"{row['as it is'][key]:,.0f} -> {row['kept'][key]:,.0f}" for key in ("faults", "peak_mb"))
        assert f"| {row['threads']} | {' | '.join(ratios)} | {' | '.join(pairs)} |" in page


def test_inference_on_a_cpu():
    rows = json.loads((ROOT / "benchmarks/results/cpu_inference.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row in rows:
        found = row["variants"]
        line = [f"{row['network'].upper()}, {row['pixels']} pixels", row["dtype"], str(row["batch"])]
        line += [f"{found['ours']['cpu_ms']:.1f}"]
        for name in ("ours", "torch.compile, freezing", "accelerate(torchvision)", "accelerate(timm)"):
            ratio = found.get(name, {}).get("cpu ratio")
            line.append("{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio) if ratio else "")
        assert f"| {' | '.join(line)} |" in page, line
    assert all(row["threads"] == 1 for row in rows) and len(rows) >= 4


def test_the_papers_table_4():
    rows = json.loads((ROOT / "benchmarks/results/paper.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs/benchmarks.md").read_text(encoding="utf-8")
    for row in rows:
        paper, plain = row["paper"], row.get("plain")
        line = [row["network"].removeprefix("efficientnet_"), str(row["pixels"])]
        line += [f"{row[key]:g} ({paper[key]:g})" for key in ("parameters_m", "macs_b")]
        line += [f"{row['measured']['cpu_ms'] / 1e3:.3f}", "" if plain is None else f"{plain['cpu_ms'] / 1e3:.3f}"]
        line += ["" if paper["seconds"] is None else f"{paper['seconds']:g}"]
        assert f"| {' | '.join(line)} |" in page, line
    times = {row["network"]: row["measured"]["cpu_ms"] for row in rows}
    ratio = times["resnet152"] / times["efficientnet_b1"]
    assert f"ResNet-152 takes {ratio:.1f} times as long as B1" in words("README.md")


def test_accuracy_on_digits():
    runs = json.loads((ROOT / "benchmarks/results/digits.json").read_text(encoding="utf-8"))["seeds"]
    accuracies, seconds = (sorted(run[key] for run in runs.values()) for key in ("accuracy", "cpu_s"))
    measured = (
        f"{100 * accuracies[0]:.1f} to {100 * accuracies[-1]:.1f} % held-out accuracy (seeds 0 to {len(runs) - 1})"
    )
    assert f"{measured} in {seconds[0]:.0f} to {seconds[-1]:.0f} s of CPU time" in words("README.md")


def test_transfer():
    page = words("docs/weights.md")
    results = json.loads((ROOT / "benchmarks/results/digits.json").read_text(encoding="utf-8"))

    def measured(part, row):
        return ", ".join(f"{100 * run[row]:.1f} %" for run in results[part].values())

    trained = "stages 4 to 6, head, classifier (`--freeze-until 3`)"
    assert f"| of digits 0 to 4 | classifier | {measured('classifier', 'digits 0 to 4')} |" in page
    assert f"| random (without `--pretrained`) | classifier | {measured('classifier', 'random')} |" in page
    assert f"| of digits 0 to 4 | {trained} | {measured('transfer', 'digits 0 to 4, until 3')} |" in page
    assert f"| random | {trained} | {measured('transfer', 'random, until 3')} |" in page
    frozen, random = (measured("transfer", f"{trunk}, until head") for trunk in ("digits 0 to 4", "random"))
    assert f"reaches {frozen} and is no better than on the random one: {random}." in page


def test_a_trained_trunk_beats_a_random_one():
    """With a classifier alone, of every seed: what the README's example is there to show."""
    runs = json.loads((ROOT / "benchmarks/results/digits.json").read_text(encoding="utf-8"))["classifier"]
    assert len(runs) >= 3 and all(run["digits 0 to 4"] > run["random"] + 0.1 for run in runs.values())
