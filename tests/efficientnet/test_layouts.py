"""Weights go from library to library and keep their logits; the libraries themselves are the oracles."""

import subprocess
import sys
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from efficientnet import EfficientNet, create_model, load_checkpoint
from efficientnet.cli import main
from efficientnet.model.config import EfficientNetConfig
from efficientnet.weights.checkpoints import convert, read_metadata
from efficientnet.weights.layouts import LAYOUTS, config_plan, conventions, recognise, translate

CLASSES = 7
SAME = {"padding": "same", "bn_eps": 1e-3, "bn_momentum": 0.01}
SYMMETRIC = {"padding": "symmetric", "bn_eps": 1e-5, "bn_momentum": 0.1}


def calibrated(model):
    """With running statistics of a random batch's own scale, so that no layer's output vanishes or explodes."""
    torch.manual_seed(1)
    model = model.double()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum, module.saved = None, module.momentum
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.2)
                module.reset_running_stats()
            elif isinstance(module, nn.Linear) or getattr(module, "bias", None) is not None:
                nn.init.normal_(module.bias, 0, 0.2)
        model.train()(torch.randn(4, 3, 64, 64, dtype=torch.float64))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = module.saved
    return model.float().eval()


@torch.no_grad()
def logits(model):
    torch.manual_seed(2)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    out = model.double().eval()(x)
    return out.logits if hasattr(out, "logits") else out


def close(actual, expected):
    return (actual - expected).norm() <= 1e-6 * expected.norm()


def build(library, variant):
    """The library's own model."""
    if library == "timm":
        return pytest.importorskip("timm").create_model(
            f"efficientnet_{variant}", num_classes=CLASSES, drop_path_rate=0.0
        )
    if library == "tf":
        return pytest.importorskip("timm").create_model(
            f"tf_efficientnet_{variant}", num_classes=CLASSES, drop_path_rate=0.0
        )
    if library == "torchvision":
        return getattr(pytest.importorskip("torchvision").models, f"efficientnet_{variant}")(num_classes=CLASSES)
    if library == "lukemelas":
        module = pytest.importorskip("efficientnet_pytorch")
        return module.EfficientNet.from_name(f"efficientnet-{variant}", num_classes=CLASSES, image_size=64)
    transformers = pytest.importorskip("transformers")
    from efficientnet.model.config import VARIANTS
    from efficientnet.model.scaling import round_filters

    scaling, dropout = VARIANTS[variant]
    config = transformers.EfficientNetConfig(
        width_coefficient=scaling.width,
        depth_coefficient=scaling.depth,
        hidden_dim=round_filters(1280, scaling.width),
        dropout_rate=dropout,
        num_labels=CLASSES,
    )
    return transformers.EfficientNetForImageClassification(config)


