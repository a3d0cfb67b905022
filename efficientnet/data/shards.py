"""Shards in webdataset's format: tar files of samples, read as streams, for data sets that are larger than one disk.

A sample is the files that share a name: ``KEY.jpg`` (or another image) and ``KEY.cls``, its class as a number. Shards
are local files, or whatever else the webdataset library opens: http, s3, gs, hf, and ``pipe:COMMAND``.
"""

import io
import os
import random
import tarfile
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from itertools import chain, count, islice
from pathlib import Path

from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info

from efficientnet.data.decoding import Picture
from efficientnet.data.images import Prepared, Preprocess, drawing_from, image_suffixes
from efficientnet.data.order import TrainingOrder
from efficientnet.errors import InputError

SHUFFLE = 1000  # samples a worker holds, to draw the next one from
PATIENCE = 100  # unreadable samples in a row before a worker gives up


class ShardSet(Prepared):
    """Labelled images in ``shards``.

    Args:
        classes: their names as the .cls files have them; "0", "1", ... where these are numbers.
        num_samples: images of a training epoch; None where nobody needs to know.
    """

    def __init__(
        self,
        shards: list[str],
        classes: list[str],
        num_samples: int | None,
        preprocess: Preprocess,
        augment: Callable | None = None,
    ):
        super().__init__(preprocess, augment)
        self.shards, self.num_samples = shards, num_samples
        self.labels = {name: label for label, name in enumerate(classes)}

    def __len__(self):
        return self.num_samples

    @property
    def size(self) -> str:
        """The number of images and of shards, as text."""
        return f"{self.num_samples or 'some'} (in {len(self.shards)} shards)"

    def sample(self, raw: dict) -> tuple[Picture, int]:
        """(its image, not yet decoded, class index) of a sample as read.

        Raises InputError that names a sample that cannot be used.
        """
        name = _name(raw)
        suffix = next((field for field in raw if f".{field.lower()}" in image_suffixes()), None)
        if suffix is None or "cls" not in raw:
            fields = ", ".join(field for field in raw if not field.startswith("__"))
            raise InputError(f"sample {name!r} must have an image and a class (.cls), got {fields}")
        text = class_name(raw["cls"])
        label = self.labels.get(text)
        if label is None and text.isdigit() and int(text) < len(self.labels):
            label = int(text)  # of classes whose names another place knows
        if label is None:
            last = len(self.labels) - 1
            accepted = (
                f"a number from 0 to {last}"
                if "0" in self.labels
                else f"one of {_some(self.labels)}, or a number from 0 to {last}"
            )
            raise InputError(f"class of sample {name!r} must be {accepted}, got {text!r}")
        return Picture(io.BytesIO(raw[suffix]), name, self.preprocess.channels), label


def find_shards(pattern: str) -> list[str]:
    """The shards that a pattern names: webdataset spells out ``{0000..0099}``, and ``*`` is what is there.

    Raises InputError for local files that do not exist.
    """
    from webdataset.shardlists import expand_urls

    shards = []
    for url in expand_urls(pattern):
        url = os.path.expanduser(url) if is_local(url) else url
        found = sorted(glob(url)) if is_local(url) and has_magic(url) else [url]
        if not found or is_local(url) and not Path(found[0]).is_file():
            raise InputError(f"shard {url!r} does not exist")
        shards += found
    if len(set(shards)) < len(shards):
        raise InputError(f"webdataset pattern {pattern!r} names a shard twice")
    return shards


def numbered(count: int) -> list[str]:
    """The names of classes that have only numbers."""
    return [str(i) for i in range(count)]


def class_name(content: bytes) -> str:
    """What a .cls file says; a number without leading zeros."""
    text = content.strip().decode(errors="replace")
    return str(int(text)) if text.isdecimal() and text.isascii() else text


def _some(names):
    names = list(names)
    return f"{', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"


def count_samples(shards: list[str]) -> tuple[int, list[str]]:
    """(samples, names of the classes) of local shards, counted from the headers and .cls files alone.

    The names are numbers up to the largest where most are numbers, else they are sorted. Raises InputError for a file
    that is no tar file.
    """
    samples, names = 0, set()
    for shard in shards:
        try:
            with tarfile.open(shard) as tar:
                for member in tar:
                    if member.isfile() and member.name.endswith(".cls"):
                        samples += 1
                        names.add(class_name(tar.extractfile(member).read()))
        except (tarfile.TarError, EOFError) as error:
            # A truncated shard is counted as far as it goes, and named when it is read.
            if "end of data" not in str(error):
                raise InputError(f"shard {shard!r} is no tar file") from error
    numbers = [int(name) for name in names if name.isdecimal()]
    # Of mostly numbers the others are faults of single samples, named when they are read.
    if 2 * len(numbers) > len(names) or not names:
        return samples, numbered(max(numbers, default=-1) + 1)
    return samples, sorted(names)


