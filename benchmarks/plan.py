"""What a step of a network must cost on a named GPU, kernel by kernel, beside what it was measured to cost.

``python -m benchmarks.plan --model b0 --gpu h200 --mode infer`` prints, for each kernel of the fused schedule, the
least time by resource: bytes (against the copy bandwidth), matrix products, fp32 multiply-adds, special functions, and
issued instructions. The last are known where effkernels/configs/static_sm90.json counts them for an element: for
depthwise, pool and apply. The largest of these times is the floor of the kernel, its resource is what binds, and
kernels follow one another. ``--results`` adds measured times; ``--predict`` adds what the simulator says that today's
kernels take (docs/performance.md); ``--plot`` draws a roofline.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from benchmarks import results, shapes
from benchmarks.schedule_bytes import works
from benchmarks.static import TABLE
from efficientnet.measure.roofline import RESOURCES, Work, block_sizes, floors, weight_bytes
from effkernels.configs.gpus import GPUS, Gpu, gpu_of
from effkernels.tools.cost_table import DEPTHWISE_FORWARD

BATCH = {"b0": 256, "b1": 256, "b2": 256, "b3": 128, "b4": 128, "b5": 64, "b6": 32, "b7": 32}
DTYPES = ("bfloat16", "float16", "float32")


@dataclass
class Line:
    """One kernel of the schedule, all blocks together.

    times has the seconds by resource; floor adds up, over the blocks, those of the resource that binds.
    """

    kernel: str
    count: int = 0
    elements: int = 0
    flops: int = 0
    times: dict = field(default_factory=lambda: dict.fromkeys(RESOURCES, 0.0))
    floor: float = 0.0
    measured: float | None = None

    @property
    def binds(self) -> str:
        """The resource that takes the most time."""
        return max(self.times, key=self.times.get)

    @property
    def share(self) -> float | None:
        """The floor as a share of the measured time."""
        return self.floor / self.measured if self.measured else None


class Instructions:
    """The instructions for an element of the compiled kernels, from the table in git."""

    def __init__(self, dtype: str):
        self.rows = [row for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"] if row["dtype"] == dtype]

    def _per_element(self, *kernels: str, given=(), absent=(), **constants) -> float:
        """The median of the rows of ``kernels`` with these constants whose launches took the arguments ``given`` and
        not those ``absent``."""
        counts = [
            row["per_element"]
            for row in self.rows
            if row["kernel"] in kernels
            and row["per_element"] is not None
            and not any(name in row["constants"] for name in given)  # an absent argument is a constant, None
            and all(name in row["constants"] for name in absent)
            and all(row["constants"].get(name) == value for name, value in constants.items())
        ]
        return statistics.median(counts) if counts else 0.0

    def of(self, work: Work, training: bool) -> float:
        """The instructions that are issued for one image; 0 where the table does not count the kernel."""
        if work.block is None:
            return 0.0
        block, sizes = work.block, block_sizes(work.block)
        expands = block.expanded != block.in_channels
        shape = {"K": block.kernel_size, "STRIDE": block.stride}
        if work.kernel == "depthwise" and not training:
            return sizes["y2"] * self._per_element(*DEPTHWISE_FORWARD, given=("norm2",), ACT2="silu", **shape)
        if work.kernel == "depthwise":
            how = {"given": ("tile_mean", "norm1")} if expands else {"given": ("tile_mean",), "absent": ("norm1",)}
            return sizes["y2"] * self._per_element(*DEPTHWISE_FORWARD, **how, **shape)
        if work.kernel == "depthwise backward":
            how = {"given": ("norm1", "gates")} if expands else {"given": ("gates",), "absent": ("norm1",)}
            return sizes["y1"] * self._per_element(
                "depthwise_backward_kernel", **how, NEED_DX=True, NEED_DW=True, **shape
            )
        if work.kernel == "pool":
            return sizes["y2"] * self._per_element("pool_kernel", given=("norm",), ACT="silu")
        if work.kernel == "apply":
            return sizes["out"] * self._per_element(
                "apply_kernel",
                given=("norm", "residual") if block.residual else ("norm",),
                absent=("gates",) if block.residual else ("gates", "residual"),
                ACT="identity",
            )
        return 0.0


def _weights(work: Work) -> int:
    """The elements of the weights that the kernel reads."""
    block = work.block
    if block is None:
        return 0
    of = {"expand": block.in_channels * block.expanded, "project": block.expanded * block.out_channels}
    of["depthwise"] = block.kernel_size**2 * block.expanded
    return of.get(work.kernel.split()[0], 0)


def plan(
    model: str, training: bool, gpu: Gpu, batch: int, dtype: str = "bfloat16", rows: Sequence[dict] = ()
) -> list[Line]:
    """One line for each kernel of the schedule, and a last one, "step", for all.

    Args:
        rows: measured ones, of this model, mode, batch and dtype.
    """
    shape, counts, lines, timed = shapes.model(model), Instructions(dtype), {}, defaultdict(list)
    torch_dtype = getattr(torch, dtype)
    step = "training" if training else "inference"
    for work in works(shape, training):
        line = lines.setdefault(work.kernel, Line(work.kernel))
        times = floors(
            work=work,
            gpu=gpu,
            batch=batch,
            dtype=torch_dtype,
            weights=_weights(work),
            instructions=counts.of(work, training),
        )
        line.count += work.elements > 0
        line.elements += work.elements
        line.flops += 2 * (work.products + work.taps)
        line.floor += max(times.values())
        for resource, seconds in times.items():
            line.times[resource] += seconds
        if work.block is not None:
            layer = shapes.kernel_of(work.kernel, work.block)
            row = (
                results.find(rows, shape=str(layer), step=step, variant="ours", batch_size=batch, dtype=dtype)
                if layer
                else None
            )
            timed[work.kernel].append(row["median_ms"] / 1e3 if row else None)
    total = Line(
        "step", flops=sum(line.flops for line in lines.values()), elements=sum(line.elements for line in lines.values())
    )
    for line in lines.values():
        total.count += line.count
        total.floor += line.floor
        for resource in RESOURCES:
            total.times[resource] += line.times[resource]
        # A training row holds several kernels.
        if not training and timed[line.kernel] and None not in timed[line.kernel]:
            line.measured = sum(timed[line.kernel])
    parameters = sum(p.numel() for p in shape.build(fused=False, device="meta").parameters())
    if training:  # the optimizer's pass over the weights
        seconds = weight_bytes(parameters, True, torch_dtype.itemsize, optimizer=True) / gpu.bandwidth
        lines["optimizer"] = Line("weights, AdamW", count=1, floor=seconds)
        lines["optimizer"].times["bytes"] = seconds
        total.times["bytes"] += seconds
        total.floor += seconds
    row = results.find(rows, shape=str(shape), step=step, variant="ours", batch_size=batch, dtype=dtype)
    total.measured = row["median_ms"] / 1e3 if row else None
    return [*lines.values(), total]


def table(lines: list[Line], batch: int, itemsize: int) -> str:
    """The lines as a table in Markdown, in milliseconds a step."""
    out = [
        "| kernel | times | MB an image | "
        + " | ".join(f"{r} ms" for r in RESOURCES)
        + " | floor ms | binds | measured ms | share |"
    ]
    out.append("|---|" + "---:|" * (3 + len(RESOURCES)) + "---|---:|---:|")
    for line in lines:
        times = " | ".join(f"{1e3 * line.times[r]:.3f}" if line.times[r] else "" for r in RESOURCES)
        measured = results.NOT_YET if line.measured is None else f"{1e3 * line.measured:.3f}"
        share = "" if line.share is None else f"{100 * line.share:.0f} %"
        megabytes = itemsize * line.elements / 1e6
        out.append(
            f"| {line.kernel} | {line.count} | {megabytes:.2f} | {times} | {1e3 * line.floor:.3f} | {line.binds} | "
            f"{measured} | {share} |"
        )
    return "\n".join(out)


def prediction(model: str, mode: str, batch: int, gpu: str, floor: float) -> str:
    """The simulator's table of today's kernels, and how near they are to the step's floor in seconds."""
    from effkernels.tools import simulate  # needs Triton, which floors do without
    from effkernels.tools.networks import predict_step

    step = predict_step(model, mode, batch, gpu)
    lines = [simulate.table(simulate.rows(step.predictions))]
    lines.append(f"predicted, not measured: {1e3 * step.time:.3f} ms, {step.time / floor:.1f} times the floor")
    return "\n".join(lines)


