"""What keeps a block of a known library from running fused: each reason by itself, named after the layer, and the
block's own numbers.
"""

import copy
import functools
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, spectral_norm

from efficientnet import MBConv
from effkernels import accelerate, explain
from effkernels.geometry import LARGEST_KERNEL_SIZE
from support.other_blocks import (
    lukemelas_block,
    timm_block,
    torchvision_block,
    torchvision_efficientnet_block,
    transformers_block,
)


def inverted(**settings):
    return timm_block(
        "InvertedResidual",
        8,
        8,
        3,
        **{"exp_ratio": 2, "act_layer": nn.SiLU, "se": 0.5, "drop_path_rate": 0.2} | settings,
    )


def separable(**settings):
    return timm_block("DepthwiseSeparableConv", 8, 8, 3, **settings)


def put(path, value):
    """An edit that puts ``value``, or what it makes of the present module, at ``path``."""

    def edit(block):
        *owners, name = path.split(".")
        owner = block.get_submodule(".".join(owners))
        setattr(
            owner, name, value(getattr(owner, name)) if callable(value) and not isinstance(value, nn.Module) else value
        )

    return edit


def conv(inputs, outputs, k=1, **settings):
    return nn.Conv2d(inputs, outputs, k, **{"bias": False, "padding": 0 if k == 1 else 1} | settings)


def forward_hook(path):
    return lambda block: block.get_submodule(path).register_forward_hook(lambda *args: None)


def weight_standardised(block):
    block.conv_pw = pytest.importorskip("timm").layers.StdConv2d(8, 16, 1)


def mixed_kernels(block):
    block.conv_dw = pytest.importorskip("timm").layers.MixedConv2d(16, 16, [3, 5], depthwise=True)


def split_norms(block):
    block.bn1 = pytest.importorskip("timm").layers.convert_splitbn_model(block.bn1, 2)


def gated(name, *args, **settings):
    return lambda block: setattr(block, "se", getattr(pytest.importorskip("timm").layers, name)(*args, **settings))


def space_to_depth(block):
    block.conv_s2d = conv(8, 32, 2)


def depthwise_padding(block):
    block._depthwise_conv.static_padding = nn.ZeroPad2d((0, 2, 0, 2))


def projection_padding(block):
    block._project_conv.static_padding = nn.ZeroPad2d(1)


