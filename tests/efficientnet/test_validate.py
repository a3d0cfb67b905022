import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet import create_model, load_checkpoint
from efficientnet.cli import main
from efficientnet.data.decoding import read_image
from efficientnet.data.images import Preprocess
from efficientnet.data.sets import load_data
from efficientnet.weights.checkpoints import save_checkpoint
from support.command_line import assert_one_line
from support.processes import results, start_group

TINY = "efficientnet_d0.1_w0.5_r32"  # a block a stage, half the channels


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """(folder of seven classes, checkpoint of a random network for them): more classes than five, few of them right."""
    root = tmp_path_factory.mktemp("seven")
    for c in range(7):
        (root / "images" / f"class{c}").mkdir(parents=True)
        for i in range(5):
            pixels = np.broadcast_to(np.linspace(0, 255, 24)[:, None, None], (24, 16, 3)).copy()
            pixels[4 + i : 12 + i] = (36 * c, 30 * i, 255 - 36 * c)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"class{c}" / f"{i}.png")
    torch.manual_seed(0)
    model = create_model(TINY, num_classes=7, bn_momentum=1.0)
    torch.nn.init.normal_(model.classifier.weight)
    preprocess = Preprocess(16, (0.5,) * 3, (0.25,) * 3)
    with torch.no_grad():  # running statistics under which logits differ
        model(torch.stack([preprocess(read_image(path)) for path in sorted((root / "images").rglob("*.png"))]))
    metadata = {"classes": [f"class{c}" for c in range(7)], "preprocess": vars(preprocess)}
    save_checkpoint(model, root / "m.safetensors", **metadata)
    return root / "images", root / "m.safetensors"


def answers(seven, part, val_fraction=0.2, **prepare):
    """Logits and labels, one image at a time."""
    data = load_data(f"imagefolder:{seven[0]}", 16, val_fraction)
    images = {"val": [data.val], "train": [data.train], "all": [data.train, data.val]}[part]
    preprocess = type(data.preprocess)(**vars(data.preprocess) | {"mean": (0.5,) * 3, "std": (0.25,) * 3} | prepare)
    model = load_checkpoint(None, seven[1]).eval()
    paths, labels = ([x for i in images for x in getattr(i, name)] for name in ("images", "labels"))
    with torch.no_grad():
        return torch.cat([model(preprocess(read_image(path))[None]) for path in paths]), torch.tensor(labels)


@pytest.mark.parametrize("split", ["val", "all"])
def test_figures_are_those_of_the_images_one_by_one(run, seven, split):  # noqa: F811
    folder, checkpoint = seven
    options = ("--data", f"imagefolder:{folder}", "--split", split, "--val-fraction", 0.4, "--batch-size", 4)
    code, out, _ = run("validate", "--checkpoint", checkpoint, *options, "--json")
    row = json.loads(out)
    logits, labels = answers(seven, split, val_fraction=0.4)
    assert code == 0 and row["images"] == len(labels) == (14 if split == "val" else 35)
    right = logits.argmax(1) == labels
    among5 = (logits.topk(5).indices == labels[:, None]).any(1)
    assert 0 < right.sum() < among5.sum() < len(labels)  # or the figures could be one another's
    assert row["top1"] == pytest.approx(100 * right.double().mean().item()) and row["top1_err"] == pytest.approx(
        100 - row["top1"]
    )
    assert row["top5"] == pytest.approx(100 * among5.double().mean().item()) and row["top5_err"] == pytest.approx(
        100 - row["top5"]
    )
    assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=5e-5)
    assert row["per_class"] == [
        {
            "class": f"class{c}",
            "images": int((labels == c).sum()),
            "top1": pytest.approx(100 * right[labels == c].double().mean().item()),
        }
        for c in range(7)
    ]
    assert (row["img_size"], row["crop_pct"], row["unreadable"]) == (16, 1.0, [])

    code, out, _ = run("validate", "--checkpoint", checkpoint, *options, "--per-class")
    lines = out.splitlines()
    assert (
        lines[0].endswith(f"loss: {row['loss']:.4f}")
        and "16 x 16 pixels, 100 % of the shorter side, bilinear" in lines[1]
    )
    assert lines[2].split() == ["class", "images", "right", "top-1", "%"]
    for line, entry in zip(lines[3:10], row["per_class"], strict=True):
        name, images, hits, share = line.split()
        assert (name, int(images), share) == (entry["class"], entry["images"], f"{entry['top1']:.2f}") and int(
            hits
        ) <= int(images)
    assert lines[10] == f"top-5 accuracy: {row['top5']:.2f} % ({among5.sum()}/{len(labels)})"
    assert lines[11] == f"test accuracy: {row['top1']:.2f} % ({right.sum()}/{len(labels)})" and len(lines) == 12


