"""Data sets of labelled images, each split into images to learn from and images to hold out: digits, folders,
torchvision's, shards.
"""

import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from efficientnet.data.decoding import Box
from efficientnet.data.images import (
    ImageSet,
    Preprocess,
    RandomCrop,
    find_images,
    hidden,
    image_suffixes,
    largest_box,
)
from efficientnet.data.shards import ShardSet, count_samples, find_shards, is_local, numbered
from efficientnet.data.torchvision_modules import torchvision_module
from efficientnet.errors import InputError

# What folders with parts of a set are called; of several held-out ones the first here is taken.
TRAIN_FOLDERS = ("train", "training", "trn", "trainval")
HELD_OUT_FOLDERS = ("val", "validation", "valid", "validate", "dev", "eval", "evaluation", "holdout", "heldout")
HELD_OUT_FOLDERS += ("test", "testing", "tst")
# Besides, in whatever case, such words and all that is no letter: val-set, Training_Images, seg_test, train2017.
BESIDES = "seg|set|sets|data|dataset|images?|imgs?|pictures?|photos?|pics|split|part|folder|dir"
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


@dataclass
class Data:
    """A data set, split: ``train`` to learn from, ``val`` held out. A label is an index into ``classes``."""

    train: ImageSet | ShardSet
    val: ImageSet | ShardSet
    classes: list[str]
    preprocess: Preprocess


