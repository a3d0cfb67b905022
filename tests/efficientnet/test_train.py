import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from efficientnet import create_model, load_checkpoint
from efficientnet.data.sets import load_data
from efficientnet.devices import describe_backend, pick_device, use_tf32
from efficientnet.errors import InputError, Interrupted
from efficientnet.training.run_state import RunStates, read_state
from efficientnet.training.runner import Evaluation, Runner
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer
from efficientnet.weights.checkpoints import read_metadata


def same_state(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def last_state(output):
    return RunStates(output / "checkpoints").paths()[0]


def test_it_learns_digits(tmp_path):
    """Three of them, half of their images: the loss falls, and most held-out digits are told apart."""
    config = TrainConfig(
        "digits:0-2", epochs=5, warmup_epochs=1, batch_size=32, val_fraction=0.5, device="cpu", output=str(tmp_path)
    )
    trainer = Trainer(config)
    evaluation = trainer.run()
    assert evaluation.accuracy > 0.8 and evaluation.total > 250
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
        "last.safetensors",
        "best.safetensors",
        "checkpoints",
        "metrics.jsonl",
        "steps.jsonl",
        "curves.png",
    }
    with Image.open(output / "curves.png") as image:
        assert image.format == "PNG" and image.width > 500
    metadata = read_metadata(output / "last.safetensors")
    assert (
        metadata["classes"] == ["blue", "green", "red"]
        and metadata["epoch"] == 4
        and metadata["preprocess"]["img_size"] == 8
    )
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    best = max(rows, key=lambda row: row["val_acc"])  # the first of equals
    assert read_metadata(output / "best.safetensors")["metrics"] == best
    weights = load_checkpoint(None, output / "last.safetensors").state_dict()
    paths = RunStates(output / "checkpoints").paths()
    assert [path.name for path in paths] == [f"step-{step:08d}.train.pt" for step in (12, 9, 6)]  # 3 updates an epoch
    assert same_state(weights, read_state(paths[0])["model"])
    assert same_state(weights, load_checkpoint(None, paths[0]).state_dict())


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
    settings = {"epochs": 20, "output": str(tmp_path), "resume": str(last_state(output))} | change
    with pytest.raises(InputError, match=message):
        Trainer(replace(config, **settings))


def test_decay_spares_biases_and_norms(trained, tmp_path):
    config, *_ = trained
    trainer = Trainer(replace(config, weight_decay=0.3, output=str(tmp_path)))
    decayed = {
        id(p) for group in trainer.optimizer.param_groups if group["weight_decay"] == 0.3 for p in group["params"]
    }
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
    images = data.preprocess.normalize(images)
    with torch.no_grad():
        logits = model(images)
    for batch_size in (4, 100):
        runner = Runner(torch.device("cpu"))
        result = runner.evaluate(model.train(), runner.batches(data.val, batch_size))
        assert result.total == len(labels) == 15 and result.correct == (logits.argmax(1) == labels).sum()
        assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert str(Evaluation(0.1, 350, 360)) == "97.22 % (350/360)"


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_amp_trains(trained, tmp_path, amp):
    config, *_ = trained
    # Not 8 pixels: oneDNN's bf16 weight gradient of a 5x5 depthwise convolution on 1x1 maps reads memory that it did
    # not write (2.13).
    trainer = Trainer(
        replace(config, img_size=32, epochs=1, batch_size=16, amp=amp, num_workers=1, output=str(tmp_path))
    )
    before = trainer.model.blocks[3][1].conv_pwl.weight.clone()
    with trainer.runner.autocast():
        assert trainer.model(torch.zeros(2, 3, 32, 32)).dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[amp]
    trainer.run()
    assert trainer.model.blocks[3][1].conv_pwl.weight.dtype == torch.float32
    assert not torch.equal(before, trainer.model.blocks[3][1].conv_pwl.weight)


def test_memory_format(trained, tmp_path):
    config, *_ = trained
    for flag in (True, False):
        trainer = Trainer(replace(config, channels_last=flag, output=str(tmp_path)))
        images, _ = next(iter(trainer.loader))
        assert images.is_contiguous(memory_format=torch.channels_last) is flag
        assert trainer.model.conv_stem.weight.is_contiguous(memory_format=torch.channels_last) is flag