@pytest.mark.parametrize(
    "make, edit, reason",
    [
        (inverted, put("conv_dw", conv(16, 16, 3, groups=16, bias=True)), "conv_dw has a bias"),
        (inverted, put("conv_pw", conv(8, 16, bias=True)), "conv_pw has a bias"),
        (inverted, put("se.conv_reduce", conv(16, 8)), "se.conv_reduce has no bias"),
        (functools.partial(inverted, dilation=2), None, r"conv_dw has dilation \(2, 2\), kernels need \(1, 1\).*"),
        (functools.partial(inverted, group_size=4), None, "conv_dw .*"),
        (inverted, put("conv_pwl", conv(16, 8, groups=2)), "conv_pwl .*"),
        (
            inverted,
            put("conv_pwl", conv(24, 8)),
            r"conv_pwl does not fit its neighbours: its weight is \(8, 24, 1, 1\).*",
        ),
        (inverted, put("conv_pw", conv(8, 16, 3)), "conv_pw has kernel_size .*"),
        (
            inverted,
            put("conv_dw", conv(16, 16, 4, groups=16)),
            f"conv_dw has kernel_size 4, kernels have odd ones up to {LARGEST_KERNEL_SIZE}",
        ),
        (inverted, put("conv_dw", conv(16, 16, (3, 5), groups=16, padding=(1, 2))), "conv_dw has kernel_size .*"),
        (inverted, put("conv_dw", conv(16, 16, 3, groups=16, stride=3)), "conv_dw has stride 3, kernels have 1 and 2"),
        (
            inverted,
            put("conv_dw", conv(16, 16, 3, groups=16, padding=0)),
            "conv_dw pads .*neither symmetrically nor as TensorFlow does",
        ),
        (
            inverted,
            put("conv_dw", conv(16, 16, 3, groups=16, padding_mode="reflect")),
            "conv_dw has padding_mode reflect.*",
        ),
        (inverted, weight_standardised, "conv_pw is a StdConv2d"),
        (inverted, mixed_kernels, "conv_dw is a MixedConv2d"),
        (
            inverted,
            lambda b: parametrize.register_parametrization(b.conv_dw, "weight", nn.Identity()),
            "conv_dw is a ParametrizedConv2d",
        ),
        (inverted, lambda b: parametrizations.spectral_norm(b.conv_pwl), "conv_pwl is a ParametrizedConv2d"),
        (inverted, lambda b: spectral_norm(b.conv_pwl), "conv_pwl has hooks"),
        (inverted, put("conv_pw", torch.ao.nn.quantized.Conv2d(8, 16, 1)), "conv_pw is a Conv2d"),
        (inverted, put("bn1", nn.BatchNorm2d(16, affine=False)), r"bn1 has no weight and bias \(affine=False\)"),
        (inverted, put("bn2", nn.GroupNorm(2, 16)), "bn2 is a GroupNorm"),
        (inverted, put("bn2", nn.BatchNorm2d(16)), r"the activation after the expand convolution \(bn1.act SiLU\(.*"),
        (inverted, split_norms, "bn1 is a SplitBatchNorm2d"),
        (inverted, put("bn1.drop", nn.Dropout(0.5)), "bn1.drop is a Dropout"),
        (
            inverted,
            put("bn1.act", nn.ReLU()),
            r"the activation after the expand convolution \(bn1.act ReLU\(\)\) is not .* \(silu\)",
        ),
        (functools.partial(inverted, act_layer=nn.Mish), None, r"bn2.act is Mish\(.*\), not one of silu, relu, .*"),
        (
            functools.partial(separable, pw_act=True),
            None,
            "bn2.act is ReLU.*: kernels have no activation after the project convolution",
        ),
        (inverted, put("se.act1", nn.Tanh()), r"se.act1 is Tanh\(\), not one of .*"),
        (functools.partial(inverted, gate=nn.Tanh), None, r"se.gate is Tanh\(.*\), not one of sigmoid, hard_sigmoid"),
        (inverted, put("se", nn.Conv2d(16, 16, 1)), "se is a Conv2d, which is not squeeze-excite as kernels have it"),
        (inverted, gated("EcaModule", 16), "se is a EcaModule, .*"),
        (inverted, gated("SEModule", 16, add_maxpool=True), "se adds maximum pooling"),
        (inverted, gated("SEModule", 16, norm_layer=nn.BatchNorm2d), "se.bn is a .*"),
        (inverted, put("aa", nn.AvgPool2d(1)), "aa is a AvgPool2d"),
        (separable, space_to_depth, "conv_s2d: a space-to-depth convolution comes first"),
        (inverted, put("drop_path", nn.Dropout(0.1)), "drop_path is a Dropout"),
        (inverted, put("has_skip", True), None),
        (functools.partial(inverted, stride=2), put("has_skip", True), "a residual over stride 2 and 8 -> 8 channels"),
        (inverted, forward_hook("bn1"), "bn1 has hooks"),
        (inverted, forward_hook("bn2.act"), "bn2.act has hooks"),
        (inverted, forward_hook("se"), "se has hooks"),
        (inverted, lambda b: b.drop_path.register_full_backward_hook(lambda *args: None), "drop_path has hooks"),
        (inverted, put("conv_pw.forward", lambda forward: forward), "conv_pw.forward was replaced"),
        (inverted, lambda b: setattr(b, "forward", b.forward), "the block's forward was replaced"),
        (lambda: torchvision_efficientnet_block(3, 1, 8, 8, 2, 0.0), forward_hook("block.0"), "block.0 has hooks"),
        (
            lambda: torchvision_efficientnet_block(3, 1, 8, 8, 2, 0.0),
            put("block.2", nn.Identity()),
            "block.2 is a Identity.*|block .*",
        ),
        (
            lambda: torchvision_efficientnet_block(3, 1, 8, 8, 2, 0.0),
            put("block.1.1", nn.Identity()),
            "block.1.1 is a Identity.*|block .*",
        ),
        (
            lambda: torchvision_efficientnet_block(3, 1, 8, 8, 2, 0.0),
            put("block.2", nn.Tanh()),
            "block.2 is a Tanh, where kernels .*",
        ),
        (
            lambda: torchvision_block("mobilenetv2.InvertedResidual", 8, 8, 1, 2),
            put("conv.1.0.dilation", (2, 2)),
            "conv.1.0 has .*",
        ),
        (
            lambda: lukemelas_block(3, 1, 8, 8, 2, 8),
            depthwise_padding,
            "_depthwise_conv.static_padding pads ZeroPad2d.*",
        ),
        (
            lambda: lukemelas_block(3, 1, 8, 8, 2, 8),
            projection_padding,
            "_project_conv.static_padding pads a 1x1 convolution",
        ),
        (lambda: lukemelas_block(3, 1, 8, 8, 2, 8), put("_swish", nn.Mish()), "_swish is Mish.*"),
        (
            lambda: transformers_block(3, 1, 8, 8, 2, True, act="gelu_new"),
            None,
            "depthwise_conv.depthwise_act is NewGELUActivation.*",
        ),
        (lambda: transformers_block(3, 1, 8, 8, 2, True), forward_hook("expansion"), "expansion has hooks"),
        (lambda: MBConv(8, 8), forward_hook("bn1"), "bn1 has hooks"),
        (lambda: MBConv(8, 8), put("conv_dw.dilation", (2, 2)), "conv_dw has dilation .*"),
        (lambda: MBConv(8, 8), lambda b: setattr(b, "forward", b.forward), "the block's forward was replaced"),
    ],
)
def test_reason(make, edit, reason):
    block = make()
    if edit is not None:
        edit(block)
    found = explain(block)[""]
    if reason is None:
        assert found is None
        return
    assert re.fullmatch(reason, found), found
    kind = type(block)
    assert type(accelerate(block, strict=False)) is kind
    with pytest.raises(ValueError, match="the model itself: ") as error:
        accelerate(block)
    assert found in str(error.value)


