"""Which training image comes when: an order that depends on the seed and the epoch alone, shared out to processes."""

import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from efficientnet.errors import InputError


class Draw(NamedTuple):
    """A training image, and all besides the seed that it depends on. So workers, processes and resumed runs see the
    same pixels.
    """

    index: int
    epoch: int
    img_size: int | tuple[int, int]


class TrainingOrder:
    """The batches of one process, as lists of Draws, in a new order every epoch: a batch sampler for torch's
    DataLoader.

    Update s of an epoch takes images ``order[s * images : (s + 1) * images]``. Of those, process r takes for its
    accumulated batch a the slice ``a * world + r`` of ``batch_size`` images. The order is a function of (seed, epoch),
    so a position in training is two numbers. Images that are left over at the end of an epoch are not seen in it. With
    ``labels``, the classes of the images, an epoch is as many draws, with replacement, of which each class has the same
    share.

    Args:
        size_of: the pixels of the images of an epoch, as a function of it.

    Raises InputError if the data set has fewer images than an update. One process without accumulation then takes them
    all.
    """

    def __init__(
        self,
        total: int,
        batch_size: int,
        accum: int = 1,
        rank: int = 0,
        world: int = 1,
        seed: int = 0,
        size_of: Callable[[int], int | tuple[int, int]] | None = None,
        labels: torch.Tensor | None = None,
    ):
        if total < batch_size and accum * world == 1:
            batch_size = total
        self.total, self.batch_size, self.accum, self.rank, self.world = total, batch_size, accum, rank, world
        self.images = batch_size * accum * world  # of an update
        self.steps = total // self.images
        self.seed, self.size_of = seed, size_of
        self.shares = None if labels is None else 1 / labels.bincount().double()[labels]
        self.epoch, self.start = 0, 0
        if self.steps == 0:
            raise InputError(
                f"an update takes {self.images} images (batch_size {batch_size} x {accum} accumulated x {world} "
                "processes), "
                f"but the training set has {total}: lower batch_size"
            )

    def begin(self, epoch: int, step: int) -> None:
        """Say what the next iteration yields: the batches of ``epoch`` from update ``step`` on."""
        self.epoch, self.start = epoch, step

    def __len__(self):
        return (self.steps - self.start) * self.accum

    def __iter__(self) -> Iterator[list[Draw]]:
        order, size, epoch = self._permutation(self.epoch), self.size_of(self.epoch), self.epoch
        for step in range(self.start, self.steps):
            for a in range(self.accum):
                at = step * self.images + (a * self.world + self.rank) * self.batch_size
                yield [Draw(index, epoch, size) for index in order[at : at + self.batch_size]]

    def indices(self, epoch: int, step: int) -> list[int]:
        """The images of an update, those of all processes."""
        return self._permutation(epoch)[step * self.images : (step + 1) * self.images]

    def _permutation(self, epoch):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
        if self.shares is not None:
            return torch.multinomial(self.shares, self.total, replacement=True, generator=generator).tolist()
        return torch.randperm(self.total, generator=generator).tolist()
