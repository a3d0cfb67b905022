"""A picture of what one SM does in a launch: issue slots, pipes, and what each warp waits for."""

from pathlib import Path

import numpy as np

from effkernels.tools.simulator.machine import FMA, KINDS, LOAD, PRODUCT, SHARED, STORE
from effkernels.tools.simulator.sm import REASONS

_NAMED = ("#d62728", "#ff7f0e", "#bcbd22", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#c7c7c7", "#1f77b4")
COLOURS = dict(zip((*REASONS, "issue"), _NAMED, strict=True))
GROUPS = {"fp32": (FMA,), "shared memory": (SHARED,), "memory": (LOAD, STORE), "products": (PRODUCT,)}
MOST_CLOCKS, MOST_ROWS, BINS = 20_000, 64, 250


def draw(path: Path, prediction, title: str) -> None:
    """prediction: of ``predict(..., timeline=True)``. Shows the run's first ``MOST_CLOCKS`` clocks."""
    try:
        import matplotlib
    except ImportError as error:
        raise RuntimeError("--timeline needs matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    events = prediction.run.timeline
    end = min(MOST_CLOCKS, max(clock + clocks for clock, clocks, *_ in events))
    edges = np.linspace(0, end, BINS + 1)
    issues = [(clock, kind) for clock, _, _, what, kind, _ in events if what == "issue" and clock < end]
    figure, (slots, warps) = plt.subplots(
        2, 1, figsize=(12, 8), sharex=True, layout="constrained", gridspec_kw={"height_ratios": [1, 2]}
    )
    known = {kind for kinds in GROUPS.values() for kind in kinds}
    groups = GROUPS | {"integer and other": tuple(set(range(len(KINDS))) - known)}
    counts = [
        np.histogram([clock for clock, kind in issues if kind in kinds], edges)[0] / (edges[1] - edges[0])
        for kinds in groups.values()
    ]
    slots.stackplot(edges[:-1], counts, labels=list(groups), step="post")
    slots.axhline(4, color="black", linewidth=0.8, linestyle="--")
    slots.set(ylabel="instructions a clock (4 at most)", title=title, xlim=(0, end), ylim=(0, 4.2))
    slots.legend(loc="upper right", fontsize=8, ncols=5)
    for reason in (*REASONS, "issue"):
        bars: dict[int, list] = {}
        for clock, clocks, row, what, _, _ in events:
            if what == reason and clock < end and row < MOST_ROWS:
                bars.setdefault(row, []).append((clock, min(clocks, end - clock)))
        for j, (row, spans) in enumerate(sorted(bars.items())):
            warps.broken_barh(spans, (row - 0.4, 0.8), facecolors=COLOURS[reason], label=reason if j == 0 else None)
    warps.set(xlabel="clocks", ylabel="warp, in the order in which programs start")
    warps.invert_yaxis()
    warps.legend(loc="upper right", fontsize=8, ncols=5)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
