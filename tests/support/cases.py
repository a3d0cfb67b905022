"""How many cases the property tests draw, and how they are counted for pytest's summary.

``pytest`` draws the same ones every time; ``pytest --cases 20`` twenty times as many, afresh (``--hypothesis-seed``
repeats them), and shrinks what fails; ``pytest --cases 0.25`` a quarter, the same ones every time.
"""

import functools
import random

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

# Hypothesis also draws numbers that stand in the sources of the modules loaded so far: cases would depend on what else
# is collected.
providers._get_local_constants = lambda: providers._local_constants  # none yet

factor = 1  # set by tests/conftest.py from --cases, before test modules are imported
ran = 0  # cases in this process so far
_decks: list[dict] = []


def dealt(values):
    """One of a few values, each as often as the others: with tens of cases, hypothesis alone leaves out some and
    repeats others.

    A deck is shuffled and dealt, card by card, to the numbers that hypothesis draws; the same number gets the same
    card. To be called at a module's top level. With --cases it is hypothesis' choice, which shrinks better.
    """
    values, deck = list(values), {}
    if factor > 1:
        return st.sampled_from(values)
    name = len(_decks)
    _decks.append(deck)

    def card(number):
        turn, place = divmod(deck.setdefault(number, len(deck)), len(values))
        return random.Random(f"{name} {turn}").sample(values, len(values))[place]

    return st.integers(0, 2**31 - 1).map(card)


def shuffle():
    """Every deck is whole again, so that a test draws the same cases whichever ran before."""
    for deck in _decks:
        deck.clear()


def cases(count):
    """A decorator for a test under ``@given``: ``count`` cases times ``--cases``."""

    def decorate(test):
        inner = test.hypothesis.inner_test

        @functools.wraps(inner)
        def counted(*args, **kwargs):
            global ran
            ran += 1
            return inner(*args, **kwargs)

        test.hypothesis.inner_test = counted
        test = settings(
            max_examples=max(1, round(count * factor)),
            derandomize=factor <= 1,
            phases=[Phase.explicit, Phase.generate] + ([Phase.shrink] if factor > 1 else []),
            database=None,
            deadline=None,  # an interpreted kernel takes as long as the machine is busy
            suppress_health_check=list(HealthCheck),  # slow data and one ``scratch`` for all cases of a test are meant
        )(test)
        test.drawn = functools.partial(_drawn, test)
        return test

    return decorate


def _drawn(test):
    """The cases that this test draws, without running it."""
    shuffle()
    inner, found = test.hypothesis.inner_test, []

    @functools.wraps(inner)
    def keep(case, **fixtures):
        found.append(case)

    test.hypothesis.inner_test = keep
    try:
        test(**dict.fromkeys(("device", "scratch")))
    finally:
        test.hypothesis.inner_test = inner
    return found
