"""Images that are higher than wide, or wider than high: from the command line to the file that remembers the size."""

import json
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientnet import create_model, load_checkpoint
from efficientnet.choices import image_size
from efficientnet.cli import _joined_sizes
from efficientnet.data.decoding import read_image
from efficientnet.data.images import ONLY_MIDDLE, Preprocess, _warn_of_the_rest, largest_box
from efficientnet.data.sets import CropFlip, load_data
from efficientnet.errors import InputError
from efficientnet.measure.roofline import block_geometries, elements, model_works
from efficientnet.training.augment import training_crop
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import read_metadata, save_checkpoint, stored_cfg
from support.command_line import assert_one_line

TINY = "efficientnet_d0.1_w0.1_r32"


@pytest.mark.parametrize(
    "given, size",
    [(224, 224), ("224", 224), ([192, 256], (192, 256)), ("192x256", (192, 256)), ("64X64", 64), ((32, 32), 32)],
)
def test_sizes_as_they_are_given(given, size):
    assert image_size(given) == size


@pytest.mark.parametrize("given", [0, -1, True, 2.5, None, "", "x", "12x", "1x2x3", "-3", "٣", (1, 2, 3), [], (0, 4)])
def test_what_is_no_size(given):
    with pytest.raises(ValueError, match="img_size must be an integer >= 1 or two, height and width, got"):
        image_size(given)


def test_two_numbers_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["train", "--img-size", "24", "40", "--epochs", "2"]
    assert _joined_sizes(argv) == ["train", "--img-size", "24x40", "--epochs", "2"]
    for argv in (["predict", "--img-size", "24", "a.png"], ["predict", "3", "4"], ["train", "--img-size", "24"]):
        assert _joined_sizes(argv) == argv
    argv = ["predict", "--img-size", "24", "40"]
    assert _joined_sizes(argv) == ["predict", "--img-size", "24x40"]
    os.mkdir("40")  # a folder to predict is not a width
    assert _joined_sizes(argv) == argv


# Pixels


@pytest.mark.parametrize("crop_pct", [1.0, 0.8])
@pytest.mark.parametrize("size", [(24, 40), (40, 24), (8, 64), (32, 32)])
@pytest.mark.parametrize("shape", [(60, 100), (100, 60), (50, 50), (24, 40)])
def test_the_image_covers_the_size_and_keeps_its_shape(shape, size, crop_pct):
    """A picture of its own coordinates says which part is seen, and at which scale."""
    rows, columns = torch.arange(shape[0]).view(-1, 1), torch.arange(shape[1])
    image = torch.stack([rows.expand(shape), columns.expand(shape), torch.zeros(shape)]).mul(2).to(torch.uint8)
    found = Preprocess(size, crop_pct=crop_pct).pixels(image)
    assert found.shape == (3, *size)
    scale = max(size[0] / shape[0], size[1] / shape[1]) / crop_pct
    for dim, coordinates in enumerate((found[0, :, 0], found[1, 0])):
        first, last = coordinates[2].item() / 2, coordinates[-3].item() / 2  # clear of the border
        assert abs((last - first) - (size[dim] - 5) / scale) <= 1.5, "the same scale in both directions"
        assert abs((first + last) / 2 - (shape[dim] - 1) / 2) <= 1.5, "the middle"


def test_the_same_shape_is_resized_and_nothing_cut():
    image = torch.randint(0, 255, (3, 48, 80), dtype=torch.uint8)
    whole = F.interpolate(image[None].float(), (24, 40), mode="bilinear", align_corners=False, antialias=True)[0]
    assert (Preprocess((24, 40)).pixels(image).float() - whole).abs().max() <= 1, "rounded twice, as Pillow does"


@pytest.mark.filterwarnings("error")
def test_thin_images_for_thin_sizes():
    """What is thin is a matter of what the model sees."""
    image = torch.randint(0, 255, (3, 8, 512), dtype=torch.uint8)
    assert torch.equal(Preprocess((8, 512)).pixels(image), image)
    assert Preprocess((16, 512)).pixels(image).shape == (3, 16, 512)
    _warn_of_the_rest.cache_clear()
    with pytest.raises(UserWarning, match=ONLY_MIDDLE):
        Preprocess((512, 8)).pixels(image)


def test_largest_box():
    assert largest_box(60, 100, (1, 1)) == (60, 60)
    assert largest_box(60, 100, (24, 40)) == (60, 100)
    assert largest_box(60, 100, (40, 24)) == (60, 36)
    assert largest_box(1, 1, (1, 10_000)) == (1, 1)


