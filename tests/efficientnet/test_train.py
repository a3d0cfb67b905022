import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientnet import create_model, load_checkpoint
from efficientnet.checkpoints import load_training_state, read_metadata
from efficientnet.data import load_data
from efficientnet.settings import InputError, TrainConfig
from efficientnet.train import Evaluation, Runner, Trainer, describe_backend, pick_device


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_it_learns_digits(tmp_path):
    """A third of the main job's images and of its steps: the loss falls, and most held-out digits are told apart."""
    trainer = Trainer(TrainConfig(epochs=6, warmup_epochs=1, batch_size=32, device="cpu", output=str(tmp_path)))
    trainer.data.train.labels = trainer.data.train.labels[:480]
    trainer.loader = trainer.runner.batches(trainer.data.train, 32, train=True)
    evaluation = trainer.run()
    assert evaluation.accuracy > 0.6 and evaluation.total == 359
    assert trainer.history[-1]["train_loss"] < 0.6 * trainer.history[0]["train_loss"]


def test_metrics_of_a_run(trained):
    config, output, evaluation = trained
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
    assert rows[-1]["train_loss"] < rows[0]["train_loss"]
    assert rows[-1]["val_acc"] == evaluation.accuracy and rows[-1]["val_loss"] == evaluation.loss
    assert all(row["images_per_s"] * row["seconds"] == pytest.approx(30) for row in rows)  # 3 batches of 10


def test_files_of_a_run(trained):
    config, output, evaluation = trained
    assert {path.name for path in output.iterdir()} == {
        "last.safetensors", "best.safetensors", "last.train.pt", "metrics.jsonl", "curves.png",
    }  # fmt: skip
    with Image.open(output / "curves.png") as image:
        assert image.format == "PNG" and image.width > 500
    metadata = read_metadata(output / "last.safetensors")
    assert metadata["classes"] == ["blue", "green", "red"] and metadata["epoch"] == 4 and metadata["preprocess"]["img_size"] == 8
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_acc"])  # the first of equals
    assert read_metadata(output / "best.safetensors")["metrics"] == best
    weights = load_checkpoint(None, output / "last.safetensors").state_dict()
    assert same_state(weights, load_training_state(output / "last.train.pt")["model"])
    assert same_state(weights, load_checkpoint(None, output / "last.train.pt").state_dict())


def test_a_resumed_run_is_the_run_that_never_stopped(trained, tmp_path, monkeypatch):
    """Stopped in the third epoch and continued in another process's place: the same weights, bit for bit."""
    config, output, evaluation = trained
    config = replace(config, output=str(tmp_path))
    whole_epoch = Trainer._train_epoch

    def stopped(self, epoch, bar):
        loss = whole_epoch(self, epoch, bar)
        if epoch == 2:
            raise KeyboardInterrupt
        return loss

    monkeypatch.setattr(Trainer, "_train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        Trainer(config).run()
    monkeypatch.undo()
    assert read_metadata(tmp_path / "last.safetensors")["epoch"] == 2
    torch.manual_seed(99)
    resumed = Trainer(replace(config, resume=str(tmp_path / "last.train.pt"))).run()
    assert resumed == evaluation
    assert same_state(*(load_checkpoint(None, folder / "last.safetensors").state_dict() for folder in (output, tmp_path)))
    rows, whole = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in (tmp_path, output))
    for row, other in zip(rows, whole, strict=True):
        assert all(row[key] == other[key] for key in ("epoch", "train_loss", "val_loss", "val_acc", "lr"))


