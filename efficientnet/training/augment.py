"""Augmentation of training images as the settings say: crops, and what torchvision.transforms.v2 does to pixels."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from efficientnet.data.decoding import Box
from efficientnet.data.images import RandomCrop
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig

TRIES = 10  # to draw a part that fits in, as torchvision has it


def training_crop(config: TrainConfig, shape: tuple[int, int] = (1, 1)) -> RandomCrop | None:
    """A random crop of a share of the image's area, mirrored or not, of about the ``shape`` of images (height, width);
    None where the settings leave it to the data set.
    """
    if config.scale is None:
        return None
    aspects = tuple(aspect * shape[1] / shape[0] for aspect in (3 / 4, 4 / 3))  # torchvision's for squares
    return AreaCrop(tuple(config.scale), aspects, config.hflip)


@dataclass(frozen=True)
class AreaCrop(RandomCrop):
    """A part with a share of the image's area in ``scale`` and a width over height in ``aspects``, mirrored in a share
    ``hflip`` of the draws.

    Area and logarithm of the aspect are uniform, and are drawn again where the part would not fit in: the distribution
    of torchvision's RandomResizedCrop, whose many small calls take ten times as long. Where none of TRIES fits it is
    the middle, as large as these aspects can be.
    """

    scale: tuple[float, float]
    aspects: tuple[float, float]
    hflip: float

    def draw(self, height: int, width: int) -> Box:
        """The part of an image of this height and width, in pixels."""
        flip, y, x, *drawn = torch.rand(3 + 2 * TRIES, dtype=torch.float64).tolist()
        mirrored, (smallest, largest) = flip < self.hflip, self.scale
        lowest, highest = map(math.log, self.aspects)
        for i in range(TRIES):
            area = height * width * (smallest + (largest - smallest) * drawn[2 * i])
            aspect = math.exp(lowest + (highest - lowest) * drawn[2 * i + 1])
            rows, columns = round(math.sqrt(area / aspect)), round(math.sqrt(area * aspect))
            if 0 < rows <= height and 0 < columns <= width:
                return Box(int(y * (height - rows + 1)), int(x * (width - columns + 1)), rows, columns, mirrored)
        aspect = min(max(width / height, self.aspects[0]), self.aspects[1])
        rows, columns = min(height, max(1, round(width / aspect))), min(width, max(1, round(height * aspect)))
        return Box((height - rows) // 2, (width - columns) // 2, rows, columns, mirrored)


def training_finish(config: TrainConfig, mean: tuple[float, ...]) -> Callable | None:
    """A function from a uint8 image at the model's size to the same after AutoAugment or RandAugment and random
    erasing.

    None where the settings ask for neither. Erased rectangles take the ``mean`` of the data set, in [0, 1].
    """
    steps = []
    if config.aa is not None:
        steps.append(_policy(config.aa))
    if config.reprob > 0:
        v2 = torchvision_module("transforms.v2")
        steps.append(v2.RandomErasing(config.reprob, value=[round(255 * m) for m in mean]))
    return partial(_in_turn, steps) if steps else None


def _in_turn(steps, image):
    for step in steps:
        image = step(image)
    return image


def _policy(name):
    if name in ("auto", "original", "v0"):  # the last two are timm's names
        return torchvision_module("transforms.v2").AutoAugment()
    found = re.fullmatch(r"rand(?:-(m)(\d+))?(?:-(n)(\d+))?(?:-mstd[\d.]+)?(?:-inc1)?", name)
    magnitude, operations = (int(found[i] or default) for i, default in ((2, 9), (4, 2))) if found else (-1, 0)
    if not 0 <= magnitude <= 10 or operations < 1:
        raise InputError(
            f"aa must be auto or rand[-mMAGNITUDE][-nOPERATIONS] with a magnitude of 0 to 10, got {name!r}"
        )
    # torchvision spreads the magnitudes over 31 bins, timm over 10.
    return torchvision_module("transforms.v2").RandAugment(operations, 3 * magnitude)


def mixing(config: TrainConfig, num_classes: int) -> Callable | None:
    """A function (images, labels) -> (images, probabilities [N, classes]) that mixes pairs of images; None where it is
    off.

    It is mixup or cutmix; where both are on, either of them for half of the batches.
    """
    if not config.mixup and not config.cutmix:
        return None
    v2 = torchvision_module("transforms.v2")
    choices = [v2.MixUp(alpha=config.mixup, num_classes=num_classes)] if config.mixup else []
    choices += [v2.CutMix(alpha=config.cutmix, num_classes=num_classes)] if config.cutmix else []
    return choices[0] if len(choices) == 1 else v2.RandomChoice(choices)
