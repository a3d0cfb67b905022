"""Tables and plots of measured results: ``python -m benchmarks.report DIR``.

It writes DIR/report.md, PNG files beside it, and the README's table between its markers. What no row says is "not yet
measured".
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from benchmarks import plan, results, shapes
from benchmarks.results import NOT_YET, find
from effkernels.configs.gpus import GPUS, gpu_of

README = Path(__file__).parents[1] / "README.md"
MARKERS = "<!-- measured: made by python -m benchmarks.report, do not edit -->", "<!-- end of measured -->"
STEPS = ("inference", "training")
LARGEST = 8  # kernels named in the stacked plot; the others are added up


def gpu_rows(rows: list[dict]) -> list[dict]:
    """The rows of a GPU: those of the device and dtype that have the most of them.

    Figures of different devices or dtypes do not belong in one table.
    """
    rows = [row for row in rows if row.get("cuda")]
    kinds = [(row["device"], row["dtype"]) for row in rows]
    return [row for row, kind in zip(rows, kinds, strict=True) if kind == max(sorted(set(kinds)), key=kinds.count)]


def _of_model(rows, name: str, step: str, **wanted) -> list[dict]:
    wanted |= {"kind": "model", "model": name, "step": step}
    return [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]


def best_compiled(rows: list[dict]) -> dict | None:
    """The fastest row of torch.compile, whichever mode and library."""
    compiled = [row for row in rows if "compile-" in row["variant"]]
    return min(compiled, key=lambda row: row["median_ms"] / row["batch_size"], default=None)


def _number(value, form="{:,.0f}") -> str:
    return NOT_YET if value is None else form.format(value)


def _get(row, key):
    return None if row is None else row.get(key)


def _ratio(a, b):
    return a / b if a and b else None


def _markdown(header, lines) -> str:
    rows = ["| " + " | ".join(map(str, line)) + " |" for line in (header, *lines)]
    return "\n".join([rows[0], "|---" + "|---:" * (len(header) - 1) + "|", *rows[1:]])


def model_lines(rows: list[dict], step: str) -> list[tuple]:
    """(name, ours, channels_last, best of torch.compile) for each of B0 to B7: rows at the batch size of ours, or
    None.
    """
    lines = []
    for name in plan.BATCH:
        of_step = _of_model(rows, name, step)
        ours = find(of_step, variant="ours")
        of_step = [row for row in of_step if ours is None or row["batch_size"] == ours["batch_size"]]
        lines.append((name, ours, find(of_step, variant="channels_last"), best_compiled(of_step)))
    return lines


def model_table(rows: list[dict], step: str) -> str:
    header = (
        "",
        "batch",
        "ours, images/s",
        "eager NHWC",
        "torch.compile, best",
        "speed-up over compile",
        "peak memory, ours / compile",
    )
    header += ("share of copy", "launches")
    lines = []
    for name, ours, eager, compiled in model_lines(rows, step):
        speed = [_get(row, "images_per_s") for row in (ours, eager, compiled)]
        mode = "" if compiled is None else f" ({compiled['variant']})"
        memory = _ratio(_get(ours, "peak_memory_mb"), _get(compiled, "peak_memory_mb"))
        lines.append(
            (
                name.upper(),
                _number(_get(ours, "batch_size"), "{}"),
                *map(_number, speed[:2]),
                _number(speed[2]) + mode,
                _number(_ratio(speed[0], speed[2]), "{:.2f}"),
                _number(memory, "{:.2f}"),
                _number(_get(ours, "share_of_copy"), "{:.0%}"),
                _number(_get(ours, "launches"), "{}"),
            )
        )
    return _markdown(header, lines)


def latency_table(rows: list[dict]) -> str:
    columns = ("ours", "channels_last", "compile-default", "compile-reduce-overhead")
    lines = []
    for name in plan.BATCH:
        found = [find(rows, kind="latency", model=name, variant=variant) for variant in columns]
        lines.append((name.upper(), *(_number(_get(row, "median_ms"), "{:.3f}") for row in found)))
    return _markdown(("one image, CUDA graph, ms", *columns), lines)


def layer_table(rows: list[dict], kind: str) -> str:
    """Layers or blocks: the time of ours and of the fastest other, GB/s, and the share of the copy bandwidth."""
    of_kind = [row for row in rows if row.get("kind") == kind]
    names = list(dict.fromkeys((row["model"], row["shape"], row["step"]) for row in of_kind))
    lines = []
    for model, shape, step in names:
        same = [row for row in of_kind if (row["model"], row["shape"], row["step"]) == (model, shape, step)]
        ours = find(same, variant="ours")
        other = min((row for row in same if row["variant"] != "ours"), key=lambda row: row["median_ms"], default=None)
        times = [_number(_get(row, "median_ms"), "{:.4f}") for row in (ours, other)]
        named = times[1] + ("" if other is None else f" ({other['variant']})")
        share = _number(_get(ours, "share_of_copy"), "{:.0%}")
        lines.append((f"{model} {shape}, {step}", times[0], named, _number(_get(ours, "gb_per_s")), share))
    header = ("", "ours, ms", "fastest other, ms", "GB/s", "share of copy")
    return _markdown(header, lines or [("all",) + (NOT_YET,) * 4])


def _versions(row) -> str:
    return ", ".join(
        f"{key} {row[key]}"
        for key in ("driver", "cuda", "cudnn", "torch", "triton", "torchvision", "timm")
        if row.get(key)
    )


CPU_OTHERS = ("channels_last", "torchvision-channels_last", "timm-channels_last")


def cpu_rows(rows: list[dict]) -> list[dict]:
    """The rows of whole networks on a CPU that were timed in turns with others."""
    return [row for row in rows if not row.get("cuda") and row.get("kind") == "model" and row.get("time_over")]


def _interval(ratio: dict | None) -> str:
    return NOT_YET if ratio is None else "{median:.2f} ({low:.2f} to {high:.2f})".format(**ratio)


def cpu_table(rows: list[dict]) -> str:
    """Ratios of times on a CPU, each pair timed in turns, with the 95 % confidence interval of their median.

    The times themselves are not shown: they depend on what else the machine did during their row.
    """
    lines = []
    for row in cpu_rows(rows):
        ratios = [_interval(row["time_over"].get(other)) if other != row["variant"] else "" for other in CPU_OTHERS]
        lines.append((f"{row['shape']} {row['step']}, {row['variant']}", *ratios))
    header = ("CPU time", "/ plain NHWC", "/ torchvision NHWC", "/ timm NHWC")
    return _markdown(header, lines or [("all",) + (NOT_YET,) * 3])


def cpu_line(rows: list[dict]) -> str:
    """Where ``cpu_table`` was measured."""
    found = cpu_rows(rows)
    if not found:
        return f"CPU: {NOT_YET}."
    row = found[-1]
    where = f"{row['device']}, {row['dtype']}, batch {row['batch_size']}; {_versions(row)}; {row['date']}"
    return f"CPU: {where}.\nRatios of CPU times taken in turns, with the 95 % confidence interval of their median:"


def machine_line(rows: list[dict]) -> str:
    if not rows:
        return f"GPU: {NOT_YET}."
    row = rows[-1]
    where = (
        f"{row['device']}, {row['dtype']}, copy bandwidth {row['copy_gb_per_s']:,.0f} GB/s measured in the same process"
    )
    return f"{where}; {_versions(row)}."


def plain_line(rows: list[dict]) -> str:
    """Which rows of ours ran plain layers, and why: their figures are not the kernels'. Empty where none did."""
    found: dict[str, list[str]] = {}
    for row in rows:
        if row["variant"] == "ours" and row["path"] != "fused kernels":
            found.setdefault(row["path"], []).append(f"{row['kind']} {row['model']} {row['step']}")
    return "\n".join(
        f"Not by fused kernels ({path}): {', '.join(dict.fromkeys(names))}." for path, names in found.items()
    )


