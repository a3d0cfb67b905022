"""Weight sets by name: the table against timm's, the transform against timm's, files from caches that the tests
write.
"""

import http.server
import os
import socket
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from efficientnet import create_model, list_pretrained, load_checkpoint
from efficientnet.weights.checkpoints import save_checkpoint
from efficientnet.weights.pretrained import WEIGHTS, fetch, transform

COMMIT = "0" * 40


def test_the_table_is_timms(timm):
    for weights in WEIGHTS:
        theirs = timm.get_pretrained_cfg(f"{weights.model}.{weights.tag}")
        assert theirs is not None, weights
        assert theirs.hf_hub_id in (weights.hub_id, "timm/")
        for field, value in weights.cfg.items():
            if field not in ("hf_hub_id", "architecture", "tag"):
                assert getattr(theirs, field) == value, (weights, field)
    ours = set(list_pretrained())
    theirs = timm.list_pretrained(["efficientnet_b?.*", "tf_efficientnet_b?.*", "tf_efficientnet_l2.*"])
    assert len(WEIGHTS) == len(ours) and ours == set(theirs)
    for model in {weights.model for weights in WEIGHTS}:  # the same default
        assert list_pretrained(model)[0].partition(".")[2] == timm.get_pretrained_cfg(model).tag


@pytest.mark.parametrize(
    "name", ["efficientnet_b0.ra_in1k", "tf_efficientnet_b3.ap_in1k", "efficientnet_b5.sw_in12k_ft_in1k"]
)
def test_the_transform_is_timms(timm, torchvision, name):
    from PIL import Image

    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (350, 513, 3), dtype=np.uint8))
    config = timm.data.resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg(name).to_dict())
    expected = timm.data.create_transform(**config)(image)
    actual = transform(name)(image)
    assert actual.shape == expected.shape and torch.allclose(actual, expected, atol=1e-6)


def test_transform_of_unknown_weights():
    with pytest.raises(ValueError, match="unknown weight set 'resnet50.a1'; known: efficientnet_b0.ra_in1k"):
        transform("resnet50.a1")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """(cache, weights): a Hub cache as huggingface_hub lays it out, with two of timm's repositories; one has the older
    file.
    """
    home, states = tmp_path_factory.mktemp("hub"), {}
    for model, tag, filename in (
        ("efficientnet_b0", "ra_in1k", "model.safetensors"),
        ("tf_efficientnet_b0", "ns_jft_in1k", "pytorch_model.bin"),
    ):
        repo = home / "hub" / f"models--timm--{model}.{tag}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(COMMIT)
        (repo / "snapshots" / COMMIT).mkdir(parents=True)
        torch.manual_seed(len(states))
        states[model] = create_model(model, fused=False).state_dict()
        path = repo / "snapshots" / COMMIT / filename
        save_file(states[model], path) if path.suffix == ".safetensors" else torch.save(states[model], path)
    return home, states


@pytest.fixture
def offline(published, monkeypatch):
    from huggingface_hub import constants

    home, states = published
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(home / "hub"), raising=False)
    return states


def test_pretrained_from_the_cache(offline):
    for name, pretrained in (
        ("efficientnet_b0", True),
        ("b0", "ra_in1k"),
        ("efficientnet_b0.ra_in1k", True),
        ("efficientnet_b0", "timm/efficientnet_b0.ra_in1k"),
        ("efficientnet_b0", "hf-hub:timm/efficientnet_b0.ra_in1k"),
    ):
        model = create_model(name, pretrained=pretrained, fused=False)
        assert torch.equal(model.classifier.weight, offline["efficientnet_b0"]["classifier.weight"])
        assert model.pretrained_cfg["tag"] == "ra_in1k" and model.pretrained_cfg["crop_pct"] == 0.875
    model = create_model("tf_efficientnet_b0", pretrained=True)
    assert torch.equal(model.conv_stem.weight, offline["tf_efficientnet_b0"]["conv_stem.weight"])
    assert model.config.padding == "same" and model.pretrained_cfg["tag"] == "ns_jft_in1k"
    model = load_checkpoint("efficientnet_b0", "timm/efficientnet_b0.ra_in1k")
    assert torch.equal(model.conv_stem.weight, offline["efficientnet_b0"]["conv_stem.weight"])


