"""How images become the model's input: the one path from an image to that input, sets of labelled images, and which
files are images.
"""

import functools
import os
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from efficientnet.choices import INTERPOLATIONS, height_width, image_size
from efficientnet.data.decoding import MODES, Box, Picture, with_channels
from efficientnet.data.order import Draw
from efficientnet.errors import InputError
from efficientnet.model.config import IMAGENET_MEAN, IMAGENET_STD

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
# Of images that Pillow can read where it has their library.
OTHER_SUFFIXES = (".avif", ".heic", ".heif", ".jxl", ".jp2")
NO_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "lost+found")  # what systems put among one's own
THIN = 4  # of an image with a side of more than so many times what a crop sees only the middle is resized
ONLY_MIDDLE = (
    f"there are images of which the model sees less than 1 / {THIN}, the middle; cut them into parts to have all seen"
)


@dataclass(frozen=True)
class Preprocess:
    """From pixels to the model's input: resize, without a change of shape, until the image just covers
    ``img_size / crop_pct``, cut out the centre of ``img_size``, scale to [0, 1], and normalise with ``mean`` and
    ``std``.

    ``img_size`` is the side of a square or (height, width). All of this is kept with a checkpoint, so that prediction
    prepares images as training did.

    Raises InputError for an ``img_size`` below 1, an unknown interpolation, or a ``crop_pct`` that is not in (0, 1].
    """

    img_size: int | tuple[int, int]
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    interpolation: str = "bilinear"
    crop_pct: float = 1.0

    def __post_init__(self):
        try:
            object.__setattr__(self, "img_size", image_size(self.img_size))
        except ValueError as error:
            raise InputError(str(error)) from error
        if self.interpolation not in INTERPOLATIONS:
            raise InputError(f"interpolation must be one of {INTERPOLATIONS}, got {self.interpolation!r}")
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")

    @property
    def channels(self) -> int:
        """Of the images: 1 for grey, 3 for RGB, 4 for RGBA."""
        return len(self.mean)

    @property
    def hw(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.img_size)

    def of_channels(self, channels: int) -> "Preprocess":
        """For images of so many channels: grey ones take the means of mean and std, an opacity is centred.

        Raises InputError for a number of channels that no image file has.
        """
        if channels == self.channels:
            return self
        if channels not in MODES:
            accepted = ", ".join(f"{n} ({mode})" for n, mode in MODES.items())
            raise InputError(f"in_chans must be one of {accepted} to read image files, got {channels}")

        def adapted(values):
            colours = values[:3] if len(values) >= 3 else values[:1] * 3
            return (sum(colours) / 3,) if channels == 1 else (*colours, 0.5)[:channels]

        return replace(self, mean=adapted(tuple(self.mean)), std=adapted(tuple(self.std)))

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [C, H, W] -> float32 [C, *hw]."""
        return self.normalize(self.pixels(image))

    def pixels(
        self,
        image: torch.Tensor | Picture,
        img_size: int | tuple[int, int] | None = None,
        crop_pct: float | None = None,
        box: Box | None = None,
    ) -> torch.Tensor:
        """uint8 [C, H, W], or the ``box`` of it -> uint8 [C, *hw] (or of ``img_size``): everything but the
        normalisation.

        It is resized in uint8, as Pillow does: rows first, rounded, then columns. That is within 1 of the float32
        result, rounded; bicubic, whose overshoot is cut off in between, within a few. Of a ``Picture`` no more is
        decoded than this needs.
        """
        wanted, crop_pct = height_width(img_size or self.img_size), crop_pct or self.crop_pct
        box = _middle(box or Box.whole(image), wanted)
        sides = box.height, box.width
        scale = max(wants / crop_pct / has for wants, has in zip(wanted, sides, strict=True))
        size = tuple(max(wants, round(has * scale)) for wants, has in zip(wanted, sides, strict=True))
        part = box.of(image) if isinstance(image, torch.Tensor) else image.part(box, size, self.interpolation)
        if tuple(part.shape[1:]) != size:
            x = part[None] if part.device.type == "cpu" else part[None].float()  # GPUs have no such kernel for bytes
            x = F.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)[0]
            part = x if x.dtype == torch.uint8 else x.round_().clamp_(0, 255).to(torch.uint8)  # bicubic overshoots
        if box.mirrored:
            part = part.flip(2)
        top, left = ((n - wants) // 2 for n, wants in zip(size, wanted, strict=True))
        return part[:, top : top + wanted[0], left : left + wanted[1]]

    def normalize(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [..., C, H, W] on any device -> float32, ``(x / 255 - mean) / std``. The memory format is kept."""
        mean, std = (255 * torch.tensor(v, device=images.device).view(-1, 1, 1) for v in (self.mean, self.std))
        return images.float().sub_(mean).div_(std)  # in place: a batch is hundreds of megabytes


