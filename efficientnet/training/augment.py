"""Augmentation of training images, made of torchvision.transforms.v2 as the settings say."""

import re
from collections.abc import Callable
from functools import partial

import torch

from efficientnet.data.decoding import Box
from efficientnet.data.images import RandomCrop
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig


def training_crop(config: TrainConfig, shape: tuple[int, int] = (1, 1)) -> RandomCrop | None:
    """A random crop of a share of the image's area, mirrored or not, of about the ``shape`` of images (height, width);
    None where the settings leave it to the data set.
    """
    if config.scale is None:
        return None
    # Only the box is drawn by torchvision: resizing is Preprocess's, at whatever size the epoch has.
    ratio = tuple(aspect * shape[1] / shape[0] for aspect in (3 / 4, 4 / 3))  # torchvision's for squares
    return _AreaCrop(torchvision_module("transforms.v2").RandomResizedCrop(1, config.scale, ratio), config.hflip)


class _AreaCrop(RandomCrop):
    def __init__(self, boxes, hflip):
        self.boxes, self.hflip = boxes, hflip

    def draw(self, height: int, width: int) -> Box:
        box = self.boxes.make_params([torch.empty(1, height, width, device="meta")])  # it reads the shape alone
        mirrored = torch.rand(1).item() < self.hflip
        return Box(box["top"], box["left"], box["height"], box["width"], mirrored)


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