def test_other_classes_get_a_fresh_classifier_and_the_rest_is_strict(offline, tmp_path):
    with pytest.warns(
        UserWarning, match="classifier is re-initialised: num_classes is 10, but checkpoint .* has 1000"
    ) as caught:
        model = create_model("efficientnet_b0", pretrained=True, num_classes=10)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert model.classifier.weight.shape == (10, 1280) and model.pretrained_cfg["num_classes"] == 10
    assert torch.equal(model.conv_head.weight, offline["efficientnet_b0"]["conv_head.weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = create_model("efficientnet_b0", pretrained=True, num_classes=0)
        features = create_model("efficientnet_b0", pretrained=True, features_only=True, out_indices=(1, 4))
    assert (
        torch.equal(features.conv_stem.weight, model.conv_stem.weight) and features.pretrained_cfg["tag"] == "ra_in1k"
    )
    state = dict(offline["efficientnet_b0"])
    del state["bn2.weight"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="1 missing: bn2.weight"):
        create_model("efficientnet_b0", pretrained=tmp_path / "w.pt", num_classes=1000)


def test_our_own_checkpoints_as_pretrained(tmp_path):
    model = create_model("b0", num_classes=4, padding="same", bn_eps=0.01)
    preprocess = {"img_size": 48, "mean": [0.1] * 3, "std": [0.2] * 3, "interpolation": "bilinear", "crop_pct": 0.9}
    save_checkpoint(model, tmp_path / "best.safetensors", preprocess=preprocess)
    loaded = create_model("b0", pretrained=str(tmp_path / "best.safetensors"))
    assert (loaded.num_classes, loaded.config.padding, loaded.config.bn_eps) == (4, "same", 0.01)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    assert loaded.pretrained_cfg["input_size"] == (3, 48, 48) and loaded.pretrained_cfg["mean"] == (0.1, 0.1, 0.1)


def test_unknown_tags_name_the_known():
    with pytest.raises(
        ValueError, match="pretrained weights 'ra9' of 'efficientnet_b0' are not known; its tags: ra_in1k, ra4_"
    ):
        create_model("efficientnet_b0", pretrained="ra9")
    with pytest.raises(ValueError, match="weights True of 'efficientnet_b8' are not known; none is published"):
        create_model("efficientnet_b8", pretrained=True)
    with pytest.raises(ValueError, match="device 'meta' holds no weights"):
        create_model("efficientnet_b0", pretrained=True, device="meta")


def test_hub_ids_that_cannot_be_reached(offline):
    with pytest.raises(
        ConnectionError, match="cannot fetch .*'timm/efficientnet_b4.ra2_in1k'.*models--timm--efficientnet_b4.ra2_in1k"
    ):
        create_model("efficientnet_b4", pretrained=True)


def test_the_command_line_offline(tmp_path):
    """HF_HUB_OFFLINE as a user sets it: one line, exit code 2, nothing written."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [
        sys.executable,
        "-m",
        "efficientnet",
        "convert",
        "timm/efficientnet_b0.ra_in1k",
        str(tmp_path / "x.pt"),
        "--to",
        "timm",
    ]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert result.stderr.startswith(
        "efficientnet: error: cannot fetch model.safetensors or pytorch_model.bin of 'timm/efficientnet_b0.ra_in1k'"
    )
    assert str(tmp_path / "home" / "hub" / "models--timm--efficientnet_b0.ra_in1k") in result.stderr
    assert not (tmp_path / "x.pt").exists()


def test_urls(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path / "cache"))
    served = tmp_path / "served"
    served.mkdir()
    state = create_model("b0", num_classes=3, fused=False).state_dict()
    torch.save(state, served / "w.pt")
    torch.save(state, served / "w-deadbeef.pt")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *args: Quiet(*args, directory=str(served)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    try:
        for _ in range(2):  # the second time from the cache
            assert torch.equal(load_checkpoint("b0", f"{url}/w.pt").conv_stem.weight, state["conv_stem.weight"])
            (served / "w.pt").unlink(missing_ok=True)
        assert fetch(f"{url}/w.pt").parent == tmp_path / "cache" / "checkpoints"
        with pytest.raises(ConnectionError, match="invalid hash value"):
            load_checkpoint("b0", f"{url}/w-deadbeef.pt")
        with pytest.raises(ConnectionError, match=r"cannot fetch .*none.pt' \(HTTP Error 404.*cache as '.*none.pt'"):
            load_checkpoint("b0", f"{url}/none.pt")
    finally:
        server.shutdown()
        server.server_close()
    with pytest.raises(ConnectionError, match="Connection refused"):
        load_checkpoint("b0", f"{url}/gone.pt")
    from efficientnet.cli import main

    with pytest.raises(SystemExit) as caught:
        main(["convert", f"{url}/gone.pt", str(tmp_path / "x.pt"), "--to", "timm", "--model", "b0"])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and "Connection refused" in error and str(tmp_path / "cache") in error


def test_without_a_connection_the_hub_is_asked_once(tmp_path, monkeypatch):
    """huggingface_hub's own repetitions, which sleep in between, are not reached; what is in the cache is found."""
    from huggingface_hub import constants

    def sleeping(seconds):
        raise AssertionError("asked again")

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))  # and not listening
        for owner in ("huggingface_hub.hf_api", "huggingface_hub.constants"):
            monkeypatch.setattr(f"{owner}.ENDPOINT", f"http://127.0.0.1:{free.getsockname()[1]}", raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleeping)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        with pytest.raises(
            ConnectionError,
            match=r"cannot fetch .* of 'nobody/nothing' from the Hub \(.*, nor from the cache '.*nothing'",
        ):
            fetch("nobody/nothing")
        snapshot = tmp_path / "models--nobody--nothing" / "snapshots" / COMMIT
        snapshot.mkdir(parents=True)
        (snapshot.parent.parent / "refs").mkdir()
        (snapshot.parent.parent / "refs" / "main").write_text(COMMIT)
        (snapshot / "pytorch_model.bin").write_bytes(b"weights")
        assert fetch("nobody/nothing") == snapshot / "pytorch_model.bin"
