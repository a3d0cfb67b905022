from collections import Counter

import pytest

from benchmarks.schedule_bytes import activation_elements, step_bytes
from benchmarks.shapes import Depthwise, SqueezeExciteLayer, blocks, model
from efficientnet.measure import roofline
from efficientnet.measure.roofline import weight_bytes

B0_PARAMETERS = 5_288_548


@pytest.mark.parametrize("name, parameters, megabytes", [("b0", B0_PARAMETERS, 27.5), ("b4", 19_341_616, 204.3)])
def test_inference_bytes_of_an_image_in_bf16(name, parameters, megabytes):
    assert step_bytes(model(name), False, 256, 2, parameters) / 256 / 1e6 == pytest.approx(megabytes, rel=0.01)


def test_training_bytes_of_an_image_in_bf16():
    # Between a schedule that also merges kernels across blocks (83.1 MB) and one that reads y1 twice in the backward
    # (88.7 MB).
    moved = 2 * activation_elements(model("b0"), True) + weight_bytes(B0_PARAMETERS, True, 2) / 256
    assert 83.1e6 < moved < 88.7e6


def test_passes_over_the_expanded_tensors():
    def passes(schedule):
        names = Counter(" ".join(f"{kernel.reads} {kernel.writes}" for kernel in schedule).split())
        return sum(names[e1] for e1 in ("y1", "dz1")), sum(names[e2] for e2 in ("y2", "dq"))

    forward = [kernel.name for kernel in roofline.BLOCK_TRAINING].index("apply") + 1
    assert passes(roofline.BLOCK_INFERENCE) == (2, 2)
    assert passes(roofline.BLOCK_TRAINING[:forward]) == (2, 3)
    assert passes(roofline.BLOCK_TRAINING[forward:]) == (3, 4)


def test_blocks_by_hand():
    first, strided, residual = (blocks("b0")[i] for i in (0, 1, 9))
    # 32 -> 16 at 112 pixels, no expansion: depthwise, project; and x takes the place of y1.
    x, e2, out = 32 * 112**2, 32 * 112**2, 16 * 112**2
    assert activation_elements(first, False) == x + 2 * e2 + out
    assert activation_elements(first, True) == (x + 3 * e2 + 3 * out) + (4 * out + 4 * e2 + 2 * x)
    # 16 -> 96 -> 24 at stride 2.
    x, e1, e2, out = 16 * 112**2, 96 * 112**2, 96 * 56**2, 24 * 56**2
    assert activation_elements(strided, False) == x + 2 * e1 + 2 * e2 + out
    # 112 -> 672 -> 112 with a residual: x is read once more forward, dout once more backward.
    x = out = 112 * 14**2
    e = 672 * 14**2
    assert activation_elements(residual, False) == x + 4 * e + out + x
    assert activation_elements(residual, True) == (x + 5 * e + 3 * out + x) + (4 * out + 7 * e + 2 * x + x)


def test_stem_and_head_by_hand():
    image, stem, features, head = 3 * 224**2, 32 * 112**2, 320 * 7**2, 1280 * 7**2
    for training, expected in (
        (False, image + stem + features),
        (True, 2 * image + 3 * stem + 3 * features + 3 * head),
    ):
        in_blocks = sum(activation_elements(block, training) for block in blocks("b0"))
        assert activation_elements(model("b0"), training) - in_blocks == expected


def test_layers_by_hand():
    inputs, outputs = 96 * 112**2, 96 * 56**2
    assert activation_elements(Depthwise(96, 112, 3, 2), False) == inputs + outputs
    assert activation_elements(Depthwise(96, 112, 3, 2), True) == 3 * inputs + 7 * outputs
    tensor = 96 * 56**2
    assert activation_elements(SqueezeExciteLayer(96, 4, 56), False) == 3 * tensor
    assert activation_elements(SqueezeExciteLayer(96, 4, 56), True) == 7 * tensor


def test_weights_are_counted_once_for_each_use():
    layer = Depthwise(96, 112, 3, 2)
    assert step_bytes(layer, False, 8, 2, 1000) - 8 * 2 * activation_elements(layer, False) == 2000
    assert step_bytes(layer, True, 8, 2, 1000) - 8 * 2 * activation_elements(layer, True) == 12_000
    b0 = model("b0")
    assert step_bytes(b0, True, 8, 2, 1000) - 8 * 2 * activation_elements(b0, True) == 40_000
