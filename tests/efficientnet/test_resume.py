"""Nothing lost: resumed runs against runs that never stopped, damaged and unwritable checkpoints, signals, kills at
random moments.
"""

import errno
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from efficientnet import load_checkpoint
from efficientnet.errors import InputError, Interrupted, TrainingStopped
from efficientnet.training.run_state import RunStates, read_state
from efficientnet.training.settings import TrainConfig, unused
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import read_metadata
from support import processes

TINY = "efficientnet_d0.1_w0.1_r32"  # seven blocks, 33,000 parameters


MEASURED = ("seconds", "images_per_s", "data_wait")


def assert_same(a, b, where="state"):
    """Training states or parts of them, bit for bit, but for measured seconds."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a.keys() - {*MEASURED}:
            assert_same(a[key], b[key], f"{where}[{key!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    else:
        equal = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        assert equal, where


def newest(folder) -> dict:
    state = read_state(RunStates(Path(folder) / "checkpoints").paths()[0])
    del state["settings"]  # output and resume differ
    return state


@pytest.fixture(scope="module")
def config(image_folder):
    """Four epochs of three updates with everything that has a state: averages, momentum, dropout, augmentation,
    mixing.
    """
    settings = {
        "opt": "rmsproptf",
        "model_ema": True,
        "drop_path_rate": 0.2,
        "reprob": 0.3,
        "mixup": 0.2,
        "aa": "rand-m5-n1",
    }
    return TrainConfig(
        f"imagefolder:{image_folder}",
        model=TINY,
        img_size=16,
        epochs=4,
        batch_size=10,
        device="cpu",
        checkpoint_interval=1,
        **settings,
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    """The folder of the run that never stopped."""
    output = tmp_path_factory.mktemp("whole")
    Trainer(replace(config, output=str(output))).run()
    return output


class Stop(BaseException):
    """Nothing catches it, as nothing catches a kill."""


@pytest.mark.parametrize("updates", [1, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_is_the_run_that_never_stopped(config, whole, tmp_path, monkeypatch, updates, workers):
    """Stopped in the first epoch, at the end of one and within the third: the same states, bit for bit, and the same
    rows.
    """
    if workers and updates != 7:
        pytest.skip("once with workers")
    config = replace(config, output=str(tmp_path), num_workers=workers)
    update = Trainer._update

    def stopped(self, batches):
        if self.step == updates:
            raise Stop
        update(self, batches)

    before = set(multiprocessing.active_children())
    monkeypatch.setattr(Trainer, "_update", stopped)
    with pytest.raises(Stop):
        Trainer(config).run()
    assert set(multiprocessing.active_children()) <= before, "data workers outlive their run"
    monkeypatch.undo()
    torch.manual_seed(99)
    trainer = Trainer(replace(config, resume="auto"))
    assert trainer.step == updates
    evaluation = trainer.run()
    assert_same(newest(tmp_path), newest(whole))
    assert evaluation.accuracy == newest(whole)["history"][-1]["val_acc"]
    for name in ("last", "best"):
        weights = (load_checkpoint(None, folder / f"{name}.safetensors").state_dict() for folder in (tmp_path, whole))
        assert_same(*weights, name)
    assert trainer.run().accuracy == evaluation.accuracy  # nothing is left to do


def test_a_run_goes_on_with_more_epochs_but_not_with_fewer(config, whole, tmp_path):
    path = RunStates(whole / "checkpoints").paths()[0]
    with pytest.raises(InputError, match="has 4 epochs behind it; epochs must be more, got 4"):
        Trainer(replace(config, resume=str(path), output=str(tmp_path)))
    trainer = Trainer(replace(config, resume=str(path), output=str(tmp_path), epochs=5))
    assert trainer.step == 12
    assert_same(trainer.model.state_dict(), read_state(path)["model"])
    trainer.run()
    assert [row["epoch"] for row in trainer.history] == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("damage", ["truncated", "a flipped bit", "empty", "another file"])
def test_a_damaged_newest_checkpoint_falls_back_to_the_one_before(config, whole, tmp_path, capsys, damage):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first, second, _ = RunStates(tmp_path / "checkpoints").paths()
    data = first.read_bytes()
    spoiled = {"truncated": data[:-2000], "empty": b"", "another file": b"PK" + data[1000:3000]}
    middle = len(data) // 2
    first.write_bytes(spoiled.get(damage, data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]))
    trainer = Trainer(replace(config, output=str(tmp_path), resume="auto"))
    out = capsys.readouterr().out
    assert (
        trainer.step == 11
        and f"{str(first)!r} is" in out
        and "falling back to the one before" in out
        and str(second) in out
    )
    trainer.run()
    assert_same(newest(tmp_path), newest(whole))


def test_no_whole_checkpoint_is_an_error(config, tmp_path):
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / "step-00000003.train.pt").write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* can be read; move them away to start anew"):
        Trainer(replace(config, output=str(tmp_path), resume="auto"))


def test_a_new_run_sets_older_checkpoints_aside(config, tmp_path, capsys):
    for number in (1, 2):
        config = replace(config, output=str(tmp_path), epochs=number)
        Trainer(config).run()
    assert "the checkpoints of an earlier run are now in" in capsys.readouterr().out
    assert newest(tmp_path)["step"] == 6
    assert [path.name for path in (tmp_path / "checkpoints.old1").iterdir()]
    Trainer(config)
    assert (tmp_path / "checkpoints.old2").is_dir() and (tmp_path / "checkpoints.old1").is_dir()


def test_the_last_few_and_the_best_are_kept(config, tmp_path):
    Trainer(replace(config, output=str(tmp_path), checkpoint_hist=2, epochs=2)).run()
    assert [path.name for path in RunStates(tmp_path / "checkpoints").paths()] == [
        "step-00000006.train.pt",
        "step-00000005.train.pt",
    ]
    assert read_metadata(tmp_path / "best.safetensors")["classes"] == ["blue", "green", "red"]


def test_a_full_disk_leaves_the_checkpoints_before(config, whole, tmp_path, monkeypatch):
    """/dev/full takes no byte: the write fails as on a full disk, the message has the last good checkpoint, which goes
    on.
    """
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    config = replace(config, output=str(tmp_path))
    trainer = Trainer(config)
    save = RunStates.save

    def full(self, state):
        if state["step"] == 5:
            monkeypatch.setattr(
                "efficientnet.training.run_state._Writer.__init__",
                lambda self, path: self.__dict__.update(file=open("/dev/full", "wb", buffering=0), error=None),
            )
        return save(self, state)

    monkeypatch.setattr(RunStates, "save", full)
    with pytest.raises(
        TrainingStopped,
        match=r"cannot write checkpoint .*step-00000005.*No space left.*last good .*step-00000004.*--resume auto",
    ):
        trainer.run()
    monkeypatch.undo()
    assert {path.name[:13] for path in (tmp_path / "checkpoints").iterdir()} == {f"step-{i:08d}" for i in (2, 3, 4)}
    Trainer(replace(config, resume="auto")).run()
    assert_same(newest(tmp_path), newest(whole))


@pytest.mark.parametrize(
    ("writes", "what"),
    [("Log.step", "the update's row"), ("Log.epoch", "the epoch's row"), ("save_checkpoint", "weights")],
)
def test_a_full_disk_ends_the_run_whatever_is_written(config, tmp_path, monkeypatch, writes, what):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "steps.jsonl")

    monkeypatch.setattr(f"efficientnet.training.trainer.{writes}", full)
    with pytest.raises(
        TrainingStopped,
        match=rf"cannot write {what}: .*No space left on device.*the last good checkpoint is .*step-0000000",
    ):
        Trainer(replace(config, output=str(tmp_path), log_interval=2)).run()


def test_an_unwritable_folder_is_found_before_any_work(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"output '.*/file/out' cannot be written: Not a directory"):
        Trainer(replace(config, output=str(tmp_path / "file" / "out")))


def divergence(trainer, monkeypatch, *steps):
    """Makes the loss of these updates NaN."""
    gradients = trainer._gradients

    def spoiled(batches):
        loss = gradients(batches)
        if trainer.step in steps:
            next(trainer.model.parameters()).grad[0] = float("nan")
        return loss

    monkeypatch.setattr(trainer, "_gradients", spoiled)


def test_divergence_stops_with_the_step_the_batch_and_the_last_good_checkpoint(config, tmp_path, monkeypatch):
    trainer = Trainer(replace(config, output=str(tmp_path)))
    divergence(trainer, monkeypatch, 4)
    with pytest.raises(TrainingStopped) as stop:
        trainer.run()
    names = [trainer.data.train.name(i) for i in trainer.order.indices(1, 1)]
    assert f"gradient norm nan in step 5 (epoch 2, batch 2: {', '.join(names[:3])}, ...)" in str(stop.value)
    assert f"the last good checkpoint is {tmp_path / 'checkpoints' / 'step-00000004.train.pt'}" in str(stop.value)
    assert all(torch.isfinite(tensor).all() for tensor in newest(tmp_path)["model"].values())


def test_a_rate_that_is_too_large_stops_the_run(config, tmp_path):
    trainer = Trainer(replace(config, output=str(tmp_path), lr=1e30, opt="sgd", mixup=0.0))
    with pytest.raises(
        TrainingStopped, match=r"loss \S+, gradient norm (nan|inf) in step \d.*a lower --lr or --clip-grad may help"
    ):
        trainer.run()


def test_updates_that_are_not_finite_are_left_out_up_to_a_limit(config, tmp_path, monkeypatch, capsys):
    """Nothing of such an update stays: not in weights, averages or statistics."""
    trainer = Trainer(replace(config, output=str(tmp_path / "a"), skip_nonfinite=1, epochs=2))
    divergence(trainer, monkeypatch, 4)
    trainer.run()
    assert trainer.skipped == 1 and "left out, 1 of at most 1: loss" in capsys.readouterr().out
    states = [read_state(path) for path in RunStates(tmp_path / "a" / "checkpoints").paths()]
    assert [state["step"] for state in states] == [6, 5, 4]
    for part in ("model", "average"):
        assert_same(states[1][part], states[2][part])
    assert_same(states[1]["optimizer"]["state"], states[2]["optimizer"]["state"])
    with pytest.raises(AssertionError):
        assert_same(states[0]["model"], states[1]["model"])
    assert 0 < trainer.history[-1]["train_loss"] < 3  # the mean of the other two
    trainer = Trainer(replace(config, output=str(tmp_path / "b"), skip_nonfinite=1))
    divergence(trainer, monkeypatch, 1, 4)
    with pytest.raises(TrainingStopped, match="in step 5 .* after 1 others that were left out"):
        trainer.run()


def test_an_overflow_under_loss_scaling_halves_the_scale_and_leaves_nothing_else(config, tmp_path, monkeypatch):
    """Nor are BatchNorm's statistics those of the batch that overflowed, which a checkpoint would carry on."""
    trainer = Trainer(replace(config, output=str(tmp_path), epochs=2))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    divergence(trainer, monkeypatch, 4)
    trainer.run()
    assert trainer.skipped == 0 and trainer.scaler.get_scale() == 2.0
    states = [read_state(path) for path in RunStates(tmp_path / "checkpoints").paths()]
    assert [state["step"] for state in states] == [6, 5, 4]
    for part in ("model", "average"):
        assert_same(states[1][part], states[2][part])


