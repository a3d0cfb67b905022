"""Folders and files of images as they are in the world: names, links, what systems leave about, sizes, channels,
orientations.
"""

import io
import json
import os
import resource
import subprocess
import sys
import tarfile
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientnet import create_model
from efficientnet.cli import main
from efficientnet.data import decoding
from efficientnet.data import images as reading
from efficientnet.data.decoding import Box, read_image, with_channels
from efficientnet.data.images import Preprocess, find_images
from efficientnet.data.sets import load_data
from efficientnet.errors import InputError
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import save_checkpoint

TINY = "efficientnet_d0.1_w0.1_r32"


def picture(path, colour=0, size=(9, 9), **saving):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour, 100, 0)).save(path, **saving)


def split(root, train, held_out, classes=("cat", "dog"), images=2):
    for part in (train, held_out):
        for label, name in enumerate(classes):
            for i in range(images):
                picture(root / part / name / f"{i}.png", 50 * label + i)


# Folders


@pytest.mark.parametrize(
    "train, held_out",
    [
        *(
            ("Train", "Val"),
            ("TRAIN", "TEST"),
            ("training", "validation"),
            ("Training", "Testing"),
            ("train", "eval"),
            ("train", "dev"),
        ),
        *(("train", "Evaluation"), ("train", "holdout"), ("Trn", "Tst"), ("train_set", "test_set"), ("train", "valid")),
        *(("train_images", "val_images"), ("train-set", "val-set"), ("training_data", "validation_data")),
        *(("seg_train", "seg_test"), ("train2017", "val2017"), ("0_train", "1_val"), ("Train Set", "hold-out")),
    ],
)
def test_split_folders(tmp_path, train, held_out):
    split(tmp_path, train, held_out)
    data = load_data(f"imagefolder:{tmp_path}", 8)
    assert data.classes == ["cat", "dog"]
    assert {path.parts[-3] for path in data.train.images} == {train} and {
        path.parts[-3] for path in data.val.images
    } == {held_out}


def test_the_better_held_out_part_is_taken(tmp_path):
    split(tmp_path, "train", "test")
    split(tmp_path, "train", "Val")
    assert {path.parts[-3] for path in load_data(f"imagefolder:{tmp_path}", 8).val.images} == {"Val"}


@pytest.mark.parametrize(
    "present, message",
    [
        (
            "train",
            "has 'train', but no held-out images beside it, in val, validation, valid, validate or the like; to hold "
            "out a share",
        ),
        ("Training", "has 'Training', but no held-out images beside it"),
        ("Test", "has 'Test', but no training images beside it, in train"),
    ],
)
def test_half_a_split_says_what_is_missing(tmp_path, present, message):
    split(tmp_path, present, present)
    with pytest.raises(InputError, match=message):
        load_data(f"imagefolder:{tmp_path}", 8)


def test_classes_that_are_called_so(tmp_path):
    """A railway's train has images, not folders."""
    for name in ("train", "tram", "test"):
        for i in range(3):
            picture(tmp_path / name / f"{i}.png", i)
    assert load_data(f"imagefolder:{tmp_path}", 8).classes == ["test", "train", "tram"]


LITTER = [
    ".ipynb_checkpoints/0-checkpoint.png",
    "._0.png",
    ".hidden.jpg",
    "@eaDir/0.png",
    "__MACOSX/x/0.png",
    "a/.b/0.png",
]


@pytest.mark.parametrize("litter", LITTER)
def test_what_systems_leave_about_is_no_image(tmp_path, litter):
    split(tmp_path, ".", ".", images=4)
    for name in ("cat", "dog"):
        path = tmp_path / name / litter
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"\0\5\x16\7")
    data = load_data(f"imagefolder:{tmp_path}", 8)
    assert sorted(path.name for path in data.train.images + data.val.images) == sorted(
        2 * [f"{i}.png" for i in range(4)]
    )


def test_litter_is_no_class_and_no_part(tmp_path):
    split(tmp_path, ".", ".")
    for name in ("@eaDir", "__MACOSX", ".git"):
        picture(tmp_path / name / "0.png")
    assert load_data(f"imagefolder:{tmp_path}", 8).classes == ["cat", "dog"]


