import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from efficientnet import EfficientNet, MBConv, compound_scale, create_model
from efficientnet.model.config import EfficientNetConfig, StageConfig

# Small, but with every kind of block: no expansion, both kernel sizes, stride 2, residual, no squeeze-excite.
TINY = EfficientNetConfig(
    stages=(StageConfig(3, 1, 1, 8, 1), StageConfig(5, 2, 6, 16, 2), StageConfig(3, 2, 4, 24, 2, se_ratio=0)),
    stem_channels=8,
    head_channels=32,
    resolution=32,
)

# Stem, stages and head, and repeats, of every variant.
SHAPES = {
    "b0": ((32, 16, 24, 40, 80, 112, 192, 320, 1280), (1, 2, 2, 3, 3, 4, 1)),
    "b1": ((32, 16, 24, 40, 80, 112, 192, 320, 1280), (2, 3, 3, 4, 4, 5, 2)),
    "b2": ((32, 16, 24, 48, 88, 120, 208, 352, 1408), (2, 3, 3, 4, 4, 5, 2)),
    "b3": ((40, 24, 32, 48, 96, 136, 232, 384, 1536), (2, 3, 3, 5, 5, 6, 2)),
    "b4": ((48, 24, 32, 56, 112, 160, 272, 448, 1792), (2, 4, 4, 6, 6, 8, 2)),
    "b5": ((48, 24, 40, 64, 128, 176, 304, 512, 2048), (3, 5, 5, 7, 7, 9, 3)),
    "b6": ((56, 32, 40, 72, 144, 200, 344, 576, 2304), (3, 6, 6, 8, 8, 11, 3)),
    "b7": ((64, 32, 48, 80, 160, 224, 384, 640, 2560), (4, 7, 7, 10, 10, 13, 4)),
    "b8": ((72, 32, 56, 88, 176, 248, 424, 704, 2816), (4, 8, 8, 11, 11, 15, 4)),
    "l2": ((136, 72, 104, 176, 344, 480, 824, 1376, 5504), (6, 11, 11, 16, 16, 22, 6)),
}


def tiny(**kwargs):
    torch.manual_seed(0)
    return create_model(TINY, **{"num_classes": 5, "fused": False, **kwargs})


def expected_shapes(channels, repeats):
    """The state_dict's keys and shapes, from the channel and repeat table alone."""
    kernels, ratios = (3, 3, 5, 3, 5, 5, 3), (1, 6, 6, 6, 6, 6, 6)
    shapes = {}

    def conv(name, out, inputs, k=1, bias=False):
        shapes[f"{name}.weight"] = (out, inputs, k, k)
        if bias:
            shapes[f"{name}.bias"] = (out,)

    def norm(name, n):
        shapes.update({f"{name}.{part}": (n,) for part in ("weight", "bias", "running_mean", "running_var")})
        shapes[f"{name}.num_batches_tracked"] = ()

    conv("conv_stem", channels[0], 3, k=3)
    norm("bn1", channels[0])
    inputs = channels[0]
    for s, (out, count, k, ratio) in enumerate(zip(channels[1:8], repeats, kernels, ratios, strict=True)):
        for b in range(count):
            at, mid = f"blocks.{s}.{b}", inputs * ratio
            if ratio == 1:
                dw_norm, project, project_norm = "bn1", "conv_pw", "bn2"
            else:
                dw_norm, project, project_norm = "bn2", "conv_pwl", "bn3"
                conv(f"{at}.conv_pw", mid, inputs)
                norm(f"{at}.bn1", mid)
            conv(f"{at}.conv_dw", mid, 1, k)
            norm(f"{at}.{dw_norm}", mid)
            conv(f"{at}.se.conv_reduce", inputs // 4, mid, bias=True)
            conv(f"{at}.se.conv_expand", mid, inputs // 4, bias=True)
            conv(f"{at}.{project}", out, mid)
            norm(f"{at}.{project_norm}", out)
            inputs = out
    conv("conv_head", channels[8], inputs)
    norm("bn2", channels[8])
    shapes["classifier.weight"], shapes["classifier.bias"] = (1000, channels[8]), (1000,)
    return shapes


@pytest.mark.parametrize("variant", SHAPES)
def test_state_dict_is_the_published_one(variant):
    state = create_model(variant, fused=False, device="meta").state_dict()
    assert {key: tuple(value.shape) for key, value in state.items()} == expected_shapes(*SHAPES[variant])


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(32, 32), (33, 47), (1, 1)])
def test_shapes_for_any_image_size(padding, size):
    model = tiny(padding=padding, in_chans=2).eval()
    x = torch.randn(2, 2, *size)
    features = model.forward_features(x)
    assert features.shape == (2, 32, math.ceil(size[0] / 8), math.ceil(size[1] / 8))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.allclose(pooled, features.mean((2, 3)))
    logits = model.forward_head(features)
    assert logits.shape == (2, 5) and torch.equal(logits, model(x))
    assert torch.equal(logits, model.classifier(pooled))