def load_data(
    name: str,
    img_size: int | tuple[int, int],
    val_fraction: float = 0.2,
    *,
    val_data: str | None = None,
    num_classes: int | None = None,
    num_samples: int | None = None,
    download: bool = False,
    in_chans: int = 3,
    classes: list[str] | None = None,
    **prepare,
) -> Data:
    """The data set of that name, split the same way every time.

    Args:
        name: "digits", scikit-learn's 1797 scanned digits, grey and 8 x 8, or some of its classes ("digits:0-4",
            "digits:1,3,7-9"); "imagefolder:PATH" with images in PATH/<class>/, or already split in PATH/train/<class>/
            and PATH/val/<class>/ (or training; validation, valid, dev, eval, test, testing and the like, in any
            case); "cifar10:ROOT" (cifar100, flowers102, oxfordiiitpet,
            food101), a set of torchvision, where ``download`` leaves it; "webdataset:SHARDS" such as
            "webdataset:/data/train-{000..146}.tar" (see ``shards``), whose held-out images are ``val_data``.
        img_size: pixels of the square that the model sees, or (height, width).
        val_fraction: the share of each class to hold out, in (0, 1); not used if the set is split already.
        val_data: the held-out images, a name as above with the same classes; then all of ``name`` is for training.
        num_classes, num_samples: of a webdataset, the second for one epoch. None: counted, where the shards are local
            files.
        download: whether torchvision may fetch a set of its own into ROOT.
        in_chans: channels of the images: 1 (grey), 3 (RGB) or 4 (RGBA).
        classes: of a webdataset, the names that its .cls files may have, in their order; None: those that they have, or
            numbers.
        prepare: further fields of Preprocess.

    Raises InputError (a ValueError) for an unknown name, no images, fewer than two classes, or nothing held out.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"val_fraction must be in (0, 1), got {val_fraction!r}")
    source = _source(name, download, num_classes, num_samples, classes)
    preprocess = Preprocess(img_size, **source.normalization | prepare).of_channels(in_chans)
    if val_data is not None:
        of_shards = (len(source.classes), None, source.classes) if val_data.startswith("webdataset:") else ()
        held_out = _source(val_data, download, *of_shards)
        if held_out.classes != source.classes and held_out.kind is ImageSet:
            raise InputError(f"val_data {val_data!r} has other classes than data {name!r}")
        kind, train, val = held_out.kind, source.train, held_out.val or held_out.train
    elif source.val is not None:
        kind, train, val = ImageSet, source.train, source.val
    elif source.kind is not ImageSet:
        raise InputError(f"data {name!r} cannot be split: name its held-out images with --val-data")
    else:
        kind, (images, labels) = ImageSet, source.train
        train, val = (
            [[part[i] for i in indices] for part in (images, labels)]
            for indices in stratified_split(labels, val_fraction)
        )
        if not val[1]:
            raise InputError(
                f"no class has the two images it takes to hold one out ({len(labels)} images, {len(source.classes)} "
                "classes)"
            )
    if source.kind is not ImageSet and source.train[-1] is None:
        raise InputError(f"samples of {name!r} cannot be counted beforehand: give --train-num-samples")
    augment = source.augment or CropFlip(shape=preprocess.hw)
    return Data(source.kind(*train, preprocess, augment), kind(*val, preprocess), source.classes, preprocess)


@dataclass
class _Source:
    """The parts of a data set before it is split and prepared.

    train and val are (images, labels), or what else comes first in ``kind``; val is None where the set is not split.
    augment None is a CropFlip.
    """

    classes: list[str]
    train: tuple
    val: tuple | None
    augment: Callable | None
    normalization: dict
    kind: type = ImageSet


def _source(name, download=False, num_classes=None, num_samples=None, classes=None):
    kind, colon, rest = name.partition(":")
    if kind == "webdataset" and rest:
        return _webdataset(rest, num_classes, num_samples, classes)
    for option, value in (("num_classes", num_classes), ("train_num_samples", num_samples)):
        if value is not None:
            raise InputError(f"{option} is for webdataset:SHARDS only, and data is {name!r}")
    if kind == "digits" and (rest or not colon):
        return _digits(rest)
    if kind == "imagefolder" and rest:
        return _imagefolder(Path(rest).expanduser())
    if kind in TORCHVISION_SETS and rest:
        return _torchvision(kind, Path(rest).expanduser(), download)
    raise InputError(f"data must be one of {', '.join(KINDS)}, got {name!r}")


def stratified_split(labels: list[int], val_fraction: float) -> tuple[list[int], list[int]]:
    """Indices (train, val): ``val_fraction`` of each class is held out, at least one image of a class that has two."""
    # The split is part of the data set, so the seed of a training does not change it.
    generator = torch.Generator().manual_seed(0)
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


@dataclass(frozen=True)
class CropFlip(RandomCrop):
    """A random part of the ``shape`` of images (height, width), with ``min_side`` to all of the sides of the largest
    one, mirrored half of the time.
    """

    min_side: float = 0.6
    shape: tuple[int, int] = (1, 1)

    def draw(self, height: int, width: int) -> Box:
        """A random box of an image of this height and width, mirrored half the time."""
        share, y, x, flip = torch.rand(4).tolist()
        share = self.min_side + (1 - self.min_side) * share
        rows, columns = (max(1, round(share * side)) for side in largest_box(height, width, self.shape))
        return Box(round(y * (height - rows)), round(x * (width - columns)), rows, columns, flip < 0.5)


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
    train, held_out = _part(root, TRAIN_FOLDERS), _part(root, HELD_OUT_FOLDERS)
    if train is None and held_out is None:
        classes, images, labels = _scan(root)
        _check_classes(classes, root)
        inside = [_folders(root / name) for name in classes]
        if len(inside[0]) > 1 and all(names == inside[0] for names in inside):
            warnings.warn(
                f"{', '.join(map(repr, classes[:3]))} are taken for classes, though the same folders are in each "
                f"({', '.join(map(repr, inside[0][:3]))}): parts of a set are called train and val",
                stacklevel=2,
            )
        return _Source(classes, (images, labels), None, None, {})
    if held_out is None:
        raise InputError(
            f"data folder {str(root)!r} has {train.name!r}, but no held-out images beside it, in "
            f"{', '.join(HELD_OUT_FOLDERS[:4])} or the "
            f"like; to hold out a share of {train.name!r}, give that folder itself"
        )
    if train is None:
        raise InputError(
            f"data folder {str(root)!r} has {held_out.name!r}, but no training images beside it, in {TRAIN_FOLDERS[0]}"
        )
    classes, images, labels = _scan(train)
    val_classes, val_images, val_labels = _scan(held_out)
    unknown = sorted(set(val_classes) - set(classes))
    if unknown:
        raise InputError(f"class {unknown[0]!r} of {str(held_out)!r} is not in {str(train)!r}")
    _check_classes(classes, train)
    val_labels = [classes.index(val_classes[label]) for label in val_labels]
    return _Source(classes, (images, labels), (val_images, val_labels), None, {})


def _part(root, names):
    """The folder of ``root`` with one of these names that has folders of its own, so that it is no class; None if there
    is none.

    Raises InputError where two have the same.
    """
    found = {}
    for entry in sorted(root.iterdir()) if root.is_dir() else ():
        if (name := _called(entry.name)) in names and not hidden(entry.name) and _folders(entry):
            found.setdefault(name, []).append(entry)
    for name in names:
        if name in found:
            entry, *others = found[name]
            if others:
                raise InputError(
                    f"data folder {str(root)!r} has several {name!r} folders, {entry.name!r} and {others[0].name!r}: "
                    "give the one to train on, and the one to hold out as --val-data"
                )
            return entry
    return None


def _called(name):
    """The name of a folder without what says nothing about its part: "Train_Images" -> "train"."""
    letters = re.sub("[^a-z]", "", name.lower())
    return re.sub(f"^({BESIDES})(?=.)|(?<=.)({BESIDES})$", "", letters)


def _folders(path):
    """The names of the folders in one, sorted; none where it is no folder."""
    return sorted(e.name for e in path.iterdir() if e.is_dir() and not hidden(e.name)) if path.is_dir() else []


def _torchvision(kind, root, download):
    if download and torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
        raise InputError("download is for one process: fetch the data set in a run without torchrun")
    name, train_parts, val_part = TORCHVISION_SETS[kind]
    make = getattr(torchvision_module("datasets"), name)
    try:
        train, val = (
            [make(root, download=download, **part) for part in train_parts],
            make(root, download=download, **val_part),
        )
    except RuntimeError as error:  # what torchvision raises where the files are not there, or are not whole
        if download:
            raise InputError(f"{kind} cannot be fetched into {str(root)!r}: {error}") from error
        raise InputError(f"{kind} is not there, or not whole, in {str(root)!r}; --download fetches it") from error
    classes = getattr(val, "classes", None) or [str(i) for i in range(1 + max(_labels(val)))]
    images, labels = ([x for part in train for x in of(part)] for of in (_images, _labels))
    return _Source(list(classes), (images, labels), (_images(val), _labels(val)), None, {})


def _images(dataset):
    """The paths of the images, or the pixels themselves."""
    if hasattr(dataset, "data"):  # CIFAR's array [N, 32, 32, 3]
        return list(torch.from_numpy(dataset.data).permute(0, 3, 1, 2))
    return list(dataset._images if hasattr(dataset, "_images") else dataset._image_files)


def _labels(dataset):
    return list(getattr(dataset, "targets", None) or dataset._labels)  # the newer sets have no public name for them


def _webdataset(pattern, num_classes, num_samples, classes=None):
    shards = find_shards(pattern)
    if (num_classes is None or num_samples is None) and all(map(is_local, shards)):
        samples, found = count_samples(shards)
        num_samples, num_classes = num_samples or samples, num_classes or len(found)
        if classes is None and found != numbered(len(found)):
            if len(found) != num_classes:
                raise InputError(
                    f"num_classes is {num_classes}, but webdataset:{pattern} has {len(found)} classes by name"
                )
            classes = found
    if num_classes is None:
        raise InputError(
            f"classes of {shards[0]!r} cannot be counted beforehand: give --num-classes, and --train-num-samples"
        )
    if num_samples == 0 or num_classes < 2:
        raise InputError(
            f"webdataset:{pattern} must have samples of 2 classes or more, got {num_samples} of {num_classes}"
        )
    names = list(classes or numbered(num_classes))
    return _Source(names, (shards, names, num_samples), None, None, {}, ShardSet)


def _scan(root):
    """(class names, image paths, labels) of root/<class>/**/*, in an order that does not depend on the file system."""
    if not root.is_dir():
        raise InputError(f"data folder {str(root)!r} {'is no folder' if root.exists() else 'does not exist'}")
    classes = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not hidden(entry.name))
    images, labels = [], []
    for label, name in enumerate(classes):
        found = find_images(root / name)
        if not found:
            raise InputError(f"class folder {str(root / name)!r} has no image ({', '.join(image_suffixes())})")
        images += found
        labels += [label] * len(found)
    if not images:
        raise InputError(f"data folder {str(root)!r} has no class folder with images")
    return classes, images, labels


def _check_classes(classes, root):
    if len(classes) < 2:
        raise InputError(
            f"data folder {str(root)!r} must have at least 2 class folders, got {len(classes)}: {', '.join(classes)}"
        )
