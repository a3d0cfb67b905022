"""What a run leaves to look at: rows of updates, TensorBoard's events, curves; cut off by a kill and gone on with."""

import json
from dataclasses import replace

import pytest
from PIL import Image

from efficientnet.training.logs import Log, plot_curves
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def config(image_folder):
    model, settings = (
        "efficientnet_d0.1_w0.1_r32",
        {"img_size": 16, "epochs": 2, "batch_size": 5, "log_interval": 2, "device": "cpu"},
    )
    return TrainConfig(f"imagefolder:{image_folder}", model=model, tensorboard=True, checkpoint_interval=1, **settings)


def test_rows_of_updates_and_epochs(config, tmp_path, capsys):
    trainer = Trainer(replace(config, output=str(tmp_path)))
    evaluation = trainer.run()
    steps, epochs = rows(tmp_path / "steps.jsonl"), rows(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in steps] == [2, 4, 6, 8, 10, 12]
    assert set(steps[0]) == {"step", "epoch", "loss", "lr", "grad_norm", "images_per_s", "data_wait"}
    for epoch in (0, 1):
        mean = sum(row["loss"] for row in steps[3 * epoch : 3 * epoch + 3]) / 3
        assert epochs[epoch]["train_loss"] == pytest.approx(mean, rel=1e-5)
    assert all(row["images_per_s"] > 0 and 0 <= row["data_wait"] <= 1 and row["grad_norm"] > 0 for row in steps)
    out = capsys.readouterr().out
    best = max(epochs, key=lambda row: row["val_acc"])
    assert f"best        {100 * best['val_acc']:.2f} % in epoch {best['epoch']}" in out
    assert out.splitlines()[-1] == f"test accuracy: {evaluation}"

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("step/loss")] == [
        (row["step"], pytest.approx(row["loss"])) for row in steps
    ]
    assert [(event.step, event.value) for event in events.Scalars("epoch/val_acc")] == [
        (6 * row["epoch"], pytest.approx(row["val_acc"])) for row in epochs
    ]


def test_rows_that_are_repeated_go(tmp_path):
    """A killed run has logged updates after its last checkpoint, the last of them in part."""
    (tmp_path / "steps.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"step": 6}\n{"st')
    log = Log(tmp_path, step=4)
    log.step({"step": 6, "again": True})
    assert rows(tmp_path / "steps.jsonl") == [{"step": 2}, {"step": 4}, {"step": 6, "again": True}]
    Log(tmp_path)
    assert (tmp_path / "steps.jsonl").read_text() == ""


def test_an_epoch_whose_row_was_lost_is_written_again(config, tmp_path):
    config = replace(config, output=str(tmp_path), tensorboard=False)
    Trainer(config).run()
    whole = (tmp_path / "metrics.jsonl").read_text()
    # Killed between the checkpoint and the row.
    (tmp_path / "metrics.jsonl").write_text(whole.splitlines(keepends=True)[0])
    Trainer(replace(config, resume="auto")).run()
    assert (tmp_path / "metrics.jsonl").read_text() == whole


def test_curves_follow_the_numbers(tmp_path):
    """Another history is another picture; the same one, the same."""
    history = [{"epoch": i + 1, "train_loss": 2.0 / (i + 1), "val_loss": 1.0, "val_acc": 0.1 * i} for i in range(5)]
    pictures = []
    for name, changed in (("a", {}), ("b", {}), ("c", {"val_acc": 0.9})):
        plot_curves([*history[:-1], history[-1] | changed], tmp_path / name)
        with Image.open(tmp_path / name) as image:
            assert image.format == "PNG"
            pictures.append(image.convert("RGB").tobytes())
    assert pictures[0] == pictures[1] != pictures[2]
