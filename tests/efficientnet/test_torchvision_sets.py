"""torchvision's data sets by name, on tiny files in each set's own on-disk format."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet.data.decoding import read_image
from efficientnet.data.sets import load_data
from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from support.command_line import assert_one_line

datasets = pytest.importorskip("torchvision.datasets", reason="torchvision is not installed")


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


def write_cifar(root, monkeypatch, kind):
    """12 training images and 5 test images; the checksums that torchvision wants become theirs."""
    cls, label_key, names = {
        "cifar10": (datasets.CIFAR10, "labels", ["plane", "car", "bird"]),
        "cifar100": (datasets.CIFAR100, "fine_labels", ["apple", "aquarium_fish", "baby"]),
    }[kind]
    folder, rng, written = root / cls.base_folder, np.random.default_rng(0), {}
    folder.mkdir(parents=True)
    for part, files, count in (
        ("train", [file for file, _ in cls.train_list], 12),
        ("test", [file for file, _ in cls.test_list], 5),
    ):
        pixels, labels = rng.integers(0, 256, (count, 3, 32, 32), dtype=np.uint8), [i % 3 for i in range(count)]
        written[part] = torch.from_numpy(pixels), labels
        for file, at in zip(files, np.array_split(np.arange(count), len(files)), strict=True):
            batch = {"data": pixels[at].reshape(len(at), -1), label_key: [labels[i] for i in at]}
            (folder / file).write_bytes(pickle.dumps(batch))
    (folder / cls.meta["filename"]).write_bytes(pickle.dumps({cls.meta["key"]: names}))
    for part in ("train_list", "test_list"):
        monkeypatch.setattr(cls, part, [[file, md5(folder / file)] for file, _ in getattr(cls, part)])
    monkeypatch.setattr(cls, "meta", cls.meta | {"md5": md5(folder / cls.meta["filename"])})
    return names, written


@pytest.mark.parametrize("kind", ["cifar10", "cifar100"])
def test_cifar(tmp_path, monkeypatch, kind):
    names, written = write_cifar(tmp_path, monkeypatch, kind)
    data = load_data(f"{kind}:{tmp_path}", 32)
    assert data.classes == names
    for part, name in ((data.train, "train"), (data.val, "test")):
        pixels, labels = written[name]
        assert part.labels == labels and torch.equal(torch.stack(part.images), pixels)
    image, label = data.val[3]
    assert torch.equal(image, written["test"][0][3]) and label == 0


def write_flowers(root, monkeypatch):
    from scipy.io import savemat

    folder = root / "flowers-102"
    (folder / "jpg").mkdir(parents=True)
    labels = [1 + i % 102 for i in range(12)]
    savemat(folder / "imagelabels.mat", {"labels": np.array(labels)})
    splits = {"trnid": [1, 5, 7], "valid": [2, 6], "tstid": [3, 4, 8, 9, 10, 11, 12]}
    savemat(folder / "setid.mat", {name: np.array(ids) for name, ids in splits.items()})
    for file in ("setid", "label"):
        name = datasets.Flowers102._file_dict[file][0]
        monkeypatch.setitem(datasets.Flowers102._file_dict, file, (name, md5(folder / name)))
    files = {i: folder / "jpg" / f"image_{i:05d}.jpg" for i in range(1, 13)}
    return files, {i: label - 1 for i, label in enumerate(labels, 1)}, [1, 5, 7, 2, 6], splits["tstid"]


def write_pets(root, monkeypatch):
    folder = root / "oxford-iiit-pet"
    (folder / "images").mkdir(parents=True)
    (folder / "annotations").mkdir()
    names = ["Abyssinian_1", "great_pyrenees_2", "Abyssinian_3", "great_pyrenees_4", "Abyssinian_5", "great_pyrenees_6"]
    lines = [f"{name} {1 + i % 2} {1 + i % 2} 1\n" for i, name in enumerate(names)]
    (folder / "annotations" / "trainval.txt").write_text("".join(lines[:4]))
    (folder / "annotations" / "test.txt").write_text("".join(lines[4:]))
    files = {i: folder / "images" / f"{name}.jpg" for i, name in enumerate(names)}
    return files, {i: i % 2 for i in files}, [0, 1, 2, 3], [4, 5]


def write_food(root, monkeypatch):
    folder = root / "food-101"
    files = {i: folder / "images" / ("waffles" if i % 2 else "apple_pie") / f"{1000 + i}.jpg" for i in range(7)}
    (folder / "meta").mkdir(parents=True)
    for path in files.values():
        path.parent.mkdir(parents=True, exist_ok=True)

    def listing(numbers):
        return {
            name: [f"{name}/{1000 + i}" for i in numbers if i % 2 == odd]
            for odd, name in enumerate(("apple_pie", "waffles"))
        }

    (folder / "meta" / "train.json").write_text(json.dumps(listing(range(4))))
    (folder / "meta" / "test.json").write_text(json.dumps(listing(range(4, 7))))
    return files, {i: i % 2 for i in files}, [0, 2, 1, 3], [4, 6, 5]


WRITERS = {"flowers102": write_flowers, "oxfordiiitpet": write_pets, "food101": write_food}


@pytest.mark.parametrize("kind", WRITERS)
def test_sets_of_image_files(tmp_path, monkeypatch, kind):
    files, labels, train, test = WRITERS[kind](tmp_path, monkeypatch)
    for i, path in files.items():
        Image.new("RGB", (12, 10), (20 * i, 0, 100)).save(path, quality=95)
    data = load_data(f"{kind}:{tmp_path}", 8)
    assert len(data.classes) == {"flowers102": 102, "oxfordiiitpet": 2, "food101": 2}[kind]
    if kind == "oxfordiiitpet":
        assert data.classes == ["Abyssinian", "Great Pyrenees"]
    for part, numbers in ((data.train, train), (data.val, test)):
        assert [Path(path) for path in part.images] == [files[i] for i in numbers]
        assert part.labels == [labels[i] for i in numbers]
        image, _ = part[0]
        assert abs(image[0].float().mean() - read_image(files[numbers[0]])[0].float().mean()) < 1
    with pytest.raises(InputError, match=f"cannot decode image '{files[test[0]]}'"):
        files[test[0]].write_bytes(b"")
        data.val[0]


def test_training_on_cifar(tmp_path, monkeypatch, capsys):
    write_cifar(tmp_path, monkeypatch, "cifar10")
    config = TrainConfig(
        f"cifar10:{tmp_path}", img_size=8, epochs=1, batch_size=4, device="cpu", output=str(tmp_path / "run")
    )
    assert Trainer(config).run().total == 5
    assert "12 training and 5 held-out images, 8 x 8" in capsys.readouterr().out


def test_nothing_is_fetched_unless_asked(run, tmp_path, monkeypatch):  # noqa: F811
    fetched = []
    monkeypatch.setattr(
        "torchvision.datasets.cifar.download_and_extract_archive", lambda *args, **more: fetched.append(args)
    )
    argv = ("train", "--data", f"cifar10:{tmp_path / 'root'}", "--output", tmp_path / "out")
    assert_one_line(run(*argv), "cifar10 is not there, or not whole, in '.*root'; --download fetches it")
    assert not fetched
    assert_one_line(run(*argv, "--download"), "cifar10 cannot be fetched into '.*root': Dataset not found or corrupted")
    assert fetched == [(datasets.CIFAR10.url, tmp_path / "root")] and not (tmp_path / "out").exists()
    for kind in ("cifar100", "flowers102", "oxfordiiitpet", "food101"):
        assert_one_line(
            run("train", "--data", f"{kind}:{tmp_path / 'root'}"), f"{kind} is not there, or not whole, in '.*root'"
        )


def test_without_torchvision(run, tmp_path, monkeypatch):  # noqa: F811
    def missing(name):
        raise ModuleNotFoundError(name="torchvision")

    monkeypatch.setattr("efficientnet.data.torchvision_modules.import_module", missing)
    assert_one_line(
        run("train", "--data", f"cifar10:{tmp_path}"),
        r'torchvision is not installed; pip install "effkernels\[train\]"',
    )
