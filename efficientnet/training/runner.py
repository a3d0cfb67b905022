"""The device, memory format, autocast and processes of a run, and the evaluation of a model; also used by validation
and prediction.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from efficientnet.data.decoding import decoding_device
from efficientnet.data.images import ImageSet, Preprocess
from efficientnet.data.loading import Batches, Readable, Unreadable, collate
from efficientnet.data.order import TrainingOrder
from efficientnet.data.shards import ShardLoader, ShardSet
from efficientnet.errors import InputError
from efficientnet.training.distributed import Processes

AMP_DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Evaluation:
    """What a model does on held-out images.

    loss is the mean cross entropy. correct counts the images whose class was the most probable one, correct5 those
    whose class was among the five most probable. per_class has (correct, total) of each class.
    """

    loss: float
    correct: int
    total: int
    correct5: int = 0
    per_class: list[tuple[int, int]] = field(default_factory=list, compare=False)

    @property
    def accuracy(self) -> float:
        """The share of images whose label is the first guess."""
        return self.correct / self.total

    @property
    def accuracy5(self) -> float:
        """The share of images whose label is among the first five guesses."""
        return self.correct5 / self.total

    def __str__(self):
        return f"{100 * self.accuracy:.2f} % ({self.correct}/{self.total})"


class Runner:
    """The device, memory format, autocast and processes that all batches of a run share."""

    def __init__(
        self, device: torch.device, amp: str = "none", channels_last: bool = True, processes: Processes | None = None
    ):
        self.device, self.dtype, self.processes = device, AMP_DTYPES[amp], processes or Processes()
        self.memory_format = torch.channels_last if channels_last else torch.contiguous_format

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move the model to the device and into the memory format, in place, and return it."""
        return model.to(device=self.device, memory_format=self.memory_format)

    def batches(
        self,
        dataset: ImageSet | ShardSet,
        batch_size: int = 1,
        num_workers: int = 0,
        order: TrainingOrder | None = None,
        unreadable: Unreadable | None = None,
    ) -> Batches:
        """The batches of a data set, on the device.

        Args:
            order: a batch sampler, for training. Without one, each image comes once, and this process gets its share of
                them.
            unreadable: what counts the images that cannot be read. None: the first one is an error.
        """
        pin = self.device.type == "cuda" and decoding_device().type == "cpu"
        where = {"num_workers": num_workers, "pin_memory": pin}
        # The loader gets a generator of its own: starting one would otherwise change the model's random numbers.
        where["generator"] = torch.Generator().manual_seed(0)
        if isinstance(dataset, ShardSet):
            loader = ShardLoader(dataset, batch_size, order, self.processes.rank, self.processes.world, **where)
            return Batches(dataset, loader, self.to_device, unreadable or Unreadable())
        where |= {"persistent_workers": num_workers > 0, "collate_fn": collate}
        if order is None:
            order = list(range(self.processes.rank, len(dataset), self.processes.world))
            order = [order[at : at + batch_size] for at in range(0, len(order), batch_size)]
        loader = DataLoader(Readable(dataset), batch_sampler=order, **where)
        return Batches(dataset, loader, self.to_device, unreadable or Unreadable())

    def to_device(
        self, images: torch.Tensor, labels: torch.Tensor, preprocess: Preprocess
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """uint8 images [N, 3, H, W] and labels [N] -> float32 images, normalised, and labels, both on the device."""
        images = images.to(self.device, non_blocking=True, memory_format=self.memory_format)
        return preprocess.normalize(images), labels.to(self.device, non_blocking=True)

    def autocast(self) -> torch.autocast:
        """The context in which the model runs; it does nothing in fp32."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.dtype is not None)

    @torch.no_grad()
    def evaluate(
        self, model: torch.nn.Module, batches: Batches, interrupted: Callable[[], bool] = lambda: False
    ) -> Evaluation:
        """Evaluate the model on the images of all processes, each of which is counted once.

        Raises InterruptedError as soon as ``interrupted()``, and InputError where no image can be read.
        """
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
            width = self.processes.sum(
                torch.tensor([0.0, 0.0] if sums is None else [float(len(sums)), 1.0], device=self.device)
            )
            if sums is None:  # more processes than images
                sums = torch.zeros(int(width[0] / width[1]), dtype=torch.float64, device=self.device)
            self.processes.sum(sums)
        if sums is None:
            raise InputError("none of the images to evaluate can be read")
        loss, correct5, *counts = sums.tolist()
        correct, total = (list(map(int, part)) for part in (counts[: len(counts) // 2], counts[len(counts) // 2 :]))
        return Evaluation(
            loss / sum(total), sum(correct), sum(total), int(correct5), list(zip(correct, total, strict=True))
        )
