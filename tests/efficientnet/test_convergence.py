"""Fused against plain PyTorch, trained from the same seed: the same accuracy, nearby loss curves."""

import json
import math
from dataclasses import replace

import pytest
import torch

from efficientnet.devices import describe_backend
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from support.interpreter import INTERPRET


def curves(config, output):
    """(losses of the updates, last evaluation) with fused blocks and with plain ones."""
    for fused in (True, False):
        trainer = Trainer(replace(config, fused=fused, output=str(output / str(fused))))
        evaluation = trainer.run()
        rows = [json.loads(line) for line in (output / str(fused) / "steps.jsonl").read_text().splitlines()]
        yield [row["loss"] for row in rows], evaluation


def test_b0_on_digits_on_the_cpu(tmp_path, monkeypatch):
    """B0 on two digits: without a GPU training runs the plain layers, so the curves are the same to the bit. Evaluation
    is fused.
    """
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    settings = {
        "epochs": 2,
        "batch_size": 24,
        "lr": 1e-3,
        "warmup_epochs": 0.5,
        "bn_momentum": 0.3,
        "drop_path_rate": 0.0,
    }
    config = TrainConfig("digits:0-1", val_fraction=0.3, log_interval=1, device="cpu", **settings)
    (fused, reached), (plain, expected) = curves(config, tmp_path)
    assert len(fused) == 20 and fused == plain
    assert reached.accuracy == expected.accuracy and reached.loss == pytest.approx(expected.loss, rel=1e-3)
    assert fused[0] == pytest.approx(math.log(2), abs=1e-3) and sum(fused[-5:]) / 5 < 0.55 and reached.accuracy > 0.7


@pytest.mark.slow
@pytest.mark.skipif(not INTERPRET, reason="the interpreter is off (TRITON_INTERPRET)")
def test_a_few_updates_in_the_interpreter(tmp_path, monkeypatch):
    """A tiny network of seven kinds of blocks at 16 pixels: the kernels' losses are plain PyTorch's, and fall with
    them.
    """
    config = TrainConfig(
        "digits:0-1",
        model="efficientnet_d0.1_w0.1_r32",
        img_size=16,
        batch_size=4,
        warmup_epochs=0.0,
        lr=3e-3,
        device="cpu",
    )
    losses = {}
    for fused in (True, False):
        monkeypatch.setenv("TRITON_INTERPRET", str(int(fused)))
        trainer = Trainer(replace(config, fused=fused, drop_rate=0.0, output=str(tmp_path / str(fused))))
        if fused:
            assert describe_backend(trainer.model.train(), torch.zeros(2, 3, 16, 16)).startswith("triton for 7 of 7")
        trainer.order.begin(0, 0)
        trainer.model.train()
        batches, losses[fused] = iter(trainer.loader), []
        for _ in range(4):
            trainer.sums["row"].zero_()
            trainer._update(batches)
            trainer.step += 1
            losses[fused].append(trainer.sums["row"][0].item())
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)
    assert losses[True] != losses[False], "the kernels did not run"
    assert len(set(losses[True])) == 4


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_b0_on_digits_on_the_gpu(tmp_path):
    """In bf16, ten epochs: both reach 97 %, the curves stay together (means of every twenty updates, within a
    tenth).
    """
    config = TrainConfig("digits", device="cuda", amp="bf16", log_interval=1)
    (fused, reached), (plain, expected) = curves(config, tmp_path)
    assert min(reached.accuracy, expected.accuracy) >= 0.97 and abs(reached.accuracy - expected.accuracy) <= 0.015
    means = [torch.tensor(losses[: len(losses) // 20 * 20]).view(-1, 20).mean(1) for losses in (fused, plain)]
    torch.testing.assert_close(*means, rtol=0.1, atol=0.03)