def test_backend_is_told_for_every_block():
    x = torch.zeros(1, 3, 32, 32)
    plain = describe_backend(create_model("b0", fused=False), x)
    assert re.fullmatch(r"triton for 0 of 16 MBConv blocks; PyTorch reference for 16: .*fused=False.*", plain)
    fused = describe_backend(create_model("b0"), x)
    assert "of 16 MBConv blocks" in fused and ("triton for 16" in fused or "CPU" in fused)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epochs", 0),
        ("epochs", 1.5),
        ("batch_size", 1),
        ("batch_size", True),
        ("lr", 0.0),
        ("lr", float("nan")),
        ("lr", float("inf")),
        ("weight_decay", -1.0),
        ("warmup_epochs", -0.5),
        ("label_smoothing", 1.0),
        ("seed", -1),
        ("num_workers", -1),
        ("amp", "int8"),
    ],
)
def test_bad_settings_are_named(field, value):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got {value!r}$"):
        TrainConfig(**{field: value})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "tpu"}, "device must be one of auto, cpu, cuda, got 'tpu'"),
        ({"model": "b99"}, "unknown model 'b99'"),
        ({"img_size": 0}, "img_size must be an integer >= 1 or two, height and width, got 0"),
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


TINY = "efficientnet_d0.1_w0.1_r32"


def test_pretrained_weights_of_other_classes_keep_the_trunk(image_folder, trained, tmp_path):
    """From a checkpoint of ours: the trunk is its, its normalisation too, the classifier starts at zero; of the same
    classes it stays.
    """
    config, output, _ = trained
    weights = load_checkpoint(None, output / "last.safetensors").state_dict()
    settings = {"pretrained": str(output / "last.safetensors"), "output": str(tmp_path), "device": "cpu"}
    trainer = Trainer(TrainConfig("digits:0-4", **settings))
    state = trainer.model.state_dict()
    assert same_state(*({k: v for k, v in part.items() if "classifier" not in k} for part in (state, weights)))
    assert state["classifier.weight"].shape == (5, 1280) and not state["classifier.weight"].any()
    stored = read_metadata(output / "last.safetensors")["preprocess"]
    assert trainer.data.train.preprocess.mean == tuple(stored["mean"]) == trainer.data.val.preprocess.mean
    assert same_state(Trainer(TrainConfig(config.data, img_size=8, **settings)).model.state_dict(), weights)


