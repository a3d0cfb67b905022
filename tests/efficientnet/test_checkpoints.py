import json
import multiprocessing
import os
import pickle
import random
import signal
import time
from argparse import Namespace

import pytest
import torch
from safetensors.torch import save_file

from efficientnet import create_model, load_checkpoint
from efficientnet.files import replacing
from efficientnet.weights.checkpoints import load_training_state, read_metadata, save_checkpoint, save_training_state


def small_model(**kwargs):
    """B0 with weights of its own and statistics that are not the initial ones."""
    torch.manual_seed(len(kwargs))
    model = create_model("efficientnet_b0", num_classes=kwargs.pop("num_classes", 5), **kwargs)
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return small_model()


def logits(model):
    x = torch.linspace(-1, 1, 2 * model.in_chans * 32 * 32).view(2, model.in_chans, 32, 32)
    with torch.no_grad():
        return model.eval()(x)


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"padding": "same", "bn_eps": 0.25, "bn_momentum": 0.01, "in_chans": 1},
        {"num_classes": 0, "drop_path_rate": 0.4},
    ],
)
def test_a_file_builds_its_own_model(tmp_path, kwargs):
    model = small_model(**kwargs)
    save_checkpoint(model, tmp_path / "m.safetensors", classes=["a", "b"], epoch=3)
    loaded = load_checkpoint(None, tmp_path / "m.safetensors")
    assert loaded.config == model.config and loaded.drop_path_rate == model.drop_path_rate
    assert same_state(model, loaded) and torch.equal(logits(model), logits(loaded))
    metadata = read_metadata(tmp_path / "m.safetensors")
    assert metadata["classes"] == ["a", "b"] and metadata["epoch"] == 3


def test_channels_last_weights_survive(tmp_path, model):
    strided = small_model().to(memory_format=torch.channels_last)
    save_checkpoint(strided, tmp_path / "m.safetensors")
    assert same_state(strided, load_checkpoint(None, tmp_path / "m.safetensors"))


@pytest.mark.parametrize(
    "wrap", [lambda s: s, lambda s: {"state_dict": s, "args": Namespace(lr=1)}, lambda s: {"model": s}]
)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_torch_files(tmp_path, model, wrap, suffix):
    path = tmp_path / f"m{suffix}"
    torch.save(wrap(model.state_dict()), path)
    fresh = create_model("b0", num_classes=5)
    assert load_checkpoint(fresh, path) is fresh and same_state(model, fresh)
    assert read_metadata(path) == {}
    with pytest.raises(ValueError, match="does not say which model it is for"):
        load_checkpoint(None, path)


def test_a_name_takes_classes_and_channels_from_the_weights(tmp_path):
    model = small_model(num_classes=7, in_chans=4)
    save_file(model.state_dict(), tmp_path / "m.safetensors")
    loaded = load_checkpoint("efficientnet_b0", tmp_path / "m.safetensors", fused=False)
    assert (loaded.num_classes, loaded.in_chans, type(loaded.blocks[0][0]).__name__) == (7, 4, "MBConv")
    assert same_state(model, loaded)
    with pytest.raises(ValueError, match="unknown model 'b99'"):
        load_checkpoint("b99", tmp_path / "m.safetensors")


def test_other_modules_keep_their_weights_only(tmp_path):
    linear = torch.nn.Linear(3, 2)
    save_checkpoint(linear, tmp_path / "m.safetensors", note="hello")
    assert read_metadata(tmp_path / "m.safetensors") == {"note": "hello"}
    assert same_state(linear, load_checkpoint(torch.nn.Linear(3, 2), tmp_path / "m.safetensors"))


def test_every_misfit_is_named_and_nothing_is_loaded(tmp_path, model):
    state = dict(model.state_dict())
    del state["conv_stem.weight"], state["blocks.1.0.bn2.running_var"]
    state["classifier.weight"] = torch.zeros(9, 1280)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(5)}
    torch.save(state, tmp_path / "m.pt")
    fresh = create_model("b0", num_classes=5)
    before = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_checkpoint(fresh, tmp_path / "m.pt")
    message = str(caught.value)
    assert "m.pt" in message and "\n" not in message
    assert "2 missing: conv_stem.weight, blocks.1.0.bn2.running_var" in message
    assert "5 unexpected: extra.0, extra.1, extra.2, ..." in message
    assert "1 misshapen: classifier.weight (expected (5, 1280), got (9, 1280))" in message
    assert all(torch.equal(before[key], tensor) for key, tensor in fresh.state_dict().items())


def test_batch_counters_may_be_missing(tmp_path, model):
    torch.save(
        {key: tensor for key, tensor in model.state_dict().items() if "num_batches" not in key}, tmp_path / "m.pt"
    )
    assert torch.equal(logits(load_checkpoint("b0", tmp_path / "m.pt")), logits(model))