def test_random_crops_have_the_shape():
    torch.manual_seed(0)
    image = torch.zeros(3, 60, 120, dtype=torch.uint8)
    for _ in range(20):
        _, height, width = CropFlip(shape=(20, 40))(image).shape
        assert 36 <= height <= 60 and abs(width - 2 * height) <= 1
    crop = training_crop(TrainConfig(scale=(0.2, 0.4)), shape=(20, 40))
    shapes = [crop(image).shape[1:] for _ in range(50)]
    assert all(2 * 3 / 4 * 0.9 <= width / height <= 2 * 4 / 3 * 1.1 for height, width in shapes)


# Commands


@pytest.fixture(scope="module")
def wide(image_folder, tmp_path_factory):
    """The folder of a run with images of 16 x 24."""
    output = tmp_path_factory.mktemp("wide")
    config = TrainConfig(
        f"imagefolder:{image_folder}", model=TINY, img_size=[16, 24], epochs=1, batch_size=8, output=str(output)
    )
    trainer = Trainer(config)
    sizes = []
    trainer.model.register_forward_pre_hook(lambda module, args: sizes.append(tuple(args[0].shape[2:])))
    trainer.run()
    assert set(sizes) == {(16, 24)}, "in training and in evaluation"
    return output


def test_train_takes_and_keeps_the_size(run, image_folder, tmp_path):
    for i, size in enumerate((["--img-size", 16, 24], ["--img-size", "16x24"], ["--input-size", 3, 16, 24])):
        argv = ["train", "--data", f"imagefolder:{image_folder}", "--model", TINY, "--epochs", 1, "--batch-size", 8]
        code, out, err = run(*argv, "--output", tmp_path / str(i), *size)
        assert code == 0, err
        assert "16 x 24" in out
        assert read_metadata(tmp_path / str(i) / "last.safetensors")["preprocess"]["img_size"] == [16, 24]


def test_input_size_has_channels_too(run, image_folder, tmp_path):
    argv = ["train", "--data", f"imagefolder:{image_folder}", "--model", TINY, "--epochs", 1, "--batch-size", 8]
    assert run(*argv, "--input-size", 1, 16, 24, "--output", tmp_path)[0] == 0
    assert load_checkpoint(None, tmp_path / "last.safetensors").in_chans == 1