@pytest.mark.parametrize(
    ("pretrained", "message"),
    [
        ("no_such_tag", "pretrained weights 'no_such_tag' of 'efficientnet_b0' are not known; its tags: ra_in1k"),
        ("no/such.pt", "no such"),
    ],
)
def test_pretrained_weights_that_are_not_there(tmp_path, pretrained, message):
    with pytest.raises((InputError, ValueError, OSError), match=message):
        Trainer(TrainConfig(pretrained=pretrained, device="cpu", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


def test_frozen_layers_stay_and_layers_have_rates_of_their_own(image_folder, tmp_path):
    """Stages 0 to 2 with their statistics are left as they are, also in the average; later blocks learn by 0.5 to the
    depth.
    """
    settings = {
        "img_size": 16,
        "epochs": 2,
        "batch_size": 10,
        "warmup_epochs": 0.0,
        "model_ema": True,
        "device": "cpu",
        "lr": 0.1,
    }
    data = f"imagefolder:{image_folder}"
    trainer = Trainer(
        TrainConfig(data, model=TINY, output=str(tmp_path), freeze_until="2", layer_decay=0.5, sched="step", **settings)
    )
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.run()
    frozen = ("conv_stem.", "bn1.", "blocks.0.", "blocks.1.", "blocks.2.")
    for model in (trainer.model, trainer.average.module):
        for key, value in model.state_dict().items():
            assert torch.equal(value, before[key]) == key.startswith(frozen), key
    rates = {group["name"]: group["lr"] for group in trainer.optimizer.param_groups}
    assert rates["classifier.decay"] == pytest.approx(0.1) and rates["blocks.6.0.no_decay"] == pytest.approx(0.05)
    assert rates["blocks.3.0.decay"] == pytest.approx(0.1 / 16) and not any(
        name.startswith("blocks.2") for name in rates
    )


@pytest.mark.parametrize("freeze_bn", ["all", "weights", "none"])
def test_what_freezing_leaves_of_batch_norm(image_folder, tmp_path, freeze_bn):
    """All but the classifier frozen: convolutions stay; BatchNorm's weights, and its statistics, as asked for."""
    settings = {"img_size": 16, "epochs": 1, "batch_size": 10, "model": TINY, "device": "cpu", "output": str(tmp_path)}
    trainer = Trainer(TrainConfig(f"imagefolder:{image_folder}", freeze_until="head", freeze_bn=freeze_bn, **settings))
    before = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    trainer.run()
    norms = {name for name, layer in trainer.model.named_modules() if isinstance(layer, torch.nn.BatchNorm2d)}
    moves = {"all": (), "weights": ("running_mean",), "none": ("running_mean", "weight")}[freeze_bn]
    for key in before:
        module, _, tensor = key.rpartition(".")
        if module not in norms or tensor in ("running_mean", "weight"):
            changes = tensor in moves if module in norms else module == "classifier"
            assert torch.equal(trainer.model.state_dict()[key], before[key]) != changes, key


def test_accumulated_gradients_are_those_of_the_whole_batch(trained, tmp_path):
    """Without BatchNorm's batch statistics: two batches of 5 are one of 10, to rounding."""
    config, *_ = trained
    gradients = []
    for parts in (1, 2):
        settings = {
            "drop_rate": 0.0,
            "drop_path_rate": 0.0,
            "model": TINY,
            "batch_size": 10 // parts,
            "grad_accum_steps": parts,
        }
        trainer = Trainer(replace(config, output=str(tmp_path), **settings))
        torch.nn.init.normal_(trainer.model.classifier.weight, generator=torch.Generator().manual_seed(0))
        trainer.order.begin(0, 0)
        trainer.model.eval()
        loss = trainer._gradients(iter(trainer.loader))
        gradients.append([loss, *(p.grad for p in trainer.model.parameters())])
    for whole, parts in zip(*gradients, strict=True):
        torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-5)


def test_gradients_are_clipped_by_their_norm(trained, tmp_path):
    config, *_ = trained
    trainer = Trainer(
        replace(config, model=TINY, clip_grad=1e-3, opt="sgd", momentum=0.0, weight_decay=0.0, output=str(tmp_path))
    )
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.order.begin(0, 0)
    trainer._update(iter(trainer.loader))
    change = torch.cat([(p - b).flatten() for p, b in zip(trainer.model.parameters(), before, strict=True)]).norm()
    rate = trainer.optimizer.param_groups[0]["lr"]
    assert trainer.norm > 0.01 and change.item() == pytest.approx(1e-3 * rate, rel=1e-3)


def test_images_grow_in_stages(trained, tmp_path, monkeypatch):
    """From 8 to 32 pixels in three stages of two epochs, in multiples of 8; evaluation sees the last size."""
    config, *_ = trained
    settings = {"progressive_size": 8, "progressive_stages": 3, "epochs": 6, "img_size": 32, "model": TINY}
    trainer, seen = Trainer(replace(config, output=str(tmp_path), **settings)), []
    trainer.model.register_forward_pre_hook(lambda module, args: seen.append((module.training, args[0].shape[-1])))
    trainer.run()
    sizes = list(dict.fromkeys(size for training, size in seen if training))
    assert sizes == [8, 16, 32]
    assert [size for training, size in seen if training].count(8) == 6
    assert {size for training, size in seen if not training} == {32}
    with pytest.raises(InputError, match="progressive_size must be at most img_size 32, got 64"):
        Trainer(replace(config, output=str(tmp_path), **settings | {"progressive_size": 64}))


def test_mixing_and_erasing_train(trained, tmp_path):
    config, *_ = trained
    settings = {
        "mixup": 0.2,
        "cutmix": 1.0,
        "reprob": 0.3,
        "aa": "auto",
        "scale": (0.3, 1.0),
        "model": TINY,
        "img_size": 32,
    }
    trainer = Trainer(replace(config, epochs=1, output=str(tmp_path), **settings))
    evaluation = trainer.run()
    assert trainer.step == 3 and evaluation.total == 6 and 0 < trainer.history[0]["train_loss"] < 3


@pytest.mark.slow
def test_a_compiled_model_trains_the_same(trained, tmp_path):
    """By Inductor: the losses of the model as it is, the same names in its files, and stopped and resumed the same
    weights.
    """
    config, *_ = trained
    settings = {
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "model": TINY,
        "img_size": 16,
        "sched": "step",
        "warmup_epochs": 0.0,
    }
    config, losses = replace(config, epochs=2, **settings), []
    for compiled in (True, False):
        trainer = Trainer(replace(config, compile=compiled, output=str(tmp_path / str(compiled))))
        assert hasattr(trainer.forward, "_orig_mod") == compiled
        trainer.run()
        losses.append([row["train_loss"] for row in trainer.history])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0] != losses[1]
    weights = load_checkpoint(None, tmp_path / "True" / "last.safetensors").state_dict()
    for epochs in (1, 2):  # from its end on a run of one epoch is one of two
        Trainer(replace(config, compile=True, epochs=epochs, resume="auto", output=str(tmp_path / "parts"))).run()
    assert same_state(weights, load_checkpoint(None, tmp_path / "parts" / "last.safetensors").state_dict())


