import io
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from efficientnet.commands.contact_sheet import CELL, LINE, MARGIN, ContactSheet
from efficientnet.errors import InputError
from support.command_line import assert_one_line


@pytest.fixture(scope="module")
def checkpoint(trained):
    return trained[1] / "last.safetensors"


@pytest.fixture
def pictures(image_folder, tmp_path):
    """A folder of five images, one deeper than the others, and a file that is none of its business."""
    root = tmp_path / "pictures"
    (root / "deeper").mkdir(parents=True)
    for i, name in enumerate(["red", "green", "blue", "red", "blue"]):
        shutil.copy(image_folder / name / f"{i:02d}.png", root / ("deeper" if i == 2 else "") / f"{i}.png")
    (root / "notes.txt").write_text("no image")
    return root


def rows_of(result):
    code, out, _ = result
    assert code == 0
    return [json.loads(line) for line in out.splitlines()]


def damaged(root):
    """A truncated JPEG, a text file called .png and an empty file: none can be decoded."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(root / "cut.jpg", quality=90)
    (root / "cut.jpg").write_bytes((root / "cut.jpg").read_bytes()[:2000])
    (root / "text.png").write_text("this is no image\n")
    (root / "empty.gif").write_bytes(b"")
    return [root / name for name in ("cut.jpg", "text.png", "empty.gif")]


def test_files_folders_and_lists(run, checkpoint, pictures, monkeypatch):  # noqa: F811
    """However images are named, each is predicted once, in that order, with the figures that it has alone."""
    inside = [pictures / name for name in ("0.png", "1.png", "3.png", "4.png", "deeper/2.png")]  # sorted
    options = ("predict", "--checkpoint", checkpoint, "--json", "--batch-size", 2)
    rows = rows_of(run(*options, pictures))
    assert [row["image"] for row in rows] == [str(path) for path in inside]
    (alone,) = rows_of(run(*options, inside[3]))
    assert alone["top"] == [
        entry | {"probability": pytest.approx(entry["probability"], abs=1e-6)} for entry in rows[3]["top"]
    ]

    monkeypatch.setattr("sys.stdin", io.StringIO(f"{inside[1]}\n\n{pictures / 'deeper'}\r\n"))
    listed = rows_of(run(*options, inside[4], "-", inside[0]))
    assert [row["image"] for row in listed] == [str(inside[i]) for i in (4, 1, 0)]


def test_topk(run, checkpoint, pictures):  # noqa: F811
    (row,) = rows_of(run("predict", "--checkpoint", checkpoint, "--json", "--topk", 2, pictures / "0.png"))
    (all_of_them,) = rows_of(run("predict", "--checkpoint", checkpoint, "--json", "--topk", 99, pictures / "0.png"))
    assert row["top"] == all_of_them["top"][:2]
    probabilities = [entry["probability"] for entry in all_of_them["top"]]
    assert sorted(probabilities, reverse=True) == probabilities and sum(probabilities) == pytest.approx(1, abs=1e-6)
    classes = ["blue", "green", "red"]
    assert sorted(entry["index"] for entry in all_of_them["top"]) == [0, 1, 2]
    assert all(classes[entry["index"]] == entry["class"] for entry in all_of_them["top"])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_images_that_cannot_be_read_are_named_and_skipped(run, checkpoint, pictures, num_workers):  # noqa: F811
    bad, good = damaged(pictures), [pictures / "0.png", pictures / "1.png"]
    paths = [bad[0], good[0], bad[1], bad[2], good[1]]
    options = ("--json", "--batch-size", 2, "--num-workers", num_workers)
    code, out, err = run("predict", "--checkpoint", checkpoint, *options, *paths)
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0 and [row["image"] for row in rows] == [str(path) for path in paths]
    assert ["error" in row for row in rows] == [True, False, True, True, False]
    for i in (0, 2, 3):
        assert f"cannot decode image '{paths[i]}'" in rows[i]["error"]
    assert [line.split(":")[0] for line in err.splitlines()] == [f"skipped, {i} of at most 4" for i in (1, 2, 3)]
    expected = rows_of(run("predict", "--checkpoint", checkpoint, "--json", *good))
    for row, other in zip((rows[1], rows[4]), expected, strict=True):
        assert row["top"][0]["class"] == other["top"][0]["class"]
        assert row["top"][0]["probability"] == pytest.approx(other["top"][0]["probability"], abs=1e-6)

    code, _, err = run("predict", "--checkpoint", checkpoint, "--max-corrupt", 1, *paths)
    assert code == 2 and err.splitlines()[-1].startswith("efficientnet: error: cannot decode image '" + str(bad[1]))
    assert "after 1 others that were skipped" in err
    code, _, err = run("predict", "--checkpoint", checkpoint, *bad)
    assert code == 2 and "cannot decode image '" + str(bad[2]) in err.splitlines()[-1]  # none is left


def test_contact_sheet(run, checkpoint, pictures, tmp_path):  # noqa: F811
    (text,) = (path for path in damaged(pictures) if path.name == "text.png")
    images = [pictures / "0.png", text, pictures / "1.png"]
    code, _, err = run(
        "predict", "--checkpoint", checkpoint, "--topk", 2, "--contact-sheet", tmp_path / "sheet.png", *images
    )
    assert code == 0 and str(tmp_path / "sheet.png") in err.splitlines()[-1]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet.convert("RGB")).astype(float)
    assert pixels.shape == (MARGIN + CELL + 3 * LINE + MARGIN, MARGIN + 3 * (CELL + MARGIN), 3)
    cells = [pixels[MARGIN : MARGIN + CELL, MARGIN + i * (CELL + MARGIN) :][:, :CELL] for i in range(3)]
    # The images are 20 x 24: the cell's width, 133 of its 160 rows.
    for cell, path in ((cells[0], images[0]), (cells[2], images[2])):
        assert np.abs(cell[14:-14].mean((0, 1)) - np.asarray(Image.open(path)).mean((0, 1))).max() < 2
        assert (cell[:13] == 255).all() and (cell[-13:] == 255).all()
    assert (cells[1] == 211).all()  # lightgrey
    for i in range(3):
        words = pixels[MARGIN + CELL : MARGIN + CELL + LINE, MARGIN + i * (CELL + MARGIN) :][:, :CELL]
        assert (words < 200).any()  # its name
        scores = pixels[MARGIN + CELL + 2 * LINE : MARGIN + CELL + 3 * LINE, MARGIN + i * (CELL + MARGIN) :][:, :CELL]
        assert (scores < 100).any() == (i != 1)  # the second class, where there is one


def test_contact_sheet_in_pages(tmp_path):
    sheet = ContactSheet(tmp_path / "s.png", lines=1, columns=3, rows=2)
    for i in range(14):
        sheet.add(torch.full((3, 5, 5), 10 * i, dtype=torch.uint8), "x" * 99, "left out")
        assert len(sheet.cells) < 6  # the memory of one page
    sheet.close()
    assert sheet.pages == [tmp_path / name for name in ("s.png", "s-2.png", "s-3.png")]
    seen = []
    for page in sheet.pages:
        pixels = np.asarray(Image.open(page))
        for y in range(MARGIN, len(pixels), CELL + LINE + MARGIN):
            seen += [pixels[y + CELL - 5, x + CELL - 5, 0] for x in range(MARGIN, pixels.shape[1], CELL + MARGIN)]
    assert seen == [10 * i for i in range(14)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s-2.png", "s-3.png", "s.png"]


def test_contact_sheet_takes_text_of_any_script(tmp_path):
    sheet = ContactSheet(tmp_path / "s.png", lines=1)
    sheet.add(None, "Ångström Ελλάδα Київ")
    sheet.close()
    assert (np.asarray(Image.open(tmp_path / "s.png"))[MARGIN + CELL :] < 200).any()


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\nb.png", "a\tb\x1b.png"])
def test_contact_sheet_takes_names_that_are_no_text(tmp_path, name):
    sheet = ContactSheet(tmp_path / "s.png", lines=1)
    sheet.add(None, name)
    sheet.close()
    pixels = np.asarray(Image.open(tmp_path / "s.png"))
    assert pixels.shape[0] == MARGIN + CELL + LINE + MARGIN and (pixels[MARGIN + CELL :] < 200).any()


def test_bad_input(run, checkpoint, pictures, tmp_path, monkeypatch):  # noqa: F811
    (tmp_path / "hollow").mkdir()
    for argv, message in [
        ([tmp_path / "hollow"], r"folder '.*hollow' has no image \(.png, "),
        ([pictures, tmp_path / "none.png"], "No such file or directory: '.*none.png'"),
        ([pictures, "--topk", 0], "topk must be an integer >= 1, got 0"),
        ([pictures, "--batch-size", 0], "batch_size must be an integer >= 1, got 0"),
        ([pictures, "--contact-sheet", tmp_path / "s.jpg"], "contact_sheet must end in .png, got '.*s.jpg'"),
        ([pictures, "--contact-sheet", tmp_path / "no" / "s.png"], "contact_sheet .*: folder '.*no' does not exist"),
        ([pictures, "--crop", 1], "unrecognized arguments: --crop 1"),
    ]:
        assert_one_line(run("predict", "--checkpoint", checkpoint, *argv), message)
    monkeypatch.setattr("sys.stdin", io.StringIO("\n"))
    assert_one_line(run("predict", "--checkpoint", checkpoint, "-"), "standard input has no path")
    with pytest.raises(InputError, match="must end in .png"):
        ContactSheet("s", lines=1)


def test_inference_on_a_cpu_is_fused(run, checkpoint, image_folder, pictures, monkeypatch):
    """Every convolution of predict and validate is one of oneDNN's fused ones."""
    from effkernels import dispatch
    from effkernels.cpu import inference

    monkeypatch.setattr(dispatch, "FEWEST_PIXELS", 0)
    calls, convolution = [], inference._convolution
    monkeypatch.setattr(inference, "_convolution", lambda *args, **how: calls.append(1) or convolution(*args, **how))
    assert rows_of(run("predict", "--checkpoint", checkpoint, "--json", pictures)) and calls
    predicted = len(calls)
    code, _, _ = run("validate", "--checkpoint", checkpoint, "--data", f"imagefolder:{image_folder}")
    assert code == 0 and len(calls) > predicted