def test_crop_and_interpolation_are_options(run, seven):  # noqa: F811
    folder, checkpoint = seven
    options = ("validate", "--checkpoint", checkpoint, "--data", f"imagefolder:{folder}", "--split", "all", "--json")
    losses = []
    for option in ({"img_size": 24}, {"crop_pct": 0.5}, {"interpolation": "bicubic"}, {}):
        option = {"img_size": 12} | option
        argv = [text for name, value in option.items() for text in ("--" + name.replace("_", "-"), value)]
        row = json.loads(run(*options, *argv)[1])
        logits, labels = answers(seven, "all", **option)
        assert row["loss"] == pytest.approx(torch.nn.functional.cross_entropy(logits, labels).item(), rel=5e-5)
        assert {name: row[name] for name in option} == option
        losses.append(row["loss"])
    assert all(abs(losses[3] / loss - 1) > 1e-4 for loss in losses[:3]), losses


def test_images_that_cannot_be_read(run, seven, tmp_path):  # noqa: F811
    _, checkpoint = seven
    for c in range(7):
        (tmp_path / f"class{c}").mkdir()
        for i in range(2):
            Image.new("RGB", (16, 16), (36 * c, 0, 0)).save(tmp_path / f"class{c}" / f"{i}.png")
    for c in (2, 4):
        (tmp_path / f"class{c}" / "0.png").write_text("text")
    options = (
        "validate",
        "--checkpoint",
        checkpoint,
        "--data",
        f"imagefolder:{tmp_path}",
        "--split",
        "all",
        "--batch-size",
        3,
    )
    code, out, err = run(*options, "--json")
    row = json.loads(out)
    assert (
        code == 0
        and row["images"] == 12
        and len(row["unreadable"]) == 2
        and "class2/0.png" in "".join(row["unreadable"])
    )
    assert [entry["images"] for entry in row["per_class"]] == [2, 2, 1, 2, 1, 2, 2]
    assert len(err.splitlines()) == 2 and all("cannot decode image" in line for line in err.splitlines())
    code, out, err = run(*options, "--max-corrupt", 1)
    assert code == 2 and out == "" and "(after 1 others that were skipped)" in err.splitlines()[-1]


def test_processes_share_the_images(run, seven, tmp_path):  # noqa: F811
    """Three processes of 35 images, one of them damaged: the figures of one process, printed once."""
    shutil.copytree(seven[0], tmp_path / "images")
    (tmp_path / "images" / "class3" / "1.png").write_text("text")
    argv = [
        "validate",
        "--checkpoint",
        str(seven[1]),
        "--data",
        f"imagefolder:{tmp_path / 'images'}",
        "--split",
        "all",
        "--json",
    ]
    argv += ["--batch-size", "4", "--device", "cpu"]
    _, out, _ = run(*argv)
    assert results(*start_group(3, main, argv, log=tmp_path / "log")) == [0, 0, 0]
    first, *others = ((tmp_path / f"log.{rank}").read_text() for rank in range(3))
    rows = [json.loads(text) for text in (out, next(line for line in first.splitlines() if line.startswith("{")))]
    assert rows[0]["images"] == 34 and not any('"top1"' in text for text in others)
    loss = rows[0].pop("loss")
    assert rows[1].pop("loss") == pytest.approx(loss, rel=5e-5) and rows[0] == rows[1]


def test_bad_input(run, seven):  # noqa: F811
    folder, checkpoint = seven
    for argv, message in [
        (["--data", "digits"], r"data 'digits' has classes 10 \(0, 1, 2, ...\), but the checkpoint has 7 \(class0, "),
        (["--data", "imagefolder:/no/such"], "data folder '/no/such' does not exist"),
        (["--data", f"imagefolder:{folder}", "--crop-pct", 0], r"crop_pct must be in \(0, 1\], got 0.0"),
        (["--data", f"imagefolder:{folder}", "--crop-pct", 1.5], r"crop_pct must be in \(0, 1\], got 1.5"),
        (["--data", f"imagefolder:{folder}", "--batch-size", 0], "batch_size must be an integer >= 1, got 0"),
        (["--data", f"imagefolder:{folder}", "--split", "test"], "argument --split: invalid choice: 'test'"),
    ]:
        assert_one_line(run("validate", "--checkpoint", checkpoint, *argv), message)
