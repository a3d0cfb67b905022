"""Checkpoint files as they are in the world: names, wrappers, prefixes, what is kept beside the weights, and what is no
checkpoint.
"""

import collections
import datetime
import decimal
import fractions
import gzip
import pathlib
import warnings
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.optim.swa_utils import AveragedModel

from efficientnet import create_model, load_checkpoint
from efficientnet.cli import main
from efficientnet.weights.checkpoints import save_checkpoint

NAME = "efficientnet_d0.1_w0.1_r32"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(0)
    return create_model(NAME, num_classes=3).state_dict()


@pytest.fixture(scope="module")
def averaged(weights):
    return {key: value + 1 for key, value in weights.items()}


def same(model, weights):
    found = model.state_dict()
    return found.keys() == weights.keys() and all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize(
    "name",
    [
        "model_best.pth.tar",
        "checkpoint-3.pth.tar",
        "last.ckpt",
        "epoch=3-step=12.ckpt",
        "W.PTH",
        "w.PT",
        "w.pkl",
        "w.model",
        "w",
        "w.weights.h",
        "w.safetensors",
    ],
)
def test_any_name(weights, tmp_path, name):
    torch.save(
        {"epoch": 3, "arch": "efficientnet_b0", "state_dict": weights, "metric": 77.3, "version": 2}, tmp_path / name
    )
    assert same(load_checkpoint(NAME, tmp_path / name), weights)
    torch.save(weights, tmp_path / name, _use_new_zipfile_serialization=False)  # as before torch 1.6
    assert same(load_checkpoint(NAME, tmp_path / name), weights)


@pytest.mark.parametrize("name", ["w.SAFETENSORS", "w.bin", "w"])
def test_safetensors_of_any_name(weights, tmp_path, name):
    model = create_model(NAME, num_classes=3)
    model.load_state_dict(weights)
    save_checkpoint(model, tmp_path / name)
    assert same(load_checkpoint(None, tmp_path / name), weights)


WRAPPED = {
    "model_state_dict": lambda w: {
        "epoch": 1,
        "model_state_dict": w,
        "optimizer_state_dict": {"state": {}, "param_groups": []},
    },
    "net": lambda w: {"net": w},
    "network and loss": lambda w: {"network": w, "loss": torch.tensor(0.5)},
    "weights": lambda w: {"weights": w, "classes": ["a", "b", "c"]},
    "a name of its own": lambda w: {"my_model_v2": w, "lr": 0.1},
    "twice": lambda w: {"checkpoint": 1, "model": {"state_dict": w}},
    "below a name of its own": lambda w: {"checkpoint": {"model": {"state_dict": w}}, "step": 3},
    "beside an optimizer": lambda w: {
        "state": {"my_net": w},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []},
    },
    "module": lambda w: {"module": w, "iteration": 7},
    "params": lambda w: {"params": w, "config": {"name": "b0"}},
    "with numbers beside": lambda w: {**w, "epoch": 4, "best": 0.9},
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers(weights, tmp_path, name):
    torch.save(WRAPPED[name](weights), tmp_path / "w.pt")
    assert same(load_checkpoint(NAME, tmp_path / "w.pt"), weights)


@pytest.mark.parametrize("key", ["model_ema", "ema", "ema_model", "teacher", "state_dict_ema", "module_ema"])
def test_averages(weights, averaged, tmp_path, key):
    torch.save({"model": weights, key: averaged}, tmp_path / "w.pt")
    assert same(load_checkpoint(NAME, tmp_path / "w.pt"), averaged)
    assert same(load_checkpoint(NAME, tmp_path / "w.pt", use_ema=False), weights)


