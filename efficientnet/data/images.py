"""How an image file becomes the model's input: decoding, the one path from pixels to that input, and sets of labelled
images.
"""

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, BinaryIO

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from efficientnet.choices import INTERPOLATIONS
from efficientnet.data.order import Draw
from efficientnet.errors import InputError
from efficientnet.model.config import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")


@dataclass(frozen=True)
class Preprocess:
    """From pixels to the model's input: resize the shorter side to ``img_size / crop_pct``, cut out the central square
    of ``img_size``, scale to [0, 1], and normalise with ``mean`` and ``std``.

    It is kept with a checkpoint, so that prediction prepares images as training did.

    Raises InputError for an ``img_size`` below 1, an unknown interpolation, or a ``crop_pct`` that is not in (0, 1].
    """

    img_size: int
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self):
        if not isinstance(self.img_size, int) or isinstance(self.img_size, bool) or self.img_size < 1:
            raise InputError(f"img_size must be an integer >= 1, got {self.img_size!r}")
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3, H, W] -> float32 [3, img_size, img_size]."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: torch.Tensor, img_size: int | None = None, crop_pct: float | None = None) -> torch.Tensor:
        """uint8 [3, H, W] -> uint8 [3, img_size, img_size]: everything but the normalisation."""
        img_size, crop_pct = img_size or self.img_size, crop_pct or self.crop_pct
        height, width = image.shape[1:]
        if (height, width) == (img_size, img_size) and crop_pct == 1:
            return image
        scale = img_size / crop_pct / min(height, width)
        size = [max(img_size, round(n * scale)) for n in (height, width)]
        x = F.interpolate(image.float().unsqueeze(0), size, mode=self.interpolation, align_corners=False, antialias=True)[0]
        top, left = ((n - img_size) // 2 for n in size)
        x = x[:, top : top + img_size, left : left + img_size]
        return x.round().clamp(0, 255).to(torch.uint8)  # bicubic overshoots

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [..., 3, H, W] on any device -> float32, ``(x / 255 - mean) / std``. The memory format is kept."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


class Prepared:
    """How a data set prepares its images, in evaluation and in training.

    Args:
        augment: a function from a uint8 image to another, before it is resized; None for none.
        finish: the same, after it is resized. Both draw from torch's global generator.
        seed: of the random draws.
    """

    def __init__(self, preprocess: Preprocess, augment: Callable | None = None, finish: Callable | None = None, seed: int = 0):
        self.preprocess, self.augment, self.finish, self.seed = preprocess, augment, finish, seed

    def augmented(self, image: torch.Tensor, img_size: int) -> torch.Tensor:
        """A training image: uint8 [3, H, W] -> uint8 [3, img_size, img_size]."""
        if self.augment:
            image = self.augment(image)
        image = self.preprocess.pixels(image, img_size, crop_pct=1.0)
        return self.finish(image) if self.finish else image


class ImageSet(Prepared, Dataset):
    """Labelled images, each decoded when it is asked for.

    Item i is (uint8 [3, img_size, img_size], class index), without augmentation. Item ``Draw(...)`` is image ``index``
    augmented, which depends on the seed and the draw alone.

    Args:
        images: paths, or uint8 tensors [3, H, W].
        preprocess, augment: as in Prepared.
    """

    def __init__(self, images: Sequence, labels: list[int], preprocess: Preprocess, augment: Callable | None = None):
        super().__init__(preprocess, augment)
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        index = item.index if isinstance(item, Draw) else item
        image = self.images[index]
        if not isinstance(image, torch.Tensor):
            image = read_image(image)
        if not isinstance(item, Draw):
            return self.preprocess.pixels(image), self.labels[index]
        with drawing_from(f"{self.seed} {item.epoch} {index}"):
            return self.augmented(image, item.img_size), self.labels[index]

    @property
    def size(self) -> str:
        """The number of images, as text."""
        return str(len(self))

    def name(self, index: int) -> str:
        """What an error message calls the image."""
        image = self.images[index]
        return f"image {index}" if isinstance(image, torch.Tensor) else str(image)


@contextmanager
def drawing_from(key: str) -> Iterator[None]:
    """Within, torch's CPU generator starts from a hash of ``key``; afterwards it goes on as before."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(zlib.crc32(key.encode()))
    try:
        yield
    finally:
        torch.set_rng_state(state)


def read_image(path: str | os.PathLike) -> torch.Tensor:
    """Decode an image file with Pillow into uint8 RGB [3, H, W]. Raises InputError for a file that is no image or is
    damaged.
    """
    return decode(path, path)


def decode(file: str | os.PathLike | BinaryIO, name: object) -> torch.Tensor:
    """``read_image`` of a path or an open file. An error calls it ``name``."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        detail = str(error).replace(repr(file), "")  # of an open file that is an address
        raise InputError(f"cannot decode image {str(name)!r} ({type(error).__name__}: {detail.strip()})") from error


def to_rgb(image: "Image.Image") -> torch.Tensor:
    """An image of Pillow in any mode -> uint8 RGB [3, H, W]. 16-bit pixels become 8-bit ones; Pillow would clip them at
    255.
    """
    import numpy as np

    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of an unknown range")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