class Left(BaseException):
    pass


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_a_model_is_compiled_is_not_kept_waiting(trained, tmp_path, monkeypatch, signum):
    """The handler of before has it, which ends a command at once; after the first update, and its second size, the
    update is finished.
    """
    config, *_ = trained
    settings = {
        "model": TINY,
        "img_size": 16,
        "progressive_size": 8,
        "progressive_stages": 2,
        "epochs": 4,
        "compile": True,
    }
    config, at = replace(config, output=str(tmp_path), **settings), [0]

    def leave(signum, frame):
        raise Left

    def compiled(model, device):
        def forward(images):
            if trainer.step == at[0]:
                signal.raise_signal(signum)
            return model(images)

        return forward

    before = signal.signal(signum, leave)
    try:
        monkeypatch.setattr("efficientnet.training.trainer._compiled", compiled)
        # No compiler is asked for.
        monkeypatch.setattr("efficientnet.training.trainer._for_processes", lambda config, *_: config)
        # Updates 6 on are of the second size.
        for at[0], stop in ((0, Left), (1, Interrupted), (6, Left), (8, Interrupted)):
            trainer = Trainer(replace(config, resume="auto"))
            with pytest.raises(stop):
                trainer.run()
            assert trainer.step == at[0] + (stop is Interrupted)
            assert signal.getsignal(signum) is leave
    finally:
        signal.signal(signum, before)


def test_processes_come_around_what_is_compiled(trained, tmp_path, monkeypatch):
    """So that DistributedDataParallel, which knows how to accumulate without an exchange, is not hidden in it."""
    config, *_ = trained
    monkeypatch.setattr("efficientnet.training.trainer._for_processes", lambda config, *_: config)
    monkeypatch.setattr("efficientnet.training.trainer._compiled", lambda model, device: ("compiled", model))
    monkeypatch.setattr("efficientnet.training.trainer.wrap", lambda model, processes: ("wrapped", model))
    trainer = Trainer(replace(config, model=TINY, compile=True, output=str(tmp_path)))
    assert trainer.forward == ("wrapped", ("compiled", trainer.model))


@pytest.mark.slow
def test_ctrl_c_while_the_compiler_runs(image_folder, tmp_path, monkeypatch):
    """Ctrl-C reaches the compiler as well: one line, no traceback, and the checkpoint of before goes on."""
    options = [
        "--data",
        f"imagefolder:{image_folder}",
        "--model",
        TINY,
        "--img-size",
        "16",
        "--batch-size",
        "10",
        "--device",
        "cpu",
    ]
    options = [
        sys.executable,
        "-m",
        "efficientnet",
        "train",
        *options,
        "--output",
        str(tmp_path / "out"),
        "--resume",
        "auto",
        "--epochs",
    ]
    subprocess.run([*options, "1"], check=True, capture_output=True)
    env = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    with subprocess.Popen(
        [*options, "2", "--compile"], env=env, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not list((tmp_path / "cache").rglob("*.main.cpp")) and process.poll() is None:
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGINT)
        err = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGINT and "Traceback" not in err
    assert err.splitlines()[-1] == "efficientnet: stopped by SIGINT; continue with --resume auto"
    subprocess.run([*options, "2"], check=True, capture_output=True)
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2


def test_compiling_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        InputError, match=r"compile needs a C\+\+ compiler, and there is no no-such-compiler .*; leave --compile out"
    ):
        Trainer(TrainConfig(compile=True, device="cpu", output=str(tmp_path / "out")))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("yes", [True, False])
def test_tf32_is_set_for_both_interfaces(yes):
    """Each of these raises where only the other one was used."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        use_tf32(yes)
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == yes
        assert (
            (torch.backends.cuda.matmul.fp32_precision == "tf32")
            == (torch.backends.cudnn.conv.fp32_precision == "tf32")
            == yes
        )
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