def test_channels_last_gives_the_same_numbers():
    x = torch.randn(2, 3, 32, 32)
    model = tiny().double().eval()
    expected = model(x.double())
    actual = model.to(memory_format=torch.channels_last)(x.double().to(memory_format=torch.channels_last))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


def test_input_is_left_alone():
    x = torch.randn(2, 3, 32, 32)
    before = x.clone()
    with torch.no_grad():
        tiny(padding="same")(x)
    assert torch.equal(x, before)


def test_names_set_padding_and_batchnorm_everywhere():
    for name, eps, padding, symmetric in (
        ("efficientnet_b0", 1e-5, "symmetric", 1),
        ("tf_efficientnet_b0", 1e-3, "same", 0),
    ):
        model = create_model(name, fused=False, device="meta")
        norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert {(m.eps, m.momentum) for m in norms} == {(eps, 0.1)} and len(norms) == 49
        assert {m.padding for m in model.modules() if isinstance(m, MBConv)} == {padding}
        assert model.conv_stem.padding == (symmetric, symmetric)


def test_keywords_override_the_name():
    model = create_model(
        "tf_efficientnet_b0", padding="symmetric", bn_eps=1e-4, bn_momentum=0.01, fused=False, device="meta"
    )
    assert {(m.eps, m.momentum) for m in model.modules() if isinstance(m, nn.BatchNorm2d)} == {(1e-4, 0.01)}
    assert {m.padding for m in model.modules() if isinstance(m, MBConv)} == {"symmetric"}
    assert model.conv_stem.padding == (1, 1)


def test_drop_rates():
    blocks = [m for m in create_model("b4", fused=False, device="meta").modules() if isinstance(m, MBConv)]
    assert [m.drop_path for m in blocks] == pytest.approx([0.2 * i / 32 for i in range(32)])
    assert create_model("b4", fused=False, device="meta").drop_rate == 0.4
    model = create_model("b4", drop_rate=0.1, drop_path_rate=0, fused=False, device="meta")
    assert model.drop_rate == 0.1 and {m.drop_path for m in model.modules() if isinstance(m, MBConv)} == {0.0}


def test_dropout_acts_before_the_classifier_in_training_only():
    model = tiny(drop_rate=0.5, num_classes=0)
    features = torch.rand(64, 32, 2, 2) + 1
    dropped = model.forward_head(features)
    pooled = features.mean((2, 3))
    kept = dropped != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[kept], 2 * pooled[kept])
    assert torch.equal(model.eval().forward_head(features), pooled)


def test_initialisation_is_the_tensorflow_release():
    torch.manual_seed(0)
    model = create_model("b0", fused=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            k, out, groups = module.kernel_size[0], module.out_channels, module.groups
            std, n = math.sqrt(2 / (k * k * out / groups)), module.weight.numel()
            assert module.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(2 * n)), name
            assert abs(module.weight.mean().item()) < 5 * std / math.sqrt(n), name
            assert module.bias is None or not module.bias.any(), name
        elif isinstance(module, nn.BatchNorm2d):
            assert (module.weight == 1).all() and not module.bias.any(), name
    bound = 1 / math.sqrt(1000)
    assert 0.999 * bound < model.classifier.weight.abs().max() <= bound
    assert model.classifier.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert not model.classifier.bias.any()


def test_model_from_a_scaling():
    model = create_model(compound_scale(1.5), num_classes=7, fused=False, device="meta")
    assert model.pretrained_cfg["input_size"] == (3, 276, 276)
    assert [len(stage) for stage in model.blocks] == [2, 3, 3, 4, 4, 6, 2]  # depth 1.315
    assert (model.num_features, model.conv_stem.out_channels) == (1480, 40)  # width 1.154
    assert tuple(model.classifier.weight.shape) == (7, 1480)


