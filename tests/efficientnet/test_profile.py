import pytest
import torch
from torch import nn

from efficientnet import create_model
from efficientnet.model.config import EfficientNetConfig, StageConfig
from efficientnet.model.profile import count_macs, count_parameters, stage_table

# Parameters with 1000 classes, and MACs / 1e9 at the variant's own resolution.
PUBLISHED = {
    "b0": (5_288_548, 0.386),
    "b1": (7_794_184, 0.687),
    "b2": (9_109_994, 0.994),
    "b3": (12_233_232, 1.827),
    "b4": (19_341_616, 4.394),
    "b5": (30_389_784, 10.266),
    "b6": (43_040_704, 19.068),
    "b7": (66_347_960, 37.746),
    "b8": (87_413_142, 62.597),
    "l2": (480_309_308, 475.70),
}
TINY = EfficientNetConfig(
    stages=(StageConfig(3, 1, 1, 8, 1), StageConfig(5, 2, 6, 16, 2)), stem_channels=8, head_channels=32, resolution=16
)


@pytest.mark.parametrize("variant", PUBLISHED)
@pytest.mark.parametrize("flavour", ["efficientnet_", "tf_efficientnet_"])
def test_parameters_and_macs_are_the_published_ones(flavour, variant):
    parameters, gmacs = PUBLISHED[variant]
    model = create_model(flavour + variant, fused=False, device="meta")
    assert count_parameters(model) == parameters
    assert round(count_macs(model) / 1e9, 2 if variant == "l2" else 3) == gmacs


def tiny_macs(h, w):
    """TINY with 5 classes, by hand; h, w are the stem's output size."""
    h2, w2 = -(-h // 2), -(-w // 2)
    stem = 3 * 9 * 8 * h * w
    first = h * w * (8 * 9 + 8 * 8) + 2 * 8 * 2
    second = h * w * 8 * 48 + h2 * w2 * (48 * 25 + 48 * 16) + 2 * 48 * 2
    third = h2 * w2 * (16 * 96 + 96 * 25 + 96 * 16) + 2 * 96 * 4
    return [stem, first, second + third, h2 * w2 * 16 * 32, 32 * 5]


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("image_size, h, w", [(None, 8, 8), (16, 8, 8), ((13, 30), 7, 15)])
def test_macs_by_hand(padding, image_size, h, w):
    model = create_model(TINY, num_classes=5, fused=False, padding=padding)
    assert count_macs(model, image_size) == sum(tiny_macs(h, w))
    assert [row.macs for row in stage_table(model, image_size)] == tiny_macs(h, w)


def test_stage_table_of_b0_is_table_1_of_the_paper():
    rows = stage_table(create_model("b0", fused=False, device="meta"))
    assert [
        (r.operator, r.kernel_size, r.stride, r.expand_ratio, r.input_size, r.channels, r.repeats) for r in rows
    ] == [
        ("Conv", 3, 2, None, (224, 224), 32, 1),
        ("MBConv", 3, 1, 1, (112, 112), 16, 1),
        ("MBConv", 3, 2, 6, (112, 112), 24, 2),
        ("MBConv", 5, 2, 6, (56, 56), 40, 2),
        ("MBConv", 3, 2, 6, (28, 28), 80, 3),
        ("MBConv", 5, 1, 6, (14, 14), 112, 3),
        ("MBConv", 5, 2, 6, (14, 14), 192, 4),
        ("MBConv", 3, 1, 6, (7, 7), 320, 1),
        ("Conv", 1, 1, None, (7, 7), 1280, 1),
        ("Pool, Linear", 1, 1, None, (7, 7), 1000, 1),
    ]
    assert [r.output_size for r in rows] == [r.input_size for r in rows[1:]] + [(1, 1)]


@pytest.mark.parametrize("num_classes", [5, 0])
def test_rows_add_up_to_the_totals(num_classes):
    model = create_model(TINY, num_classes=num_classes, in_chans=4, fused=False)
    rows = stage_table(model, (31, 20))
    assert sum(r.params for r in rows) == count_parameters(model)
    assert sum(r.macs for r in rows) == count_macs(model, (31, 20))
    assert len(rows) == (5 if num_classes else 4)


def test_counting_leaves_the_model_alone():
    model = create_model(TINY, fused=False)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    count_macs(model)
    assert model.training and all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_a_layer_used_twice_counts_twice():
    conv = nn.Conv2d(3, 3, 1, bias=False)
    assert count_macs(nn.Sequential(conv, conv), 4) == 2 * 9 * 16


def test_fused_blocks_count_like_plain_ones():
    for image_size in (32, (17, 40)):
        fused = create_model(TINY, fused=True)
        assert count_macs(fused, image_size) == count_macs(create_model(TINY, fused=False), image_size)


@pytest.mark.parametrize("image_size", [0, -3, (8,), (8, 8, 8), (8, 0), 8.0, (True, 8)])
def test_wrong_image_size(image_size):
    with pytest.raises(ValueError, match="image_size must be a positive integer or"):
        count_macs(create_model(TINY, fused=False), image_size)


def test_image_size_is_needed_without_a_config():
    with pytest.raises(ValueError, match="image_size is needed"):
        count_macs(nn.Conv2d(3, 8, 3))


def test_timm_models_count_the_same(timm):
    ours = create_model("tf_efficientnet_b0", fused=False, device="meta")
    theirs = timm.create_model("tf_efficientnet_b0", device="meta")
    assert count_macs(theirs, 65) == count_macs(ours, 65)