@pytest.mark.parametrize(
    "name, suffix",
    [
        ("efficientnet_b0", ".pt"),
        ("tf_efficientnet_b0", ".pt"),
        ("efficientnet_b0", ".safetensors"),
        pytest.param("efficientnet_b3", ".safetensors", marks=pytest.mark.slow),
    ],
)
def test_round_trip_through_every_layout(tmp_path, name, suffix):
    """timm -> torchvision -> lukemelas -> Hugging Face -> NVIDIA -> timm: the same tensors, and in between the same
    logits.
    """
    model = calibrated(create_model(name, num_classes=CLASSES, fused=False))
    expected, path = logits(model), tmp_path / "0.pt"
    torch.save(model.state_dict(), path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that another library's own models differ: their tests are below
        for i, layout in enumerate(("torchvision", "lukemelas", "huggingface", "nvidia", "timm")):
            source, path = path, tmp_path / f"{layout}{suffix}"
            convert(source, path, layout, model=name if i == 0 else None)
            loaded = load_checkpoint(None, path, fused=False).double()
            assert loaded.config == model.config
            assert close(logits(loaded), expected)
    final = load_checkpoint(None, path).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(final[key].double(), tensor.double()), key


# The library that makes the weights, ours in the middle, and a library with the same padding and epsilon to run them.
PAIRS = [
    ("timm", "b0", "torchvision"),
    ("torchvision", "b3", "timm"),
    ("tf", "b0", "lukemelas"),
    ("lukemelas", "b0", "huggingface"),
    ("huggingface", "b0", "tf"),
    ("lukemelas", "b3", "tf"),
]


@pytest.mark.parametrize(("source", "variant", "target"), PAIRS)
def test_libraries_give_the_logits_of_each_other(tmp_path, source, variant, target):
    theirs = calibrated(build(source, variant))
    expected = logits(theirs)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    name = f"{'tf_' if source == 'tf' else ''}efficientnet_{variant}"
    ours = load_checkpoint(name, tmp_path / "theirs.pth", fused=False)
    trained = (
        SAME if source in ("lukemelas", "huggingface") else SAME | {"bn_momentum": 0.1} if source == "tf" else SYMMETRIC
    )
    assert {field: getattr(ours.config, field) for field in SAME} == trained
    norms = [m for m in ours.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(m.eps, m.momentum) for m in norms} == {(trained["bn_eps"], trained["bn_momentum"])}
    assert ours.num_classes == CLASSES and close(logits(ours), expected)

    to = "timm" if target in ("timm", "tf") else target
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        convert(tmp_path / "theirs.pth", tmp_path / "other.pt", to, model=name if source in ("timm", "tf") else None)
    other = build(target, variant).double()
    other.load_state_dict(torch.load(tmp_path / "other.pt", weights_only=True), strict=True)
    assert close(logits(other), expected)


def nvidia_names():
    """DeepLearningExamples' modules for B0, as facts say, spelt out by hand."""
    names = ["stem.conv", "stem.bn"]
    for stage, repeats in enumerate((1, 2, 2, 3, 3, 4, 1)):
        for block in range(repeats):
            layers = ["expand.conv", "expand.bn"] * (stage > 0)
            layers += ["depsep.conv", "depsep.bn", "se.squeeze", "se.expand", "proj.conv", "proj.bn"]
            names += [f"layers.{stage}.block{block}.{layer}" for layer in layers]
    return [*names, "features.conv", "features.bn", "classifier.fc"]


def test_nvidia_names_and_shapes(tmp_path):
    model = create_model("b0", num_classes=CLASSES, fused=False, padding="symmetric", bn_eps=1e-3, bn_momentum=0.01)
    theirs = translate(model.state_dict(), LAYOUTS["timm"], LAYOUTS["nvidia"], config_plan(model.config))
    assert list(dict.fromkeys(key.rpartition(".")[0] for key in theirs)) == nvidia_names()
    assert theirs["layers.1.block0.se.squeeze.weight"].shape == (4, 96) and theirs[
        "layers.1.block0.se.expand.weight"
    ].shape == (96, 4)
    assert theirs["layers.1.block0.expand.conv.weight"].shape == (96, 16, 1, 1)
    # Files of 2020 and 2021 call the stages layer1 to layer7.
    old = {f"module.{key}".replace("module.layers.0", "module.layer1"): tensor for key, tensor in theirs.items()}
    torch.save({"state_dict": old, "epoch": 3}, tmp_path / "nvidia.pth")
    loaded = load_checkpoint("b0", tmp_path / "nvidia.pth")
    assert {field: getattr(loaded.config, field) for field in SAME} == {
        "padding": "symmetric",
        "bn_eps": 1e-3,
        "bn_momentum": 0.01,
    }
    assert all(torch.equal(loaded.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("variant", ["b0", "b4", "b5", "b7"])
def test_conventions_are_those_of_torchvision(torchvision, variant):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"efficientnet_{variant}")()
    usual = conventions(LAYOUTS["torchvision"], EfficientNetConfig.from_name(variant))
    assert {(m.eps, m.momentum) for m in theirs.modules() if isinstance(m, nn.BatchNorm2d)} == {
        (usual["bn_eps"], usual["bn_momentum"])
    }
    assert recognise(theirs.state_dict()).name == "torchvision"


@pytest.fixture(scope="module")
def lukemelas_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "luke.pth"
    model = create_model("b0", num_classes=CLASSES, fused=False, **SAME)
    state = translate(model.state_dict(), LAYOUTS["timm"], LAYOUTS["lukemelas"], config_plan(model.config))
    torch.save({key: tensor for key, tensor in state.items() if "num_batches" not in key}, path)
    return path


def test_another_padding_is_refused_and_can_be_overruled(lukemelas_file):
    with pytest.raises(
        ValueError, match="lukemelas layout.* trained with padding='same', but the model has padding='symmetric'"
    ):
        load_checkpoint(create_model("b0", num_classes=CLASSES), lukemelas_file)
    with pytest.raises(ValueError, match="trained with bn_eps=0.001, but the model has bn_eps=1e-05"):
        load_checkpoint(create_model("b0", num_classes=CLASSES, padding="same"), lukemelas_file)
    model = create_model("b0", num_classes=CLASSES)
    assert load_checkpoint(model, lukemelas_file, padding="symmetric", bn_eps=1e-5) is model
    model = create_model("tf_efficientnet_b0", num_classes=CLASSES)
    assert load_checkpoint(model, lukemelas_file) is model
    model = load_checkpoint("b0", lukemelas_file, bn_eps=0.01)
    assert (model.config.padding, model.config.bn_eps, model.config.bn_momentum) == ("same", 0.01, 0.01)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: {"state_dict": s},
        lambda s: {"model": s, "epoch": 1},
        lambda s: {"model_ema": s, "model": {key: t + 1 for key, t in s.items()}},
        lambda s: {"state_dict_ema": s, "state_dict": {key: t + 1 for key, t in s.items()}},
        lambda s: {"state_dict": {f"module.{key}": t for key, t in s.items()}},
        lambda s: {f"_orig_mod.module.{key}": t for key, t in s.items()},
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_wrappers_and_prefixes(tmp_path, lukemelas_file, wrap, zipped):
    state = torch.load(lukemelas_file, weights_only=True)
    torch.save(wrap(state), tmp_path / "w.bin", _use_new_zipfile_serialization=zipped)
    assert torch.equal(load_checkpoint("b0", tmp_path / "w.bin").conv_stem.weight, state["_conv_stem.weight"])


def test_the_weights_that_are_not_averaged(tmp_path, lukemelas_file):
    state = torch.load(lukemelas_file, weights_only=True)
    torch.save({"state_dict_ema": state, "state_dict": {key: t + 1 for key, t in state.items()}}, tmp_path / "w.pt")
    loaded = load_checkpoint("b0", tmp_path / "w.pt", use_ema=False)
    assert torch.equal(loaded.conv_stem.weight, state["_conv_stem.weight"] + 1)


def test_hugging_face_without_a_classifier(tmp_path):
    model = create_model("b0", num_classes=0, fused=False, **SAME)
    state = translate(model.state_dict(), LAYOUTS["timm"], LAYOUTS["huggingface"], config_plan(model.config))
    save_file(
        {key.removeprefix("efficientnet."): t.contiguous() for key, t in state.items()}, tmp_path / "base.safetensors"
    )
    loaded = load_checkpoint("b0", tmp_path / "base.safetensors")
    assert loaded.num_classes == 0 and torch.equal(loaded.conv_head.weight, model.conv_head.weight)


def test_unknown_layouts_show_keys_and_the_nearest(tmp_path, torchvision):
    torch.save({f"backbone.layer{i}.weight": torch.zeros(1) for i in range(9)}, tmp_path / "resnet.pt")
    with pytest.raises(
        ValueError, match=r"unknown layout: the nearest .*9 of 9 keys: backbone.layer0.weight, .*layer2.weight, \.\.\."
    ):
        load_checkpoint("b0", tmp_path / "resnet.pt")
    torch.save(torchvision.models.mobilenet_v2().state_dict(), tmp_path / "mobilenet.pt")
    with pytest.raises(
        ValueError, match=r"nearest .* is torchvision, which does not know \d+ of 314 keys: features.1.conv.0.0.weight"
    ):
        load_checkpoint("b0", tmp_path / "mobilenet.pt")
    with pytest.raises(ValueError, match="layout must be one of timm, torchvision, .*, got 'keras'"):
        load_checkpoint("b0", tmp_path / "mobilenet.pt", layout="keras")


def test_keys_that_a_layout_lacks_are_unexpected(tmp_path, lukemelas_file):
    state = torch.load(lukemelas_file, weights_only=True)
    torch.save({**state, "_swish.beta": torch.zeros(1)}, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="1 unexpected: _swish.beta"):
        load_checkpoint("b0", tmp_path / "w.pt")
    del state["_blocks.3._bn1.bias"]
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ValueError, match="1 missing: blocks.2.0.bn2.bias"):
        load_checkpoint("b0", tmp_path / "w.pt")


def test_wrapped_models_and_foreign_modules(tmp_path):
    model = create_model("b0", num_classes=CLASSES, fused=False)
    torch.save({f"module.{key}": t for key, t in model.state_dict().items()}, tmp_path / "w.pt")
    wrapped = nn.DataParallel(create_model("b0", num_classes=CLASSES, fused=False))
    assert load_checkpoint(wrapped, tmp_path / "w.pt") is wrapped
    assert torch.equal(wrapped.module.conv_stem.weight, model.conv_stem.weight)
    assert isinstance(wrapped.module, EfficientNet)
    foreign = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="does not fit the model"):
        load_checkpoint(foreign, tmp_path / "w.pt")


