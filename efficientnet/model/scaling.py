"""Compound scaling (Tan & Le, 2019, section 3): one number, phi, makes a network deeper and wider and its images
larger, together.
"""

import math
from collections.abc import Callable
from typing import NamedTuple


class Scaling(NamedTuple):
    """Multipliers of the B0 stage table, and the image size in pixels that goes with them."""

    depth: float
    width: float
    resolution: int


# What the paper found for B0, and the limits of the product that it wants to be about 2.
COEFFICIENTS = (1.2, 1.1, 1.15)
PRODUCT = (1.8, 2.2)


def compound_scale(
    phi: float, alpha: float = 1.2, beta: float = 1.1, gamma: float = 1.15, base_resolution: int = 224
) -> Scaling:
    """``depth = alpha^phi, width = beta^phi, resolution = base_resolution * gamma^phi``, rounded to the nearest pixel.

    MACs grow with depth, width^2 and resolution^2. So ``alpha * beta^2 * gamma^2`` of about 2 makes phi the binary
    logarithm of the cost. It is checked, within 10 %; the paper's 1.2, 1.1 and 1.15 give 1.92. The published B1 to B7
    are NOT phi = 1 to 7: they come from a table of hand-rounded values (``efficientnet.model.config.VARIANTS``), so no
    phi stands for a name and no name for a phi.

    Raises ValueError for a phi that is negative, not finite or too large to compute with, for alpha, beta or gamma
    below 1, and for a product away from 2.
    """
    if not 0 <= phi < math.inf:
        raise ValueError(f"phi must be finite and >= 0, got {phi!r}")
    for name, value in (("alpha", alpha), ("beta", beta), ("gamma", gamma)):
        if not 1 <= value < math.inf:
            raise ValueError(f"{name} must be finite and >= 1, got {value!r}")
    check_count("base_resolution", base_resolution)
    product = alpha * beta**2 * gamma**2
    low, high = PRODUCT
    if not low <= product <= high:
        raise ValueError(
            f"alpha * beta^2 * gamma^2 must be about 2 ({low} to {high}), got {product:.4g} from alpha={alpha}, "
            f"beta={beta}, gamma={gamma}"
        )
    try:
        return Scaling(depth=alpha**phi, width=beta**phi, resolution=round(base_resolution * gamma**phi))
    except OverflowError:
        raise ValueError(f"phi is too large to compute with, got {phi!r}") from None


def coefficient_grid(
    step: float = 0.05, at_least: float = 1.9, at_most: float = 2.0
) -> list[tuple[float, float, float]]:
    """Every (alpha, beta, gamma) of multiples of ``step`` from 1 with ``at_least <= alpha * beta^2 * gamma^2 <=
    at_most``.

    The paper searches at phi = 1 for twice the cost. A candidate far below it would lose for being smaller, not for its
    shape.

    Raises ValueError for a step that is not in [0.01, 0.5], limits that are not in order within 1.8 to 2.2, or no point
    left.
    """
    if not 0.01 <= step <= 0.5:
        raise ValueError(f"step must be in [0.01, 0.5], got {step!r}")
    if not PRODUCT[0] <= at_least <= at_most <= PRODUCT[1]:
        raise ValueError(
            f"at_least and at_most must be in order and in [{PRODUCT[0]}, {PRODUCT[1]}], got {at_least!r} and "
            f"{at_most!r}"
        )
    values = [round(1 + i * step, 6) for i in range(int((at_most - 1) / step + 1e-9) + 1)]
    grid = [
        (a, b, c)
        for a in values
        for b in values
        for c in values
        if at_least - 1e-9 <= a * b**2 * c**2 <= at_most + 1e-9
    ]
    if not grid:
        raise ValueError(f"step {step!r} leaves no alpha, beta, gamma with a product from {at_least!r} to {at_most!r}")
    return grid


def largest_phi(
    cost: Callable[[float], float], budget: float, step: float = 0.01, phi_max: float = 16.0
) -> float | None:
    """The largest multiple of ``step`` in [0, phi_max] whose ``cost(phi)`` is at most ``budget``; None if phi = 0 costs
    more.

    ``cost`` must not fall as phi grows; parameters and MACs never do, since every rounding is monotone. It doubles phi
    and then bisects, so ``cost`` is never asked about a network of more than twice the phi that fits.
    """
    if cost(0.0) > budget:
        return None
    below, above = 0, round(1 / step)
    while cost(min(above * step, phi_max)) <= budget:
        if above * step >= phi_max:
            return phi_max
        below, above = above, 2 * above
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if cost(round(middle * step, 6)) <= budget else (below, middle)
    return round(below * step, 6)


def round_filters(channels: int, width: float, divisor: int = 8) -> int:
    """``channels * width`` to the nearest multiple of ``divisor`` (halves up, at least one), never more than 10 % down.

    This is the rule of the TensorFlow release: ``new = max(d, int(c * w + d / 2) // d * d)``, plus d if ``new < 0.9 * c
    * w``.
    """
    if channels < 1 or divisor < 1 or not 0 < width < math.inf:
        raise ValueError(
            f"channels and divisor must be >= 1 and width finite and > 0, got {channels!r}, {divisor!r}, {width!r}"
        )
    target = channels * width
    rounded = max(divisor, int(target + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * target else rounded


def round_repeats(repeats: int, depth: float) -> int:
    """``ceil(depth * repeats)``: scaling never drops a block."""
    if repeats < 1 or not 0 < depth < math.inf:
        raise ValueError(f"repeats must be >= 1 and depth finite and > 0, got {repeats!r} and {depth!r}")
    return math.ceil(depth * repeats)


def check_count(name: str, value: int, minimum: int = 1) -> None:
    """Raise ValueError that names the argument unless ``value`` is an integer of at least ``minimum``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