def test_reasons_after_accelerate(device, monkeypatch):
    """What is edited later is seen at the next call: the block's own forward runs then, and again the kernels once it
    is undone.
    """
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    block = accelerate(inverted().eval())
    x, seen = torch.randn(2, 8, 4, 4), []
    handle = block.bn2.register_forward_hook(lambda *args: seen.append(args))
    assert explain(block) == {"": "bn2 has hooks"} and explain(block).fused == 0
    with torch.no_grad():
        hooked = block(x)
        assert len(seen) == 1
        handle.remove()
        fused = block(x)
    assert len(seen) == 1 and explain(block, x) == {"": None} and explain(block).fused == 1
    torch.testing.assert_close(hooked, fused)


@pytest.mark.parametrize(
    "make, reason",
    [
        (
            lambda: transformers_block(3, 1, 8, 8, 2, True, drop=0.2),
            "in training, projection.dropout (p=0.2) drops single elements",
        ),
        (
            lambda: put_drop_path(scale_by_keep=False),
            "in training, drop_path is DropPath(drop_prob=0.500): kernels drop samples",
        ),
        (lambda: stochastic_depth(0.5, "batch"), "in training, stochastic_depth is StochasticDepth(p=0.5, mode=batch)"),
        (lambda: stochastic_depth(1.0, "row"), "in training, stochastic_depth is StochasticDepth(p=1.0, mode=row)"),
    ],
)
def test_reasons_in_training_only(make, reason, device, monkeypatch):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    block = make()
    plain = copy.deepcopy(block)
    accelerate(block)  # it is of use in eval
    x = torch.randn(4, 8, 3, 3)
    assert explain(block, x)[""].startswith(reason)
    torch.manual_seed(0)
    own = block(x)
    torch.manual_seed(0)
    assert torch.equal(own, plain(x))
    assert explain(block.eval(), x) == {"": None}


def put_drop_path(**settings):
    block = inverted()
    block.drop_path = pytest.importorskip("timm").layers.DropPath(0.5, **settings)
    return block


def stochastic_depth(p, mode):
    block = torchvision_efficientnet_block(3, 1, 8, 8, 2, 0.0)
    block.stochastic_depth.p, block.stochastic_depth.mode = p, mode
    return block


def test_subclass_with_its_own_forward():
    base = type(inverted())

    class Scaled(base):
        def forward(self, x):
            return 2 * super().forward(x)

    class Named(base):
        pass

    assert explain(Scaled(8, 8)) == {"": "Scaled has a forward of its own, not InvertedResidual's"}
    assert explain(Named(8, 8)) == {"": None} and isinstance(accelerate(Named(8, 8)), Named)


def test_blocks_that_are_not_mbconv():
    models = pytest.importorskip("torchvision").models
    config = models.efficientnet.FusedMBConvConfig(2, 3, 1, 8, 8, 1)
    dense = models.efficientnet.FusedMBConv(config, 0.0, nn.BatchNorm2d)
    edge = timm_block("EdgeResidual", 8, 8, 3)
    conditional = timm_block("CondConvResidual", 8, 8, 3, num_experts=2)
    universal = timm_block("UniversalInvertedResidual", 8, 8)
    reasons = explain(nn.Sequential(dense, edge, conditional, universal))
    assert reasons["0"] == reasons["1"] and "a dense k x k convolution" in reasons["0"]
    assert "CondConv" in reasons["2"] and "MobileNetV4" in reasons["3"]
    with pytest.raises(
        ValueError,
        match="(?s)Sequential has no block that effkernels can run:\n  0: a dense.*\n  1: .*\n  2: .*CondConv",
    ):
        accelerate(nn.Sequential(dense, edge, conditional))


def test_bad_arguments():
    with pytest.raises(ValueError, match="Linear has no block that effkernels can run, nor any of a known class"):
        accelerate(nn.Linear(2, 2))
    linear = nn.Linear(2, 2)
    assert accelerate(linear, strict=False) is linear and explain(linear) == {}
    for function in (accelerate, explain):
        with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
            function("efficientnet_b0")


def test_what_explain_prints():
    model = nn.Sequential(inverted(), separable(pw_act=True), MBConv(8, 8))
    assert str(explain(nn.ReLU())) == "no MBConv block of a known class"
    before = str(explain(model)).splitlines()
    assert before[0] == "0 of 3 MBConv blocks run fused"
    assert before[1].split() == ["0", "InvertedResidual", "eligible,", "accelerate(model)", "fuses", "it"]
    after = str(explain(accelerate(model))).splitlines()
    assert after[0] == "2 of 3 MBConv blocks run fused"
    assert [line.split()[:3] for line in after[1::2]] == [["0", "InvertedResidual", "fused"], ["2", "MBConv", "fused"]]
    assert after[2].split()[:2] == ["1", "DepthwiseSeparableConv"] and "no activation after the project" in after[2]