def test_averaged_model_of_torch(weights, tmp_path):
    model = create_model(NAME, num_classes=3)
    model.load_state_dict(weights)
    average = AveragedModel(torch.nn.DataParallel(model)).state_dict()
    assert "n_averaged" in average
    torch.save({"ema": average}, tmp_path / "w.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert same(load_checkpoint(NAME, tmp_path / "w.pt"), weights)


@pytest.mark.parametrize(
    "prefix",
    [
        "model.",
        "backbone.",
        "net.",
        "module.",
        "module.model.",
        "model.module.",
        "model.backbone._orig_mod.",
        "net.module.encoder.",
        "teacher.",
        "cnn.",
        "feature_extractor.0.",
        "efficientnet.",
        "_fsdp_wrapped_module.trunk.",
        "module.img_encoder.model.",
    ],
)
def test_prefixes_in_any_order(weights, tmp_path, prefix):
    torch.save({"state_dict": {prefix + key: value for key, value in weights.items()}}, tmp_path / "w.ckpt")
    assert same(load_checkpoint(NAME, tmp_path / "w.ckpt"), weights)


@pytest.mark.parametrize("layout", ["torchvision", "lukemelas", "huggingface"])
def test_a_prefix_that_nobody_knows_before_other_layouts(tmp_path, run, layout):
    model = create_model("efficientnet_b0", num_classes=2)
    save_checkpoint(model, tmp_path / "m.safetensors")
    assert run("convert", tmp_path / "m.safetensors", tmp_path / "l.pt", "--to", layout)[0] == 0
    state = torch.load(tmp_path / "l.pt", weights_only=True)
    torch.save({f"vision_tower.{key}": value for key, value in state.items()}, tmp_path / "w.pt")
    found = load_checkpoint("efficientnet_b0", tmp_path / "w.pt").state_dict()
    assert same(model, found)


def test_two_networks_behind_unknown_prefixes_are_not_chosen_between(weights, averaged, tmp_path):
    both = {f"q.{key}": value for key, value in weights.items()} | {f"k.{key}": v for key, v in averaged.items()}
    torch.save(both, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="is of an unknown layout"):
        load_checkpoint(NAME, tmp_path / "w.pt")


def test_what_is_beside_the_network_is_left_out_with_a_warning(weights, averaged, tmp_path):
    lightning = {f"model.{key}": value for key, value in weights.items()} | {"criterion.weight": torch.ones(3)}
    torch.save({"state_dict": lightning}, tmp_path / "w.ckpt")
    with pytest.warns(UserWarning, match="1 keys beside those of the network are left out: criterion.weight"):
        assert same(load_checkpoint(NAME, tmp_path / "w.ckpt"), weights)
    both = {f"student.{key}": value for key, value in weights.items()} | {
        f"teacher.{key}": value for key, value in averaged.items()
    }
    torch.save(both, tmp_path / "w.pt")
    with pytest.warns(UserWarning, match="beside those of the network are left out: student.conv_stem.weight"):
        assert same(load_checkpoint(NAME, tmp_path / "w.pt"), averaged)
    half = {f"model.{key}" if key.startswith("blocks.1") else key: value for key, value in weights.items()}
    torch.save(half, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="does not fit the model"):  # half of it is not beside it
        load_checkpoint(NAME, tmp_path / "w.pt")


VALUES = {
    "numpy": {"best": np.float64(0.5), "epoch": np.int64(3), "flag": np.bool_(True), "curve": np.arange(3.0)},
    "paths": {"output": pathlib.PosixPath("/runs"), "where": pathlib.PurePosixPath("a/b")},
    "containers": {
        "history": collections.defaultdict(list, a=[1, 2]),
        "counts": collections.Counter("abca"),
        "set": {1, 2},
    },
    "settings": {"args": SimpleNamespace(lr=0.1), "when": datetime.datetime(2024, 1, 2), "took": datetime.timedelta(1)},
    "queues": {"last": collections.deque([1.0, 2.0], maxlen=5), "steps": range(3)},
    "fractions": {"lr": decimal.Decimal("0.1"), "share": fractions.Fraction(1, 3)},
    "numpy's text": {"name": np.str_("b0"), "letters": np.array(["a", "bc"])},
    "types": {"dtype": torch.float16, "device": torch.device("cpu"), "size": torch.Size([2])},
}


@pytest.mark.parametrize("name", VALUES)
def test_values_beside_the_weights(weights, tmp_path, name):
    torch.save({"model": weights, **VALUES[name]}, tmp_path / "w.pt")
    assert same(load_checkpoint(NAME, tmp_path / "w.pt"), weights)


def test_names_of_numpy_1(weights, tmp_path):
    """numpy 2 writes and reads the same classes under another module's name; windows' paths are read on other
    systems.
    """
    torch.save({"model": weights, "best": np.float32(2.0)}, tmp_path / "new.pt")
    with zipfile.ZipFile(tmp_path / "new.pt") as source, zipfile.ZipFile(tmp_path / "old.pt", "w") as target:
        for name in source.namelist():
            data = source.read(name)
            target.writestr(
                name,
                data.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                if name.endswith("data.pkl")
                else data,
            )
    assert same(load_checkpoint(NAME, tmp_path / "old.pt"), weights)


def test_folders_of_save_pretrained(weights, tmp_path):
    model = create_model(NAME, num_classes=3)
    model.load_state_dict(weights)
    for name, write in (
        ("model.safetensors", save_checkpoint),
        ("pytorch_model.bin", lambda m, path: torch.save(m.state_dict(), path)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        write(model, folder / name)
        assert same(load_checkpoint(NAME, folder), weights) and same(load_checkpoint(NAME, str(folder) + "/"), weights)
    (tmp_path / "none").mkdir()
    with pytest.raises(
        ValueError,
        match="folder .*none' has none of model.safetensors, pytorch_model.bin, which save_pretrained writes",
    ):
        load_checkpoint(NAME, tmp_path / "none")


def test_home_and_old_names(weights, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    torch.save(weights, tmp_path / "w.pth.tar")
    assert same(load_checkpoint(NAME, "~/w.pth.tar"), weights)
    assert same(create_model(NAME, pretrained="~/w.pth.tar"), weights)


class Evil:
    def __reduce__(self):
        return print, ("code ran",)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 21388428\n"


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.ckpt"])
@pytest.mark.parametrize(
    "content, message",
    [
        (POINTER, "is a pointer of git-lfs, not the weights"),
        (b"\n<!DOCTYPE html><html>404</html>", "is a web page, not the weights"),
        (b"<HTML><body>Sign in</body></HTML>", "is a web page"),
        (b"", "is empty"),
        (b"PK\x03\x04 not a zip file", "is unreadable or truncated"),
        (b"\x80\x02not a pickle", "is unreadable or truncated"),
        (b"\xef\xbb\xbf<!doctype html>", "is a web page"),
        (b"404: Not Found", "is text, not the weights: '404: Not Found'"),
        (b'{"error": "gated"}\n', "is text, not the weights: '{"),
        (b"\0\1\2 what", "is unreadable or truncated"),
        (gzip.compress(b"weights"), "is compressed by gzip: unpack it"),
        (b"\x89HDF\r\n\x1a\n", "is HDF5, as of Keras"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, capsys, name, content, message):
    """One line that says what it is, and never how to read it unsafely."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--checkpoint", str(path), "--model", NAME, str(tmp_path)])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and message in err and str(path) in err
    assert not any(
        word in err for word in ("weights_only", "Weights only", "trust the source", "allowlist", "safe_globals")
    )


def test_archives_of_others(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), str(tmp_path / "w.pt"))
    with pytest.raises(ValueError, match="is TorchScript, which is a program: torch.jit.load.PATH..state_dict"):
        load_checkpoint(NAME, tmp_path / "w.pt")
    np.savez(tmp_path / "w.npz", a=np.ones(1))
    with pytest.raises(
        ValueError, match="is an archive of a.npy, .*accepted are files of safetensors and of torch.save"
    ):
        load_checkpoint(NAME, tmp_path / "w.npz")


def test_code_is_refused(weights, tmp_path, capsys):
    for value in (Evil(), {"hparams": Evil()}, create_model(NAME)):
        torch.save({"model": weights, "beside": value}, tmp_path / "w.ckpt")
        with pytest.raises(ValueError, match="is refused: reading it would run code"):
            load_checkpoint(NAME, tmp_path / "w.ckpt")
    assert "code ran" not in capsys.readouterr().out


def test_no_state_dict_says_what_there_is(tmp_path):
    for value, message in (
        ({"epoch": 1, "lr": 0.1}, "its keys are epoch, lr"),
        ([1, 2], "but a list"),
        ({}, "its keys are none"),
    ):
        torch.save(value, tmp_path / "w.pt")
        with pytest.raises(ValueError, match=f"holds no state_dict .*{message}"):
            load_checkpoint(NAME, tmp_path / "w.pt")
