import math

import pytest

from efficientnet import compound_scale
from efficientnet.model.scaling import Scaling, round_filters, round_repeats


def test_phi_zero_is_the_base_network():
    assert compound_scale(0) == Scaling(depth=1.0, width=1.0, resolution=224)
    assert compound_scale(0, base_resolution=225).resolution == 225


@pytest.mark.parametrize("phi", [0.5, 1, 1.5, 3.7])
def test_formula(phi):
    depth, width, resolution = compound_scale(phi)
    assert depth == pytest.approx(math.exp(phi * math.log(1.2)))
    assert width == pytest.approx(math.exp(phi * math.log(1.1)))
    assert abs(resolution - 224 * math.exp(phi * math.log(1.15))) <= 0.5 and isinstance(resolution, int)


def test_other_coefficients():
    assert compound_scale(2, alpha=1.0, beta=1.0, gamma=1.4, base_resolution=100) == Scaling(1.0, 1.0, 196)


@pytest.mark.parametrize(
    "phi, coefficients, message",
    [
        (-0.1, {}, "phi must be finite and >= 0, got -0.1"),
        (math.nan, {}, "phi must be finite"),
        (math.inf, {}, "phi must be finite"),
        (1e6, {}, "phi is too large"),
        (1, {"alpha": 0.9}, "alpha must be finite and >= 1, got 0.9"),
        (1, {"beta": math.nan}, "beta must be finite"),
        (1, {"gamma": math.inf}, "gamma must be finite"),
        (1, {"alpha": 2.0}, "about 2.*got 3.2"),
        (1, {"gamma": 1.0}, "about 2.*got 1.45"),
        (1, {"base_resolution": 0}, "base_resolution must be an integer >= 1, got 0"),
        (1, {"base_resolution": 224.0}, "base_resolution must be an integer"),
    ],
)
def test_compound_scale_errors(phi, coefficients, message):
    with pytest.raises(ValueError, match=message):
        compound_scale(phi, **coefficients)


# Stem and stage channels, then head, of B0 times width; the 10 % rule fires once: 16 * 1.2 = 19.2 gives 24, not 16.
B0_CHANNELS = (32, 16, 24, 40, 80, 112, 192, 320, 1280)


@pytest.mark.parametrize(
    "width, expected",
    [
        (1.0, B0_CHANNELS),
        (1.1, (32, 16, 24, 48, 88, 120, 208, 352, 1408)),
        (1.2, (40, 24, 32, 48, 96, 136, 232, 384, 1536)),
        (1.4, (48, 24, 32, 56, 112, 160, 272, 448, 1792)),
        (1.6, (48, 24, 40, 64, 128, 176, 304, 512, 2048)),
        (1.8, (56, 32, 40, 72, 144, 200, 344, 576, 2304)),
        (2.0, (64, 32, 48, 80, 160, 224, 384, 640, 2560)),
        (2.2, (72, 32, 56, 88, 176, 248, 424, 704, 2816)),
        (4.3, (136, 72, 104, 176, 344, 480, 824, 1376, 5504)),
    ],
)
def test_round_filters_gives_the_published_channels(width, expected):
    assert tuple(round_filters(c, width) for c in B0_CHANNELS) == expected


def test_round_filters_is_a_multiple_of_the_divisor_and_never_much_smaller():
    for divisor in (1, 4, 8, 16):
        for channels in range(1, 400, 7):
            for width in (0.1, 0.75, 1.0, 1.3, 2.0):
                rounded, target = round_filters(channels, width, divisor), channels * width
                assert rounded % divisor == 0 and rounded >= divisor
                assert 0.9 * target <= rounded < target + 1.5 * divisor


@pytest.mark.parametrize(
    "depth, expected",
    [
        (1.0, (1, 2, 2, 3, 3, 4, 1)),
        (1.1, (2, 3, 3, 4, 4, 5, 2)),
        (1.4, (2, 3, 3, 5, 5, 6, 2)),
        (3.1, (4, 7, 7, 10, 10, 13, 4)),
        (5.3, (6, 11, 11, 16, 16, 22, 6)),
    ],
)
def test_round_repeats_gives_the_published_repeats(depth, expected):
    assert tuple(round_repeats(r, depth) for r in (1, 2, 2, 3, 3, 4, 1)) == expected


@pytest.mark.parametrize("bad", [0, -1, math.nan, math.inf])
def test_rounding_errors(bad):
    with pytest.raises(ValueError, match="width"):
        round_filters(32, bad)
    with pytest.raises(ValueError, match="depth"):
        round_repeats(2, bad)