def test_out_of_memory_names_the_batch_to_try(config, tmp_path, monkeypatch):
    trainer = Trainer(replace(config, output=str(tmp_path)))

    def out_of_memory(images, labels):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")

    monkeypatch.setattr(trainer, "forward_backward", out_of_memory)
    with pytest.raises(
        TrainingStopped,
        match="out of memory with batches of 10: try --batch-size 5 --grad-accum-steps 2, or --auto-batch",
    ):
        trainer.run()


def test_auto_batch_halves_until_it_fits(config, tmp_path, monkeypatch):
    """Memory for 7 images: 5 at a time, two batches an update, the same images in it; what was tried leaves no
    trace.
    """
    from efficientnet.model.network import EfficientNet

    def small(self, images):
        if len(images) > 7:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, images)

    fits = Trainer(replace(config, output=str(tmp_path)))
    forward = EfficientNet.forward
    monkeypatch.setattr(EfficientNet, "forward", small)
    trainer = Trainer(replace(config, output=str(tmp_path), auto_batch=True))
    assert (trainer.config.batch_size, trainer.config.grad_accum_steps, trainer.steps) == (5, 2, fits.steps)
    assert trainer.order.indices(1, 2) == fits.order.indices(1, 2)
    assert_same(trainer.model.state_dict(), fits.model.state_dict())
    assert all(p.grad is None for p in trainer.model.parameters())
    trainer.run()
    monkeypatch.setattr(EfficientNet, "forward", lambda self, images: small(self, images.repeat(8, 1, 1, 1)))
    with pytest.raises(InputError, match="not even batches of 5 images fit the memory"):
        Trainer(replace(config, output=str(tmp_path), auto_batch=True))