class ShardLoader:
    """Iterating yields (batch or None, problems), as ``loading.Batches`` wants them.

    In training, process r of ``world`` and worker w of ``workers`` read every (world * workers)-th shard of the epoch's
    own order of them, drawn from (seed, epoch), through a shuffle buffer; who is through with his shards begins again.
    So an update is a function of seed, epoch and update for a given number of processes and workers. A resumed run
    reads over what the epoch has had, without decoding it. A sample that cannot be read gives way to a neighbour.
    Without ``order``, in evaluation, each sample comes once.

    Raises InputError if there are fewer shards than readers.
    """

    def __init__(
        self,
        dataset: ShardSet,
        batch_size: int,
        order: TrainingOrder | None = None,
        rank: int = 0,
        world: int = 1,
        num_workers: int = 0,
        **loading,
    ):
        self.dataset, self.order, self.rank, self.world = dataset, order, rank, world
        self.batch_size = order.batch_size if order else batch_size
        self.workers, self.loading = max(1, num_workers), {"num_workers": num_workers, **loading}
        if order is not None and len(dataset.shards) < world * self.workers:
            raise InputError(
                f"{len(dataset.shards)} shards are too few for {world} processes with {self.workers} loading processes "
                "each: "
                "lower --num-workers, or make more and smaller shards"
            )

    def __iter__(self):
        reader = _Reader(
            self.dataset, self.batch_size, self.rank, self.world, _Plan.of(self.order) if self.order else None
        )
        return iter(DataLoader(reader, batch_size=None, **self.loading))

    @property
    def description(self) -> dict:
        """What the samples of an update depend on besides the settings."""
        return {"shards": len(self.dataset.shards), "data workers": self.workers}

    def names(self, epoch: int, step: int) -> list[str]:
        """The samples of an update of this process, as an error message calls them."""
        order, names = self.order, []
        for batch in range(step * order.accum, (step + 1) * order.accum):
            plan = _Plan(epoch, batch, batch + 1, 0)
            reader = _Reader(self.dataset, self.batch_size, self.rank, self.world, plan)
            names += [
                _name(raw) for _, raw in islice(reader.stream(batch % self.workers, self.workers, []), self.batch_size)
            ]
        return names


@dataclass(frozen=True)
class _Plan:
    """The batches ``start`` to ``stop`` of an epoch of one process."""

    epoch: int
    start: int
    stop: int
    img_size: int | tuple[int, int]

    @classmethod
    def of(cls, order):
        return cls(order.epoch, order.start * order.accum, order.steps * order.accum, order.size_of(order.epoch))


@dataclass
class _Reader(IterableDataset):
    dataset: ShardSet
    batch_size: int
    rank: int
    world: int
    plan: _Plan | None

    def __iter__(self):
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        return self._evaluation(worker, workers) if self.plan is None else self._training(worker, workers)

    def _evaluation(self, worker, workers):
        problems = []
        samples = self._samples(self.dataset.shards[self.rank * workers + worker :: self.world * workers], problems)
        while raws := list(islice(samples, self.batch_size)):
            items = []
            for raw in raws:
                try:
                    image, label = self.dataset.sample(raw)
                    items.append((self.dataset.preprocess.pixels(image), label))
                except InputError as error:
                    problems.append(str(error))
            yield default_collate(items) if items else None, problems[:]
            problems.clear()
        if problems:
            yield None, problems

    def _training(self, worker, workers):
        plan, problems = self.plan, []
        # Batch b comes from stream b modulo workers; the loader asks worker 0 first, whatever the first batch is.
        samples, ahead = self.stream((plan.start + worker) % workers, workers, problems), deque()

        def look_ahead():
            for i in range(PATIENCE):
                if i == len(ahead):
                    ahead.append(next(samples))
                yield ahead[i]
            raise InputError(f"{PATIENCE} samples in a row cannot be read, the last: {problems[-1]}")

        def first_readable(candidates):
            for turn, raw in candidates:
                try:
                    image, label = self.dataset.sample(raw)
                    with drawing_from(f"{self.dataset.seed} {plan.epoch} {turn} {_name(raw)}"):
                        return self.dataset.augmented(image, plan.img_size), label
                except InputError as error:
                    problems.append(str(error))

        for _ in range(plan.start + worker, plan.stop, workers):
            drawn, items = [ahead.popleft() if ahead else next(samples) for _ in range(self.batch_size)], []
            for i in range(self.batch_size):
                # Else the rest of the batch, its beginning, or what comes next, which stays in the stream.
                items.append(first_readable(chain(drawn[i:], drawn[:i], look_ahead())))
            yield default_collate(items), problems[:]
            problems.clear()

    def stream(self, stream: int, workers: int, problems: list[str]) -> Iterator[tuple[int, dict]]:
        """(turn, sample) of one worker from batch ``plan.start`` on, without end; turn counts the passes over its
        shards.
        """
        drawn = self._turns(stream, workers, problems)
        behind = len(range(stream, self.plan.start, workers)) * self.batch_size
        return islice(drawn, behind, None)

    def _turns(self, stream, workers, problems):
        from webdataset import shuffle

        key = f"{self.dataset.seed} {self.plan.epoch}"
        shards = random.Random(key).sample(self.dataset.shards, len(self.dataset.shards))
        shards = shards[self.rank * workers + stream :: self.world * workers]
        for turn in count():
            draw, empty = random.Random(f"{key} {self.rank} {stream} {turn}"), True
            for raw in shuffle(SHUFFLE, rng=draw)(self._samples(draw.sample(shards, len(shards)), problems)):
                empty = False
                yield turn, raw
            if empty:
                raise InputError(
                    f"no sample in shard {shards[0]!r}" + (f" and {len(shards) - 1} more" if len(shards) > 1 else "")
                )

    @staticmethod
    def _samples(shards, problems):
        """The samples of shards as they are read, in order. A shard that cannot be read on is added to ``problems`` and
        left.
        """
        from webdataset import tarfile_samples

        for shard in shards:
            try:
                yield from tarfile_samples([{"url": shard}])
            except (OSError, tarfile.TarError, EOFError, ValueError) as error:
                detail = str(error.args[0] if error.args else "").partition(" @ ")[0]  # webdataset adds the stream
                problems.append(f"cannot read shard {shard!r} to its end ({type(error).__name__}: {detail})")


def _name(raw):
    return f"{raw['__url__'].rpartition('/')[2]}:{raw['__key__']}"


def is_local(url: str) -> bool:
    """Whether a shard is a file of this machine."""
    return "://" not in url and not url.startswith("pipe:")
