"""Accelerated blocks of every library on kernels, against the library's own block and float64: outputs, gradients,
running statistics.
"""

import copy
import itertools

import pytest
import torch
from torch import nn

from efficientnet import MBConv
from effkernels import accelerate, explain
from support.blocks import compare, images, random_like_output, randomise, step
from support.kernel_runs import kernels_of
from support.other_blocks import (
    lukemelas_block,
    timm_block,
    torchvision_block,
    torchvision_efficientnet_block,
    torchvision_mobilenet_block,
    transformers_block,
)
from support.truth import assert_close_to_truth, images_away_from_kinks, relative_error

pytestmark = pytest.mark.usefixtures("small_tiles")


# name: (block, height and width). Every reader, padding rule, activation and gate that a library's models have, with
# and without expansion, squeeze-excite, residual and drop-path. Eight channels and more, as in test_modules.py.
BLOCKS = {
    "timm-b0": (
        lambda: timm_block("InvertedResidual", 8, 8, 3, exp_ratio=2, act_layer=nn.SiLU, se=0.5, drop_path_rate=0.3),
        (5, 4),
    ),
    "timm-tf": (
        lambda: timm_block("InvertedResidual", 8, 16, 5, 2, pad_type="same", exp_ratio=2, act_layer=nn.SiLU, se=0.5),
        (6, 5),
    ),
    "timm-lite": (
        lambda: timm_block("DepthwiseSeparableConv", 16, 16, 3, act_layer=nn.ReLU6, drop_path_rate=0.4),
        (4, 4),
    ),
    "timm-mobilenetv3": (
        lambda: timm_block(
            "InvertedResidual", 8, 8, 5, exp_ratio=2, act_layer=nn.Hardswish, se=0.5, gate=nn.Hardsigmoid
        ),
        (3, 5),
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
}


def triple(make, seed=0):
    """{"fused", "eager", "truth"}: one block accelerated, as the library runs it, and so in float64."""
    torch.manual_seed(seed)
    eager = make()
    randomise(eager)
    return {"fused": accelerate(copy.deepcopy(eager)), "eager": eager, "truth": copy.deepcopy(eager).double()}


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


# What every run of the tests sees of each library in half precision; --slow adds all others.
NARROW = [
    ("timm-lite", "float16", "cast"),
    ("torchvision-mobilenetv2-first", "float16", "autocast"),
    ("lukemelas", "bfloat16", "cast"),
    ("transformers-odd", "bfloat16", "autocast"),
    ("own", "bfloat16", "autocast"),
]
HALF = [
    pytest.param(*case, id="-".join(case), marks=() if case in NARROW else pytest.mark.slow)
    for case in itertools.product(BLOCKS, ("bfloat16", "float16"), ("cast", "autocast"))
]


@pytest.mark.parametrize("name, dtype, how", HALF)
def test_block_in_half_precision(name, dtype, how, device, scratch, monkeypatch):
    """Parameters, buffers and images in half precision, or fp32 ones under autocast: in training, all gradients too,
    and in inference.
    """
    make, size = BLOCKS[name]
    modules, runs, dtype = triple(make), kernels_of(monkeypatch), getattr(torch, dtype)
    if how == "cast":
        for module in modules.values():
            module.to(dtype)
        modules["truth"].double()  # of the rounded values
    kind = dtype if how == "cast" else torch.float32
    shape = (3, in_channels(modules["eager"]), *size)
    x = images_away_from_kinks(modules["truth"], lambda: images(*shape).to(kind), enough=4 * torch.finfo(dtype).eps)
    autocast = dtype if how == "autocast" else None
    gradient = random_like_output(modules["truth"], x).to(dtype)
    compare(modules, x, gradient, autocast)
    assert runs == ["mbconv"]
    out = {}
    for key, module in modules.items():
        with torch.no_grad(), torch.autocast("cpu", autocast, enabled=autocast is not None and key != "truth"):
            out[key] = module.eval()(x.double() if key == "truth" else x)
    assert runs[1:] == ["mbconv_inference"]
    assert out["fused"].dtype == out["eager"].dtype
    assert_close_to_truth(out["fused"], out["eager"], out["truth"])


def test_drop_connect_is_drawn_as_the_library_draws(device):
    """efficientnet_pytorch takes the rate at the call, and draws floor(keep + uniform), whose stream depends on the
    dtype.
    """
    modules = triple(lambda: lukemelas_block(3, 1, 32, 32, 1, 8))
    x = images(6, 32, 3, 3)
    outs = {}
    for key in ("fused", "eager"):
        torch.manual_seed(4)
        outs[key] = modules[key](x, drop_connect_rate=0.5)
    dropped = [torch.equal(a, b) for a, b in zip(outs["fused"], x, strict=True)]
    assert dropped == [torch.equal(a, b) for a, b in zip(outs["eager"], x, strict=True)] and 0 < sum(dropped) < 6
    assert relative_error(outs["fused"], outs["eager"]) < 1e-5


# ---- stem and head ---------------------------------------------------------------------------------------------------


def timm_network(**settings):
    timm = pytest.importorskip("timm")
    blocks = timm.models._efficientnet_builder.decode_arch_def([["ds_r1_k3_s1_e1_c16"]])
    kind = timm.models.efficientnet.EfficientNet
    return kind(
        blocks,
        num_classes=8,
        num_features=24,
        stem_size=16,
        pad_type="same",
        act_layer=nn.SiLU,
        drop_rate=0.3,
        **settings,
    )


def timm_mobilenet():
    timm = pytest.importorskip("timm")
    blocks = timm.models._efficientnet_builder.decode_arch_def([["ds_r1_k3_s1_e1_c16"]])
    return timm.models.mobilenetv3.MobileNetV3(
        blocks, num_classes=8, num_features=24, stem_size=16, act_layer=nn.Hardswish
    )


def torchvision_network():
    models = pytest.importorskip("torchvision").models
    model = models.MobileNetV2(num_classes=8, inverted_residual_setting=[[1, 16, 1, 1]], width_mult=0.25)
    # Not the 1280 channels that it has at any width.
    model.features[-1] = models.mobilenetv2.Conv2dNormActivation(8, 24, kernel_size=1)
    model.classifier = nn.Linear(24, 8)
    return model


def lukemelas_network():
    package = pytest.importorskip("efficientnet_pytorch")
    blocks, settings = package.utils.efficientnet(
        width_coefficient=0.25,
        depth_coefficient=1.0,
        dropout_rate=0.0,
        drop_connect_rate=0.0,
        image_size=8,
        num_classes=8,
    )
    return package.EfficientNet(blocks[:1], settings)


def transformers_stem():
    transformers = pytest.importorskip("transformers")
    from transformers.models.efficientnet.modeling_efficientnet import EfficientNetEmbeddings

    block = transformers_block(3, 1, 16, 16, 1, True)
    return nn.Sequential(EfficientNetEmbeddings(transformers.EfficientNetConfig(width_coefficient=0.5)), block)


NETWORKS = {
    "timm": (timm_network, ["stem", "mbconv", "head"]),
    "timm-mobilenetv3": (timm_mobilenet, ["stem", "mbconv"]),
    "torchvision": (torchvision_network, ["stem", "mbconv", "head"]),
    "lukemelas": (lukemelas_network, ["stem", "mbconv", "head"]),
    "transformers": (transformers_stem, ["stem", "mbconv"]),
}
INFERENCE = {"stem": "stem_inference", "mbconv": "mbconv_inference", "head": "head_inference"}


@pytest.mark.parametrize("name", NETWORKS)
def test_stem_and_head(name, device, scratch, monkeypatch):
    """One launch each in inference; numbers, gradients and statistics of the library's network in both modes."""
    make, operators = NETWORKS[name]
    modules, runs = triple(make), kernels_of(monkeypatch)
    x = images(3, 3, 9, 8)
    outputs = {}
    with torch.no_grad():
        for key, module in modules.items():
            outputs[key] = module.eval()(x.double() if key == "truth" else x)
    assert runs == [INFERENCE[operator] for operator in operators]
    assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"])
    runs.clear()
    for module in modules.values():
        module.train()
        if hasattr(module, "drop_rate"):
            module.drop_rate = 0.0  # its draw depends on the dtype
    gradient, results = torch.randn(outputs["truth"].shape), {}
    for key, module in modules.items():
        found = step(module, x.double() if key == "truth" else x, gradient)
        found = {name: value for name, value in found.items() if not name.endswith("num_batches_tracked")}
        gradients = [found.pop(name).flatten() for name in ("x", *dict(module.named_parameters()))]
        results[key] = {**found, "gradients": torch.cat(gradients)}  # some vanish, before a BatchNorm, so all together
    assert_close_to_truth(*(results[key] for key in ("fused", "eager", "truth")))
    assert runs == operators


def edit_stem(model):
    model.conv_stem = nn.Conv2d(3, 16, 7, 2, 3, bias=False)


@pytest.mark.parametrize(
    "make, edit, reason",
    [
        (timm_network, edit_stem, "conv_stem has kernel_size 7 and stride 2, kernels have 3 and stride 1 or 2"),
        (timm_network, lambda m: m.bn1.register_forward_hook(lambda *args: None), "bn1 has hooks"),
        (timm_network, lambda m: m.bn2.act.register_forward_hook(lambda *args: None), "bn2.act has hooks"),
        (timm_network, lambda m: setattr(m.bn2, "act", nn.Tanh()), "bn2.act is Tanh(), not one of silu"),
        (timm_network, lambda m: m.set_grad_checkpointing(), "grad_checkpointing is on"),
        (timm_network, lambda m: setattr(m, "forward", m.forward), "the network's forward was replaced"),
        (torchvision_network, lambda m: m.features.register_forward_hook(lambda *args: None), "features has hooks"),
        (
            torchvision_network,
            lambda m: setattr(m.features, "2", nn.Conv2d(8, 24, 1)),
            "features does not begin and end with a convolution",
        ),
        (torchvision_network, lambda m: setattr(m.features[0][0], "dilation", (2, 2)), "features.0.0 has dilation"),
        (
            lukemelas_network,
            lambda m: setattr(m._conv_head, "bias", nn.Parameter(torch.zeros(320))),
            "_conv_head has a bias",
        ),
    ],
)
def test_why_stem_and_head_are_not_fused(make, edit, reason):
    model = make().eval()
    edit(model)
    kind, x = type(model), torch.randn(1, 3, 9, 8)
    assert explain(model).ends["stem"].startswith(reason), explain(model).ends
    with torch.no_grad():
        plain = model(x)
        assert type(accelerate(model)) is kind and torch.equal(model(x), plain)


def test_networks_own_forward():
    """A subclass with another forward keeps its stem, another pooling than the mean's the head."""
    base = type(timm_network())

    class Other(base):
        def forward_features(self, x):
            return super().forward_features(x * 2)

    blocks = pytest.importorskip("timm").models._efficientnet_builder.decode_arch_def([["ds_r1_k3_s1_e1_c16"]])
    assert explain(Other(blocks, stem_size=16)).ends["stem"] == "Other has a forward of its own"
    assert explain(timm_network(global_pool="max")).ends == {
        "stem": None,
        "head": explain(timm_network(global_pool="max")).ends["head"],
    }
    assert "global_pool is" in explain(timm_network(global_pool="avgmax")).ends["head"]


def test_a_forward_that_the_library_has_changed(monkeypatch):
    from effkernels.adapters import registry

    path = "timm.models.efficientnet.EfficientNet"
    reader = registry.NETWORKS[path]
    monkeypatch.setitem(registry.NETWORKS, path, reader._replace(names=reader.names + " another_layer"))
    assert explain(timm_network()).ends["stem"] == "EfficientNet's forward is not the one known here"