def test_links_to_folders_are_followed_and_end(tmp_path):
    split(tmp_path / "set", ".", ".")
    picture(tmp_path / "elsewhere" / "deep" / "9.png", 9)
    os.symlink(tmp_path / "elsewhere", tmp_path / "set" / "cat" / "more")
    os.symlink(tmp_path / "set" / "cat", tmp_path / "set" / "cat" / "loop")
    os.symlink(tmp_path / "set" / "dog", tmp_path / "set" / "wolf")
    data = load_data(f"imagefolder:{tmp_path / 'set'}", 8)
    assert data.classes == ["cat", "dog", "wolf"]
    assert sum(path.name == "9.png" for path in data.train.images + data.val.images) == 1
    assert len(data.train) + len(data.val) == 7


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    split(tmp_path / "pets", "train", "val")
    assert len(load_data("imagefolder:~/pets", 8).train) == 4
    assert (
        Trainer(TrainConfig("imagefolder:~/pets", model=TINY, img_size=8, output="~/run", device="cpu")).output
        == tmp_path / "run"
    )


def test_suffixes(tmp_path, monkeypatch):
    for name, kind in (("a.jfif", "JPEG"), ("b.jpe", "JPEG"), ("c.JPG", "JPEG"), ("d.WebP", "WEBP")):
        picture(tmp_path / name, format=kind)
    (tmp_path / "e.heic").write_bytes(b"x")
    (tmp_path / "notes.txt").write_text("x")
    monkeypatch.setattr(reading, "image_suffixes", lambda: reading.IMAGE_SUFFIXES)
    with pytest.warns(
        UserWarning, match=r"1 files \(.heic\) in '.*' are left out: Pillow, as it is here, cannot read them"
    ):
        assert [path.name for path in find_images(tmp_path)] == ["a.jfif", "b.jpe", "c.JPG", "d.WebP"]
    monkeypatch.setattr(reading, "image_suffixes", lambda: (*reading.IMAGE_SUFFIXES, ".heic"))
    assert len(find_images(tmp_path)) == 5
    monkeypatch.undo()
    assert (".avif" in reading.image_suffixes()) == (Image.registered_extensions().get(".avif") in Image.OPEN)


def test_two_folders_of_the_same_part(tmp_path):
    """Neither is left out in silence."""
    split(tmp_path, "train", "val")
    split(tmp_path, "train_2", "test")
    with pytest.raises(InputError, match="has several 'train' folders, 'train' and 'train_2': give the one to train"):
        load_data(f"imagefolder:{tmp_path}", 8)


@pytest.mark.parametrize("names", [("tr", "te"), ("part1", "part2"), ("\u8bad\u7ec3", "\u6d4b\u8bd5")])
def test_parts_that_are_taken_for_classes_are_named(tmp_path, names):
    split(tmp_path, *names)
    with pytest.warns(
        UserWarning, match="taken for classes, though the same folders are in each .'cat', 'dog'.: parts"
    ):
        assert load_data(f"imagefolder:{tmp_path}", 8).classes == sorted(names)


@pytest.mark.filterwarnings("error")
def test_classes_with_folders_of_their_own(tmp_path):
    for name in ("cat/a", "cat/b", "dog/a", "dog/c", "test_tube/a", "training_dog/a"):
        for i in range(2):
            picture(tmp_path / name / f"{i}.png")
    assert load_data(f"imagefolder:{tmp_path}", 8).classes == ["cat", "dog", "test_tube", "training_dog"]


# Pixels


@pytest.mark.parametrize("size", [(20_000, 1), (1, 20_000), (30_000, 3), (2_000, 2), (1_001, 4)])
@pytest.mark.parametrize("crop_pct", [1.0, 0.5])
def test_thin_images(size, crop_pct, monkeypatch):
    """The middle, as from the whole image resized; and never more than a few times the output in memory."""
    generator = np.random.default_rng(0)
    image = torch.from_numpy(generator.integers(0, 255, (3, *size), dtype=np.uint8))
    largest, interpolate = [], F.interpolate
    monkeypatch.setattr(
        F, "interpolate", lambda x, *args, **kwargs: largest.append(interpolate(x, *args, **kwargs)) or largest[-1]
    )
    found = Preprocess(32, crop_pct=crop_pct).pixels(image)
    assert found.shape == (3, 32, 32) and largest[0].numel() <= 3 * 32 * 32 * 5 / crop_pct**2
    if min(size) > 1:  # the whole: its middle is at the same place
        monkeypatch.setattr(reading, "THIN", 10**6)
        whole = Preprocess(32, crop_pct=crop_pct).pixels(image)
        assert (found.float() - whole.float()).abs().mean() < 2


def test_ordinary_images_are_resized_whole():
    box = Box(0, 5, 60, 240, True)
    assert reading._middle(box, (9, 9)) == box
    assert reading._middle(box._replace(height=30), (9, 9)) == Box(0, 5 + 60, 30, 120, True)


