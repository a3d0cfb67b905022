import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from efficientnet import create_model, load_checkpoint
from efficientnet.cli import main
from efficientnet.data.decoding import read_image
from efficientnet.data.sets import load_data
from support.command_line import assert_one_line


def python_m(*argv):
    return subprocess.run(
        [sys.executable, "-m", "efficientnet", *map(str, argv)], capture_output=True, text=True, timeout=120
    )


def test_info(run):
    code, out, _ = run("info", "efficientnet_b0")
    assert code == 0 and "efficientnet_b0: 5,288,548 parameters, 0.386 GMACs at 224 x 224" in out
    table = [line.split() for line in out.splitlines()]
    assert table[0][:3] == ["stage", "operator", "kernel"] and len(table) == 1 + 10 + 2
    assert sum(int(row[-2].replace(",", "")) for row in table[1:11]) == 5_288_548
    assert table[3] == ["2", "MBConv", "3", "2", "6", "24", "2", "112x112", "56x56", "16,714", "54,945,216"]
    assert "efficientnet_b4: 19,341,616 parameters, 4.394 GMACs at 380 x 380" in run("info", "b4")[1]
    assert "efficientnet_b0: 4,020,358 parameters" in run("info", "b0", "--num-classes", 10)[1]
    assert "at 448 x 448" in run("info", "b0", "--img-size", 448)[1]


def test_info_without_a_name_lists_the_models(run):
    code, out, _ = run("info")
    assert code == 0 and {"efficientnet_b0", "efficientnet_b8", "efficientnet_l2", "tf_efficientnet_b3"} <= set(
        out.split()
    )


def test_train_prints_what_ran_and_ends_with_the_accuracy(run, image_folder, tmp_path):
    """One epoch through the command line; its options reach the run, its figures are those of validate."""
    data, output = f"imagefolder:{image_folder}", tmp_path / "out"
    options = (
        "--img-size",
        8,
        "--epochs",
        1,
        "--batch-size",
        5,
        "--drop-path-rate",
        0.1,
        "--val-fraction",
        0.25,
        "--device",
        "cpu",
    )
    code, out, err = run("train", "--data", data, "--output", output, *options, "--no-fused", "--tensorboard")
    assert code == 0
    assert re.search(r"^data .* 27 training and 9 held-out images, 8 x 8$", out, re.MULTILINE)
    assert re.search(r"^backend +triton for 0 of 16 MBConv blocks; PyTorch reference for 16: ", out, re.MULTILINE)
    assert re.search(r"^epoch +1/1  train loss \d", out, re.MULTILINE)
    last = out.splitlines()[-1]
    assert re.fullmatch(r"test accuracy: \d+\.\d\d % \(\d/9\)", last)
    assert "5/5" in err and "batch/s" in err  # the progress bar
    assert load_checkpoint(None, output / "last.safetensors").drop_path_rate == 0.1
    assert list((output / "tensorboard").glob("events.*"))
    code, out, _ = run(
        "validate",
        "--checkpoint",
        output / "last.safetensors",
        "--data",
        data,
        "--val-fraction",
        0.25,
        "--batch-size",
        4,
    )
    row = json.loads((output / "metrics.jsonl").read_text())
    assert code == 0 and out.splitlines()[-1] == last
    assert float(out.split()[2]) == pytest.approx(row["val_loss"], abs=2e-4)


