import subprocess
import sys
from dataclasses import replace

import pytest

import efficientnet
from efficientnet import compound_scale, list_models
from efficientnet.model.config import EfficientNetConfig, StageConfig

VARIANTS = [f"b{i}" for i in range(9)] + ["l2"]


def test_list_models_is_sorted_naturally():
    assert list_models() == [f"efficientnet_{v}" for v in VARIANTS] + [f"tf_efficientnet_{v}" for v in VARIANTS]


@pytest.mark.parametrize(
    "filter, exclude, expected",
    [
        ("efficientnet_b*", "", [f"efficientnet_b{i}" for i in range(9)]),
        ("*_b[01]", "", ["efficientnet_b0", "efficientnet_b1", "tf_efficientnet_b0", "tf_efficientnet_b1"]),
        (["*net_l2", "*net_b8"], "tf_*", ["efficientnet_b8", "efficientnet_l2"]),
        ("efficientnet_*", ["*_b?"], ["efficientnet_l2"]),
        ("efficientnet_b0", "", ["efficientnet_b0"]),
        ("resnet*", "", []),
        ([], "*b*", ["efficientnet_l2", "tf_efficientnet_l2"]),
    ],
)
def test_list_models_wildcards(filter, exclude, expected):
    assert list_models(filter, exclude_filters=exclude) == expected


# Padding and BatchNorm are not in a state_dict: these numbers are what timm's weights of that name need.
@pytest.mark.parametrize(
    "name, padding, bn_eps",
    [("efficientnet_b3", "symmetric", 1e-5), ("tf_efficientnet_b3", "same", 1e-3), ("b3", "symmetric", 1e-5)],
)
def test_names_choose_padding_and_batchnorm(name, padding, bn_eps):
    config = EfficientNetConfig.from_name(name)
    assert (config.padding, config.bn_eps, config.bn_momentum) == (padding, bn_eps, 0.1)
    assert (config.resolution, config.drop_rate, config.drop_path_rate) == (300, 0.3, 0.2)
    assert config.name.endswith("efficientnet_b3")


def test_resolution_and_dropout_of_all_variants():
    configs = [EfficientNetConfig.from_name(v) for v in VARIANTS]
    assert [c.resolution for c in configs] == [224, 240, 260, 300, 380, 456, 528, 600, 672, 800]
    assert [c.drop_rate for c in configs] == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5, 0.5, 0.5]


@pytest.mark.parametrize(
    "name, near",
    [
        ("efficientnet-b0", "efficientnet_b0"),
        ("eficientnet_b7", "efficientnet_b7"),
        ("resnet50", "known: efficientnet_b0"),
        ("b9", "known: efficientnet_b0"),
    ],
)
def test_unknown_name_is_told_with_near_ones(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}'.*{near}"):
        EfficientNetConfig.from_name(name)


def test_from_scaling_scales_every_channel_and_repeat_but_no_name():
    config = EfficientNetConfig.from_scaling(compound_scale(1), drop_rate=0.25, padding="same")
    assert [s.channels for s in config.stages] == [16, 24, 48, 88, 120, 208, 352]  # width 1.1
    assert [s.repeats for s in config.stages] == [2, 3, 3, 4, 4, 5, 2]  # depth 1.2
    assert [(s.kernel_size, s.stride, s.expand_ratio) for s in config.stages] == [
        (3, 1, 1),
        (3, 2, 6),
        (5, 2, 6),
        (3, 2, 6),
        (5, 1, 6),
        (5, 2, 6),
        (3, 1, 6),
    ]
    assert (config.stem_channels, config.head_channels) == (32, 1408)
    assert config.resolution == 258  # B2 has 260: phi 1 is close to B2, and not B2
    assert (config.drop_rate, config.padding, config.name) == (0.25, "same", "efficientnet")


@pytest.mark.parametrize(
    "field, value",
    [
        ("padding", "valid"),
        ("bn_eps", 0.0),
        ("bn_eps", float("nan")),
        ("bn_momentum", 1.5),
        ("stages", ()),
        ("stem_channels", 0),
        ("head_channels", 12.0),
        ("resolution", -1),
    ],
)
def test_config_errors_name_the_field(field, value):
    with pytest.raises(ValueError, match=field):
        replace(EfficientNetConfig(), **{field: value})


@pytest.mark.parametrize("repeats", [0, 1.5, True])
def test_stage_repeats_error(repeats):
    with pytest.raises(ValueError, match="repeats"):
        StageConfig(kernel_size=3, stride=1, expand_ratio=1, channels=16, repeats=repeats)


def test_import_and_list_models_do_not_import_torch():
    code = "import sys, efficientnet; efficientnet.list_models(); assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unknown_attribute():
    assert {"create_model", "list_models", "load_checkpoint"} <= set(dir(efficientnet))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        efficientnet.nothing_like_this  # noqa: B018