@pytest.mark.parametrize("other", [{"padding": "same"}, {"bn_eps": 1e-3}])
def test_what_no_shape_tells_is_compared(tmp_path, model, other):
    save_checkpoint(model, tmp_path / "m.safetensors")
    (field,) = other
    with pytest.raises(ValueError, match=f"trained with {field}=.* but the model has {field}="):
        load_checkpoint(create_model("b0", num_classes=5, **other), tmp_path / "m.safetensors")


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_a_value_error(tmp_path, model, suffix, keep):
    path = tmp_path / f"m{suffix}"
    if suffix == ".pt":
        torch.save(model.state_dict(), path)
    else:
        save_checkpoint(model, path)
    size = path.stat().st_size
    os.truncate(path, int(size * keep) if isinstance(keep, float) else keep % size)
    with pytest.raises(ValueError, match=f"checkpoint '.*m{suffix}' is unreadable or truncated") as caught:
        load_checkpoint("b0", path)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_is_not_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "boom"),))

    with open(tmp_path / "m.pt", "wb") as file:
        pickle.dump({"conv_stem.weight": Bomb()}, file)
    torch.save({"conv_stem.weight": Bomb()}, tmp_path / "zip.pt")
    torch.save({"conv_stem.weight": Bomb()}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    torch.save(torch.nn.Linear(2, 2), tmp_path / "module.pt")  # a whole module: its class would have to be called
    for name, cause in (
        ("m.pt", "Unsupported operand"),
        ("zip.pt", "it calls posix.mkdir"),
        ("legacy.pt", "it calls posix.mkdir"),
        ("module.pt", "it calls torch.nn.modules.linear.Linear"),
    ):
        with pytest.raises(ValueError, match=rf"{name}' is refused: reading it would run code \({cause}") as caught:
            load_checkpoint("b0", tmp_path / name)
        assert (
            ".safetensors" in str(caught.value)
            and "state_dict()" in str(caught.value)
            and "\n" not in str(caught.value)
        )
    assert not (tmp_path / "boom").exists()


def write_safetensors(path, metadata):
    save_file({"conv_stem.weight": torch.zeros(1)}, path, metadata={"efficientnet": metadata})


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: torch.save([1, 2], path.with_suffix(".pt")), "holds no state_dict"),
        (lambda path: torch.save({"a": 1}, path.with_suffix(".pt")), "holds no state_dict"),
        (
            lambda path: torch.save({"a": torch.zeros(1)}, path.with_suffix(".pt")),
            "is of an unknown layout: the nearest .* is timm, which does not know 1 of 1 keys: a",
        ),
        (lambda path: path.with_suffix(".ckpt").write_bytes(b"\0x"), "unreadable or truncated"),
        (lambda path: write_safetensors(path, "{not json"), "unreadable or truncated"),
    ],
)
def test_files_of_another_kind(tmp_path, write, message):
    write(tmp_path / "m.safetensors")
    (path,) = tmp_path.iterdir()
    with pytest.raises(ValueError, match=message):
        load_checkpoint("b0", path)


def test_a_description_that_cannot_be_built(tmp_path):
    write_safetensors(tmp_path / "m.safetensors", json.dumps({"config": {"stages": [{"kernel": 3}]}}))
    with pytest.raises(ValueError, match="describes a model that this version cannot build"):
        load_checkpoint(None, tmp_path / "m.safetensors")


def test_no_such_file(tmp_path):
    for read in (lambda path: load_checkpoint("b0", path), read_metadata, load_training_state):
        with pytest.raises(FileNotFoundError, match="no such checkpoint file"):
            read(tmp_path / "none.safetensors")
        with pytest.raises(
            ValueError, match="has none of model.safetensors, pytorch_model.bin, which save_pretrained writes"
        ):
            read(tmp_path)


def test_training_state(tmp_path):
    state = {"optimizer": {"step": torch.tensor(3)}, "history": [{"epoch": 1, "val_acc": 0.5}]}
    save_training_state(tmp_path / "last.train.pt", state)
    assert load_training_state(tmp_path / "last.train.pt") == state
    torch.save({"weights": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match="other.pt' is no training state"):
        load_training_state(tmp_path / "other.pt")


def test_a_failed_write_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.bin"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError, match="disk full"):
        with replacing(path) as temporary:
            temporary.write_bytes(b"ne")
            raise RuntimeError("disk full")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with replacing(path) as temporary:
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def save_forever(path, value, started):
    torch.set_num_threads(1)  # a fork has no thread pool
    linear = torch.nn.Linear(300, 300)
    while True:
        value += 1
        with torch.no_grad():
            for parameter in linear.parameters():
                parameter.fill_(value)
        save_checkpoint(linear, path, value=value)
        save_training_state(path.with_suffix(".pt"), {"optimizer": {}, "value": value, "model": linear.state_dict()})
        started.set()


def test_killed_while_writing_the_files_are_whole(tmp_path):
    """SIGKILL at random moments of a process that does nothing but write: what is there is one of its states,
    complete.
    """
    path, context, rng = tmp_path / "m.safetensors", multiprocessing.get_context("fork"), random.Random(0)
    value = 0
    for _ in range(15):
        started = context.Event()
        process = context.Process(target=save_forever, args=(path, value, started), daemon=True)
        process.start()
        assert started.wait(60)
        time.sleep(rng.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        linear = load_checkpoint(torch.nn.Linear(300, 300), path)
        stored = read_metadata(path)["value"]
        assert stored > value and all((parameter == stored).all() for parameter in linear.parameters())
        state = load_training_state(path.with_suffix(".pt"))
        assert state["value"] in (stored, stored - 1) and all(
            (t == state["value"]).all() for t in state["model"].values()
        )
        value = stored