def test_another_seed_is_another_run(trained, tmp_path):
    config, output, _ = trained
    Trainer(replace(config, seed=1, epochs=1, output=str(tmp_path))).run()
    first = [json.loads((folder / "metrics.jsonl").read_text().splitlines()[0]) for folder in (output, tmp_path)]
    assert first[0]["train_loss"] != first[1]["train_loss"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 4}, "has 4 epochs behind it; epochs must be more, got 4"),
        ({"model": "b1"}, "trained with name 'efficientnet_b0', but this run has 'efficientnet_b1'"),
        ({"drop_rate": 0.0}, "trained with drop_rate 0.2, but this run has 0.0"),
        ({"data": "digits"}, "trained with num_classes 3, but this run has 10"),
    ],
)
def test_resume_refuses_another_run(trained, tmp_path, change, message):
    config, output, _ = trained
    settings = {"epochs": 20, "output": str(tmp_path), "resume": str(output / "last.train.pt")} | change
    with pytest.raises(InputError, match=message):
        Trainer(replace(config, **settings))


def test_learning_rate_warms_up_then_falls_to_zero(trained, tmp_path):
    config, *_ = trained
    trainer = Trainer(replace(config, epochs=10, warmup_epochs=2, lr=1.0, output=str(tmp_path)))
    rates = [trainer._lr(step) for step in range(30)]
    assert rates[:6] == pytest.approx([(i + 1) / 7 for i in range(6)]) and rates[6] == 1.0
    assert all(a > b for a, b in zip(rates[6:], rates[7:], strict=False)) and 0 < rates[-1] < 0.01
    assert rates[18] == pytest.approx(0.5)  # half-way down


def test_decay_spares_biases_and_norms(trained, tmp_path):
    config, *_ = trained
    trainer = Trainer(replace(config, weight_decay=0.3, output=str(tmp_path)))
    decayed = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]}
    spared = {id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        plain = name.endswith(".bias") or "bn" in name
        assert id(parameter) in (spared if plain else decayed), name
    assert len(decayed) + len(spared) == len(list(trainer.model.parameters()))


def test_evaluation_counts_every_held_out_image(image_folder):
    """Against one batch of everything: loss and accuracy do not depend on the batch size, nor on a short last batch."""
    data = load_data(f"imagefolder:{image_folder}", 16, val_fraction=0.4)
    torch.manual_seed(3)
    model = create_model("b0", num_classes=3).eval()
    images, labels = (torch.stack([torch.as_tensor(item[i]) for item in data.val]) for i in (0, 1))
    with torch.no_grad():
        logits = model(images)
    for batch_size in (4, 100):
        runner = Runner(torch.device("cpu"))
        result = runner.evaluate(model.train(), runner.batches(data.val, batch_size))
        assert result.total == len(labels) == 15 and result.correct == (logits.argmax(1) == labels).sum()
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert str(Evaluation(0.1, 350, 360)) == "97.22 % (350/360)"


def test_training_drops_the_remainder_but_never_everything(image_folder):
    data, runner = load_data(f"imagefolder:{image_folder}", 8), Runner(torch.device("cpu"))
    assert [len(y) for _, y in runner.batches(data.train, 7, train=True)] == [7] * 4
    assert [len(y) for _, y in runner.batches(data.train, 64, train=True)] == [30]
    first, second = ([y for _, y in runner.batches(data.train, 30, train=True)][0].tolist() for _ in range(2))
    assert first != second and sorted(first) == sorted(second) == sorted(data.train.labels)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains(trained, tmp_path, amp):
    config, *_ = trained
    trainer = Trainer(replace(config, epochs=1, batch_size=16, amp=amp, num_workers=1, output=str(tmp_path)))
    before = trainer.model.blocks[3][1].conv_pwl.weight.clone()
    with trainer.runner.autocast():
        assert trainer.model(torch.zeros(2, 3, 8, 8)).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    trainer.run()
    assert trainer.model.blocks[3][1].conv_pwl.weight.dtype == torch.float32
    assert not torch.equal(before, trainer.model.blocks[3][1].conv_pwl.weight)


def test_memory_format(trained, tmp_path):
    config, *_ = trained
    for flag in (True, False):
        trainer = Trainer(replace(config, channels_last=flag, output=str(tmp_path)))
        images, _ = trainer.runner.to_device(*next(iter(trainer.loader)))
        assert images.is_contiguous(memory_format=torch.channels_last) is flag
        assert trainer.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) is flag