def test_classifier_api():
    model = tiny().eval()
    x = torch.randn(2, 3, 32, 32)
    assert model.get_classifier() is model.classifier
    assert (model.num_classes, model.num_features) == (5, 32)
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)

    model.reset_classifier(0)
    assert model.num_classes == 0 and torch.equal(model(x), pooled)

    model.double().reset_classifier(11, global_pool="avg")
    assert model.num_classes == 11 and model.classifier.weight.dtype == torch.float64
    assert model.classifier.weight.abs().max() <= 11**-0.5 and not model.classifier.bias.any()
    assert not model.classifier.training
    torch.testing.assert_close(model(x.double()), model.classifier(pooled.double()), rtol=1e-4, atol=1e-4)


def test_feature_info_describes_the_modules():
    model = tiny().eval()
    shapes = {}
    for info in model.feature_info:
        model.get_submodule(info["module"]).register_forward_hook(
            lambda m, i, o, n=info["module"]: shapes.update({n: o.shape})
        )
    model(torch.randn(1, 3, 32, 32))
    assert [(i["module"], i["num_chs"], i["reduction"]) for i in model.feature_info] == [
        ("blocks.0", 8, 2),
        ("blocks.1", 16, 4),
        ("blocks.2", 24, 8),
    ]
    for info in model.feature_info:
        assert shapes[info["module"]] == (1, info["num_chs"], 32 // info["reduction"], 32 // info["reduction"])


def test_pretrained_cfg():
    cfg = create_model("b4", in_chans=1, fused=False, device="meta").pretrained_cfg
    assert cfg["architecture"] == "efficientnet_b4" and cfg["input_size"] == (1, 380, 380)
    assert cfg["crop_pct"] == pytest.approx(0.922, abs=1e-3)


@pytest.mark.parametrize(
    "images, error, message",
    [
        ("photo.jpg", TypeError, "images must be a torch.Tensor, got str"),
        (torch.zeros(3, 8, 8), ValueError, r"images must be \[N, 3, H, W\], got shape \(3, 8, 8\)"),
        (torch.zeros(1, 1, 8, 8), ValueError, r"got shape \(1, 1, 8, 8\)"),
        (torch.zeros(1, 3, 0, 8), ValueError, r"got shape \(1, 3, 0, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), TypeError, "images must be floating point, got torch.uint8"),
        (torch.zeros(1, 3, 8, 8, device="meta"), ValueError, "images are on meta but the model is on cpu"),
    ],
)
def test_wrong_images(images, error, message):
    with pytest.raises(error, match=message):
        tiny()(images)


@pytest.mark.parametrize(
    "argument, value",
    [
        ("num_classes", -1),
        ("num_classes", 10.0),
        ("num_classes", True),
        ("in_chans", 0),
        ("drop_rate", 1.0),
        ("drop_rate", "0.2"),
        ("drop_path_rate", -0.1),
        ("drop_path_rate", math.nan),
        ("padding", "valid"),
        ("bn_eps", -1e-3),
        ("bn_momentum", 2),
    ],
)
def test_wrong_argument_is_named_with_its_value(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be .*{value}"):
        tiny(**{argument: value})


def test_wrong_names_and_keywords():
    with pytest.raises(ValueError, match="unknown model 'efficientnet_b9'; did you mean .*efficientnet_b8"):
        create_model("efficientnet_b9")
    with pytest.raises(TypeError, match="name must be a str, Scaling or EfficientNetConfig, got float"):
        create_model(1.5)
    with pytest.raises(
        TypeError, match="unknown keyword 'classes'; accepted: pretrained, num_classes, in_chans, drop_rate"
    ):
        create_model("b0", classes=10)
    with pytest.raises(ValueError, match="out_indices is for features_only=True"):
        create_model("b0", out_indices=(1,))
    with pytest.raises(ValueError, match="global_pool must be one of 'avg', .*, got 'median'"):
        tiny().reset_classifier(3, global_pool="median")
    with pytest.raises(ValueError, match="num_classes must be"):
        tiny().reset_classifier(-3)


@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_compiles_without_a_graph_break(padding):
    model = tiny(padding=padding, drop_path_rate=0.0).eval()
    x = torch.randn(2, 3, 33, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, model(x))


def test_fused_and_plain_share_parameters_names_and_numbers():
    plain, fused = tiny(), tiny(fused=True)
    assert {type(b).__name__ for stage in fused.blocks for b in stage} == {"FusedMBConv"}
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(4, 3, 33, 32)
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x), rtol=1e-5, atol=1e-6)
    outputs = []
    for model in (plain, fused):
        torch.manual_seed(1)  # the same drop-path and dropout draws
        outputs.append(model.train()(x))
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-5)


def test_fused_is_the_default():
    assert type(EfficientNet(replace(TINY, act="relu")).blocks[0][0]).__name__ == "FusedMBConv"