def test_commands_take_the_size_of_the_checkpoint(run, wide, image_folder):
    checkpoint, picture = wide / "last.safetensors", image_folder / "red" / "00.png"
    code, out, _ = run("predict", "--checkpoint", checkpoint, "--json", picture)
    metadata, model = read_metadata(checkpoint), load_checkpoint(None, checkpoint).eval()
    stored = metadata["preprocess"]
    prepared = Preprocess(**stored)(read_image(picture))
    assert prepared.shape == (3, 16, 24)
    with torch.no_grad():
        expected = model(prepared[None]).softmax(1)[0]
    top = json.loads(out)["top"][0]
    assert code == 0 and top["index"] == int(expected.argmax())
    assert top["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
    code, out, _ = run("validate", "--checkpoint", checkpoint, "--data", f"imagefolder:{image_folder}", "--json")
    row, metrics = json.loads(out), metadata["metrics"]
    assert row["img_size"] == [16, 24] and row["loss"] == pytest.approx(metrics["val_loss"], abs=1e-5)
    code, out, _ = run("export", "--checkpoint", checkpoint, "--format", "torchscript", "--output", wide / "m.pt")
    assert code == 0 and "3 x 16 x 24 images" in out
    assert torch.jit.load(wide / "m.pt")(torch.zeros(1, 3, 16, 24)).shape == (1, 3)
    code, _, err = run("export", "--checkpoint", checkpoint, "--format", "torch-export", "--output", wide / "m.pt2")
    assert code == 0, err
    with pytest.raises((AssertionError, RuntimeError), match="24"):  # of this shape, where TorchScript takes any
        torch.export.load(wide / "m.pt2").module()(torch.zeros(1, 3, 16, 16))
    assert torch.export.load(wide / "m.pt2").module()(torch.zeros(1, 3, 16, 24)).shape == (1, 3)


def test_commands_take_another_size(run, wide, image_folder):
    data, checkpoint = f"imagefolder:{image_folder}", wide / "last.safetensors"
    for size, told in ((["--img-size", 24, 16], "24 x 16"), (["--input-size", 3, 8, 32], "8 x 32"), ([], "16 x 24")):
        code, out, err = run("validate", "--checkpoint", checkpoint, "--data", data, *size)
        assert code == 0 and told in out, err
    assert run("predict", "--checkpoint", checkpoint, "--img-size", 24, 16, image_folder / "red")[0] == 0


def test_pretrained_weights_remember_the_size(wide, image_folder, tmp_path):
    cfg = stored_cfg(read_metadata(wide / "last.safetensors"))
    assert cfg["input_size"] == (3, 16, 24)
    model = create_model(TINY, pretrained=str(wide / "last.safetensors"), num_classes=3)
    assert model.pretrained_cfg["input_size"] == (3, 16, 24)


def test_resume(wide, image_folder, capsys):
    more = {"model": TINY, "batch_size": 8, "output": str(wide), "resume": "auto", "epochs": 2}
    Trainer(TrainConfig(f"imagefolder:{image_folder}", img_size=(16, 24), **more))
    assert "img_size" not in capsys.readouterr().out
    Trainer(TrainConfig(f"imagefolder:{image_folder}", img_size=16, **more))
    assert "resume: img_size was (16, 24), is 16 from here on" in capsys.readouterr().out


def test_benchmark(run):
    argv = ["benchmark", "--model", "b0", "--img-size", 32, 64, "--batch-size", 2, "--num-warm-iter", 1]
    code, out, err = run(*argv, "--num-bench-iter", 2, "--device", "cpu", "--results-format", "json")
    assert code == 0, err
    (record,) = json.loads(out)
    assert record["infer_img_size"] == [32, 64]
    model = create_model("efficientnet_b0", device="meta")
    square, wide = (sum(work.products for work in model_works(model, False, size)) for size in (64, (32, 64)))
    assert wide == square // 2
    assert elements(model_works(model, True, (64, 32))) == elements(model_works(model, True, (32, 64)))
    assert block_geometries(model, (64, 32))[-1].out_size == (2, 1)
    assert block_geometries(model, (64, 64)) == block_geometries(model, 64)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["train", "--img-size", 24, 40, "--progressive-size", 16], "progressive_size is for square images, .*24 x 40"),
        (["train", "--img-size", 24, 0], "must be an integer >= 1 or two, height and width, got '24x0'"),
        (["train", "--img-size", 24, 40, 3], "unrecognized arguments: 3"),
        (["train", "--img-size", "24x40x3"], "must be an integer >= 1 or two, height and width, got '24x40x3'"),
        (["train", "--input-size", 3, 0, 4], "must be channels, height and width, got 3 0 4"),
        (["train", "--input-size", 2, 24, 40], "in_chans must be one of 1 .* got 2"),
        (["validate", "--checkpoint", "{wide}", "--input-size", 1, 24, 40], "input_size has 1 channels, .* in_chans 3"),
        (["benchmark", "--input-size", 1, 32, 64], "input_size has 1 channels, but the model has in_chans 3"),
        (["benchmark", "--img-size", 64, 16], "img_size must be an integer >= 32 or two, .* got .64, 16."),
        (["predict", "--checkpoint", "{wide}", "--img-size", "a", "x.png"], "height and width, got 'a'"),
    ],
)
def test_bad_input(run, wide, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)
    argv = [str(arg).format(wide=wide / "last.safetensors") for arg in argv]
    assert_one_line(run(*argv), message)
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_recipe(run, tmp_path):
    (tmp_path / "r.toml").write_text('data = "digits:0-1"\nimg_size = [16, 24]\nepochs = 1\n')
    code, out, err = run("train", "--recipe", tmp_path / "r.toml", "--model", TINY, "--output", tmp_path / "o")
    assert code == 0 and "16 x 24" in out, err


def test_shards(tmp_path):
    wds = pytest.importorskip("webdataset", reason="webdataset is not installed")
    with wds.TarWriter(str(tmp_path / "s-0.tar")) as writer:
        for i in range(8):
            Image.fromarray(np.full((20, 30, 3), 9 * i, np.uint8)).save(tmp_path / "i.png")
            writer.write({"__key__": f"{i}", "png": (tmp_path / "i.png").read_bytes(), "cls": str(i % 2).encode()})
    shards = f"webdataset:{tmp_path / 's-0.tar'}"
    data = load_data(shards, (16, 24), val_data=shards)
    assert data.preprocess.hw == (16, 24)
    config = TrainConfig(
        shards, val_data=shards, model=TINY, img_size=(16, 24), epochs=1, batch_size=4, output=str(tmp_path / "run")
    )
    assert Trainer(config).run().total == 8


def test_a_square_stays_a_number(tmp_path):
    """So that files are what they were."""
    assert Preprocess((32, 32)) == Preprocess(32) and Preprocess([32, 32]).img_size == 32
    model = create_model(TINY, num_classes=2)
    save_checkpoint(model, tmp_path / "m.safetensors", preprocess={"img_size": 32, "mean": [0.5] * 3, "std": [0.5] * 3})
    assert read_metadata(tmp_path / "m.safetensors")["preprocess"]["img_size"] == 32
    with pytest.raises(InputError, match="img_size must be"):
        Preprocess((1, 2, 3))
