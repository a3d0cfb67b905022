"""Data sets of labelled images: scikit-learn's real digits, and folders of image files. One path from pixels to the model's input."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from efficientnet.model import IMAGENET_MEAN, IMAGENET_STD
from efficientnet.settings import InputError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
DIGITS_MEAN, DIGITS_STD = (0.305,) * 3, (0.324,) * 3  # of the training images
INTERPOLATIONS = ("bilinear", "bicubic")


@dataclass(frozen=True)
class Preprocess:
    """Pixels to input: shorter side to ``img_size / crop_pct``, centre crop of ``img_size``, scale to [0, 1], normalise.

    Kept with a checkpoint, so that prediction prepares images as training did.
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

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3, H, W] -> float32 [3, img_size, img_size]."""
        height, width = image.shape[1:]
        scale = self.img_size / self.crop_pct / min(height, width)
        size = [max(self.img_size, round(n * scale)) for n in (height, width)]
        x = image.float().unsqueeze(0) / 255
        x = F.interpolate(x, size, mode=self.interpolation, align_corners=False, antialias=True)[0].clamp(0, 1)  # bicubic overshoots
        top, left = ((n - self.img_size) // 2 for n in size)
        x = x[:, top : top + self.img_size, left : left + self.img_size]
        return (x - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


class ImageSet(Dataset):
    """Labelled images, each decoded when asked for: item i is (float32 [3, img_size, img_size], class index).

    Args:
        images: paths, or uint8 tensors [3, H, W].
        augment: uint8 image -> uint8 image, drawn from torch's generator; None for none.
    """

    def __init__(self, images, labels: list[int], preprocess: Preprocess, augment: Callable | None = None):
        self.images, self.labels, self.preprocess, self.augment = images, labels, preprocess, augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index):
        image = self.images[index]
        if not isinstance(image, torch.Tensor):
            image = read_image(image)
        if self.augment:
            image = self.augment(image)
        return self.preprocess(image), self.labels[index]


@dataclass
class Data:
    """A data set, split: ``train`` to learn from, ``val`` held out; a label indexes ``classes``."""

    train: ImageSet
    val: ImageSet
    classes: list[str]
    preprocess: Preprocess


def load_data(name: str, img_size: int, val_fraction: float = 0.2) -> Data:
    """The data set of that name, split the same way every time.

    Args:
        name: "digits", scikit-learn's 1797 scanned digits, grey and 8 x 8; or "imagefolder:PATH" with images in
            PATH/<class>/, or already split in PATH/train/<class>/ and PATH/val/<class>/.
        img_size: pixels of the square the model sees.
        val_fraction: share of each class to hold out, in (0, 1); unused if the folder is split already.

    Raises InputError (a ValueError) for an unknown name, no images, fewer than two classes, or nothing held out.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be in (0, 1), got {val_fraction!r}")
    kind, _, path = name.partition(":")
    if name == "digits":
        return _digits(img_size, val_fraction)
    if kind == "imagefolder" and path:
        return _imagefolder(Path(path), img_size, val_fraction)
    raise InputError(f"data must be 'digits' or 'imagefolder:PATH', got {name!r}")


def read_image(path) -> torch.Tensor:
    """Decode an image file with Pillow: uint8 RGB [3, H, W]. Raises InputError naming a file that is no image or is damaged."""
    import numpy as np
    from PIL import Image

    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        raise InputError(f"cannot decode image {str(path)!r} ({type(error).__name__}: {error})") from error
    return torch.from_numpy(pixels).permute(2, 0, 1)


def stratified_split(labels: list[int], val_fraction: float) -> tuple[list[int], list[int]]:
    """Indices (train, val): ``val_fraction`` of each class held out, at least one image of a class that has two."""
    generator = torch.Generator().manual_seed(0)  # the split is part of the data set: a training seed does not change it
    members = {}
    for i, label in enumerate(labels):
        members.setdefault(label, []).append(i)
    train, val = [], []
    for _, indices in sorted(members.items()):
        order = torch.randperm(len(indices), generator=generator).tolist()
        held_out = min(max(1, round(len(indices) * val_fraction)), len(indices) - 1)
        val += [indices[i] for i in order[:held_out]]
        train += [indices[i] for i in order[held_out:]]
    return sorted(train), sorted(val)