# Signals


def command(config):
    """The command line of a run with these settings."""
    options = []
    for field in fields(config):
        value, name = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if isinstance(value, bool):
            options.append(name if value else "--no-" + name[2:])
        elif value is not None and value != field.default:
            options += [name, str(value)]
    return [sys.executable, "-m", "efficientnet", "train", *options]


def wait_for(condition, process, seconds=300):
    """Until the condition holds or the process ends; fails after ``seconds``, which nothing here comes near."""
    deadline = time.monotonic() + seconds
    ended = process.poll if isinstance(process, subprocess.Popen) else lambda: process.exitcode
    while not condition() and ended() is None:
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


def test_sigterm_saves_the_update_and_names_the_checkpoint(config, tmp_path):
    config = replace(config, epochs=100_000, checkpoint_interval=None, output=str(tmp_path), num_workers=1)
    with open(tmp_path / "log", "w+") as log:
        process = subprocess.Popen(command(config), stdout=log, stderr=log, env=os.environ | {"OMP_NUM_THREADS": "1"})
        wait_for((tmp_path / "metrics.jsonl").exists, process)
        process.send_signal(signal.SIGTERM)
        code = process.wait(120)
        log.seek(0)
        text = log.read()
    # A data worker may see its end of the pipe close, and then Python prints that worker's traceback; ours never is one
    # of them.
    assert code == 128 + signal.SIGTERM and "efficientnet/cli.py" not in text
    last = [line for line in text.splitlines() if line.startswith("efficientnet: ")][-1]
    newest_path = RunStates(tmp_path / "checkpoints").paths()[0]
    assert last == f"efficientnet: stopped by SIGTERM; continue with --resume {newest_path}"
    step = read_state(newest_path)["step"]
    trainer = Trainer(replace(config, epochs=step // 3 + 1, resume="auto", num_workers=0))
    assert trainer.step == step and trainer.run().total == 6


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_within_an_update_or_an_evaluation(config, whole, tmp_path, monkeypatch, signum):
    """The update that it comes in is finished and saved, the evaluation is not waited for; the rest of the run is the
    whole one's.
    """
    config, update, evaluate = (
        replace(config, output=str(tmp_path), checkpoint_interval=None),
        Trainer._update,
        Trainer._finish_epoch,
    )

    def signalled(self, batches):
        if self.step == 4:
            os.kill(os.getpid(), signum)
        update(self, batches)

    def signalled_evaluation(self, epoch):
        os.kill(os.getpid(), signum)
        return evaluate(self, epoch)

    before = signal.getsignal(signum)
    monkeypatch.setattr(Trainer, "_update", signalled)
    with pytest.raises(Interrupted) as stop:
        Trainer(config).run()
    assert stop.value.signum == signum and stop.value.checkpoint.name == "step-00000005.train.pt"
    monkeypatch.undo()
    monkeypatch.setattr(Trainer, "_finish_epoch", signalled_evaluation)
    with pytest.raises(Interrupted) as stop:
        Trainer(replace(config, resume="auto")).run()
    monkeypatch.undo()
    assert stop.value.checkpoint.name == "step-00000006.train.pt" and len(newest(tmp_path)["history"]) == 1
    assert signal.getsignal(signum) == before
    Trainer(replace(config, resume="auto")).run()
    assert_same(newest(tmp_path), newest(whole))


# Kills


def test_a_run_killed_at_twenty_random_moments_ends_as_if_it_never_was(config, tmp_path):
    """kill -9 from outside at a random moment within an update, a save or an evaluation, again and again, each time
    resumed.
    """
    kills, moments = 20, random.Random(0)
    # A rate that does not depend on when the run ends.
    config = replace(config, sched="step", warmup_epochs=0.0, checkpoint_hist=2)
    killed = replace(config, output=str(tmp_path / "killed"), resume="auto", epochs=100_000)
    states, log, progress = RunStates(tmp_path / "killed" / "checkpoints"), tmp_path / "log", [0]

    def further():
        names = [path.name for path in states.paths()]
        return bool(names) and names[0] > f"step-{progress[-1]:08d}.train.pt"

    for _ in range(kills):
        process = processes.start(processes.train, killed, log=log)
        wait_for(further, process)
        time.sleep(moments.uniform(0, 0.1))  # an update and its save take some 0.05 s
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, log.read_text()
        found = states.newest(pytest.fail)  # whole, the newest of them
        progress.append(found[1]["step"])
    assert all(a < b for a, b in zip(progress, progress[1:], strict=False))
    epochs = progress[-1] // 3 + 1
    outputs = replace(killed, epochs=epochs), replace(config, epochs=epochs, output=str(tmp_path / "whole"))
    processes.results(*(processes.start(processes.train, config, log=log) for config in outputs))
    assert_same(newest(tmp_path / "killed"), newest(tmp_path / "whole"))
    assert log.read_text().count("resumed     ") == kills


# Settings that are others, and evaluations that fail


CHANGES = [
    ("adamw", {"weight_decay": 0.01}, {"weight_decay": 0.5}, "weight_decay"),
    ("adamw", {"opt_eps": 1e-8}, {"opt_eps": 1e-3}, "eps"),
    ("sgd", {"momentum": 0.9}, {"momentum": 0.5}, "momentum"),
    ("sgd", {"momentum": 0.0}, {"momentum": 0.9}, "nesterov"),
    ("rmsproptf", {"alpha": 0.9}, {"alpha": 0.5}, "alpha"),
    ("adamw", {"layer_decay": 0.8}, {"layer_decay": 0.5}, "lr_scale"),
    ("adamw", {}, {"layer_decay": 0.5}, "lr_scale"),
    ("sgd", {"layer_decay": 0.5}, {"layer_decay": 1.0}, "lr_scale"),
]


@pytest.mark.parametrize("opt, first, second, key", CHANGES, ids=lambda value: str(value))
def test_changed_optimizer_settings_are_used(image_folder, tmp_path, opt, first, second, key):
    """Those of a fresh optimizer, and each parameter's own moments, however the parameters are grouped."""
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "device": "cpu",
        "opt": opt,
        "output": str(tmp_path),
    }
    config = TrainConfig(f"imagefolder:{image_folder}", **base)
    before = Trainer(replace(config, epochs=1, **first))
    before.run()
    resumed = Trainer(replace(config, epochs=2, resume="auto", **{**first, **second}))
    fresh = Trainer(replace(config, epochs=2, output=str(tmp_path / "new"), **{**first, **second}))
    groups = [
        [{k: v for k, v in g.items() if k != "params"} for g in t.optimizer.param_groups] for t in (resumed, fresh)
    ]
    assert (
        groups[0] == groups[1] != [{k: v for k, v in g.items() if k != "params"} for g in before.optimizer.param_groups]
    )
    assert any(group[key] == groups[1][0][key] for group in groups[0])
    for (name, p), q in zip(before.model.named_parameters(), resumed.model.parameters(), strict=True):
        states = before.optimizer.state[p], resumed.optimizer.state[q]
        assert states[0].keys() == states[1].keys(), name
        for moment, value in states[0].items():
            assert value is None or torch.equal(value, states[1][moment]), (name, moment)
    resumed.run()
    assert len(resumed.history) == 2


@pytest.mark.parametrize(
    "opt, changed, without",
    [
        ("adamw", {"momentum": 0.3}, "opt adamw"),
        ("sgd", {"opt_eps": 0.2}, "opt sgd"),
        ("sgd", {"alpha": 0.5}, "opt sgd"),
        ("adam", {"decay_rate": 0.5}, "sched cosine"),
        ("adam", {"model_ema_decay": 0.5}, "no model_ema"),
        ("adam", {"hflip": 0.1}, "no scale"),
    ],
    ids=str,
)
def test_settings_without_an_effect_are_not_announced_as_if_they_had_one(
    image_folder, tmp_path, capsys, opt, changed, without
):
    config = TrainConfig(f"imagefolder:{image_folder}", model=TINY, img_size=8, opt=opt, output=str(tmp_path), epochs=1)
    Trainer(config).run()
    capsys.readouterr()
    Trainer(replace(config, epochs=2, resume="auto", **changed))
    said = [line for line in capsys.readouterr().out.splitlines() if next(iter(changed)) in line]
    assert len(said) == 1 and said[0].endswith(f"without effect: the run has {without}")


def test_every_setting_of_the_optimizers_that_has_an_effect_is_announced():
    used = {
        opt: {"momentum", "alpha", "opt_eps"} - unused(TrainConfig(opt=opt)).keys()
        for opt in ("adamw", "adam", "sgd", "rmsproptf")
    }
    assert used == {
        "adamw": {"opt_eps"},
        "adam": {"opt_eps"},
        "sgd": {"momentum"},
        "rmsproptf": {"momentum", "alpha", "opt_eps"},
    }
    assert "lr" in unused(TrainConfig(lr_base=0.1)) and "lr" not in unused(TrainConfig())


@pytest.mark.parametrize(
    "first, second, message",
    [
        ({"opt": "adamw"}, {"opt": "sgd"}, "was trained with opt 'adamw', but this run has 'sgd'"),
        ({"opt": "sgd"}, {"opt": "rmsproptf"}, "was trained with opt 'sgd', but this run has 'rmsproptf'"),
        ({"opt": "rmsproptf"}, {"opt": "adamw"}, "was trained with opt 'rmsproptf', but this run has 'adamw'"),
        ({}, {"freeze_until": "stem"}, "was trained with freeze_until None, but this run has 'stem'"),
        ({"freeze_until": "2"}, {"freeze_until": "2", "freeze_bn": "none"}, "has another optimizer: it has groups of "),
    ],
)
def test_what_cannot_be_used_is_refused(image_folder, tmp_path, first, second, message):
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "device": "cpu",
        "output": str(tmp_path),
    }
    config = TrainConfig(f"imagefolder:{image_folder}", **base)
    Trainer(replace(config, epochs=1, **first)).run()
    with pytest.raises(InputError, match=message):
        Trainer(replace(config, epochs=2, resume="auto", **second))


