"""The paper's grid search for alpha, beta and gamma (section 3.3, step 1): every candidate at phi = 1, about twice the
cost of the base.
"""

import json
import math
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from efficientnet.errors import InputError
from efficientnet.files import replacing
from efficientnet.model.profile import count_macs, count_parameters
from efficientnet.model.scaling import Scaling, check_count, coefficient_grid, compound_scale
from efficientnet.scaling_study.networks import create_scaled
from efficientnet.training.settings import TrainConfig

PHI = 1.0
OBJECTIVES = ("accuracy", "latency", "macs")


@dataclass(frozen=True)
class SearchConfig:
    """Everything that the result of a search depends on.

    Args:
        objective: "accuracy" of a short training on ``data``; "latency", the milliseconds that a GMAC takes on
            ``device``; "macs", how close rounding lets the network come to twice the MACs of the base. Only the first
            knows about accuracy.
            None: "accuracy" with data, else "latency".
        base: one of ``efficientnet.scaling_study.networks.BASES``; accuracy is of "efficientnet_b0" only.
        step: of the grid.
        at_least, at_most: limits of alpha * beta^2 * gamma^2.
        img_size: pixels of the unscaled network. None: 32 for the digits, else 224.
        batch_size: images of a training step (None: as ``TrainConfig``), or of a timed forward (None: 1).
        data, epochs, lr, seed, amp, val_fraction, num_workers: as in ``TrainConfig``, for accuracy.

    Raises InputError that names the field, its value and what is accepted.
    """

    objective: str | None = None
    base: str = "efficientnet_b0"
    step: float = 0.05
    at_least: float = 1.9
    at_most: float = 2.0
    img_size: int | None = None
    batch_size: int | None = None
    device: str = "auto"
    data: str | None = None
    epochs: int = 3
    lr: float = TrainConfig.lr
    seed: int = 0
    amp: str = "none"
    val_fraction: float = TrainConfig.val_fraction
    num_workers: int = 0

    def __post_init__(self):
        trains = self.data is not None
        defaults = {
            "objective": "accuracy" if trains else "latency",
            "img_size": 32 if trains and self.data.startswith("digits") else 224,
            "batch_size": TrainConfig.batch_size if trains else 1,
        }
        for field, value in defaults.items():
            if getattr(self, field) is None:
                object.__setattr__(self, field, value)
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if (self.objective == "accuracy") != (self.data is not None):
            raise InputError(
                f"data is what objective accuracy is measured on, got objective {self.objective!r} and data "
                f"{self.data!r}"
            )
        if self.objective == "accuracy" and self.base != "efficientnet_b0":
            raise InputError(f"base must be efficientnet_b0 for objective accuracy, got {self.base!r}")
        for field, minimum in (("img_size", 1), ("batch_size", 1), ("epochs", 1), ("seed", 0), ("num_workers", 0)):
            check_count(field, getattr(self, field), minimum)


