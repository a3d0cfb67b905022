"""Which training image comes when: an order that depends on the seed and the epoch alone, shared out to processes."""

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import torch

from efficientnet.errors import InputError


class Draw(NamedTuple):
    """A training image, and all besides the seed that it depends on: workers, processes and resumed runs see the same pixels."""

    index: int
    epoch: int
    img_size: int


class TrainingOrder:
    """A batch sampler: lists of Draws, a new order every epoch, that of one process of ``world``.

    Update s of an epoch takes images ``order[s * images : (s + 1) * images]``; of those, process r takes for its accumulated batch a
    slice ``a * world + r`` of batch_size images. The order is a function of (seed, epoch), so a position is two numbers; images left
    over at the end of an epoch are not seen in it.

    Raises InputError if the data set has fewer images than an update (one process without accumulation then takes them all).
    """

    def __init__(self, total: int, batch_size: int, accum: int = 1, rank: int = 0, world: int = 1, seed: int = 0, size_of=None):
        if total < batch_size and accum * world == 1:
            batch_size = total
        self.total, self.batch_size, self.accum, self.rank, self.world = total, batch_size, accum, rank, world
        self.images = batch_size * accum * world  # of an update
        self.steps = total // self.images
        self.seed, self.size_of = seed, size_of
        self.epoch, self.start = 0, 0
        if self.steps == 0:
            raise InputError(
                f"an update takes {self.images} images (batch_size {batch_size} x {accum} accumulated x {world} processes), "
                f"but the training set has {total}: lower batch_size"
            )

    def begin(self, epoch: int, step: int) -> None:
        """What the next iteration yields: the epoch's batches from update ``step`` on."""
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
        """The images of an update, all processes'."""
        return self._permutation(epoch)[step * self.images : (step + 1) * self.images]

    def _permutation(self, epoch):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {epoch}".encode()))
        return torch.randperm(self.total, generator=generator).tolist()
