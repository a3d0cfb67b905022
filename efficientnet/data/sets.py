"""Data sets of labelled images: digits, folders, sets of torchvision. One path from pixels to the model's input."""

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from efficientnet.model.network import IMAGENET_MEAN, IMAGENET_STD
from efficientnet.training.augment import torchvision_module
from efficientnet.training.settings import INTERPOLATIONS, InputError

if TYPE_CHECKING:
    from efficientnet.data.shards import ShardSet

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
HELD_OUT_FOLDERS = ("val", "validation", "valid", "test")
DIGITS_MEAN, DIGITS_STD = (0.305,) * 3, (0.324,) * 3  # of the training images
# name: (class, arguments of the training parts, of the held-out part)
TORCHVISION_SETS = {
    "cifar10": ("CIFAR10", [{"train": True}], {"train": False}),
    "cifar100": ("CIFAR100", [{"train": True}], {"train": False}),
    "flowers102": ("Flowers102", [{"split": "train"}, {"split": "val"}], {"split": "test"}),
    "oxfordiiitpet": ("OxfordIIITPet", [{"split": "trainval"}], {"split": "test"}),
    "food101": ("Food101", [{"split": "train"}], {"split": "test"}),
}
KINDS = ("digits[:CLASSES]", "imagefolder:PATH", *(f"{name}:ROOT" for name in TORCHVISION_SETS), "webdataset:SHARDS")


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
        if not 0 < self.crop_pct <= 1:
            raise InputError(f"crop_pct must be in (0, 1], got {self.crop_pct!r}")

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        """uint8 [3, H, W] -> float32 [3, img_size, img_size]."""
        return self.normalize(self.pixels(image))

    def pixels(self, image: torch.Tensor, img_size: int | None = None, crop_pct: float | None = None) -> torch.Tensor:
        """uint8 [3, H, W] -> uint8 [3, img_size, img_size]."""
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
        """uint8 [..., 3, H, W] on any device -> float32, ``(x / 255 - mean) / std``; the memory format is kept."""
        mean, std = (torch.tensor(v, device=images.device).view(3, 1, 1) for v in (self.mean, self.std))
        return (images.float() / 255 - mean) / std


class Draw(NamedTuple):
    """A training image, and all besides the seed that it depends on: workers, processes and resumed runs see the same pixels."""

    index: int
    epoch: int
    img_size: int


class Prepared:
    """How a data set prepares its images, in evaluation and in training.

    Args:
        augment: uint8 image -> uint8 image, before it is resized; None for none.
        finish: the same, after. Both draw from torch's global generator.
    """

    def __init__(self, preprocess: Preprocess, augment: Callable | None = None, finish: Callable | None = None, seed: int = 0):
        self.preprocess, self.augment, self.finish, self.seed = preprocess, augment, finish, seed

    def augmented(self, image: torch.Tensor, img_size: int) -> torch.Tensor:
        if self.augment:
            image = self.augment(image)
        image = self.preprocess.pixels(image, img_size, crop_pct=1.0)
        return self.finish(image) if self.finish else image


class ImageSet(Prepared, Dataset):
    """Labelled images, each decoded when asked for: item i is (uint8 [3, img_size, img_size], class index).

    Item ``Draw(...)`` is image ``index`` augmented, a function of the seed and the draw alone; item i without augmentation.

    Args:
        images: paths, or uint8 tensors [3, H, W].
        preprocess, augment: as in Prepared.
    """

    def __init__(self, images, labels: list[int], preprocess: Preprocess, augment: Callable | None = None):
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
        return str(len(self))

    def name(self, index: int) -> str:
        """How an error message calls the image."""
        image = self.images[index]
        return f"image {index}" if isinstance(image, torch.Tensor) else str(image)


