import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet.data.decoding import read_image
from efficientnet.data.images import ImageSet, Preprocess
from efficientnet.data.order import Draw
from efficientnet.data.sets import CropFlip, load_data, random_shift, stratified_split
from efficientnet.errors import InputError
from efficientnet.training.augment import training_crop, training_finish
from efficientnet.training.runner import Runner
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer

TINY = "efficientnet_d0.1_w0.5_r32"  # a block a stage, half the channels


def image_of(height, width):
    """uint8 [3, H, W] whose channels tell row, column and neither apart."""
    rows = torch.arange(height, dtype=torch.uint8).view(-1, 1).expand(height, width)
    columns = torch.arange(width, dtype=torch.uint8).expand(height, width)
    return torch.stack([rows, columns, torch.full((height, width), 7, dtype=torch.uint8)])


def identity(img_size, **kwargs):
    """A Preprocess that changes no value but the scale: 255 * its output is the pixels."""
    return Preprocess(img_size, (0.0,) * 3, (1.0,) * 3, **kwargs)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    data, digits = load_data("digits", 32), load_digits()
    assert len(data.train) + len(data.val) == 1797 and data.classes == [str(i) for i in range(10)]
    counts = np.bincount(data.train.labels) + np.bincount(data.val.labels)
    assert counts.tolist() == np.bincount(digits.target).tolist()
    # Averaged back to 8 x 8, the images are nearest to the originals, each to another one, of the same label.
    images, labels = data.train.images + data.val.images, data.train.labels + data.val.labels
    small = torch.nn.functional.avg_pool2d(torch.stack(images)[:, :1].float() / 255 * 16, 4).flatten(1)
    nearest = torch.cdist(small, torch.tensor(digits.images, dtype=torch.float32).flatten(1)).argmin(1)
    assert len(nearest.unique()) > 1790
    assert digits.target[nearest].tolist() == labels
    x, label = data.val[5]
    assert x.shape == (3, 32, 32) and x.dtype == torch.uint8 and torch.equal(x[0], x[2]) and label == data.val.labels[5]


def test_digits_are_normalised():
    data = load_data("digits", 32)
    x = torch.stack([data.preprocess(image) for image in data.train.images])
    assert abs(x.mean()) < 0.02 and abs(x.std() - 1) < 0.02


def test_split_is_stratified_disjoint_and_always_the_same():
    labels = [0] * 50 + [1] * 11 + [2] * 2 + [3]
    train, val = stratified_split(labels, 0.2)
    assert sorted(train + val) == list(range(len(labels)))
    assert [sum(labels[i] == c for i in val) for c in range(4)] == [10, 2, 1, 0]
    assert val != list(range(10)) + [50, 51, 61]  # drawn, not cut off at the front
    torch.manual_seed(123)
    assert stratified_split(labels, 0.2) == (train, val)


@pytest.mark.parametrize(
    ("height", "width", "top", "left"), [(20, 40, 0, 10), (40, 20, 10, 0), (20, 20, 0, 0), (20, 21, 0, 0)]
)
def test_preprocess_crops_the_centre(height, width, top, left):
    image = image_of(height, width)
    assert torch.allclose(identity(20)(image) * 255, image[:, top : top + 20, left : left + 20].float(), atol=1e-3)


def test_preprocess_crop_pct_drops_the_border():
    image = image_of(16, 16)
    assert torch.allclose(identity(8, crop_pct=0.5)(image) * 255, image[:, 4:12, 4:12].float(), atol=1e-3)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_preprocess_resizes_as_pillow_does(interpolation):
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    mode = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}[interpolation]
    expected = np.asarray(Image.fromarray(pixels).resize((20, 20), mode)).transpose(2, 0, 1)
    got = identity(20, interpolation=interpolation)(torch.from_numpy(pixels).permute(2, 0, 1)) * 255
    assert np.abs(got.numpy() - expected).max() < 1.5  # Pillow rounds after each of its two passes


def test_preprocess_normalises_each_channel():
    image = torch.stack([torch.full((4, 4), v, dtype=torch.uint8) for v in (0, 51, 255)])
    got = Preprocess(4, (0.5, 0.1, 0.2), (0.5, 0.1, 0.4))(image)
    assert torch.allclose(got[:, 0, 0], torch.tensor([-1.0, 1.0, 2.0]))


def test_random_shift_moves_by_at_most_two_and_repeats_the_border():
    image, seen = image_of(9, 11), set()
    torch.manual_seed(0)
    for _ in range(200):
        shifted = random_shift(image)
        dy, dx = (int(shifted[c, 4, 5]) - int(image[c, 4, 5]) for c in (0, 1))
        rows = (torch.arange(9) + dy).clamp(0, 8)
        columns = (torch.arange(11) + dx).clamp(0, 10)
        assert torch.equal(shifted, image[:, rows][:, :, columns])
        seen.add((dy, dx))
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}