def test_divergence_ends_the_run_and_keeps_the_last_epoch(trained, tmp_path, monkeypatch):
    config, *_ = trained
    trainer = Trainer(replace(config, output=str(tmp_path)))
    rate = trainer._lr
    monkeypatch.setattr(trainer, "_lr", lambda step: rate(step) if step < 3 else 1e38)
    with pytest.raises(InputError, match="training diverged .loss (nan|inf) in epoch 2.: lr 0.003 is too large"):
        trainer.run()
    assert read_metadata(tmp_path / "last.safetensors")["epoch"] == 1


def test_backend_is_told_for_every_block():
    x = torch.zeros(1, 3, 32, 32)
    plain = describe_backend(create_model("b0", fused=False), x)
    assert re.fullmatch(r"triton for 0 of 16 MBConv blocks; PyTorch reference for 16: .*fused=False.*", plain)
    fused = describe_backend(create_model("b0"), x)
    assert "of 16 MBConv blocks" in fused and ("triton for 16" in fused or "CPU" in fused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0), ("epochs", 1.5), ("batch_size", 1), ("batch_size", True), ("lr", 0.0), ("lr", float("nan")), ("lr", float("inf")),
        ("weight_decay", -1.0), ("warmup_epochs", -0.5), ("label_smoothing", 1.0), ("seed", -1), ("num_workers", -1), ("amp", "int8"),
    ],
)  # fmt: skip
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}$"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"model": "b99"}, "unknown model 'b99'"),
        ({"img_size": 0}, "img_size must be an integer >= 1, got 0"),
        ({"drop_rate": 1.0}, "drop_rate must be a number in"),
        ({"val_fraction": 2.0}, "val_fraction must be in"),
    ],
)
def test_bad_settings_leave_no_folder(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        Trainer(TrainConfig(output=str(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu():
    assert pick_device("auto").type == "cpu"
    with pytest.raises(InputError, match="device 'cuda' was asked for, but torch sees no CUDA device"):
        pick_device("cuda")


def command(config):
    """The command line of a run with these settings."""
    options = []
    for field in fields(config):
        value = getattr(config, field.name)
        if value is not None and not isinstance(value, bool):
            options += ["--" + field.name.replace("_", "-"), str(value)]
    return [sys.executable, "-m", "efficientnet", "train", *options]


@pytest.mark.parametrize(("signum", "delay"), [(signal.SIGINT, 0.3), (signal.SIGTERM, 0.9), (signal.SIGKILL, 0.6)])
def test_a_stopped_run_can_be_resumed(trained, tmp_path, signum, delay):
    config, *_ = trained
    config = replace(config, epochs=1000, output=str(tmp_path), num_workers=1 if signum == signal.SIGTERM else 0)
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command(config), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        deadline = time.monotonic() + 120
        while not (tmp_path / "metrics.jsonl").exists() and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        time.sleep(delay)
        process.send_signal(signum)
        code = process.wait(20)
        log.seek(0)
        text = log.read()
    state = load_training_state(tmp_path / "last.train.pt")
    done = len(state["history"])
    assert done >= 1 and load_checkpoint(None, tmp_path / "best.safetensors").num_classes == 3
    assert read_metadata(tmp_path / "last.safetensors")["epoch"] in (done, done + 1)  # the weights are written first
    if signum == signal.SIGKILL:
        assert code == -signum
    else:
        # A data worker may see its end of the pipe close, and then Python prints that worker's traceback; ours never is one of them.
        assert code == 128 + signum and "efficientnet/cli.py" not in text
        last = [line for line in text.splitlines() if line.startswith("efficientnet: ")][-1]
        assert last == f"efficientnet: stopped by {signum.name}; continue with --resume {tmp_path / 'last.train.pt'}"
    trainer = Trainer(replace(config, epochs=done + 1, resume=str(tmp_path / "last.train.pt"), num_workers=0))
    trainer.run()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == done + 1
    assert not list(tmp_path.glob(".*.tmp"))
