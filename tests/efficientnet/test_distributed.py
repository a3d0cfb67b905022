"""Processes of one run (gloo, on the CPU): the same training as in one, exact evaluation, how they end, lost processes,
wrong environments.
"""

import atexit
import gc
import os
import re
import signal
import socket
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from efficientnet import create_model
from efficientnet.cli import main
from efficientnet.data.sets import load_data
from efficientnet.errors import InputError
from efficientnet.model.transfer import parameter_groups
from efficientnet.training.distributed import Processes, SyncBatchNorm, join, leave, synchronize_batch_norm
from efficientnet.training.optim import create_optimizer, learning_rate
from efficientnet.training.run_state import RunStates, read_state
from efficientnet.training.runner import Runner
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer, _for_processes
from effkernels import explain
from support import processes

# The same sums in another order, in fp32, over six updates. At five times the rate one part in 10^7 of the weights
# grows tenfold with every update: there a tolerance would say nothing.
LOSS = 5e-6  # relative
STATE = 1e-4  # of a tensor's norm


@pytest.fixture(scope="module")
def config(image_folder):
    """Updates of 10 images, by the order of the same seed the same ones whoever takes them; no noise that depends on
    the process.
    """
    settings = {
        "opt": "sgd",
        "lr": 0.01,
        "warmup_epochs": 0.0,
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "log_interval": 1,
        "device": "cpu",
    }
    data = f"imagefolder:{image_folder}"
    return TrainConfig(data, model="efficientnet_d0.1_w0.1_r32", img_size=16, epochs=2, batch_size=5, **settings)


def assert_close(a, b):
    assert a.keys() == b.keys()
    for key, value in a.items():
        error, scale = np.linalg.norm(value - b[key]), np.linalg.norm(b[key])
        assert error <= STATE * max(scale, 0.1), (key, error, scale)


def losses(history, *keys):
    return [row[key] for row in history for key in keys]


def train_group(config, tmp_path):
    """(history, state of the first process, of the second)."""
    group = processes.start_group(
        2, processes.train, replace(config, output=str(tmp_path / "two")), log=tmp_path / "log"
    )
    (history, first), (other, second) = processes.results(*group)
    for key in ("train_loss", "val_loss", "val_acc"):
        assert losses(history, key) == losses(other, key)
    for key, value in first.items():  # after an epoch the processes have the same weights, and the same statistics
        assert np.array_equal(value, second[key]), key
    return history, first


def test_synchronised_processes_train_as_one_of_twice_the_batch(config, tmp_path):
    """The same losses, weights and running statistics, averages too."""
    config = replace(config, model_ema=True)
    history, state = train_group(replace(config, sync_bn=True), tmp_path)
    one, expected = processes.train(replace(config, batch_size=10, output=str(tmp_path / "one")))
    assert losses(history, "train_loss", "val_loss") == pytest.approx(losses(one, "train_loss", "val_loss"), rel=LOSS)
    assert losses(history, "val_correct", "val_total") == losses(one, "val_correct", "val_total")
    assert_close(state, expected)
    rows = [[line for line in (tmp_path / name / "steps.jsonl").read_text().splitlines()] for name in ("one", "two")]
    assert len(rows[0]) == len(rows[1]) == 6
    apart = processes.results(
        *processes.start_group(2, processes.train, replace(config, output=str(tmp_path / "apart")))
    )[0][0]
    assert losses(apart, "train_loss") != pytest.approx(losses(one, "train_loss"), rel=20 * LOSS)
    averages = [read_state(RunStates(tmp_path / name / "checkpoints").paths()[0])["average"] for name in ("two", "one")]
    assert_close(*({key: value.numpy() for key, value in average.items()} for average in averages))


