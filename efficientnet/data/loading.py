"""How batches reach a model: loading them, passing over images that cannot be read, measuring the time spent
waiting.
"""

import time
from collections.abc import Callable

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from efficientnet.data.shards import ShardLoader
from efficientnet.errors import InputError


class Unreadable:
    """Counts the images that could not be read. Each is named once; more of them than ``limit`` are an InputError.

    Args:
        say: is told of each image that is passed over.
        hint: ends the message of the error.
    """

    def __init__(self, limit: int = 0, say: Callable[[str], None] = print, hint: str = "; --max-corrupt allows more"):
        self.limit, self.say, self.hint, self.seen = limit, say, hint, []

    def record(self, problems: list[str]) -> None:
        """Count these problems, which are the messages of errors. Raises InputError beyond the limit."""
        for problem in problems:
            if problem in self.seen:
                continue
            self.seen.append(problem)
            if len(self.seen) > self.limit:
                more = f" (after {self.limit} others that were skipped)" if self.limit else ""
                raise InputError(f"{problem}{more}{self.hint}")
            self.say(f"skipped, {len(self.seen)} of at most {self.limit}: {problem}")


class Readable(torch.utils.data.Dataset):
    """(item or None, problems) of a data set: a training image that cannot be read gives way to the next one that
    can.
    """

    def __init__(self, dataset: Dataset):
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


def collate(items: list[tuple]) -> tuple[list[torch.Tensor] | None, list[str]]:
    """A batch of what ``Readable`` returned: (tensors of the items that could be read, or None; the problems of
    all).
    """
    problems = [problem for _, found in items for problem in found]
    readable = [item for item, _ in items if item is not None]
    return default_collate(readable) if readable else None, problems


class Batches:
    """Iterating yields (images float32 [N, 3, H, W], labels [N]) as ``to_device`` returns them.

    ``wait`` adds up the seconds in which the loop stood still for data.
    """

    def __init__(self, dataset: Dataset, loader: DataLoader, to_device: Callable, unreadable: Unreadable):
        self.dataset, self.loader, self.to_device, self.unreadable, self.wait = (
            dataset,
            loader,
            to_device,
            unreadable,
            0.0,
        )

    def names(self, epoch: int, step: int) -> list[str]:
        """The images of an update in training: those of all processes, or of shards those of this process."""
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
                yield self.to_device(*batch, self.dataset.preprocess)

    def close(self) -> None:
        """End the data workers that wait for another epoch; iterating again starts new ones.

        Left to the garbage collector each stands still for 5 s: it closes their queues before the loader can ask them
        to end.
        """
        waiting = getattr(self.loader, "_iterator", None)  # PyTorch has no public way
        if waiting is not None:
            waiting._shutdown_workers()
            self.loader._iterator = None
