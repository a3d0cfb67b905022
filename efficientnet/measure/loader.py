"""How fast images of a data set can be prepared on this machine, and how many of its cores a network needs for that."""

import time

import torch

from efficientnet.data.order import TrainingOrder
from efficientnet.data.sets import load_data
from efficientnet.errors import InputError
from efficientnet.training.runner import Runner

BATCH = 16
MOST_IMAGES, MOST_SECONDS = 512, 5.0  # of one measurement


class Loader:
    """The images of a data set as a network of ``img_size`` gets them: held-out ones, or ``training`` ones with the
    set's own random crops.

    Args:
        name: as ``load_data`` takes it.

    Raises InputError for what ``load_data`` does not accept.
    """

    def __init__(self, name: str, img_size: int | tuple[int, int], training: bool):
        data = load_data(name, img_size)
        self.images = data.train if training else data.val
        self.order = TrainingOrder(len(self.images), BATCH, size_of=lambda epoch: img_size) if training else None

    def measure(self) -> dict:
        """Of one process with one thread, from the files to batches of bytes: "loader_samples_per_sec" by the clock,
        reading included, and "loader_cpu_ms", what an image takes of a core.

        Raises InputError where no image can be read.
        """
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as data workers have it
        try:
            self._read(BATCH, epoch=0)  # imports, and the system's first look at the folder
            clock, cpu = time.perf_counter(), time.process_time()
            images = self._read(MOST_IMAGES, epoch=1)
            clock, cpu = time.perf_counter() - clock, time.process_time() - cpu
        finally:
            torch.set_num_threads(threads)
        return {"loader_samples_per_sec": round(images / clock, 1), "loader_cpu_ms": round(1e3 * cpu / images, 3)}

    def _read(self, wanted, epoch):
        """Read so many images, fewer if time is short: their number."""
        images, started = 0, time.perf_counter()
        while True:
            if self.order is not None:
                self.order.begin(epoch, 0)
            found, problems = 0, []
            for batch, of_batch in Runner(torch.device("cpu")).batches(self.images, BATCH, order=self.order).loader:
                found += 0 if batch is None else len(batch[0])
                problems += of_batch
                if images + found >= wanted or time.perf_counter() - started > MOST_SECONDS:
                    break
            images, epoch = images + found, epoch + 1
            if not found:
                raise InputError(f"no image can be read: {problems[0]}" if problems else "there is no image to read")
            if images >= wanted or time.perf_counter() - started > MOST_SECONDS:
                return images


def cores(loader: dict, samples_per_sec: float) -> float:
    """How many cores prepare images as fast as a network takes them, by what ``Loader.measure`` returned."""
    return round(samples_per_sec * loader["loader_cpu_ms"] / 1e3, 2)
