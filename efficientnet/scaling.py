"""Compound scaling (Tan & Le, 2019, section 3): one number, phi, makes a network deeper, wider and its images larger together."""

import math
from typing import NamedTuple


class Scaling(NamedTuple):
    """Multipliers of the B0 stage table, and the image size in pixels that goes with them."""

    depth: float
    width: float
    resolution: int


def compound_scale(phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15, base_resolution: int = 224) -> Scaling:
    """``depth = alpha^phi, width = beta^phi, resolution = base_resolution * gamma^phi``, rounded to the nearest pixel.

    MACs grow with depth, width^2 and resolution^2, so ``alpha * beta^2 * gamma^2`` of about 2 (checked, within 10 %; the paper's
    1.2, 1.1, 1.15 give 1.92) makes phi the binary logarithm of the cost. The published B1..B7 are NOT phi = 1..7: they come
    from a table of hand-rounded values (``efficientnet.config.VARIANTS``), so no phi stands for a name and no name for a phi.

    Raises ValueError for a phi that is negative, not finite or too large to compute with, for alpha, beta or gamma below 1,
    and for a product away from 2.
    """
    if not 0 <= phi < math.inf:
        raise ValueError(f"phi must be finite and >= 0, got {phi!r}")
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 1, got {value!r}")
    check_count("base_resolution", base_resolution)
    product = alpha * beta**2 * gamma**2
    if not 1.8 <= product <= 2.2:
        raise ValueError(
            f"alpha * beta^2 * gamma^2 must be about 2 (1.8 to 2.2), got {product:.4g} from alpha={alpha}, beta={beta}, gamma={gamma}"
        )
    try:
        return Scaling(depth=alpha**phi, width=beta**phi, resolution=round(base_resolution * gamma**phi))
    except OverflowError:
        raise ValueError(f"phi is too large to compute with, got {phi!r}") from None


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width`` to the nearest multiple of ``divisor`` (halves up, at least one), never more than 10 % down.

    The rule of the TensorFlow release: ``new = max(d, int(c * w + d / 2) // d * d)``, plus d if ``new < 0.9 * c * w``.
    """
    if channels < 1 or divisor < 1 or not 0 < width < math.inf:
        raise ValueError(f"channels and divisor must be >= 1 and width finite and > 0, got {channels!r}, {divisor!r}, {width!r}")
    target = channels * width
    rounded = max(divisor, int(target + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * target else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """``ceil(depth * repeats)``: scaling never drops a block."""
    if repeats < 1 or not 0 < depth < math.inf:
        raise ValueError(f"repeats must be >= 1 and depth finite and > 0, got {repeats!r} and {depth!r}")
    return math.ceil(depth * repeats)


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """ValueError naming the argument unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
