"""Accelerated blocks of every library on kernels, against the library's own block and float64: outputs, gradients, running statistics."""

import copy
import functools

import pytest
import torch
from test_modules import compare, images, random_like_output, randomise
from torch import nn
from truth import assert_close_to_truth, relative_error

from efficientnet import MBConv
from effkernels import accelerate, explain

pytestmark = pytest.mark.usefixtures("small_tiles")


def timm_block(cls, *args, se=None, gate=nn.Sigmoid, **kwargs):
    timm = pytest.importorskip("timm")
    blocks = timm.models._efficientnet_blocks
    if se:
        kwargs["se_layer"] = functools.partial(blocks.SqueezeExcite, rd_ratio=se, gate_layer=gate)
    return getattr(blocks, cls)(*args, **kwargs)


def torchvision_efficientnet_block(kernel, stride, I, O, expand, drop):
    models = pytest.importorskip("torchvision").models
    config = models.efficientnet.MBConvConfig(expand, kernel, stride, I, O, 1)
    return models.efficientnet.MBConv(config, drop, functools.partial(nn.BatchNorm2d, eps=1e-3, momentum=0.01))


def torchvision_mobilenet_block(kernel, I, E, O, se, act, stride):
    models = pytest.importorskip("torchvision").models
    config = models.mobilenetv3.InvertedResidualConfig(I, kernel, E, O, se, act, stride, 1, 1.0)
    return models.mobilenetv3.InvertedResidual(config, functools.partial(nn.BatchNorm2d, eps=0.01, momentum=0.3))


def torchvision_block(path, *args):
    module, name = path.split(".")
    return getattr(getattr(pytest.importorskip("torchvision").models, module), name)(*args)


def lukemelas_block(kernel, stride, I, O, expand, image_size, se=0.25):
    model = pytest.importorskip("efficientnet_pytorch").model
    utils = pytest.importorskip("efficientnet_pytorch").utils
    args = utils.BlockArgs(1, kernel, [stride] if stride == 2 else stride, expand, I, O, se, True)
    settings = utils.GlobalParams(batch_norm_momentum=0.99, batch_norm_epsilon=1e-3)
    return model.MBConvBlock(args, settings, image_size=image_size)


def transformers_block(kernel, stride, I, O, expand, adjust, drop=0.0, act="swish"):
    transformers = pytest.importorskip("transformers")
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetBlock

    config = transformers.EfficientNetConfig(hidden_act=act)
    return EfficientNetBlock(config, I, O, stride, expand, kernel, drop, id_skip=not (stride == 1 and I == O), adjust_padding=adjust)