@contextmanager
def drawing_from(key: str):
    """Torch's CPU generator starts from a hash of ``key`` within, and goes on as before after."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(zlib.crc32(key.encode()))
    try:
        yield
    finally:
        torch.set_rng_state(state)


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


@dataclass
class Data:
    """A data set, split: ``train`` to learn from, ``val`` held out; a label indexes ``classes``."""

    train: "ImageSet | ShardSet"
    val: "ImageSet | ShardSet"
    classes: list[str]
    preprocess: Preprocess


def load_data(
    name: str,
    img_size: int,
    val_fraction: float = 0.2,
    *,
    val_data: str | None = None,
    num_classes: int | None = None,
    num_samples: int | None = None,
    download: bool = False,
    **prepare,
) -> Data:
    """The data set of that name, split the same way every time.

    Args:
        name: "digits", scikit-learn's 1797 scanned digits, grey and 8 x 8, or some of its classes ("digits:0-4", "digits:1,3,7-9");
            "imagefolder:PATH" with images in PATH/<class>/, or already split in PATH/train/<class>/ and PATH/val/<class>/
            (or validation, valid, test);
            "cifar10:ROOT" (cifar100, flowers102, oxfordiiitpet, food101), a set of torchvision, where ``download`` leaves it;
            "webdataset:SHARDS" such as "webdataset:/data/train-{000..146}.tar" (see ``shards``), whose held-out images are ``val_data``.
        img_size: pixels of the square the model sees.
        val_fraction: share of each class to hold out, in (0, 1); unused if the set is split already.
        val_data: the held-out images, a name as above with the same classes; then all of ``name`` is for training.
        num_classes, num_samples: of a webdataset, the second for one epoch; None: counted, where the shards are local files.
        download: let torchvision fetch a set of its own into ROOT.
        prepare: further fields of Preprocess.

    Raises InputError (a ValueError) for an unknown name, no images, fewer than two classes, or nothing held out.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be in (0, 1), got {val_fraction!r}")
    source = _source(name, download, num_classes, num_samples)
    preprocess = Preprocess(img_size, **source.normalization | prepare)
    if val_data is not None:
        held_out = _source(val_data, download, len(source.classes) if val_data.startswith("webdataset:") else None)
        if held_out.classes != source.classes and held_out.kind is ImageSet:
            raise InputError(f"val_data {val_data!r} has other classes than data {name!r}")
        kind, train, val = held_out.kind, source.train, held_out.val or held_out.train
    elif source.val is not None:
        kind, train, val = ImageSet, source.train, source.val
    elif source.kind is not ImageSet:
        raise InputError(f"data {name!r} cannot be split: name its held-out images with --val-data")
    else:
        kind, (images, labels) = ImageSet, source.train
        train, val = ([[part[i] for i in indices] for part in (images, labels)] for indices in stratified_split(labels, val_fraction))
        if not val[1]:
            raise InputError(f"no class has the two images it takes to hold one out ({len(labels)} images, {len(source.classes)} classes)")
    if source.kind is not ImageSet and source.train[-1] is None:
        raise InputError(f"samples of {name!r} cannot be counted beforehand: give --train-num-samples")
    return Data(source.kind(*train, preprocess, source.augment), kind(*val, preprocess), source.classes, preprocess)


@dataclass
class _Source:
    """Parts of a set: (images, labels), or what else comes first in ``kind``; ``val`` is None where it is not split."""

    classes: list[str]
    train: tuple
    val: tuple | None
    augment: Callable
    normalization: dict
    kind: type = ImageSet


def _source(name, download=False, num_classes=None, num_samples=None):
    kind, colon, rest = name.partition(":")
    if kind == "webdataset" and rest:
        return _webdataset(rest, num_classes, num_samples)
    for option, value in (("num_classes", num_classes), ("train_num_samples", num_samples)):
        if value is not None:
            raise InputError(f"{option} is for webdataset:SHARDS only, and data is {name!r}")
    if kind == "digits" and (rest or not colon):
        return _digits(rest)
    if kind == "imagefolder" and rest:
        return _imagefolder(Path(rest))
    if kind in TORCHVISION_SETS and rest:
        return _torchvision(kind, Path(rest), download)
    raise InputError(f"data must be one of {', '.join(KINDS)}, got {name!r}")


def read_image(path) -> torch.Tensor:
    """Decode an image file with Pillow: uint8 RGB [3, H, W]. Raises InputError naming a file that is no image or is damaged."""
    return decode(path, path)