def test_convert_command(tmp_path, lukemelas_file, capsys):
    target = tmp_path / "b0.safetensors"
    assert main(["convert", str(lukemelas_file), str(target), "--to", "timm"]) == 0
    assert "timm layout, efficientnet_b0, trained with padding 'same' and bn_eps 0.001" in capsys.readouterr().out
    assert read_metadata(target)["num_classes"] == CLASSES
    model = load_checkpoint("b0", lukemelas_file)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), load_checkpoint(None, target).parameters(), strict=True)
    )

    assert main(["convert", str(target), str(tmp_path / "tv.pt"), "--to", "torchvision"]) == 0
    error = capsys.readouterr().err
    assert (
        "warning: these weights were trained with padding='same', bn_eps=0.001, but torchvision's own models have"
        in error
    )
    with pytest.raises(ValueError, match="trained with padding='same'"):  # the file remembers
        load_checkpoint(create_model("b0", num_classes=CLASSES), tmp_path / "tv.pt")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["SRC", "x.txt", "--to", "timm"], "target 'x.txt' must end in .safetensors, .pt, .pth, .bin"),
        (["SRC", "x.pt", "--to", "keras"], "invalid choice: 'keras'"),
        (["SRC", "x.pt", "--to", "timm", "--model", "b4"], "does not fit the model"),
        (["TIMM", "x.pt", "--to", "nvidia"], "which efficientnet_* and tf_efficientnet_* share: name the model"),
        (["none.pt", "x.pt", "--to", "nvidia"], "no such checkpoint file"),
        (["SRC", "x.pt", "--to", "timm", "--from", "nvidia"], "is not of a published variant's size: name the model"),
    ],
)
def test_convert_with_bad_input(tmp_path, lukemelas_file, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    torch.save(create_model("b0", fused=False).state_dict(), tmp_path / "timm.pt")
    arguments = [{"SRC": str(lukemelas_file), "TIMM": "timm.pt"}.get(argument, argument) for argument in arguments]
    with pytest.raises(SystemExit) as caught:
        main(["convert", *arguments])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and message in error and error.count("\n") == 1
    assert not list(tmp_path.glob("x.*"))


def test_the_table_needs_no_torch():
    code = "import efficientnet.weights.layouts, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
