"""A picture of what one SM does in a launch: issue slots, pipes, and what each warp waits for."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from effkernels.tools.simulator.launch import Prediction
from effkernels.tools.simulator.machine import (
    ALU,
    COPY,
    DOUBLE,
    FMA,
    FMA_HEAVY,
    LOAD,
    MATRIX,
    PIPE,
    PIPES,
    PRODUCT,
    SHARED,
    SPECIAL,
    STORE,
    TENSOR_COPY,
    UNIFORM,
)
from effkernels.tools.simulator.sm import REASONS, RESOURCES, Event

_NAMED = ("#d62728", "#ff7f0e", "#bcbd22", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#c7c7c7", "#1f77b4")
COLOURS = dict(zip((*REASONS, "issue"), _NAMED, strict=True))
# Classes of instructions, by what they need; the last are those that need no pipe.
CLASSES = (
    "matrix products",
    "fp32, integer products",
    "integer and logic",
    "special functions",
    "uniform",
    "fp64",
    "shared memory",
    "global memory",
    "branches, barriers, waits",
)
_OF_PIPE = {
    MATRIX: "matrix products",
    FMA_HEAVY: "fp32, integer products",
    ALU: "integer and logic",
    SPECIAL: "special functions",
    UNIFORM: "uniform",
    DOUBLE: "fp64",
}
MOST_CLOCKS, MOST_ROWS, BINS = 20_000, 64, 250


def class_of(kind: int, pipe: int) -> str:
    """The class, of ``CLASSES``, of an operation of ``machine.Machine.operation``: a product of matrices is one whether
    it is mma.sync's or wgmma's."""
    if kind in (LOAD, STORE, COPY, TENSOR_COPY):
        return "global memory"
    if kind in (SHARED, FMA, PRODUCT):
        return {SHARED: "shared memory", FMA: "fp32, integer products", PRODUCT: "matrix products"}[kind]
    return _OF_PIPE[pipe] if kind == PIPE else "branches, barriers, waits"


def taken(events: Iterable[Event], edges: np.ndarray) -> dict[str, np.ndarray]:
    """{resource: the share of each bin between ``edges``, in clocks, for which it is taken}, in the order of
    ``RESOURCES``. Pipes of four schedulers count a quarter each."""
    busy = {name: np.zeros(len(edges) - 1) for name in RESOURCES}
    for event in events:
        if event.what in busy:
            start, stop = event.clock, event.clock + event.clocks
            overlap = np.minimum(edges[1:], stop) - np.maximum(edges[:-1], start)
            busy[event.what] += np.maximum(overlap, 0.0)
    return {name: of / np.diff(edges) / (4 if name in PIPES else 1) for name, of in busy.items()}


def draw(path: Path, prediction: Prediction, title: str) -> None:
    """Write a PNG of the first ``MOST_CLOCKS`` clocks of one SM, of a prediction of ``predict(..., timeline=True)``.

    From above: instructions issued in a clock, by class; the share of each pipe, of L1 and of the SM's part of L2's and
    DRAM's bandwidth that is taken; what every warp waits for. RuntimeError without matplotlib, ValueError for a
    prediction that kept no timeline."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("--timeline needs matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    if prediction.run is None or not prediction.run.timeline:
        raise ValueError("prediction must be one of predict(..., timeline=True), got one without a timeline")
    end = min(MOST_CLOCKS, max(event.clock + event.clocks for event in prediction.run.timeline))
    events = [event for event in prediction.run.timeline if event.clock < end]
    edges = np.linspace(0, end, BINS + 1)
    figure, (slots, pipes, warps) = plt.subplots(
        3, 1, figsize=(12, 11), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [2, 2, 4]}
    )
    issued: dict[str, list[float]] = {name: [] for name in CLASSES}
    for event in events:
        if event.what == "issue":
            issued[class_of(event.kind, event.pipe)].append(event.clock)
    issued = {name: clocks for name, clocks in issued.items() if clocks}
    counts = [np.histogram(clocks, edges)[0] / np.diff(edges) for clocks in issued.values()]
    slots.stackplot(edges[:-1], counts, labels=list(issued), step="post")
    slots.axhline(4, color="black", linewidth=0.8, linestyle="--")
    slots.set(ylabel="instructions a clock (4 at most)", title=title, xlim=(0, end), ylim=(0, 4.2))
    slots.legend(loc="upper right", fontsize=8, ncols=5)
    shares = {name: share for name, share in taken(events, edges).items() if share.any()}
    image = pipes.imshow(
        np.array(list(shares.values())), aspect="auto", extent=(0, end, len(shares), 0), vmin=0, vmax=1, cmap="viridis"
    )
    pipes.set_yticks(np.arange(len(shares)) + 0.5, list(shares), fontsize=8)
    figure.colorbar(image, ax=pipes, label="share of the clocks taken")
    for reason in (*REASONS, "issue"):
        bars: dict[int, list] = {}
        for event in events:
            if event.what == reason and event.row < MOST_ROWS:
                bars.setdefault(event.row, []).append((event.clock, min(event.clocks, end - event.clock)))
        for j, (row, spans) in enumerate(sorted(bars.items())):
            warps.broken_barh(spans, (row - 0.4, 0.8), facecolors=COLOURS[reason], label=reason if j == 0 else None)
    warps.set(xlabel="clocks", ylabel="warp, in the order in which programs start")
    warps.yaxis.get_major_locator().set_params(integer=True)
    warps.invert_yaxis()
    warps.legend(loc="upper right", fontsize=8, ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