def largest_box(height: int, width: int, shape: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of the largest part of an image that has the shape of images (height, width), and a pixel at
    least.
    """
    return min(height, -(-width * shape[0] // shape[1])), min(width, -(-height * shape[1] // shape[0]))


def _middle(box, wanted):
    """The part of a thin box that a centre crop of (height, width) can see: a line of 20,000 pixels would be resized to
    gigabytes.
    """
    seen = largest_box(box.height, box.width, wanted)
    for start, side, part in (("top", "height", seen[0]), ("left", "width", seen[1])):
        size = getattr(box, side)
        keep = THIN * part + size % 2  # as many left out on either side
        if size > keep:
            _warn_of_the_rest()
            box = box._replace(**{start: getattr(box, start) + (size - keep) // 2, side: keep})
    return box


@functools.cache  # once in a process: Python forgets which warnings it has shown whenever their filters change
def _warn_of_the_rest():
    warnings.warn(ONLY_MIDDLE, stacklevel=3)


class RandomCrop:
    """An augmentation that takes a part of the image, mirrored or not. It is drawn from the image's size alone, so that
    of a file only what is needed is decoded.
    """

    def draw(self, height: int, width: int) -> Box:
        """The part of an image of that size, from torch's global generator."""
        raise NotImplementedError

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [C, H, W] -> that part of it."""
        box = self.draw(*image.shape[1:])
        part = box.of(image)
        return part.flip(2) if box.mirrored else part


class Prepared:
    """How a data set prepares its images, in evaluation and in training.

    Args:
        augment: a RandomCrop, or another function from a uint8 image to one, before it is resized; None for none.
        finish: a function from a uint8 image to another, after it is resized. All draw from torch's global generator.
        seed: of the random draws.
    """

    def __init__(
        self, preprocess: Preprocess, augment: Callable | None = None, finish: Callable | None = None, seed: int = 0
    ):
        self.preprocess, self.augment, self.finish, self.seed = preprocess, augment, finish, seed

    def augmented(self, image: torch.Tensor | Picture, img_size: int | tuple[int, int]) -> torch.Tensor:
        """A training image: uint8 [C, H, W] -> uint8 [C, img_size, img_size], or of (height, width)."""
        box = None
        if isinstance(self.augment, RandomCrop):
            box = self.augment.draw(*image.shape[1:])
        elif self.augment:
            image = self.augment(image if isinstance(image, torch.Tensor) else image.part())
        image = self.preprocess.pixels(image, img_size, 1.0, box)
        return self.finish(image) if self.finish else image


class ImageSet(Prepared, Dataset):
    """Labelled images, each decoded when it is asked for.

    Item i is (uint8 [C, *preprocess.hw], class index), without augmentation. Item ``Draw(...)`` is image ``index``
    augmented, which depends on the seed and the draw alone.

    Args:
        images: paths, or uint8 tensors [C, H, W] of one channel or three.
        preprocess, augment: as in Prepared.
    """

    def __init__(self, images: Sequence, labels: list[int], preprocess: Preprocess, augment: Callable | None = None):
        super().__init__(preprocess, augment)
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, item):
        index = item.index if isinstance(item, Draw) else item
        image, channels = self.images[index], self.preprocess.channels
        if isinstance(image, torch.Tensor):
            return self._prepared(with_channels(image, channels), item), self.labels[index]
        with Picture(image, image, channels) as picture:
            return self._prepared(picture, item), self.labels[index]

    def _prepared(self, image, item):
        if not isinstance(item, Draw):
            return self.preprocess.pixels(image)
        with drawing_from(f"{self.seed} {item.epoch} {item.index}"):
            return self.augmented(image, item.img_size)

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


@functools.cache
def image_suffixes() -> tuple[str, ...]:
    """Of the files that are read as images, in lower case."""
    from PIL import Image

    try:
        import pillow_heif
    except ImportError:
        pass
    else:
        pillow_heif.register_heif_opener()
    known = Image.registered_extensions()
    return IMAGE_SUFFIXES + tuple(suffix for suffix in OTHER_SUFFIXES if known.get(suffix) in Image.OPEN)


def find_images(folder: str | os.PathLike) -> list[Path]:
    """Image files in a folder, in any depth, sorted; links to folders are followed. Hidden files and what systems leave
    about are none.

    A warning says how many were left out because this Pillow cannot read them.
    """
    found, unknown, seen = [], [], set()
    for root, folders, files in os.walk(folder, followlinks=True):
        where = os.path.realpath(root)
        if where in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(where)
        folders[:] = [name for name in folders if not hidden(name)]
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            path = os.path.join(root, name)
            if hidden(name) or suffix not in IMAGE_SUFFIXES + OTHER_SUFFIXES or not os.path.isfile(path):
                continue
            (found if suffix in image_suffixes() else unknown).append(Path(path))
    if unknown:
        kinds = ", ".join(sorted({path.suffix.lower() for path in unknown}))
        text = (
            f"{len(unknown)} files ({kinds}) in {str(folder)!r} are left out: Pillow, as it is here, cannot read them"
        )
        warnings.warn(text, stacklevel=2)
    return sorted(found)


def hidden(name: str) -> bool:
    """Whether a file or folder of that name is none of the user's images or classes."""
    return name.startswith(".") or name in NO_FOLDERS