def test_loss_scaling_may_begin_later(image_folder, tmp_path):
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "device": "cpu",
        "output": str(tmp_path),
    }
    config = TrainConfig(f"imagefolder:{image_folder}", **base)
    Trainer(replace(config, epochs=1)).run()
    resumed = Trainer(replace(config, epochs=2, resume="auto", amp="fp16"))
    assert resumed.scaler.get_scale() == 2.0**16
    Trainer(replace(config, epochs=1, amp="fp16", output=str(tmp_path / "b"))).run()
    Trainer(replace(config, epochs=2, resume="auto", output=str(tmp_path / "b"))).run()


class Broken(RuntimeError):
    pass


@pytest.mark.parametrize(
    "error, raised, message",
    [
        (
            InputError("cannot decode image 'x.png'"),
            InputError,
            "image 'x.png'; epoch 2 is trained: the last good checkpoint",
        ),
        (OSError("server gone"), OSError, "server gone"),
        (Broken("a bug"), Broken, "a bug"),
        (KeyboardInterrupt(), KeyboardInterrupt, ""),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_evaluation_that_fails_costs_no_epoch(image_folder, tmp_path, monkeypatch, error, raised, message):
    """What was trained is saved, and the run goes on with the evaluation, to the same rows and weights."""
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "epochs": 3,
        "device": "cpu",
        "model_ema": True,
    }
    config = TrainConfig(f"imagefolder:{image_folder}", **base)
    whole = Trainer(replace(config, output=str(tmp_path / "whole")))
    whole.run()
    trainer = Trainer(replace(config, output=str(tmp_path / "parts")))
    evaluate, calls = trainer.runner.evaluate, []

    def fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise error
        return evaluate(*args)

    monkeypatch.setattr(trainer.runner, "evaluate", fails)
    with pytest.raises(raised, match=message):
        trainer.run()
    resumed = Trainer(replace(config, output=str(tmp_path / "parts"), resume="auto"))
    assert (resumed.step, len(resumed.history)) == (2 * resumed.steps, 1)
    resumed.run()
    measured = ("images_per_s", "data_wait", "seconds")
    rows = [[{k: v for k, v in row.items() if k not in measured} for row in t.history] for t in (whole, resumed)]
    assert rows[0] == rows[1]
    assert all(
        torch.equal(a, b)
        for a, b in zip(whole.model.state_dict().values(), resumed.model.state_dict().values(), strict=True)
    )


def test_evaluation_takes_the_memory_there_is(image_folder, tmp_path, monkeypatch, capsys):
    """Batches that do not fit are halved; where one image does not, that is the error, and the epoch is saved."""
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "epochs": 1,
        "device": "cpu",
        "num_workers": 1,
    }
    trainer = Trainer(TrainConfig(f"imagefolder:{image_folder}", output=str(tmp_path / "a"), **base))
    plain = Trainer(TrainConfig(f"imagefolder:{image_folder}", output=str(tmp_path / "b"), **base)).run()
    forward, limit = trainer.model.forward, 3

    def small(images):
        if not trainer.model.training and len(images) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(images)

    trainer.model.forward = small
    evaluation = trainer.run()
    assert (evaluation.correct, evaluation.total) == (plain.correct, plain.total) and trainer.val_batch_size == 2
    assert capsys.readouterr().out.count("out of memory: evaluation goes on in batches of") == 3  # 10, 5, 2
    limit = 0
    trainer.history.clear()
    trainer.val_batch_size = 1
    with pytest.raises(TrainingStopped, match="out of memory with one held-out image; the last good checkpoint is"):
        trainer._finish_epoch(0)


def test_the_average_in_a_training_state(image_folder, tmp_path):
    base = {
        "model": "efficientnet_d0.1_w0.1_r32",
        "img_size": 8,
        "batch_size": 10,
        "epochs": 1,
        "device": "cpu",
        "output": str(tmp_path),
    }
    Trainer(TrainConfig(f"imagefolder:{image_folder}", model_ema=True, model_ema_decay=0.5, **base)).run()
    (path,) = (tmp_path / "checkpoints").glob("*.train.pt")
    averaged, raw = load_checkpoint(None, path).state_dict(), load_checkpoint(None, path, use_ema=False).state_dict()
    expected = load_checkpoint(None, tmp_path / "last.safetensors").state_dict()
    assert all(torch.equal(value, averaged[key]) for key, value in expected.items())
    stored = read_state(path)["model"]
    assert all(torch.equal(value, raw[key]) for key, value in stored.items())
    assert not torch.equal(raw["conv_stem.weight"], averaged["conv_stem.weight"])
