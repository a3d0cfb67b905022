"""Exported programs against the model, each in its own runtime."""

import json
import re
import sys

import numpy as np
import pytest
import torch

from efficientnet.errors import InputError
from efficientnet.model.config import EfficientNetConfig, StageConfig
from efficientnet.model.network import EfficientNet
from efficientnet.weights.checkpoints import load_checkpoint, save_checkpoint
from efficientnet.weights.export import EXPORT_FORMATS, METADATA_KEY, export_model
from support.command_line import assert_one_line

STAGES = (StageConfig(3, 1, 1, 8, 1), StageConfig(5, 2, 6, 16, 2))
CLASSES = ["ant", "bee", "cat", "dog", "eel"]
PREPROCESS = {
    "img_size": 19,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.2, 0.2],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a small network for 19 x 19 images whose weights and running statistics matter: 5 logits of about 1."""
    torch.manual_seed(0)
    config = EfficientNetConfig(STAGES, stem_channels=8, head_channels=32, resolution=16, padding="same", bn_eps=1e-2)
    model = EfficientNet(config, num_classes=5)
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        norm.momentum = 1.0
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
        torch.nn.init.normal_(norm.bias, 0.0, 0.2)
    torch.nn.init.normal_(model.classifier.weight)
    with torch.no_grad():
        model.train()(torch.randn(8, 3, 19, 19))
    path = tmp_path_factory.mktemp("export") / "model.safetensors"
    save_checkpoint(model, path, classes=CLASSES, preprocess=PREPROCESS)
    return path


def read(path, format):
    """(program, metadata), as a user of the runtime reads the file, without this package."""
    if format == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        metadata = session.get_modelmeta().custom_metadata_map[METADATA_KEY]
        return lambda x: torch.from_numpy(session.run(["logits"], {"images": np.asarray(x)})[0]), metadata
    files = {f"{METADATA_KEY}.json": ""}
    if format == "torchscript":
        return torch.jit.load(path, _extra_files=files), files[f"{METADATA_KEY}.json"]
    with open(path, "rb") as file:
        program = torch.export.load(file, extra_files=files)
    return program.module(), files[f"{METADATA_KEY}.json"]


@pytest.mark.parametrize("format", EXPORT_FORMATS)
@pytest.mark.parametrize("batch", [(), ("--batch-size", 4), ("--dynamic-batch",)], ids=str)
def test_the_program_gives_the_models_logits(run, checkpoint, tmp_path, format, batch):  # noqa: F811
    output = tmp_path / "program"
    code, out, err = run("export", "--checkpoint", checkpoint, "--format", format, "--output", output, *batch)
    assert code == 0 and err == "", err
    assert list(tmp_path.iterdir()) == [output]
    size = {(): "1", ("--batch-size", 4): "4", ("--dynamic-batch",): "any"}[batch]
    assert f"{format}, {size} x 3 x 19 x 19 images, {output.stat().st_size:,} bytes" in out
    program, metadata = read(str(output), format)
    assert json.loads(metadata) == {"classes": CLASSES, "preprocess": PREPROCESS}
    model = load_checkpoint(None, checkpoint).eval()
    for n in {"1": (1,), "4": (4,), "any": (1, 2, 7)}[size]:
        images = torch.randn(n, 3, 19, 19)
        with torch.no_grad():
            expected, logits = model(images), program(images)
        assert expected.abs().max() > 0.1 and logits.shape == expected.shape
        assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert float(re.search(r"maximal difference from the model: (\S+)", out)[1]) < 1e-4


def test_image_size_and_opset(run, checkpoint, tmp_path):  # noqa: F811
    import onnx

    output = tmp_path / "m.onnx"
    options = ("--img-size", 32, "--opset", 18)
    code, out, _ = run("export", "--checkpoint", checkpoint, "--format", "onnx", "--output", output, *options)
    assert code == 0 and "1 x 3 x 32 x 32" in out
    written = onnx.load(output)
    onnx.checker.check_model(written)
    assert [entry.version for entry in written.opset_import if entry.domain == ""] == [18]
    assert [d.dim_value for d in written.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 32, 32]
    assert json.loads(written.metadata_props[0].value)["preprocess"]["img_size"] == 32


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_a_program_that_differs_is_not_kept(checkpoint, tmp_path, format, monkeypatch):
    """Weights are changed between the export and the check, as a faulty exporter would."""
    model = load_checkpoint(None, checkpoint, fused=False).eval()
    writer = {"onnx": "_write_onnx", "torchscript": "_write_torchscript", "torch-export": "_write_torch_export"}[format]
    import efficientnet.weights.export

    write = getattr(efficientnet.weights.export, writer)

    def faulty(model, *args):
        write(model, *args)
        model.bn2.bias.data += 0.01

    monkeypatch.setattr(efficientnet.weights.export, writer, faulty)
    (tmp_path / "program").write_text("from before")
    with pytest.raises(
        InputError, match=rf"^the exported {format} program differs from the model by 0\.\d+ where logits reach"
    ):
        export_model(model, tmp_path / "program", format, image_size=19)
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("program", "from before")]


@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_a_failed_export_leaves_nothing(run, checkpoint, tmp_path, format, monkeypatch):  # noqa: F811
    module = {"onnx": "torch.onnx.export", "torchscript": "torch.jit.trace", "torch-export": "torch.export.export"}[
        format
    ]

    def failing(*args, **kwargs):
        raise RuntimeError("no such operator\nmany more lines")

    monkeypatch.setattr(module, failing)
    result = run("export", "--checkpoint", checkpoint, "--format", format, "--output", tmp_path / "program")
    assert_one_line(result, rf"export to {format} failed \(RuntimeError: no such operator\)")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--format", "tflite"], "format must be one of onnx, torchscript, torch-export, got 'tflite'"),
        (["--format", "torchscript", "--opset", 18], "opset is for format onnx, not for torchscript"),
        (["--format", "onnx", "--opset", 9], r"opset must be from 18 to \d+, got 9"),
        (["--format", "onnx", "--opset", 99], r"opset must be from 18 to \d+, got 99"),
        (["--format", "onnx", "--batch-size", 0], "batch_size must be an integer >= 1, got 0"),
        (["--format", "onnx", "--batch-size", 2, "--dynamic-batch"], "batch_size is not for dynamic_batch"),
        (["--format", "onnx", "--img-size", 0], "img-size: must be an integer >= 1 or two, height and width, got '0'"),
        (
            ["--format", "onnx", "--checkpoint", "/no/such.safetensors"],
            "no such checkpoint file: '/no/such.safetensors'",
        ),
        (
            ["--format", "onnx", "--output", "/no/such/m.onnx"],
            "output '/no/such/m.onnx' must be a file in a folder that exists",
        ),
        (["--format", "onnx", "--output", "/"], "output '/' must be a file in a folder that exists"),
        (["--format", "onnx", "--model", "b4"], "does not fit the model"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, checkpoint, tmp_path, argv, message):  # noqa: F811
    assert_one_line(run("export", "--checkpoint", checkpoint, "--output", tmp_path / "m", *argv), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(run, checkpoint, tmp_path, monkeypatch, package):  # noqa: F811
    monkeypatch.setitem(sys.modules, package, None)
    result = run("export", "--checkpoint", checkpoint, "--format", "onnx", "--output", tmp_path / "m.onnx")
    assert_one_line(result, re.escape(f'{package} is not installed; pip install "effkernels[export]"'))


@pytest.mark.slow
@pytest.mark.parametrize("format", EXPORT_FORMATS)
def test_a_trained_b0(run, trained, tmp_path, format):  # noqa: F811
    output = tmp_path / "b0"
    options = ("--format", format, "--output", output, "--img-size", 64, "--dynamic-batch")
    code, out, _ = run("export", "--checkpoint", trained[1] / "best.safetensors", *options)
    assert code == 0 and float(re.search(r"maximal difference from the model: (\S+)", out)[1]) < 1e-4
    program, metadata = read(str(output), format)
    assert json.loads(metadata)["classes"] == ["blue", "green", "red"]
    images = torch.randn(5, 3, 64, 64)
    with torch.no_grad():
        expected = load_checkpoint(None, trained[1] / "best.safetensors").eval()(images)
        assert (program(images) - expected).norm() <= 1e-4 * expected.norm()