class Search:
    """One search, kept in a JSON file that is whole after every candidate, so that it may be stopped at any moment.

    The constructor reads and checks all input. ``run`` evaluates what the file does not have yet and returns all rows,
    the best first. While a candidate is trained, its files are in ``OUTPUT.runs``, and it continues from its last
    complete epoch.
    """

    def __init__(self, config: SearchConfig, output: str | os.PathLike):
        self.config, self.output = config, Path(output)
        self.runs = self.output.with_name(f"{self.output.name}.runs")
        self.grid = coefficient_grid(config.step, config.at_least, config.at_most)
        self.base_macs = count_macs(self._build(Scaling(1.0, 1.0, config.img_size)))
        self.rows: list[dict] = []
        self._networks: dict[tuple, object] = {}
        if self.output.is_dir() or not self.output.parent.is_dir():
            raise InputError(f"output {str(output)!r} must be a file in a folder that exists")
        if self.output.exists():
            self.rows = self._continue()
        if config.objective == "accuracy":
            with TemporaryDirectory() as scratch:  # what is wrong with the data or a setting shows before any work
                self._new_trainer(self.grid[0], scratch)
        elif config.objective == "latency":
            from efficientnet.devices import describe_device, pick_device

            self.device = pick_device(config.device)
            for stored in {row["device"] for row in self.rows} - {describe_device(self.device)}:
                raise InputError(
                    f"output {str(output)!r} was measured on {stored}, but this is {describe_device(self.device)}"
                )

    def run(self) -> list[dict]:
        """Evaluate every candidate that the file does not have yet. Returns all rows, the best first."""
        from tqdm import tqdm

        measure: Callable = {"accuracy": self._accuracy, "latency": self._latency, "macs": self._macs}[
            self.config.objective
        ]
        done = {coefficients(row) for row in self.rows}
        self._save()  # the settings, before any training that they belong to
        with tqdm(total=len(self.grid), initial=len(done), unit="network", dynamic_ncols=True) as bar:
            for candidate in self.grid:
                if candidate in done:
                    continue
                bar.set_postfix_str("alpha {:g}, beta {:g}, gamma {:g}".format(*candidate))
                row, network = self._describe(candidate), self._network(candidate)
                twin = next((other for other in self.rows if self._network(coefficients(other)) == network), None)
                row |= {key: twin[key] for key in twin if key not in row} if twin else measure(candidate, row)
                self.rows.append(row)
                self._save()
                bar.update()
        return sorted(self.rows, key=self._rank)

    def _scaling(self, candidate):
        depth, width, resolution = compound_scale(PHI, *candidate, base_resolution=self.config.img_size)
        return Scaling(round(depth, 4), round(width, 4), resolution)

    def _build(self, scaling, fused=False, device="meta"):
        return create_scaled(self.config.base, scaling, fused=fused, device=device)

    def _describe(self, candidate):
        """What is known of a candidate without measuring it."""
        alpha, beta, gamma = candidate
        scaling = self._scaling(candidate)
        model = self._build(scaling)
        self._networks[candidate] = replace(model.config, name="")
        return {
            "alpha": alpha,
            "beta": beta,
            "gamma": gamma,
            "product": round(alpha * beta**2 * gamma**2, 6),
            "resolution": scaling.resolution,
            "parameters": count_parameters(model),
            "macs": count_macs(model),
        }

    def _network(self, candidate):
        """What rounding leaves of a candidate. Several candidates may be the same network, which is measured once."""
        if candidate not in self._networks:
            self._networks[candidate] = replace(self._build(self._scaling(candidate)).config, name="")
        return self._networks[candidate]

    def _macs(self, candidate, row):
        return {"macs_of_base": row["macs"] / self.base_macs}

    def _latency(self, candidate, row):
        from efficientnet.devices import describe_device
        from efficientnet.measure.latency import measure_latency

        model = self._build(self._scaling(candidate), fused=True, device=self.device)
        latency = measure_latency(model, row["resolution"], self.device, self.config.batch_size)
        per_gmac = latency.ms / self.config.batch_size / (row["macs"] / 1e9)
        return {
            "ms": latency.ms,
            "iqr_ms": latency.iqr,
            "ms_per_gmac": per_gmac,
            "device": describe_device(self.device),
        }

    def _accuracy(self, candidate, row):
        folder = self._folder(candidate)
        epochs = _read_rows(folder / "metrics.jsonl")
        if len(epochs) < self.config.epochs:
            with redirect_stdout(sys.stderr):  # the search's own lines are what a user keeps
                self._trainer(candidate).run()
            epochs = _read_rows(folder / "metrics.jsonl")
        shutil.rmtree(folder)
        if not any(self.runs.iterdir()):
            self.runs.rmdir()
        return {"accuracy": epochs[-1]["val_acc"], "loss": epochs[-1]["val_loss"]}

    def _folder(self, candidate):
        return self.runs / "a{:g}_b{:g}_g{:g}".format(*candidate)

    def _trainer(self, candidate):
        """The trainer of a candidate, from where it was stopped; anew if no state of it can be continued."""
        folder = self._folder(candidate)
        try:
            return self._new_trainer(candidate, folder, "auto")
        except ValueError as error:
            if not folder.exists():
                raise
            print(f"{folder.name} is trained anew: {error}", file=sys.stderr)
            shutil.rmtree(folder)
            return self._new_trainer(candidate, folder)

    def _new_trainer(self, candidate, folder, resume=None):
        from efficientnet.training.trainer import Trainer

        config, scaling = self.config, self._scaling(candidate)
        names = ("data", "epochs", "batch_size", "lr", "seed", "device", "amp", "val_fraction", "num_workers")
        return Trainer(
            TrainConfig(
                model=self._build(scaling).config.name,
                img_size=scaling.resolution,
                warmup_epochs=min(TrainConfig.warmup_epochs, config.epochs / 3),
                output=str(folder),
                resume=resume,
                **{name: getattr(config, name) for name in names},
            )
        )

    def _rank(self, row):
        if self.config.objective == "accuracy":
            return -row["accuracy"], row["loss"]
        if self.config.objective == "latency":
            return (row["ms_per_gmac"],)
        return (abs(math.log(row["macs_of_base"] / 2)),)

    def _save(self):
        best = min(self.rows, key=self._rank) if len(self.rows) == len(self.grid) else None
        result = {"search": asdict(self.config), "phi": PHI, "rows": self.rows, "best": best}
        with replacing(self.output) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")

    def _continue(self):
        try:
            stored = json.loads(self.output.read_text(encoding="utf-8"))
            settings, rows = stored["search"], stored["rows"]
            known = set(self.grid) >= {coefficients(row) for row in rows}
        except (ValueError, TypeError, KeyError) as error:
            raise InputError(f"output {str(self.output)!r} exists and is no result of a search") from error
        for field, value in asdict(self.config).items():
            if settings.get(field) != value:
                raise InputError(
                    f"output {str(self.output)!r} is of a search with {field} {settings.get(field)!r}, but this one "
                    f"has {value!r}"
                )
        if not known:
            raise InputError(f"output {str(self.output)!r} has candidates that are not of this grid")
        return rows


def coefficients(row: dict) -> tuple[float, float, float]:
    """(alpha, beta, gamma) of a row."""
    return row["alpha"], row["beta"], row["gamma"]


def _read_rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
