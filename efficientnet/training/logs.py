"""What a run leaves to look at: JSON lines, TensorBoard's events, curves."""

import json
import os
from pathlib import Path

from efficientnet.files import replacing


class Log:
    """The log files of a run in ``folder``.

    ``metrics.jsonl`` has a row an epoch, ``steps.jsonl`` one every few updates; TensorBoard's events are counted in
    updates. Rows of updates after ``step`` are removed: a run that was killed left them, and is repeated from there.
    """

    def __init__(self, folder: Path, step: int = 0, tensorboard: bool = False):
        self.folder, self.writer = folder, None
        path = folder / "steps.jsonl"
        kept = [row for row in _rows(path) if row["step"] <= step] if path.is_file() and step else []
        with replacing(path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in kept), encoding="utf-8")
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.writer = SummaryWriter(folder / "tensorboard", purge_step=step + 1)

    def step(self, row: dict) -> None:
        """Add the row of an update."""
        with open(self.folder / "steps.jsonl", "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        self._scalars("step", row)

    def epoch(self, history: list[dict], step: int) -> None:
        """Write the rows of all epochs, of which the last has just ended with update ``step``."""
        self.rewrite(history)
        self._scalars("epoch", history[-1] | {"step": step})
        if self.writer:
            self.writer.flush()

    def rewrite(self, history: list[dict]) -> None:
        """Write ``metrics.jsonl`` anew from these epochs: a killed run may have saved its last one without its row."""
        with replacing(self.folder / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in history), encoding="utf-8")

    def _scalars(self, prefix, row):
        if self.writer:
            for key, value in row.items():
                if key != "step":
                    self.writer.add_scalar(f"{prefix}/{key}", value, row["step"])


def _rows(path):
    """The rows of a JSON-lines file, whose last may be cut off."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def plot_curves(history: list[dict], path: str | os.PathLike) -> None:
    """Draw loss and held-out accuracy by epoch into a PNG file."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training (smoothed labels)")
    loss.plot(epochs, [row["val_loss"] for row in history], marker=".", label="held-out")
    loss.set(xlabel="epoch", ylabel="cross entropy", title="Loss")
    loss.legend()
    accuracy.plot(epochs, [100 * row["val_acc"] for row in history], marker=".", color="tab:orange")
    accuracy.set(
        xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Accuracy: {100 * history[-1]['val_acc']:.2f} %"
    )
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, format="png", dpi=120)