def plot(path: Path, lines: list[Line], gpu: Gpu, batch: int, itemsize: int, title: str) -> None:
    """Draw the roofline: the FLOP/s that the floor (hollow) and the measured time (filled) of each kernel allow, over
    FLOP a byte.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    points = [line for line in lines if line.flops and line.elements]
    intensities = [line.flops / (itemsize * line.elements) for line in points]
    low, high = min(intensities) / 3, max(2 * gpu.matrix / gpu.bandwidth, 2 * max(intensities))
    axes.set(
        xscale="log",
        yscale="log",
        xlim=(low, high),
        xlabel="arithmetic intensity [FLOP/byte]",
        ylabel="rate [TFLOP/s]",
        title=title,
    )
    roofs = [("matrix units", gpu.matrix)] if itemsize == 2 else []
    roofs.append(("fp32 units", 2 * gpu.per_second(gpu.fma)))
    top = max(rate for _, rate in roofs)
    xs = [low, top / gpu.bandwidth]
    axes.plot(
        xs, [x * gpu.bandwidth / 1e12 for x in xs], color="black", label=f"memory, {gpu.bandwidth / 1e12:.2f} TB/s"
    )
    for (name, rate), style in zip(roofs, ("-", "--"), strict=False):
        label = f"{name}, {rate / 1e12:.0f} TFLOP/s"
        axes.plot([rate / gpu.bandwidth, high], [rate / 1e12] * 2, color="black", linestyle=style, label=label)
    colors = plt.get_cmap("tab10").colors
    for line, x, color, marker in zip(points, intensities, colors * 2, "osDv^<>pPX*hos", strict=False):
        flops = batch * line.flops / 1e12
        axes.plot(
            x,
            flops / line.floor,
            marker,
            color=color,
            fillstyle="none",
            ms=10,
            mew=1.8,
            ls="",
            label=f"{line.kernel}: {line.binds}",
        )
        if line.measured:
            axes.plot(x, flops / line.measured, marker, color=color, ms=9, ls="", label=f"{line.kernel}, measured")
    axes.grid(True, which="major", alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=9, title="floor (hollow) and what binds")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plan", description="Floors of a network's kernels on a GPU."
    )
    parser.add_argument("--model", nargs="+", default=["b0"], choices=tuple(BATCH), help="default: b0")
    parser.add_argument("--gpu", default="h200", choices=tuple(GPUS), help="default: h200")
    parser.add_argument("--bandwidth", type=float, metavar="GB/S", help="measured copy bandwidth, instead of the GPU's")
    parser.add_argument(
        "--matrix", type=float, metavar="TFLOP/S", help="measured 16-bit matrix rate, instead of the GPU's"
    )
    parser.add_argument("--clock", type=float, metavar="GHZ", help="measured clock under load, instead of the GPU's")
    parser.add_argument("--mode", nargs="+", default=["infer", "train"], choices=("infer", "train"))
    parser.add_argument("--batch-size", type=int, help="images (default: 256 for B0 to 32 for B7)")
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--results", type=Path, help="folder of results whose measured times are shown beside")
    parser.add_argument("--predict", action="store_true", help="predict the time of today's kernels, in bf16 (minutes)")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the roofline of the first model and mode")
    args = parser.parse_args(argv)
    for name in ("bandwidth", "matrix", "clock", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(args, name)}")
    if args.predict and args.dtype != "bfloat16":
        parser.error(f"--predict knows bfloat16 only, got --dtype {args.dtype}")
    for name in ("bandwidth", "matrix", "clock"):
        if args.predict and getattr(args, name) is not None:
            parser.error(f"--predict takes the figures of --gpu {args.gpu}: leave --{name} out")
    gpu = named = GPUS[args.gpu]
    units = {"bandwidth": 1e9, "matrix": 1e12, "clock": 1e9}
    gpu = replace(
        gpu, **{name: getattr(args, name) * unit for name, unit in units.items() if getattr(args, name) is not None}
    )
    rows = results.load(args.results) if args.results else []
    rows = [row for row in rows if row.get("cuda") and gpu_of(row["device"]) is named]
    itemsize = getattr(torch, args.dtype).itemsize
    for i, (model, mode) in enumerate((model, mode) for model in args.model for mode in args.mode):
        batch = args.batch_size or BATCH[model]
        lines = plan(model=model, training=mode == "train", gpu=gpu, batch=batch, dtype=args.dtype, rows=rows)
        title = (
            f"{shapes.model(model)} {'training' if mode == 'train' else 'inference'}, batch {batch}, {args.dtype}, "
            f"{gpu.name}"
        )
        print(f"\n### {title}\n\n{table(lines, batch, itemsize)}\n\nat most {batch / lines[-1].floor:,.0f} images/s")
        if args.predict:
            print("\n" + prediction(model=model, mode=mode, batch=batch, gpu=args.gpu, floor=lines[-1].floor))
        if i == 0 and args.plot:
            plot(path=args.plot, lines=lines, gpu=gpu, batch=batch, itemsize=itemsize, title=title)
    return 0


if __name__ == "__main__":
    sys.exit(main())