@pytest.mark.parametrize("dist_bn", ["reduce", "broadcast"])
def test_processes_of_their_own_statistics(config, tmp_path, dist_bn):
    """Without synchronisation each normalises by its own half. By hand: two copies of a model, gradients averaged, then
    statistics averaged or the first one's.
    """
    config = replace(config, dist_bn=dist_bn)
    history, state = train_group(config, tmp_path)

    one = Trainer(replace(config, batch_size=10, output=str(tmp_path / "one")))
    halves = [one.model, one._create_model()]
    halves[1].load_state_dict(one.model.state_dict())
    optimizers = [create_optimizer(config, parameter_groups(model, config.lr, config.weight_decay)) for model in halves]
    total, expected = 0.0, []
    for step in range(6):
        if step % 3 == 0:
            one.order.begin(step // 3, 0)
            batches, total = iter(one.loader), 0.0
        images, labels = next(batches)
        for i, model in enumerate(halves):
            model.train().zero_grad()
            logits = model(images[5 * i : 5 * i + 5])
            loss = F.cross_entropy(logits, labels[5 * i : 5 * i + 5], label_smoothing=config.label_smoothing)
            loss.backward()
            total += loss.item() / 2
        for pair in zip(*(model.parameters() for model in halves), strict=True):
            mean = sum(p.grad for p in pair) / 2
            for p in pair:
                p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = learning_rate(config, step, 3, 10)
            optimizer.step()
        if step % 3 == 2:
            expected.append(total / 3)
            for pair in zip(*(model.buffers() for model in halves), strict=True):
                shared = sum(pair) / 2 if dist_bn == "reduce" else pair[0]
                for buffer in pair:
                    buffer.copy_(shared.clone())
    assert losses(history, "train_loss") == pytest.approx(expected, rel=LOSS)
    assert_close(state, {key: value.numpy() for key, value in halves[0].state_dict().items()})
    assert not np.allclose(state["bn1.running_mean"], 0)


def test_accumulated_batches_are_the_batches_of_processes(config, tmp_path):
    """Two processes of 5 images see what one process accumulates in two batches of 5: the same loss curve."""
    history, _ = train_group(config, tmp_path)
    one, _ = processes.train(replace(config, grad_accum_steps=2, output=str(tmp_path / "one")))
    assert losses(history, "train_loss") == pytest.approx(losses(one, "train_loss"), rel=LOSS)


def evaluate(data):
    """(evaluation, per class, images that this process saw)."""
    group = join("cpu")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 3))
    runner = Runner(torch.device("cpu"), processes=group)
    batches = runner.batches(data.val, 2)
    seen = [index for batch in batches.loader.batch_sampler for index in batch]
    result = runner.evaluate(model, batches)
    leave()
    return result, result.per_class, seen


@pytest.mark.parametrize("world", [2, 4])
def test_evaluation_is_shared_out_and_exact(image_folder, tmp_path, world):
    """7 images for 2 processes, 3 for 4: every image once, the counts of one process."""
    data = load_data(f"imagefolder:{image_folder}", 8, 0.2)
    data.val.images, data.val.labels = (
        part[: 7 if world == 2 else 3] for part in (data.train.images[::4], data.train.labels[::4])
    )
    alone, *_ = evaluate(data)
    found = processes.results(*processes.start_group(world, evaluate, data, log=tmp_path / "log"))
    seen = [index for *_, indices in found for index in indices]
    assert sorted(seen) == list(range(len(data.val)))
    for result, per_class, _ in found:
        assert (result.correct, result.total, result.correct5) == (alone.correct, alone.total, alone.correct5)
        assert per_class == alone.per_class and result.loss == pytest.approx(alone.loss, rel=1e-6)


def normalise(x, weight, sizes, kwargs):
    """Two steps of SyncBatchNorm on this process's share of x."""
    group = join("cpu")
    layer = nn.BatchNorm2d(x.shape[1], dtype=torch.float64, **kwargs)
    layer = synchronize_batch_norm(nn.Sequential(nn.BatchNorm2d(1), layer))[1]
    assert type(layer) is SyncBatchNorm
    share = x.split(sizes)[group.rank].clone().requires_grad_()
    for _ in range(2):
        y = layer(share)
    (y * weight.split(sizes)[group.rank]).sum().backward()
    grads = [group.sum(p.grad).numpy() for p in layer.parameters()]
    buffers = {key: value.numpy() for key, value in layer.named_buffers()}
    inference = layer.eval()(share).detach().numpy()
    leave()
    return y.detach().numpy(), share.grad.numpy(), grads, buffers, inference