def test_random_crop_flip_takes_squares_of_the_image():
    image, sides, flips = image_of(20, 30), set(), 0
    torch.manual_seed(0)
    for _ in range(200):
        crop = CropFlip()(image)
        side = crop.shape[1]
        assert crop.shape == (3, side, side) and 12 <= side <= 20
        flipped = bool(crop[1, 0, 0] > crop[1, 0, -1])
        crop = crop.flip(2) if flipped else crop
        top, left = int(crop[0, 0, 0]), int(crop[1, 0, 0])
        assert torch.equal(crop, image[:, top : top + side, left : left + side])
        sides.add(side)
        flips += flipped
    assert sides == set(range(12, 21)) and 70 < flips < 130


def test_training_images_are_augmented_and_held_out_ones_are_not():
    data = load_data("digits", 32)
    torch.manual_seed(0)
    draws = [[data.train[Draw(i, epoch, 32)][0] for i in range(5)] for epoch in (0, 1, 0)]
    assert any(not torch.equal(a, b) for a, b in zip(draws[0], draws[1], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(draws[0], draws[2], strict=True))  # whatever was drawn in between
    assert all(torch.equal(data.val[i][0], data.val[i][0]) for i in range(5))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK"])
def test_read_image_gives_rgb_for_every_mode(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 3), (255, 255, 255)).convert(mode).save(path)
    assert torch.equal(read_image(path), torch.full((3, 3, 5), 255, dtype=torch.uint8))


def test_sixteen_bits_become_eight(tmp_path):
    """Pillow itself clips them: white, but for the darkest."""
    levels = np.array([[0, 255, 256], [1000, 40000, 65535]], dtype=np.uint16)
    for name in ("x.png", "x.tif"):
        Image.fromarray(levels).save(tmp_path / name)
        assert torch.equal(
            read_image(tmp_path / name), torch.from_numpy((levels >> 8).astype(np.uint8)).expand(3, -1, -1)
        )
    Image.fromarray(levels.astype(np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match="cannot decode image '.*float.tif' .*floating-point"):
        read_image(tmp_path / "float.tif")


def test_image_folder(image_folder):
    data = load_data(f"imagefolder:{image_folder}", 16, val_fraction=0.25)
    assert data.classes == ["blue", "green", "red"]
    assert (len(data.train), len(data.val)) == (27, 9)
    assert not set(data.train.images) & set(data.val.images)
    for part in (data.train, data.val):
        assert [path.parent.name for path in part.images] == [data.classes[label] for label in part.labels]
    x, label = data.val[0]
    assert x.shape == (3, 16, 16) and data.classes[label] == "blue" and x.float().mean((1, 2)).argmax() == 2


@pytest.mark.parametrize("held_out", ["val", "validation", "test"])
def test_image_folder_that_is_split_already(tmp_path, held_out):
    for part, names in (("train", ("a", "b", "c")), (held_out, ("b", "c"))):
        for name in names:
            (tmp_path / part / name / "deeper").mkdir(parents=True)
            Image.new("RGB", (4, 4)).save(tmp_path / part / name / "deeper" / "x.JPG")
            (tmp_path / part / name / "notes.txt").write_text("not an image")
    data = load_data(f"imagefolder:{tmp_path}", 8)
    assert (data.classes, data.train.labels, data.val.labels) == (["a", "b", "c"], [0, 1, 2], [1, 2])
    (tmp_path / held_out / "unheard-of").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / held_out / "unheard-of" / "x.png")
    with pytest.raises(InputError, match=f"class 'unheard-of' of .*{held_out}.* is not in .*train"):
        load_data(f"imagefolder:{tmp_path}", 8)


def make_folder(root, **counts):
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (4, 4)).save(root / name / f"{i}.png")
    return f"imagefolder:{root}"


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({}, "has no class folder with images"),
        ({"only": 3}, "must have at least 2 class folders, got 1: only"),
        ({"some": 3, "none": 0}, "class folder .*none.* has no image"),
        ({"one": 1, "two": 1}, "no class has the two images it takes to hold one out"),
    ],
)
def test_image_folder_without_enough_to_learn_from(tmp_path, counts, message):
    with pytest.raises(InputError, match=message):
        load_data(make_folder(tmp_path, **counts), 8)