def test_predict_says_that_it_sees_the_middle_alone(tmp_path):
    """Once, in one line, without a place in the code."""
    save_checkpoint(create_model(TINY, num_classes=2), tmp_path / "m.safetensors")
    for i in range(3):
        picture(tmp_path / "thin" / f"{i}.png", size=(900 + i, 1 + i))
    picture(tmp_path / "square" / "0.png")
    argv = [sys.executable, "-m", "efficientnet", "predict", "--checkpoint", tmp_path / "m.safetensors"]
    for folder, said in (("thin", f"efficientnet: warning: {reading.ONLY_MIDDLE}\n"), ("square", "")):
        done = subprocess.run([*argv, "--img-size", "32", tmp_path / folder], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, said)


@pytest.mark.slow
def test_a_thin_image_fits_a_small_memory(tmp_path):
    picture(tmp_path / "strip.png", size=(20_000, 1))
    save_checkpoint(create_model(TINY, num_classes=2), tmp_path / "m.safetensors")
    argv = ["predict", "--checkpoint", tmp_path / "m.safetensors", "--img-size", "224", tmp_path / "strip.png"]
    limit = lambda: resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))  # noqa: E731
    done = subprocess.run(
        [sys.executable, "-m", "efficientnet", *argv], capture_output=True, text=True, preexec_fn=limit
    )
    assert done.returncode == 0, done.stderr