def test_predict(run, trained, image_folder):
    _, output, _ = trained
    images = [image_folder / name / "03.png" for name in ("red", "blue")]
    code, out, _ = run("predict", "--checkpoint", output / "last.safetensors", *images, "--topk", 2)
    lines = out.splitlines()
    assert code == 0 and len(lines) == 6 and lines[0] == str(images[0]) and lines[3] == str(images[1])
    assert all(re.fullmatch(r" +\d+\.\d\d %  (blue|green|red)", lines[i]) for i in (1, 2, 4, 5))

    code, out, _ = run("predict", "--checkpoint", output / "last.safetensors", *images, "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in images]
    data, model = load_data(f"imagefolder:{image_folder}", 8), load_checkpoint(None, output / "last.safetensors").eval()
    for row in rows:
        with torch.no_grad():
            expected = model(data.preprocess(read_image(row["image"]))[None])[0].softmax(0)
        assert [top["class"] for top in row["top"]] == [data.classes[i] for i in expected.argsort(descending=True)]
        assert [top["probability"] for top in row["top"]] == pytest.approx(
            expected.sort(descending=True).values.tolist(), abs=1e-5
        )


def test_predict_with_weights_from_elsewhere(run, image_folder, tmp_path):
    """A file without our metadata needs the model's name; images are then prepared as that name's weights want."""
    torch.manual_seed(0)
    model = create_model("b0", num_classes=12).eval()
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    image = image_folder / "red" / "00.png"
    assert_one_line(
        run("predict", "--checkpoint", tmp_path / "m.safetensors", image), "does not say which model it is for"
    )
    code, out, _ = run(
        "predict", "--checkpoint", tmp_path / "m.safetensors", "--model", "b0", "--img-size", 32, image, "--json"
    )
    (top,) = (json.loads(line)["top"] for line in out.splitlines())
    assert code == 0 and len(top) == 5 and {int(entry["class"]) for entry in top} <= set(range(12))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required"),
        (["fly"], "invalid choice: 'fly'"),
        (["train", "--epoch", "3"], "unrecognized arguments: --epoch 3; did you mean --epochs.$"),
        (["info", "--qqq=3"], "unrecognized arguments: --qqq=3$"),
        (["train", "--epochs", "three"], "argument --epochs: invalid int value: 'three'"),
        (["train", "--amp", "int8"], "argument --amp: invalid choice: 'int8'"),
        (["train", "--epochs", "0"], "epochs must be an integer >= 1, got 0"),
        (["train", "--recipe", "paper-b99"], "unknown recipe 'paper-b99'; accepted: a .toml file, or one of paper-b"),
        (["train", "--aa", "augmix"], "aa must be auto or rand"),
        (
            ["train", "--global-batch-size", "100", "--grad-accum-steps", "3"],
            "global_batch_size must be divisible .* got 100; try 102",
        ),
        (["train", "--cuda-graphs", "--device", "cpu"], "cuda_graphs needs a CUDA device, and this run is on the CPU"),
        (["train", "--sync-bn", "--device", "cpu"], "sync_bn needs several processes"),
        (["train", "--freeze-until", "7"], "freeze_until must be one of stem, 0, .*, head, got '7'"),
        (
            ["train", "--freeze-bn", "weights"],
            "freeze_bn weights is about layers that freeze_until freezes: give --freeze-until too",
        ),
        (["train", "--freeze-bn", "some"], "argument --freeze-bn: invalid choice: 'some'"),
        (["train", "--layer-decay", "0"], r"layer_decay must be in \(0, 1\], got 0.0"),
        (["train", "--scale", "0.5", "0.1"], r"scale must be two numbers, .*, got \(0.5, 0.1\)"),
        (["train", "--dist-bn", "sum"], "argument --dist-bn: invalid choice: 'sum'"),
        (["train", "--lr", "nan"], "lr must be a finite number > 0, got nan"),
        (["train", "--data", "mnist"], "data must be one of digits.* got 'mnist'"),
        (["train", "--data", "imagefolder:/no/such"], "data folder '/no/such' does not exist"),
        (["train", "--model", "efficientnet_b99"], "unknown model 'efficientnet_b99'"),
        (["train", "--img-size", "0"], "--img-size: must be an integer >= 1 or two, height and width, got '0'"),
        (["train", "--drop-rate", "1.5"], r"drop_rate must be a number in \[0, 1\), got 1.5"),
        (["train", "--resume", "/no/such.train.pt"], "no such checkpoint file: '/no/such.train.pt'"),
        (["predict", "x.png"], "the following arguments are required: --checkpoint"),
        (
            ["predict", "--checkpoint", "/no/such.safetensors", "x.png"],
            "no such checkpoint file: '/no/such.safetensors'",
        ),
        (["info", "b99"], "unknown model 'b99'"),
        (["info", "b0", "--num-classes", "-1"], "num_classes must be an integer >= 0, got -1"),
        (["info", "b0", "--img-size", "-3"], "--img-size: must be an integer >= 1 or two, height and width, got '-3'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, argv, message):
    monkeypatch.chdir(tmp_path)  # where a run that started by mistake would write
    assert_one_line(run(*argv), message)
    assert not list(tmp_path.iterdir())


def test_data_that_cannot_be_used(run, image_folder, trained, tmp_path):
    """Found before anything is written, by train and by validate."""
    (tmp_path / "hollow" / "one").mkdir(parents=True)
    (tmp_path / "hollow" / "two").mkdir()
    shutil.copytree(image_folder / "red", tmp_path / "single" / "red")
    shutil.copytree(image_folder, tmp_path / "more")
    shutil.copytree(image_folder / "red", tmp_path / "more" / "scarlet")
    for data, message in [
        (f"imagefolder:{tmp_path / 'hollow'}", r"class folder '.*one' has no image \(.png, "),
        (f"imagefolder:{tmp_path / 'none'}", "data folder '.*none' does not exist"),
        (f"imagefolder:{tmp_path / 'single'}", "must have at least 2 class folders, got 1: red"),
        ("imagenet:/data", "data must be one of digits.*, webdataset:SHARDS, got 'imagenet:/data'"),
        ("cifar10", "data must be one of digits.* got 'cifar10'"),
    ]:
        assert_one_line(run("train", "--data", data, "--img-size", 8, "--output", tmp_path / "out"), message)
        assert_one_line(run("validate", "--data", data, "--checkpoint", trained[1] / "last.safetensors"), message)
    assert not (tmp_path / "out").exists()
    more = ("--data", f"imagefolder:{tmp_path / 'more'}", "--checkpoint", trained[1] / "last.safetensors")
    assert_one_line(
        run("validate", *more),
        r"has classes 4 \(blue, green, red, ...\), but the checkpoint has 3 \(blue, green, red\)",
    )


def test_bad_images_and_checkpoints(run, trained, image_folder, tmp_path):
    _, output, _ = trained
    checkpoint = output / "last.safetensors"
    (tmp_path / "bad.png").write_bytes(b"no image")
    good = image_folder / "red" / "00.png"
    assert_one_line(
        run("predict", "--checkpoint", checkpoint, tmp_path / "bad.png"), r"cannot decode image '.*bad.png' \(.*\)$"
    )
    assert_one_line(
        run("predict", "--checkpoint", checkpoint, tmp_path / "none.png"), "No such file or directory: '.*none.png'"
    )
    assert_one_line(
        run("predict", "--checkpoint", checkpoint, good, "--topk", 0), "topk must be an integer >= 1, got 0"
    )
    assert_one_line(run("predict", "--checkpoint", checkpoint, good, "--model", "b1"), "does not fit the model")
    (tmp_path / "cut.safetensors").write_bytes(checkpoint.read_bytes()[:5000])
    assert_one_line(
        run("predict", "--checkpoint", tmp_path / "cut.safetensors", good),
        "cut.safetensors' is unreadable or truncated",
    )
    assert_one_line(
        run("train", "--resume", tmp_path / "cut.safetensors"), "cut.safetensors' is unreadable or truncated"
    )
    assert_one_line(
        run("validate", "--checkpoint", checkpoint),
        r"data 'digits' has classes 10 \(0, 1, 2, ...\), but the checkpoint has 3",
    )


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_image_in_the_data_set(run, image_folder, tmp_path, num_workers):
    """Found in the middle of training, also in a worker process: still one line that names it."""
    shutil.copytree(image_folder, tmp_path / "images")
    for name in ("00.png", "01.png", "02.png", "05.png", "08.png"):
        (tmp_path / "images" / "green" / name).write_bytes(b"")
    options = (
        "--img-size",
        8,
        "--output",
        tmp_path / "out",
        "--num-workers",
        num_workers,
        "--device",
        "cpu",
        "--max-corrupt",
        0,
    )
    code, _, err = run("train", "--data", f"imagefolder:{tmp_path / 'images'}", *options)
    assert code == 2 and "Traceback" not in err
    assert re.fullmatch(
        r"efficientnet: error: cannot decode image '.*/green/0\d.png' \(UnidentifiedImageError: .*\); .*",
        err.splitlines()[-1],
    )


def test_data_and_checkpoints_that_do_not_fit(run, trained, image_folder, tmp_path):
    """An empty class folder, another architecture, other classes: found before training."""
    (state,) = list((trained[1] / "checkpoints").glob("step-00000012.*"))
    options = ("--device", "cpu", "--img-size", 8, "--output", tmp_path / "out", "--epochs", 9)
    resume = ("train", "--data", f"imagefolder:{image_folder}", *options, "--resume", state)
    assert_one_line(
        run(*resume, "--model", "b1"), "was trained with name 'efficientnet_b0', but this run has 'efficientnet_b1'"
    )
    assert_one_line(run("train", *options, "--resume", state), "was trained with num_classes 3, but this run has 10")
    shutil.copytree(image_folder, tmp_path / "images")
    (tmp_path / "images" / "violet").mkdir()
    assert_one_line(
        run("train", "--data", f"imagefolder:{tmp_path / 'images'}", *options), "class folder '.*violet' has no image"
    )
    assert not (tmp_path / "out").exists()


def test_a_programming_error_keeps_its_traceback(run, image_folder, tmp_path, monkeypatch):
    def bug(self):
        raise ValueError("a bug")

    monkeypatch.setattr("efficientnet.training.trainer.Trainer.run", bug)
    with pytest.raises(ValueError, match="a bug"):
        run("train", "--data", f"imagefolder:{image_folder}", "--output", tmp_path, "--img-size", 8)


def test_a_reader_that_leaves_ends_the_command_in_silence(monkeypatch, capsys):
    """As ``predict ... | head`` does: no message, the exit code of a program that SIGPIPE ended, nothing said at
    Python's own end.
    """
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as file:
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", file)
            assert main(["info"]) == 128 + signal.SIGPIPE
        file.write("more")  # closing flushes it
    assert capsys.readouterr() == ("", "")


def test_a_missing_package_is_named(run, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert_one_line(
        run("train", "--output", tmp_path, "--epochs", 1, "--img-size", 8),
        re.escape('scikit-learn is not installed; pip install "effkernels[train]"'),
    )


def test_python_m():
    done = python_m("info", "b0")
    assert done.returncode == 0 and "5,288,548" in done.stdout and done.stderr == ""
    failed = python_m("info", "b99")
    assert failed.returncode == 2 and failed.stdout == "" and failed.stderr.count("\n") == 1