@pytest.mark.parametrize("name", ["", "digit", "digits:", "imagefolder", "imagefolder:", "cifar10", "mnist:x"])
def test_unknown_data(name):
    with pytest.raises(
        InputError, match=rf"data must be one of digits\[:CLASSES\], imagefolder:PATH, cifar10:ROOT, .*got '{name}'"
    ):
        load_data(name, 8)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"name": "imagefolder:/no/such/folder"}, "'/no/such/folder' does not exist"),
        ({"name": f"imagefolder:{__file__}"}, "test_data.py' is no folder"),
        ({"name": "digits:3"}, "classes of the digits must be at least 2, got '3'"),
        ({"name": "digits:7-12"}, "classes of the digits must look like 0-4 or 1,3,7-9, got '7-12'"),
        ({"val_data": "digits:0-4"}, "val_data 'digits:0-4' has other classes than data 'digits'"),
        ({"crop_pct": 0.0}, r"crop_pct must be in \(0, 1\], got 0.0"),
        ({"val_fraction": 0.0}, r"val_fraction must be in \(0, 1\), got 0.0"),
        ({"val_fraction": 1.5}, "val_fraction must be"),
        ({"img_size": 0}, "img_size must be an integer >= 1 or two, height and width, got 0"),
        ({"img_size": 2.5}, "img_size must be an integer >= 1 or two, height and width, got 2.5"),
    ],
)
def test_bad_arguments(kwargs, message):
    with pytest.raises(InputError, match=message):
        load_data(**{"name": "digits", "img_size": 8} | kwargs)


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: b"GIF89a nonsense", lambda data: data[:200]])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_image_that_cannot_be_decoded_is_named(tmp_path, damage, num_workers):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(good)
    bad.write_bytes(damage(good.read_bytes()))
    images = ImageSet([good, bad], [0, 1], identity(8))
    assert images[0][0].shape == (3, 8, 8)
    with pytest.raises(InputError, match="cannot decode image .*bad.png"):
        list(Runner(torch.device("cpu")).batches(images, 2, num_workers))


def test_a_folder_with_damaged_images_trains(tmp_path, capsys):
    """A truncated JPEG and a text file called .png are named and skipped, a CMYK JPEG is an image like others."""
    rng, colours = np.random.default_rng(0), {"cyan": (20, 200, 220), "orange": (230, 120, 20)}
    for name, colour in colours.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(6):
            pixels = np.clip(np.array(colour) + rng.normal(0, 10, (24, 20, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).convert("CMYK" if i == 5 else "RGB").save(
                tmp_path / "images" / name / f"{i}.jpg", quality=95
            )
    for name, colour in colours.items():
        path = tmp_path / "images" / name / "5.jpg"
        assert Image.open(path).mode == "CMYK"
        assert np.abs(read_image(path).float().mean((1, 2)).numpy() - colour).max() < 8
    cut, text = tmp_path / "images" / "cyan" / "0.jpg", tmp_path / "images" / "orange" / "text.png"
    cut.write_bytes(cut.read_bytes()[:-200])
    text.write_text("not an image")
    name = f"imagefolder:{tmp_path / 'images'}"
    config = TrainConfig(
        name, model=TINY, img_size=8, epochs=3, batch_size=3, device="cpu", output=str(tmp_path / "run"), max_corrupt=2
    )
    Trainer(config).run()
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("skipped, ")]
    # Once each, in three epochs.
    assert [line[:21] for line in said] == ["skipped, 1 of at most", "skipped, 2 of at most"]
    assert (
        sum(f"cannot decode image '{cut}'" in line for line in said) == sum(f"'{text}'" in line for line in said) == 1
    )
    with pytest.raises(
        InputError,
        match="cannot decode image '.*' .* \\(after 1 others that were skipped\\); --max-corrupt allows more",
    ):
        Trainer(replace(config, output=str(tmp_path / "other"), max_corrupt=1)).run()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("channels_last", [True, False])
def test_batches_travel_as_bytes_and_are_normalised_at_the_device(num_workers, channels_last):
    """Normalised there as one image alone is, in the memory format asked for; pinned where the device is a GPU."""
    data, runner = load_data("digits:0-1", 24), Runner(torch.device("cpu"), channels_last=channels_last)
    batches = runner.batches(data.val, 16, num_workers)
    sent = [batch[0] for batch, _ in batches.loader]
    assert all(images.dtype == torch.uint8 for images in sent)
    received = list(batches)
    format = torch.channels_last if channels_last else torch.contiguous_format
    assert all(images.dtype == torch.float32 and images.is_contiguous(memory_format=format) for images, _ in received)
    expected = torch.stack([data.preprocess(image) for image in data.val.images])
    assert torch.equal(torch.cat([images for images, _ in received]), expected)
    assert torch.cat([labels for _, labels in received]).tolist() == data.val.labels
    assert (
        not batches.loader.pin_memory
        and Runner(torch.device("cuda")).batches(data.val, 16, num_workers).loader.pin_memory
    )


def test_augmentation_reaches_workers_that_are_not_forked():
    """As on macOS, and from Python 3.14 on: what is sent to them must survive pickling, and draw the same."""
    config = TrainConfig("digits:0-1", scale=(0.5, 1.0), aa="rand", reprob=0.9)
    data = load_data(config.data, 24)
    data.train.augment, data.train.finish = training_crop(config), training_finish(config, data.preprocess.mean)
    sent = pickle.loads(pickle.dumps(data.train))
    for i in range(5):
        assert torch.equal(sent[Draw(i, 1, 24)][0], data.train[Draw(i, 1, 24)][0])
        assert not torch.equal(sent[Draw(i, 1, 24)][0], sent[i][0])


def test_missing_image_is_a_file_not_found_error():
    with pytest.raises(FileNotFoundError):
        read_image("/no/such.png")