@pytest.mark.parametrize(
    "kwargs", [{}, {"momentum": None, "affine": False}, {"track_running_stats": False, "eps": 1e-3}]
)
def test_sync_batch_norm_is_batch_norm_of_all(tmp_path, kwargs):
    """Shares of 3 and 5 images in float64, against nn.BatchNorm2d on all 8, to 1e-12."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 4, 3, 5, dtype=torch.float64) * 3 + 1, torch.randn(8, 4, 3, 5, dtype=torch.float64)
    found = processes.results(*processes.start_group(2, normalise, x, weight, [3, 5], kwargs, log=tmp_path / "log"))
    layer, whole = nn.BatchNorm2d(4, dtype=torch.float64, **kwargs), x.clone().requires_grad_()
    for _ in range(2):
        y = layer(whole)
    (y * weight).sum().backward()
    for i, expected in enumerate((y, whole.grad)):
        np.testing.assert_allclose(
            np.concatenate([part[i] for part in found]), expected.detach().numpy(), rtol=1e-12, atol=1e-12
        )
    for *_, grads, buffers, _ in found:
        for grad, p in zip(grads, layer.parameters(), strict=True):
            np.testing.assert_allclose(grad, p.grad.numpy(), rtol=1e-12, atol=1e-12)
        assert buffers.keys() == dict(layer.named_buffers()).keys()
        for key, value in layer.named_buffers():
            np.testing.assert_allclose(buffers[key], value.numpy(), rtol=1e-12, err_msg=key)
    if kwargs.get("track_running_stats", True):
        inference = np.concatenate([part[-1] for part in found])
        np.testing.assert_allclose(inference, layer.eval()(x).detach().numpy(), rtol=1e-12, atol=1e-12)


def test_on_a_gpu_synchronised_blocks_run_in_kernels():
    """There --sync-bn takes torch's SyncBatchNorm, which the kernels merge: every block stays eligible. On no device,
    so without a GPU.
    """
    model = create_model("efficientnet_b0", device="meta")
    names = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    model = synchronize_batch_norm(model)
    assert [name for name, layer in model.named_modules() if type(layer) is nn.SyncBatchNorm] == names and len(
        names
    ) == 49
    assert explain(model).fused == 16


# How they end


def gloo():
    return [name for name in processes.threads() if "gloo" in name]


def by_leaving(trainer):
    trainer.run()
    leave()


def by_itself(trainer):
    """As a user's own script ends its group, the trainer alive."""
    trainer.run()
    dist.destroy_process_group()


def by_exit(trainer):
    """Without a word, as a notebook ends."""
    trainer.run()
    atexit._run_exitfuncs()


def before_training(trainer):
    leave()


def by_an_error(trainer):
    """Between two updates, with the trainer kept alive by the error."""
    trainer._log_step = lambda epoch, step: 1 / 0
    try:
        trainer.run()
    except ZeroDivisionError:
        leave()


def dropped(trainer):
    """The trainer is unreachable, but nobody has collected it."""
    trainer.run()
    trainer.__dict__.clear()
    leave()


def twice(trainer):
    """A second run joins the first one's group."""
    trainer.run()
    again = Trainer(replace(trainer.config, output=trainer.config.output + "-again"))
    assert again.processes == trainer.processes
    again.run()
    leave()


def ended(config, how):
    """Without the collector, which frees now and then what should have been freed by then."""
    gc.disable()
    trainer = Trainer(config)
    before = gloo()
    how(trainer)
    return before, gloo()


@pytest.mark.parametrize("how", [by_leaving, by_itself, by_exit, before_training, by_an_error, dropped, twice])
def test_no_thread_of_a_group_outlives_it(config, tmp_path, how):
    """Whoever frees a group later does so with the interpreter's lock held, for which the group's threads may wait."""
    one = replace(config, epochs=1, output=str(tmp_path / "two"))
    for before, after in processes.results(*processes.start_group(2, ended, one, how, log=tmp_path / "log")):
        assert len(before) > 1 and after == []


@pytest.mark.slow
def test_two_hundred_runs_end(config, tmp_path):
    """Each in its time, with no thread left: ``processes`` looks at the threads of every process."""
    config = replace(config, epochs=1, output=str(tmp_path / "two"))
    for _ in range(200):
        histories = [
            history for history, _ in processes.results(*processes.start_group(2, processes.train, config), seconds=60)
        ]
        assert [len(history) for history in histories] == [1, 1]