def test_large_photographs(tmp_path, capsys, monkeypatch):
    picture(tmp_path / "a.png", size=(40, 30))
    save_checkpoint(create_model(TINY, num_classes=2), tmp_path / "m.safetensors")
    monkeypatch.setitem(decoding._limits, "pixels", 1)
    argv = [
        "predict",
        "--checkpoint",
        str(tmp_path / "m.safetensors"),
        "--img-size",
        "16",
        str(tmp_path / "a.png"),
        "--max-pixels",
    ]
    with pytest.raises(SystemExit):
        main([*argv, "1199"])
    assert "a.png' (ValueError: 40 x 30 pixels, more than 1199; --max-pixels allows more)" in capsys.readouterr().err
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's limit gives way
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*argv, "1200"]) == 0
    assert Image.MAX_IMAGE_PIXELS == 100
    with pytest.raises(SystemExit):
        main([*argv, "0"])
    assert "max_pixels must be an integer >= 1, got 0" in capsys.readouterr().err


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation(tmp_path, orientation, kind):
    """As a viewer shows it: a red top left corner is where the camera's owner saw it."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = np.zeros((16, 24, 3), np.uint8)
    pixels[:8, :8, 0] = 255
    options = {"quality": 100} if kind == "JPEG" else {"lossless": True} if kind == "WEBP" else {}
    Image.fromarray(pixels).save(tmp_path / "a", kind, exif=exif, **options)
    image = read_image(tmp_path / "a")
    turned = orientation >= 5
    assert image.shape == (3, 24, 16) if turned else (3, 16, 24)
    corner = {1: (0, 0), 2: (0, 1), 3: (1, 1), 4: (1, 0), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}[orientation]
    red = image[0].float()
    ends = (slice(0, 4), slice(-4, None))
    corners = {(y, x): red[ends[y], ends[x]].mean() for y in (0, 1) for x in (0, 1)}
    assert max(corners, key=corners.get) == corner


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels, tmp_path):
    """From files and from tensors alike, as Pillow converts."""
    pixels = np.random.default_rng(0).integers(0, 255, (7, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    found = read_image(tmp_path / "a.png", channels)
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    expected = torch.from_numpy(np.array(Image.fromarray(pixels).convert(mode))).view(7, 5, channels).permute(2, 0, 1)
    assert torch.equal(found, expected)
    assert torch.equal(with_channels(torch.from_numpy(pixels).permute(2, 0, 1), channels), expected)


@pytest.mark.parametrize("channels", [1, 4])
def test_train_validate_predict_of_other_channels(tmp_path, capsys, channels):
    split(tmp_path / "data", ".", ".", images=6)
    data = f"imagefolder:{tmp_path / 'data'}"
    argv = [
        "train",
        "--data",
        data,
        "--model",
        TINY,
        "--img-size",
        "16",
        "--batch-size",
        "4",
        "--epochs",
        "1",
        "--device",
        "cpu",
    ]
    assert main([*argv, "--in-chans", str(channels), "--output", str(tmp_path / "run")]) == 0
    checkpoint = str(tmp_path / "run" / "last.safetensors")
    assert main(["validate", "--data", data, "--checkpoint", checkpoint, "--json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert json.loads(out[-1])["images"] == 2
    assert main(["predict", "--checkpoint", checkpoint, str(tmp_path / "data"), "--json"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 12


def test_channels_that_no_file_has(tmp_path, capsys):
    picture(tmp_path / "a.png")
    save_checkpoint(create_model(TINY, num_classes=2, in_chans=2), tmp_path / "m.safetensors")
    for argv in (
        ["predict", "--checkpoint", str(tmp_path / "m.safetensors"), str(tmp_path / "a.png")],
        ["validate", "--checkpoint", str(tmp_path / "m.safetensors")],
        ["train", "--in-chans", "2", "--output", str(tmp_path / "out")],
    ):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        err = capsys.readouterr().err
        assert stop.value.code == 2 and err.endswith(
            "in_chans must be one of 1 (L), 3 (RGB), 4 (RGBA) to read image files, got 2\n"
        )
    assert not (tmp_path / "out").exists()


# Shards


def shard(path, samples):
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(samples):
            Image.new("RGB", (9, 9), (i, 0, 0)).save(buffer := io.BytesIO(), "PNG")
            for suffix, content in (("png", buffer.getvalue()), ("cls", label)):
                info = tarfile.TarInfo(f"{i:04d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return f"webdataset:{path}"


@pytest.mark.parametrize("labels", [[b"dog", b"cat\n"], ["käse".encode(), b"apple pie"], [b"n02119789", b"n01440764"]])
def test_class_names_in_shards(tmp_path, labels):
    train = shard(tmp_path / "train.tar", 4 * labels)
    val = shard(tmp_path / "val.tar", [labels[0]])  # fewer classes, whose numbers must be the same
    data = load_data(train, 8, val_data=val)
    names = sorted(label.decode().strip() for label in labels)
    assert data.classes == names
    config = TrainConfig(
        train, val_data=val, model=TINY, img_size=16, batch_size=4, epochs=1, device="cpu", output=str(tmp_path / "run")
    )
    evaluation = Trainer(config).run()
    assert [total for _, total in evaluation.per_class] == [int(name == labels[0].decode().strip()) for name in names]


def test_numbers_in_shards_stay_numbers(tmp_path):
    data = load_data(
        shard(tmp_path / "a.tar", [b"0", b"02", b"1\n", b"2"]), 8, val_data=shard(tmp_path / "b.tar", [b"1"])
    )
    assert data.classes == ["0", "1", "2"]


# Names


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii", "cp1252", "latin-1"])
def test_names_that_cannot_be_printed(tmp_path, encoding):
    save_checkpoint(create_model(TINY, num_classes=2), tmp_path / "m.safetensors", classes=["Käse", "猫"])
    folder = os.fsencode(tmp_path) + b"/images"
    os.makedirs(folder)
    for name in (b"caf\xe9.png", "\u732b.png".encode(), b"zebra.png"):
        with open(folder + b"/" + name, "wb") as file:
            Image.new("RGB", (9, 9)).save(file, "PNG")
    names = b"\n".join(folder + b"/" + name for name in os.listdir(folder)) + b"\n"
    command = [
        sys.executable,
        "-m",
        "efficientnet",
        "predict",
        "--checkpoint",
        str(tmp_path / "m.safetensors"),
        "--img-size",
        "16",
        "-",
    ]
    sheet = ["--contact-sheet", str(tmp_path / "sheet.png")]
    done = subprocess.run(
        [*command, *sheet], input=names, capture_output=True, env=os.environ | {"PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"zebra.png\n") == 1 and len(done.stdout.splitlines()) == 9
    assert b"caf\xe9.png\n" in done.stdout or encoding != "utf-8:strict"
    assert "猫.png\n".encode() in done.stdout or encoding != "utf-8:strict"
    assert (b"\\u732b.png\n" in done.stdout) == (encoding != "utf-8:strict")


# Logits that are no numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(tmp_path, capsys, value):
    split(tmp_path / "data", ".", ".", images=2)
    model = create_model(TINY, num_classes=2)
    torch.nn.init.constant_(model.classifier.bias, value)
    save_checkpoint(model, tmp_path / "m.safetensors", classes=["cat", "dog"])
    for argv in (
        ["predict", str(tmp_path / "data")],
        ["validate", "--data", f"imagefolder:{tmp_path / 'data'}", "--split", "all"],
    ):
        with pytest.raises(SystemExit) as stop:
            main([*argv, "--checkpoint", str(tmp_path / "m.safetensors"), "--img-size", "16"])
        result = capsys.readouterr()
        assert stop.value.code == 2 and "logits" in result.err and "not finite" in result.err
        assert "nan" not in result.out and result.err.count("\n") == 1
