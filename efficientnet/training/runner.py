"""How batches reach a model, and what is measured of it. Shared by training, validation and prediction."""

import time
from collections import Counter
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

from efficientnet.data.sets import ImageSet
from efficientnet.data.shards import ShardLoader, ShardSet
from efficientnet.training.distributed import Processes
from efficientnet.training.settings import DEVICES, InputError

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one. Raises InputError for "cuda" without."""
    if name not in DEVICES:
        raise InputError(f"device must be one of {', '.join(DEVICES)}, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("device 'cuda' was asked for, but torch sees no CUDA device; accepted here: auto, cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def use_tf32(yes: bool) -> None:
    """Whether CUDA's fp32 products and convolutions may be TF32. Set so that both of torch's interfaces can read it: after the newer one
    (``fp32_precision``) alone, the older raises, and libraries read that."""
    torch.set_float32_matmul_precision("high" if yes else "highest")
    torch.backends.cudnn.allow_tf32 = yes


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
    """Mean cross entropy; images whose class was the most probable one, or among the five. per_class: (correct, total) of each."""

    loss: float
    correct: int
    total: int
    correct5: int = 0
    per_class: list[tuple[int, int]] = field(default_factory=list, compare=False)

    @property
    def accuracy(self) -> float:
        return self.correct / self.total

    @property
    def accuracy5(self) -> float:
        return self.correct5 / self.total

    def __str__(self):
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


class Unreadable:
    """Images that could not be read: named once each, and an InputError when they are more than ``limit``."""

    def __init__(self, limit: int = 0, say=print, hint: str = "; --max-corrupt allows more"):
        self.limit, self.say, self.hint, self.seen = limit, say, hint, []

    def record(self, problems: list[str]) -> None:
        for problem in problems:
            if problem in self.seen:
                continue
            self.seen.append(problem)
            if len(self.seen) > self.limit:
                more = f" (after {self.limit} others that were skipped)" if self.limit else ""
                raise InputError(f"{problem}{more}{self.hint}")
            self.say(f"skipped, {len(self.seen)} of at most {self.limit}: {problem}")


class _Readable(torch.utils.data.Dataset):
    """(item or None, problems) of a data set: a training image that cannot be read gives way to the next one that can."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __getitem__(self, draw):
        problems = []
        training = not isinstance(draw, int)
        for _ in range(len(self.dataset) if training else 1):
            try:
                return self.dataset[draw], problems
            except (InputError, OSError) as error:
                problems.append(str(error))
                if training:
                    draw = draw._replace(index=(draw.index + 1) % len(self.dataset))
        return None, problems


def _collate(items):
    problems = [problem for _, found in items for problem in found]
    readable = [item for item, _ in items if item is not None]
    return default_collate(readable) if readable else None, problems


class Batches:
    """Iterating yields (images float32 [N, 3, H, W], labels [N]) on the runner's device, normalised there.

    ``wait`` adds up the seconds in which the loop stood still for data.
    """

    def __init__(self, dataset, loader: DataLoader, runner: "Runner", unreadable: Unreadable):
        self.dataset, self.loader, self.runner, self.unreadable, self.wait = dataset, loader, runner, unreadable, 0.0

    def names(self, epoch: int, step: int) -> list[str]:
        """Images of an update, in training: all processes', or of shards this one's."""
        if isinstance(self.loader, ShardLoader):
            return self.loader.names(epoch, step)
        return [self.dataset.name(index) for index in self.loader.batch_sampler.indices(epoch, step)]

    @property
    def description(self) -> dict:
        """What the images of an update depend on besides the settings, for a run that is resumed."""
        return self.loader.description if isinstance(self.loader, ShardLoader) else {}

    def __iter__(self):
        batches = iter(self.loader)
        while True:
            started = time.perf_counter()
            batch, problems = next(batches, (None, None))
            self.wait += time.perf_counter() - started
            if problems is None:
                return
            self.unreadable.record(problems)
            if batch is not None:
                yield self.runner.to_device(*batch, self.dataset.preprocess)

    def close(self):
        """Ends the data workers that wait for another epoch; iterating again starts others.

        Left to the garbage collector they stand still for 5 s each: it closes their queues before the loader can ask them to end.
        """
        waiting = getattr(self.loader, "_iterator", None)  # PyTorch has no public way
        if waiting is not None:
            waiting._shutdown_workers()
            self.loader._iterator = None


class Runner:
    """Device, memory format, autocast and processes of a run."""

    def __init__(self, device: torch.device, amp: str = "none", channels_last: bool = True, processes: Processes | None = None):
        self.device, self.dtype, self.processes = device, AMP_DTYPES[amp], processes or Processes()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def place(self, model):
        return model.to(device=self.device, memory_format=self.memory_format)

    def batches(self, dataset: ImageSet, batch_size: int = 1, num_workers: int = 0, order=None, unreadable=None) -> Batches:
        """Training batches in the given ``order`` (a batch sampler); without one, this process's share of the images, each once."""
        where = {"num_workers": num_workers, "pin_memory": self.device.type == "cuda"}
        # Its own generator: the model's random numbers do not depend on how often a loader was started.
        where["generator"] = torch.Generator().manual_seed(0)
        if isinstance(dataset, ShardSet):
            loader = ShardLoader(dataset, batch_size, order, self.processes.rank, self.processes.world, **where)
            return Batches(dataset, loader, self, unreadable or Unreadable())
        where |= {"persistent_workers": num_workers > 0, "collate_fn": _collate}
        if order is None:
            order = list(range(self.processes.rank, len(dataset), self.processes.world))
            order = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        loader = DataLoader(_Readable(dataset), batch_sampler=order, **where)
        return Batches(dataset, loader, self, unreadable or Unreadable())

    def to_device(self, images, labels, preprocess):
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return preprocess.normalize(images), labels.to(self.device, non_blocking=True)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def evaluate(self, model, batches, interrupted=lambda: False) -> Evaluation:
        """Over the images of all processes, each counted once. Raises InterruptedError as soon as ``interrupted()``."""
        model.eval()
        sums = None
        for images, labels in batches:
            with self.autocast():
                logits = model(images).float()
            losses = F.cross_entropy(logits, labels, reduction="none")
            best = logits.topk(min(5, logits.shape[1])).indices == labels.view(-1, 1)
            if sums is None:
                sums = torch.zeros(2 + 2 * logits.shape[1], dtype=torch.float64, device=self.device)
            classes = sums[2:].view(2, -1)
            sums[0] += losses.double().sum()
            sums[1] += best.any(1).sum()
            classes[0].index_add_(0, labels, best[:, 0].double())
            classes[1].index_add_(0, labels, torch.ones_like(losses, dtype=torch.float64))
            if interrupted():
                raise InterruptedError
        if self.processes.world > 1:
            width = self.processes.sum(torch.tensor([0.0, 0.0] if sums is None else [float(len(sums)), 1.0], device=self.device))
            if sums is None:  # more processes than images
                sums = torch.zeros(int(width[0] / width[1]), dtype=torch.float64, device=self.device)
            self.processes.sum(sums)
        if sums is None:
            raise InputError("none of the images to evaluate can be read")
        loss, correct5, *counts = sums.tolist()
        correct, total = (list(map(int, part)) for part in (counts[: len(counts) // 2], counts[len(counts) // 2 :]))
        return Evaluation(loss / sum(total), sum(correct), sum(total), int(correct5), list(zip(correct, total, strict=True)))