def random_shift(image: torch.Tensor, pixels: int = 2) -> torch.Tensor:
    """Move the image by up to ``pixels`` in each direction; what comes in repeats the border."""
    height, width = image.shape[1:]
    padded = F.pad(image.float().unsqueeze(0), [pixels] * 4, mode="replicate")[0].to(image.dtype)
    top, left = torch.randint(0, 2 * pixels + 1, (2,)).tolist()
    return padded[:, top : top + height, left : left + width]


def random_crop_flip(image: torch.Tensor, min_side: float = 0.6) -> torch.Tensor:
    """A random square of ``min_side`` to all of the shorter side, mirrored half of the time."""
    height, width = image.shape[1:]
    share, y, x, flip = torch.rand(4).tolist()
    side = max(1, round((min_side + (1 - min_side) * share) * min(height, width)))
    top, left = round(y * (height - side)), round(x * (width - side))
    crop = image[:, top : top + side, left : left + side]
    return crop.flip(2) if flip < 0.5 else crop


def _digits(img_size, val_fraction):
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 8 x 8 grey levels 0..16 -> 32 x 32 RGB bytes: ordinary images from here on, and a shift by a pixel is a small one.
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = (pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    preprocess = Preprocess(img_size, DIGITS_MEAN, DIGITS_STD)
    classes = [str(digit) for digit in digits.target_names]
    return _split(list(images), digits.target.tolist(), classes, preprocess, random_shift, val_fraction)


def _imagefolder(root, img_size, val_fraction):
    preprocess = Preprocess(img_size)
    if (root / "train").is_dir() and (root / "val").is_dir():
        classes, images, labels = _scan(root / "train")
        val_classes, val_images, val_labels = _scan(root / "val")
        unknown = sorted(set(val_classes) - set(classes))
        if unknown:
            raise InputError(f"class {unknown[0]!r} of {str(root / 'val')!r} is not in {str(root / 'train')!r}")
        val_labels = [classes.index(val_classes[label]) for label in val_labels]
        _check_classes(classes, root / "train")
        return Data(
            ImageSet(images, labels, preprocess, random_crop_flip), ImageSet(val_images, val_labels, preprocess), classes, preprocess
        )
    classes, images, labels = _scan(root)
    _check_classes(classes, root)
    return _split(images, labels, classes, preprocess, random_crop_flip, val_fraction)


def _split(images, labels, classes, preprocess, augment, val_fraction):
    train, val = stratified_split(labels, val_fraction)
    if not val:
        raise InputError(f"no class has the two images it takes to hold one out ({len(images)} images, {len(classes)} classes)")
    parts = [([images[i] for i in part], [labels[i] for i in part], preprocess) for part in (train, val)]
    return Data(ImageSet(*parts[0], augment), ImageSet(*parts[1]), classes, preprocess)


def _scan(root):
    """(class names, image paths, labels) of root/<class>/**/*, in an order that does not depend on the file system."""
    if not root.is_dir():
        raise InputError(f"data folder {str(root)!r} does not exist")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    images, labels = [], []
    for label, name in enumerate(classes):
        found = sorted(path for path in (root / name).rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file())
        if not found:
            raise InputError(f"class folder {str(root / name)!r} has no image ({', '.join(IMAGE_SUFFIXES)})")
        images += found
        labels += [label] * len(found)
    if not images:
        raise InputError(f"data folder {str(root)!r} has no class folder with images")
    return classes, images, labels


def _check_classes(classes, root):
    if len(classes) < 2:
        raise InputError(f"data folder {str(root)!r} must have at least 2 class folders, got {len(classes)}: {', '.join(classes)}")