def fitted_tables(folder: Path) -> str:
    """Measured beside predicted times of each kernel, of the files that ``benchmarks.fitted`` wrote into a campaign."""
    parts = []
    for path in sorted(folder.glob("fitted-*.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        times: dict[str, list[float]] = {}
        for launch in found["launches"]:
            if "predicted_us" not in launch:  # it was stopped before it had predicted anything
                break
            both = times.setdefault(launch["kernel"], [0.0, 0.0])
            both[0] += launch["measured_us"]
            both[1] += launch["predicted_us"]
        lines = [
            (kernel, f"{measured:,.0f}", f"{predicted:,.0f}", f"{predicted / measured:.2f}")
            for kernel, (measured, predicted) in sorted(times.items(), key=lambda item: -item[1][0])
        ]
        parts.append(f"{found['model'].upper()} {found['mode']}, {found['batch']} images, {found['device']}:")
        parts.append(_markdown(("kernel", "measured us", "predicted us", "ratio"), lines))
        if "before" in found:
            left = f" The time was up with {found['left']} trials left." if found.get("left") else ""
            parts.append(
                f"Predictions are {100 * found['before']:.0f} % off, {100 * found['after']:.0f} % with what was "
                f"fitted: {found['constants'] or 'nothing'}.{left}"
            )
    return "\n\n".join(parts) or NOT_YET


def report(folder: Path, rows: list[dict], plots: dict[str, Path | None]) -> str:
    """The whole page."""
    on_gpu = gpu_rows(rows)
    correctness = folder / "correctness.json"
    said = json.loads(correctness.read_text(encoding="utf-8"))["summary"] if correctness.exists() else NOT_YET
    parts = [
        "# Results",
        machine_line(on_gpu),
        plain_line(on_gpu),
        f"Tests on the GPU: {said}. Each row's results were checked against float64 first.",
    ]
    for step in STEPS:
        parts += [f"## Models, {step}", model_table(on_gpu, step)]
    parts += ["## Latency", latency_table(on_gpu)]
    for kind, title in (
        ("depthwise", "Depthwise layers"),
        ("pointwise", "1x1 convolutions"),
        ("squeeze_excite", "Squeeze-excite"),
    ):
        parts += [f"## {title}", layer_table(on_gpu, kind)]
    parts += ["## Blocks", layer_table(on_gpu, "block")]
    parts += ["## Launches, measured beside predicted", fitted_tables(folder)]
    parts += ["## CPU", cpu_line(rows), cpu_table(rows), "## Plots"]
    parts += [f"{title}: " + (NOT_YET if path is None else f"![{title}]({path.name})") for title, path in plots.items()]
    return "\n\n".join(filter(None, parts)) + "\n"


def readme_table(rows: list[dict]) -> str:
    """What the README shows.

    It is each network's speed-up and memory against the best of torch.compile, on one GPU, and what a CPU's path costs.
    """
    on_gpu = gpu_rows(rows)
    lines = []
    tables = [model_lines(on_gpu, step) for step in STEPS]
    for (name, ours, _, compiled), (_, trained, _, trained_compiled) in zip(*tables, strict=True):
        cells = [
            _number(_get(ours, "images_per_s")),
            _number(_ratio(_get(ours, "images_per_s"), _get(compiled, "images_per_s")), "{:.2f}"),
        ]
        cells.append(_number(_get(trained, "images_per_s")))
        cells.append(_number(_ratio(_get(trained, "images_per_s"), _get(trained_compiled, "images_per_s")), "{:.2f}"))
        cells.append(
            _number(_ratio(_get(trained, "peak_memory_mb"), _get(trained_compiled, "peak_memory_mb")), "{:.2f}")
        )
        if any(cell != NOT_YET for cell in cells):
            lines.append((name.upper(), *cells))
    header = (
        "",
        "inference, images/s",
        "/ torch.compile",
        "training, images/s",
        "/ torch.compile",
        "training memory / torch.compile",
    )
    on_gpu_table = _markdown(header, lines or [("B0 to B7",) + (NOT_YET,) * 5])
    parts = [machine_line(on_gpu), plain_line(on_gpu), on_gpu_table, cpu_line(rows), cpu_table(rows)]
    return "\n\n".join(filter(None, parts))


def update_readme(path: Path, table: str) -> bool:
    """Put ``table`` between the markers. Returns whether that changed the file. Raises ValueError where markers are
    missing.
    """
    text = path.read_text(encoding="utf-8")
    start, end = MARKERS
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(f"{path} must hold the markers {start!r} and {end!r} once, in this order")
    before, rest = text.split(start)
    new = f"{before}{start}\n{table}\n{end}{rest.split(end)[1]}"
    if new != text:
        path.write_text(new, encoding="utf-8")
    return new != text


# ---- plots -----------------------------------------------------------------------------------------------------------


def _bars(axes, names, groups, ylabel, title):
    """Draw groups of bars, one bar of each group for each name; None leaves a gap."""
    width = 0.8 / len(groups)
    for i, (label, values) in enumerate(groups.items()):
        at = [x + (i - (len(groups) - 1) / 2) * width for x in range(len(names))]
        axes.bar(at, [value or 0 for value in values], width, label=label)
    axes.set_xticks(range(len(names)), [name.upper() for name in names])
    axes.set(ylabel=ylabel, title=title)
    axes.grid(True, axis="y", alpha=0.3)
    axes.set_axisbelow(True)


def _figure(panels: int):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, panels, figsize=(6.5 * panels, 4.8), layout="constrained", squeeze=False)


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def speed_plot(path: Path, rows: list[dict]) -> Path | None:
    """The images a second over those of eager NHWC."""
    lines = {step: [line for line in model_lines(rows, step) if line[1] and line[2]] for step in STEPS}
    if not any(lines.values()):
        return None
    figure, axes = _figure(len(STEPS))
    for panel, (step, found) in zip(axes[0], lines.items(), strict=True):
        speeds = [[_get(row, "images_per_s") for row in line[1:]] for line in found]
        groups = {
            "ours": [ours / eager for ours, eager, _ in speeds],
            "torch.compile, best": [_ratio(compiled, eager) for _, eager, compiled in speeds],
        }
        _bars(
            axes=panel,
            names=[line[0] for line in found],
            groups=groups,
            ylabel="speed over eager NHWC [ratio]",
            title=step,
        )
        panel.axhline(1, color="black", lw=0.8)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return _save(figure, path)


def memory_plot(path: Path, rows: list[dict]) -> Path | None:
    lines = {step: [line for line in model_lines(rows, step) if _get(line[1], "peak_memory_mb")] for step in STEPS}
    if not any(lines.values()):
        return None
    figure, axes = _figure(len(STEPS))
    for panel, (step, found) in zip(axes[0], lines.items(), strict=True):
        columns = list(zip(*([_get(row, "peak_memory_mb") for row in line[1:]] for line in found), strict=True)) or [
            (),
            (),
            (),
        ]
        groups = dict(zip(("ours", "eager NHWC", "torch.compile, best"), columns, strict=True))
        groups = {label: [value and value / 1e3 for value in values] for label, values in groups.items()}
        _bars(axes=panel, names=[line[0] for line in found], groups=groups, ylabel="peak memory [GB]", title=step)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return _save(figure, path)


def kernels_plot(path: Path, rows: list[dict]) -> Path | None:
    """The time of each kernel within a step, for an image, stacked."""
    found = [
        (f"{row['model'].upper()}\n{row['step']}", row)
        for row in rows
        if row.get("kind") == "model" and row["variant"] == "ours"
    ]
    found = [(name, row) for name, row in found if row.get("kernels_ms")]
    if not found:
        return None
    totals: dict[str, float] = {}
    for _, row in found:
        whole = sum(row["kernels_ms"].values())
        for kernel, milliseconds in row["kernels_ms"].items():
            totals[kernel] = totals.get(kernel, 0) + milliseconds / whole
    named = sorted(totals, key=totals.get, reverse=True)[:LARGEST]
    figure, axes = _figure(2 if len(found) > 4 else 1)
    panel = axes[0][0]
    if len(axes[0]) == 2:
        gridspec = panel.get_gridspec()
        for extra in axes[0]:
            extra.remove()
        panel = figure.add_subplot(gridspec[0, :])
    bottom = [0.0] * len(found)
    for kernel in [*named, "others"]:
        values = []
        for _, row in found:
            times, images = row["kernels_ms"], row["batch_size"]
            mine = (
                times.get(kernel, 0.0)
                if kernel in named
                else sum(ms for name, ms in times.items() if name not in named)
            )
            values.append(100 * mine / sum(times.values()) if images else 0.0)
        label = kernel if len(kernel) <= 40 else kernel[:37] + "..."
        panel.bar(
            range(len(found)),
            values,
            0.7,
            bottom=bottom,
            label=label,
            color="lightgray" if kernel == "others" else None,
        )
        bottom = [a + b for a, b in zip(bottom, values, strict=True)]
    ticks = [f"{name}\n{sum(row['kernels_ms'].values()):.1f} ms" for name, row in found]
    panel.set_xticks(range(len(found)), ticks, fontsize=8)
    panel.set(ylabel="share of the kernels' time [%]", title="Time per kernel within a step", ylim=(0, 100))
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    return _save(figure, path)


def roofline_plot(path: Path, rows: list[dict]) -> Path:
    """B0's inference on the GPU of the rows, at its measured copy bandwidth.

    Where there is none, or one that ``effkernels.configs.gpus`` does not have, it is the plan for an H200.
    """
    gpu = gpu_of(rows[-1]["device"]) if rows else None
    rows = rows if gpu else []
    gpu = replace(gpu, bandwidth=1e9 * rows[-1]["copy_gb_per_s"]) if gpu else GPUS["h200"]
    row = find(rows, kind="model", model="b0", step="inference", variant="ours")
    batch, dtype = (row["batch_size"], row["dtype"]) if row else (plan.BATCH["b0"], "bfloat16")
    lines = plan.plan(model="b0", training=False, gpu=gpu, batch=batch, dtype=dtype, rows=rows)
    note = "" if any(line.measured for line in lines) else f" ({NOT_YET})"
    title = f"{shapes.model('b0')} inference, batch {batch}, {dtype}, {gpu.name}{note}"
    plan.plot(path=path, lines=lines, gpu=gpu, batch=batch, itemsize=4 if dtype == "float32" else 2, title=title)
    return path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.report", description="Tables and plots of measured results."
    )
    parser.add_argument(
        "folder", type=Path, metavar="DIR", help="a campaign's folder, or one of --benchmark-json files"
    )
    parser.add_argument("--readme", type=Path, default=README, help="file whose table between the markers is updated")
    parser.add_argument("--no-readme", action="store_true", help="leave the README alone")
    args = parser.parse_args(argv)
    try:
        rows = results.load(args.folder)
        args.folder.mkdir(parents=True, exist_ok=True)
        on_gpu = gpu_rows(rows)
        plots = {
            "Roofline": roofline_plot(args.folder / "roofline.png", on_gpu),
            "Speed-up": speed_plot(args.folder / "speed.png", on_gpu),
            "Time per kernel": kernels_plot(args.folder / "kernels.png", on_gpu),
            "Memory": memory_plot(args.folder / "memory.png", on_gpu),
        }
        text = report(args.folder, rows, plots)
        (args.folder / "report.md").write_text(text, encoding="utf-8")
        changed = not args.no_readme and update_readme(args.readme, readme_table(rows))
    except (ValueError, OSError) as error:
        print(f"python -m benchmarks.report: {error}", file=sys.stderr)
        return 2
    print(text)
    print(f"{args.folder / 'report.md'}: {len(rows)} rows{f', {args.readme} updated' if changed else ''}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
