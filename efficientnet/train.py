"""Training and evaluation: one process, one device, files that are whole at every moment."""

import json
import math
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from efficientnet.checkpoints import describe_model, load_training_state, replacing, save_checkpoint, save_training_state
from efficientnet.config import EfficientNetConfig
from efficientnet.data import Data, ImageSet, load_data
from efficientnet.model import create_model
from efficientnet.profile import count_parameters
from efficientnet.settings import DEVICES, InputError, TrainConfig

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises InputError for "cuda" without."""
    if name not in DEVICES:
        raise InputError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def describe_backend(model: torch.nn.Module, images: torch.Tensor) -> str:
    """Which kernels the model's MBConv blocks run for such images, and why not the fused ones where they do not."""
    from effkernels import explain

    reasons = explain(model, images)
    plain = dict.fromkeys(reasons.plain, "a plain block (built with fused=False)")
    counts = Counter(reason for reason in (reasons | plain).values() if reason is not None)
    parts = [f"triton for {reasons.fused} of {len(reasons)} MBConv blocks"]
    parts += [f"PyTorch reference for {count}: {reason}" for reason, count in counts.most_common()]
    return "; ".join(parts)


@dataclass(frozen=True)
class Evaluation:
    loss: float
    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    def __str__(self):
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


class Runner:
    """How batches reach a model: device, memory format, autocast. Shared by training and evaluation."""

    def __init__(self, device: torch.device, amp: str = "none", channels_last: bool = True):
        self.device, self.dtype = device, AMP_DTYPES[amp]
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def place(self, model):
        return model.to(device=self.device, memory_format=self.memory_format)

    def batches(self, dataset: ImageSet, batch_size: int, num_workers: int = 0, train: bool = False):
        """A loader of (images, labels) on the CPU; in training shuffled, without a remainder (one image has no batch statistics)."""
        pinned = self.device.type == "cuda"
        drop_last = train and len(dataset) >= batch_size
        return DataLoader(dataset, batch_size, shuffle=train, drop_last=drop_last, num_workers=num_workers, pin_memory=pinned)

    def to_device(self, images, labels):
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return images, labels.to(self.device, non_blocking=True)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def evaluate(self, model, loader) -> Evaluation:
        """Mean cross entropy and number of correct top classes."""
        model.eval()
        loss, correct, total = 0.0, 0, 0
        for batch in loader:
            images, labels = self.to_device(*batch)
            with self.autocast():
                logits = model(images)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum").item()
            correct += (logits.argmax(1) == labels).sum().item()
            total += len(labels)
        return Evaluation(loss / total, correct, total)