def fail_or_wait(how):
    if os.environ["RANK"] == "1":
        how()
    signal.pause()


def leave_with_an_error():
    raise InputError("nothing to train on")


@pytest.mark.parametrize(("how", "code"), [(leave_with_an_error, 1), (sys.exit, 0), (os.abort, -signal.SIGABRT)])
def test_one_process_that_fails_ends_its_group(tmp_path, how, code):
    """A test fails then, in seconds, and no process is left that waits for the one that failed."""
    group = processes.start_group(2, fail_or_wait, how, log=tmp_path / "log")
    with pytest.raises(AssertionError, match=f"a process ended with exit code {code}"):
        processes.results(*group)
    assert [process.exitcode for process in group] == [-signal.SIGKILL, code]


def test_a_group_that_waits_for_ever_is_ended():
    group = processes.start_group(2, signal.pause)
    with pytest.raises(AssertionError, match="2 of 2 processes neither returned nor ended in 0.2 s"):
        processes.results(*group, seconds=0.2)
    assert [process.exitcode for process in group] == [-signal.SIGKILL] * 2


# Lost processes and wrong environments


def command(*argv):
    return main([str(arg) for arg in argv])


def arguments(config, output, *more):
    argv = [
        "train",
        "--data",
        config.data,
        "--model",
        config.model,
        "--img-size",
        16,
        "--batch-size",
        5,
        "--device",
        "cpu",
        "--drop",
        0,
    ]
    return [*argv, "--drop-path", 0, "--opt", "sgd", "--sched", "step", "--warmup-epochs", 0, "--output", output, *more]