# name: (block, height and width). Every reader, padding rule, activation and gate that a library's models have, with and without
# expansion, squeeze-excite, residual and drop-path. Eight channels and more, as in test_modules.py.
BLOCKS = {
    "timm-b0": (lambda: timm_block("InvertedResidual", 8, 8, 3, exp_ratio=2, act_layer=nn.SiLU, se=0.5, drop_path_rate=0.3), (5, 4)),
    "timm-tf": (lambda: timm_block("InvertedResidual", 8, 16, 5, 2, pad_type="same", exp_ratio=2, act_layer=nn.SiLU, se=0.5), (6, 5)),
    "timm-lite": (lambda: timm_block("DepthwiseSeparableConv", 16, 16, 3, act_layer=nn.ReLU6, drop_path_rate=0.4), (4, 4)),
    "timm-mobilenetv3": (
        lambda: timm_block("InvertedResidual", 8, 8, 5, exp_ratio=2, act_layer=nn.Hardswish, se=0.5, gate=nn.Hardsigmoid), (3, 5),
    ),
    "timm-mnasnet": (lambda: timm_block("DepthwiseSeparableConv", 16, 8, 3, act_layer=nn.ReLU, se=0.5), (4, 3)),
    "torchvision-b0": (lambda: torchvision_efficientnet_block(3, 1, 32, 32, 1, 0.3), (4, 4)),
    "torchvision-v2": (lambda: torchvision_efficientnet_block(5, 2, 32, 16, 2, 0.0), (5, 5)),
    "torchvision-mobilenetv2": (lambda: torchvision_block("mobilenetv2.InvertedResidual", 16, 16, 1, 2), (4, 5)),
    "torchvision-mobilenetv2-first": (lambda: torchvision_block("mobilenetv2.InvertedResidual", 16, 8, 1, 1), (4, 5)),
    "torchvision-mobilenetv3": (lambda: torchvision_mobilenet_block(5, 8, 16, 8, True, "HS", 1), (4, 5)),
    "torchvision-mobilenetv3-plain": (lambda: torchvision_mobilenet_block(3, 8, 32, 16, False, "RE", 2), (5, 4)),
    "torchvision-mnasnet": (lambda: torchvision_block("mnasnet._InvertedResidual", 8, 8, 3, 1, 3, 0.2), (4, 3)),
    "lukemelas": (lambda: lukemelas_block(3, 1, 32, 32, 1, 8), (4, 4)),
    "lukemelas-even": (lambda: lukemelas_block(5, 2, 32, 16, 2, 8), (5, 6)),
    "lukemelas-odd": (lambda: lukemelas_block(3, 2, 8, 16, 2, 7, se=None), (4, 5)),
    "lukemelas-dynamic": (lambda: lukemelas_block(3, 2, 8, 16, 2, None, se=None), (4, 5)),
    "transformers": (lambda: transformers_block(3, 1, 32, 32, 1, True), (4, 4)),
    "transformers-even": (lambda: transformers_block(5, 2, 32, 16, 2, True), (5, 6)),
    "transformers-odd": (lambda: transformers_block(3, 2, 32, 16, 1, False, act="gelu"), (4, 5)),
    "own": (lambda: MBConv(8, 8, 3, expand_ratio=2, se_ratio=1.0, padding="same", drop_path=0.3), (4, 5)),
}  # fmt: skip


def triple(make, seed=0):
    """{"fused", "eager", "truth"}: one block accelerated, as the library runs it, and so in float64."""
    torch.manual_seed(seed)
    eager = make()
    randomise(eager)
    return {"fused": accelerate(copy.deepcopy(eager)), "eager": eager, "truth": copy.deepcopy(eager).double()}


def kernels_of(monkeypatch):
    """What runs on kernels, by name, from here on."""
    from effkernels import library

    runs, run = [], library.run
    monkeypatch.setattr(library, "run", lambda name, *args: (runs.append(name), run(name, *args))[1])
    return runs


def in_channels(block):
    return next(layer for layer in block.modules() if isinstance(layer, nn.Conv2d)).in_channels


@pytest.mark.parametrize("name", BLOCKS)
def test_block_in_training(name, device, scratch, monkeypatch):
    make, size = BLOCKS[name]
    modules, runs = triple(make), kernels_of(monkeypatch)
    x = images(3, in_channels(modules["eager"]), *size)
    gradient = random_like_output(modules["truth"], x)
    assert explain(modules["fused"], x) == {"": None}
    compare(modules, x, gradient)
    assert runs == ["mbconv"]


@pytest.mark.parametrize("name", BLOCKS)
def test_block_in_inference(name, device, scratch, monkeypatch):
    make, size = BLOCKS[name]
    modules, runs = triple(make, seed=1), kernels_of(monkeypatch)
    x = images(2, in_channels(modules["eager"]), *size)
    with torch.no_grad():
        out = {key: module.eval()(x.double() if key == "truth" else x) for key, module in modules.items()}
    assert runs == ["mbconv_inference"]
    assert_close_to_truth(out["fused"], out["eager"], out["truth"])


def test_drop_connect_is_drawn_as_the_library_draws(device):
    """efficientnet_pytorch takes the rate at the call, and draws floor(keep + uniform), whose stream depends on the dtype."""
    modules = triple(lambda: lukemelas_block(3, 1, 32, 32, 1, 8))
    x = images(6, 32, 3, 3)
    outs = {}
    for key in ("fused", "eager"):
        torch.manual_seed(4)
        outs[key] = modules[key](x, drop_connect_rate=0.5)
    dropped = [torch.equal(a, b) for a, b in zip(outs["fused"], x, strict=True)]
    assert dropped == [torch.equal(a, b) for a, b in zip(outs["eager"], x, strict=True)] and 0 < sum(dropped) < 6
    assert relative_error(outs["fused"], outs["eager"]) < 1e-5