class Trainer:
    """A training run. The constructor reads and checks all input; ``run`` trains.

    Files in ``config.output``, each whole at every moment, so that a run may be stopped at any:

    - ``last.safetensors``, ``best.safetensors``: weights of the last epoch and of the best held-out accuracy (``load_checkpoint``);
    - ``last.train.pt``: all that ``resume`` needs, weights included;
    - ``metrics.jsonl``: one row an epoch; at the end ``curves.png``: loss and accuracy; ``samples/``: held-out digits to predict on.
    """

    def __init__(self, config: TrainConfig):
        self.config, self.output = config, Path(config.output)
        self.runner = Runner(pick_device(config.device), config.amp, config.channels_last)
        img_size = config.img_size
        if img_size is None:
            img_size = 32 if config.data == "digits" else EfficientNetConfig.from_name(config.model).resolution
        self.data: Data = load_data(config.data, img_size, config.val_fraction)
        self.loader = self.runner.batches(self.data.train, config.batch_size, config.num_workers, train=True)
        self.val_loader = self.runner.batches(self.data.val, 2 * config.batch_size, config.num_workers)

        torch.manual_seed(config.seed)
        model = create_model(
            config.model,
            num_classes=len(self.data.classes),
            drop_rate=config.drop_rate,
            drop_path_rate=config.drop_path_rate,
            fused=config.fused,
        )
        # The release's classifier starts at +-1 / sqrt(classes): fine for 1000, but with 10 the first logits are so large and wrong
        # that it takes hundreds of steps to unlearn them (12 epochs of the digits at lr 3e-3: 81 % so, 97 % from zero).
        torch.nn.init.zeros_(model.classifier.weight)
        self.model = self.runner.place(model)
        parameters = list(self.model.parameters())
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, fused=True)
        self.scaler = torch.amp.GradScaler(self.runner.device.type, enabled=config.amp == "fp16")
        self.history: list[dict] = []
        if config.resume:
            self._resume(config.resume)
        self.output.mkdir(parents=True, exist_ok=True)

    def run(self) -> Evaluation:
        """Train to the end, print as it goes, and return the evaluation of the final weights on the held-out images."""
        from tqdm import tqdm

        self._announce()
        self._write_samples()
        writer = self._tensorboard()
        done, steps, evaluation = len(self.history), len(self.loader), None
        interval = 0.1 if sys.stderr.isatty() else 5  # seconds; a log file needs no film
        with tqdm(total=self.config.epochs * steps, initial=done * steps, unit="batch", mininterval=interval, dynamic_ncols=True) as bar:
            for epoch in range(done, self.config.epochs):
                started = time.perf_counter()
                train_loss = self._train_epoch(epoch, bar)
                seconds = time.perf_counter() - started
                evaluation = self.runner.evaluate(self.model, self.val_loader)
                row = {
                    "epoch": epoch + 1,
                    "train_loss": train_loss,
                    "val_loss": evaluation.loss,
                    "val_acc": evaluation.accuracy,
                    "lr": self._lr(epoch * steps + steps - 1),
                    "images_per_s": len(self.loader) * self._batch() / seconds,
                    "seconds": seconds,
                }
                self.history.append(row)
                self._save()
                bar.write(
                    f"epoch {epoch + 1:3d}/{self.config.epochs}  train loss {train_loss:.3f}  held-out loss {evaluation.loss:.3f}  "
                    f"accuracy {100 * evaluation.accuracy:6.2f} %  {row['images_per_s']:.0f} images/s"
                )
                sys.stdout.flush()
                if writer:
                    for key in ("train_loss", "val_loss", "val_acc", "lr", "images_per_s"):
                        writer.add_scalar(key, row[key], epoch + 1)
                    writer.flush()
        with replacing(self.output / "curves.png") as path:
            plot_curves(self.history, path)
        print(f"checkpoint  {self.output / 'last.safetensors'}")
        print(f"test accuracy: {evaluation}", flush=True)
        return evaluation

    def _train_epoch(self, epoch, bar):
        """Mean training loss. Each epoch draws from a seed of its own, so a resumed run repeats what the whole run would have done."""
        torch.manual_seed(self.config.seed * 1_000_003 + epoch + 1)
        self.model.train()
        total = torch.zeros((), device=self.runner.device)
        for step, batch in enumerate(self.loader):
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(epoch * len(self.loader) + step)
            images, labels = self.runner.to_device(*batch)
            with self.runner.autocast():
                logits = self.model(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=self.config.label_smoothing)
            self.optimizer.zero_grad()
            self.scaler.scale(loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            total += loss.detach()
            if step % 10 == 0:  # reading the loss waits for the device
                bar.set_postfix_str(f"epoch {epoch + 1}/{self.config.epochs}, loss {loss.item():.3f}", refresh=False)
            bar.update()
        mean = total.item() / len(self.loader)
        if not math.isfinite(mean):
            raise InputError(f"training diverged (loss {mean} in epoch {epoch + 1}): lr {self.config.lr} is too large for it")
        return mean

    def _lr(self, step):
        """Linear warm-up, then a half cosine that reaches zero after the last step."""
        steps = self.config.epochs * len(self.loader)
        warmup = min(self.config.warmup_epochs * len(self.loader), steps - 1)
        if step < warmup:
            return self.config.lr * (step + 1) / (warmup + 1)
        return self.config.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup)))

    def _batch(self):
        return min(self.config.batch_size, len(self.data.train))

    def _metadata(self):
        return {"classes": self.data.classes, "preprocess": asdict(self.data.preprocess)}

    def _save(self):
        row, metadata = self.history[-1], self._metadata()
        metadata |= {"epoch": row["epoch"], "metrics": row}
        save_checkpoint(self.model, self.output / "last.safetensors", **metadata)
        if row["val_acc"] > max((earlier["val_acc"] for earlier in self.history[:-1]), default=-1.0):
            save_checkpoint(self.model, self.output / "best.safetensors", **metadata)
        state = {
            "model": self.model.state_dict(),
            "metadata": describe_model(self.model) | self._metadata(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "history": self.history,
        }
        save_training_state(self.output / "last.train.pt", state)
        with replacing(self.output / "metrics.jsonl") as path:
            path.write_text("".join(json.dumps(row) + "\n" for row in self.history), encoding="utf-8")

    def _resume(self, path):
        state = load_training_state(path)
        stored, ours = (_flat(described) for described in (state["metadata"], describe_model(self.model) | self._metadata()))
        for field in ("name", *ours):  # the name first: it explains the rest
            if field != "preprocess" and stored[field] != ours[field]:
                raise InputError(f"resume {str(path)!r} was trained with {field} {stored[field]!r}, but this run has {ours[field]!r}")
        done = len(state["history"])
        if done >= self.config.epochs:
            raise InputError(f"resume {str(path)!r} has {done} epochs behind it; epochs must be more, got {self.config.epochs}")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        self.history = state["history"]

    def _announce(self):
        images, _ = self.runner.to_device(*next(iter(self.val_loader)))
        with self.runner.autocast():
            backend = describe_backend(self.model.train(), images)
        device = self.runner.device
        where = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
        size, classes = self.data.preprocess.img_size, len(self.data.classes)
        print(f"model       {self.config.model}, {count_parameters(self.model):,} parameters, {classes} classes")
        print(f"data        {self.config.data}, {len(self.data.train)} training and {len(self.data.val)} held-out images, {size} x {size}")
        print(f"device      {where}, amp {self.config.amp}")
        print(f"backend     {backend}")
        print(f"output      {self.output}", flush=True)

    def _write_samples(self):
        """One held-out digit of each class as a PNG, for ``predict``."""
        if self.config.data != "digits":
            return
        from PIL import Image

        folder = self.output / "samples"
        folder.mkdir(exist_ok=True)
        for label, name in enumerate(self.data.classes):
            image = self.data.val.images[self.data.val.labels.index(label)]
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{name}.png")

    def _tensorboard(self):
        if not self.config.tensorboard:
            return None
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self.output / "tensorboard", purge_step=len(self.history) + 1)


def _flat(description):
    return {**description["config"], **{key: value for key, value in description.items() if key != "config"}}


def plot_curves(history: list[dict], path) -> None:
    """Loss and held-out accuracy by epoch, as a PNG."""
    from matplotlib.figure import Figure  # not pyplot: no global state, no display

    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    loss.plot(epochs, [row["train_loss"] for row in history], marker=".", label="training (smoothed labels)")
    loss.plot(epochs, [row["val_loss"] for row in history], marker=".", label="held-out")
    loss.set(xlabel="epoch", ylabel="cross entropy", title="Loss")
    loss.legend()
    accuracy.plot(epochs, [100 * row["val_acc"] for row in history], marker=".", color="tab:orange")
    accuracy.set(xlabel="epoch", ylabel="held-out accuracy (%)", title=f"Accuracy: {100 * history[-1]['val_acc']:.2f} %")
    for axes in (loss, accuracy):
        axes.grid(alpha=0.3)
        axes.xaxis.get_major_locator().set_params(integer=True)
    figure.savefig(path, format="png", dpi=120)