def test_a_killed_process_is_an_error_and_a_checkpoint_to_go_on_from(config, tmp_path):
    """The other one ends at once, with one line and exit code 1; resumed, the run is the one that was never killed."""
    argv = arguments(config, tmp_path / "two", "--checkpoint-interval", 1, "--epochs", 100_000)
    group = processes.start_group(2, command, *argv, log=tmp_path / "log")
    states = RunStates(tmp_path / "two" / "checkpoints")
    while not states.paths() and all(process.exitcode is None for process in group):
        group[0].join(0.01)
    group[1].kill()
    for process in group:
        process.join(300)
    text = (tmp_path / "log.0").read_text()
    assert group[0].exitcode == 1, text
    (line,) = [line for line in text.splitlines() if line.startswith("efficientnet: error: ")]
    path, state = states.newest(pytest.fail)
    assert line.startswith("efficientnet: error: process 0 lost another process of the run (")
    assert line.endswith(f"; the last good checkpoint is {path}, continue with --resume auto")
    epochs = ("--epochs", state["step"] // 3 + 2)
    for output in ("two", "whole"):
        argv = arguments(config, tmp_path / output, "--resume", "auto", *epochs)
        assert processes.results(*processes.start_group(2, command, *argv, log=tmp_path / "log")) == [0, 0]
    resumed, whole = (
        RunStates(tmp_path / output / "checkpoints").newest(pytest.fail)[1] for output in ("two", "whole")
    )
    assert resumed["step"] == whole["step"] > state["step"]
    for key, value in whole["model"].items():
        assert torch.equal(value, resumed["model"][key]), key


@pytest.mark.parametrize(
    ("output", "message"),
    [("two", "no checkpoint in .* can be read"), ("file/two", "output .* cannot be written: Not a directory")],
)
def test_what_only_the_first_process_finds_wrong_ends_all(config, tmp_path, output, message):
    """The same line from each, and exit code 2."""
    (tmp_path / "file").touch()
    (tmp_path / "two" / "checkpoints").mkdir(parents=True)
    (tmp_path / "two" / "checkpoints" / "step-00000003.train.pt").touch()
    group = processes.start_group(
        2, command, *arguments(config, tmp_path / output, "--resume", "auto"), log=tmp_path / "log"
    )
    for rank, process in enumerate(group):
        process.join(300)
        err = [line for line in (tmp_path / f"log.{rank}").read_text().splitlines() if "falling back" not in line]
        assert process.exitcode == 2 and len(err) == 1 and re.match(f"efficientnet: error: {message}", err[0]), err


def command_without_data(*argv):
    """``command``, with a data folder that the second process's machine lacks."""
    return command(*argv, *(("--data", "imagefolder:/no/such") if os.environ["RANK"] == "1" else ()))


def test_a_process_that_ends_before_training_is_one_line_in_the_others(config, tmp_path):
    group = processes.start_group(2, command_without_data, *arguments(config, tmp_path / "two"), log=tmp_path / "log")
    for process in group:
        process.join(300)
    texts = [(tmp_path / f"log.{rank}").read_text() for rank in range(2)]
    assert [process.exitcode for process in group] == [1, 2] and not any("Traceback" in text for text in texts), texts
    assert (
        "efficientnet: error: process 0 lost another process of the run (" in texts[0]
        and "; it had not begun to train" in texts[0]
    )
    assert texts[1] == "efficientnet: error: data folder '/no/such' does not exist\n"


def test_a_signal_reaches_every_process(config, tmp_path):
    """SIGTERM to one of them: all finish the update and leave together, saved."""
    argv = arguments(config, tmp_path / "two", "--epochs", 100_000)
    group = processes.start_group(2, command, *argv, log=tmp_path / "log")
    while not (tmp_path / "two" / "metrics.jsonl").exists() and all(process.exitcode is None for process in group):
        group[0].join(0.01)
    group[1].terminate()
    assert processes.results(*group) == [128 + signal.SIGTERM] * 2
    path, state = RunStates(tmp_path / "two" / "checkpoints").newest(pytest.fail)
    assert f"stopped by SIGTERM; continue with --resume {path}" in (tmp_path / "log.0").read_text()
    with pytest.raises(InputError, match="was trained with 2 processes, but this run has 1"):
        Trainer(replace(config, batch_size=10, sched="step", output=str(tmp_path / "one"), resume=str(path)))


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE must be an integer from 1 to .*, got None; torchrun sets it"),
        ({"WORLD_SIZE": "0", "RANK": "0"}, "WORLD_SIZE must be an integer from 1 to .*, got '0'"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE must be an integer .* got 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK must be an integer from 0 to 1, got '2'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_PORT must be an integer from 1 to 65535, got None"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "70000"}, "MASTER_PORT must be .* got '70000'"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_PORT": "29511"}, "MASTER_ADDR must name the host"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "1", "MASTER_ADDR": "127.0.0.1"},
            r"process 1 of 2 cannot reach the others at 127.0.0.1:1 "
            r"\(.*Connection refused\); check world size, rank and port",
        ),
    ],
)
def test_a_wrong_environment_is_one_line(monkeypatch, tmp_path, capfd, env, message):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        main(["train", "--device", "cpu", "--dist-timeout", "1", "--output", str(tmp_path / "out")])
    err = capfd.readouterr().err  # what torch's C++ writes too
    assert stop.value.code == 2 and err.startswith("efficientnet: error: ") and err.count("\n") == 1
    assert re.search(message, err), err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_another_server_at_the_port_is_one_line(tmp_path):
    """It takes the connection and never answers, which torch waits for without an end, whatever the timeout."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        command = [
            sys.executable,
            "-m",
            "efficientnet",
            "train",
            "--device",
            "cpu",
            "--dist-timeout",
            "1",
            "--output",
            str(tmp_path / "out"),
        ]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert (
        "process 1 of 2 cannot reach the others at 127.0.0.1:" in done.stderr
        and "check world size, rank and port" in done.stderr
    )


def test_what_needs_other_numbers_of_processes(config, tmp_path):
    assert join("cpu") == Processes()  # without torchrun
    with pytest.raises(InputError, match="sync_bn needs several processes .torchrun .*, this run has one"):
        Trainer(replace(config, sync_bn=True, output=str(tmp_path / "out")))
    cpu = torch.device("cpu")
    message = "global_batch_size must be divisible .* for 4 processes x 2 accumulated, got 100; try 104"
    with pytest.raises(InputError, match=message):
        _for_processes(replace(config, global_batch_size=100, grad_accum_steps=2), cpu, 4)
    assert _for_processes(replace(config, global_batch_size=104, grad_accum_steps=2), cpu, 4).batch_size == 13
    with pytest.raises(
        InputError,
        match="an update takes 50 images .batch_size 25 x 2 accumulated x 1 processes., but the training set",
    ):
        Trainer(replace(config, batch_size=25, grad_accum_steps=2, output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()
