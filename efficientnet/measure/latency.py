"""How long a forward takes on the device at hand."""

from typing import NamedTuple

import torch
from torch import nn
from torch.utils.benchmark import Timer

from efficientnet.errors import InputError


class Latency(NamedTuple):
    """The median and the interquartile range of the times of a forward, in milliseconds."""

    ms: float
    iqr: float


def measure_latency(
    model: nn.Module, image_size: int, device: torch.device, batch_size: int = 1, seconds: float = 0.5
) -> Latency:
    """Time the forward of ``batch_size`` fp32 images [N, 3, image_size, image_size] in eval, channels_last.

    It runs on as many threads as torch has. The weights do not matter to it. The device is waited for; the first
    forwards, which allocate and compile, do not count.

    Raises InputError where the device's memory does not suffice.
    """
    try:
        model = model.to(device, memory_format=torch.channels_last).eval()
        images = torch.randn(batch_size, 3, image_size, image_size, device=device).to(memory_format=torch.channels_last)
        with torch.no_grad():
            for _ in range(2):
                model(images)
            timer = Timer(
                "model(images)", globals={"model": model, "images": images}, num_threads=torch.get_num_threads()
            )
            measured = timer.blocked_autorange(min_run_time=seconds)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise InputError(
            f"{batch_size} images of {image_size} x {image_size} do not fit the memory of {device}"
        ) from error
    return Latency(1e3 * measured.median, 1e3 * measured.iqr)