def decode(file, name) -> torch.Tensor:
    """``read_image`` of a path or an open file, which ``name`` stands for in the error."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            return to_rgb(image)
    except (FileNotFoundError, IsADirectoryError, PermissionError):
        raise
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and more
        detail = str(error).replace(repr(file), "")  # of an open file that is an address
        raise InputError(f"cannot decode image {str(name)!r} ({type(error).__name__}: {detail.strip()})") from error


def to_rgb(image) -> torch.Tensor:
    """An image of Pillow in any mode -> uint8 RGB [3, H, W]. 16 bits become 8; Pillow itself would clip them at 255."""
    import numpy as np

    if image.mode == "I" or image.mode.startswith("I;16"):
        grey = np.asarray(image).astype(np.int64).clip(0, 65535) >> 8
        return torch.from_numpy(grey.astype(np.uint8)).expand(3, -1, -1)
    if image.mode == "F":
        raise ValueError("pixels are floating-point numbers of an unknown range")
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


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


def _digits(selection):
    from sklearn.datasets import load_digits

    digits = load_digits()
    # 8 x 8 grey levels 0..16 -> 32 x 32 RGB bytes: ordinary images from here on, and a shift by a pixel is a small one.
    pixels = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
    pixels = F.interpolate(pixels, size=(32, 32), mode="bilinear", align_corners=False)
    images = (pixels * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    chosen = _chosen_digits(selection)
    labels = digits.target.tolist()
    kept = [i for i, label in enumerate(labels) if label in chosen]
    part = [images[i] for i in kept], [chosen.index(labels[i]) for i in kept]
    return _Source([str(digit) for digit in chosen], part, None, random_shift, {"mean": DIGITS_MEAN, "std": DIGITS_STD})


def _chosen_digits(selection):
    """ "0-4,7" -> [0, 1, 2, 3, 4, 7]; "" -> all."""
    if not selection:
        return list(range(10))
    chosen = set()
    for part in selection.split(","):
        first, dash, last = part.partition("-")
        if not (first.isdigit() and (last.isdigit() or not dash)) or not 0 <= int(first) <= int(last or first) <= 9:
            raise InputError(f"classes of the digits must look like 0-4 or 1,3,7-9, got {selection!r}")
        chosen |= set(range(int(first), int(last or first) + 1))
    if len(chosen) < 2:
        raise InputError(f"classes of the digits must be at least 2, got {selection!r}")
    return sorted(chosen)


def _imagefolder(root):
    held_out = next((root / name for name in HELD_OUT_FOLDERS if (root / name).is_dir()), None)
    if not (root / "train").is_dir() or held_out is None:
        classes, images, labels = _scan(root)
        _check_classes(classes, root)
        return _Source(classes, (images, labels), None, random_crop_flip, {})
    classes, images, labels = _scan(root / "train")
    val_classes, val_images, val_labels = _scan(held_out)
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        raise InputError(f"class {unknown[0]!r} of {str(held_out)!r} is not in {str(root / 'train')!r}")
    _check_classes(classes, root / "train")
    val_labels = [classes.index(val_classes[label]) for label in val_labels]
    return _Source(classes, (images, labels), (val_images, val_labels), random_crop_flip, {})


def _torchvision(kind, root, download):
    if download and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise InputError("download is for one process: fetch the data set in a run without torchrun")
    name, train_parts, val_part = TORCHVISION_SETS[kind]
    make = getattr(torchvision_module("datasets"), name)
    try:
        train, val = [make(root, download=download, **part) for part in train_parts], make(root, download=download, **val_part)
    except RuntimeError as error:  # what torchvision raises where the files are not there, or are not whole
        if download:
            raise InputError(f"{kind} cannot be fetched into {str(root)!r}: {error}") from error
        raise InputError(f"{kind} is not there, or not whole, in {str(root)!r}; --download fetches it") from error
    classes = getattr(val, "classes", None) or [str(i) for i in range(1 + max(_labels(val)))]
    images, labels = ([x for part in train for x in of(part)] for of in (_images, _labels))
    return _Source(list(classes), (images, labels), (_images(val), _labels(val)), random_crop_flip, {})


def _images(dataset):
    """Paths, or the pixels themselves."""
    if hasattr(dataset, "data"):  # CIFAR's array [N, 32, 32, 3]
        return list(torch.from_numpy(dataset.data).permute(0, 3, 1, 2))
    return list(dataset._images if hasattr(dataset, "_images") else dataset._image_files)


def _labels(dataset):
    return list(getattr(dataset, "targets", None) or dataset._labels)  # the newer sets have no public name for them


def _webdataset(pattern, num_classes, num_samples):
    from efficientnet.data.shards import ShardSet, count_samples, find_shards, is_local

    shards = find_shards(pattern)
    if (num_classes is None or num_samples is None) and all(map(is_local, shards)):
        counted = count_samples(shards)
        num_samples, num_classes = num_samples or counted[0], num_classes or counted[1]
    if num_classes is None:
        raise InputError(f"classes of {shards[0]!r} cannot be counted beforehand: give --num-classes, and --train-num-samples")
    if num_samples == 0 or num_classes < 2:
        raise InputError(f"webdataset:{pattern} must have samples of 2 classes or more, got {num_samples} of {num_classes}")
    part = shards, num_classes, num_samples
    return _Source([str(i) for i in range(num_classes)], part, None, random_crop_flip, {}, ShardSet)


def _scan(root):
    """(class names, image paths, labels) of root/<class>/**/*, in an order that does not depend on the file system."""
    if not root.is_dir():
        raise InputError(f"data folder {str(root)!r} {'is no folder' if root.exists() else 'does not exist'}")
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
