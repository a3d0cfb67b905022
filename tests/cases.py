"""How many cases the property tests draw, and how they are counted for pytest's summary.

``pytest`` draws the same ones every time; ``pytest --cases 20`` twenty times as many, afresh (``--hypothesis-seed`` repeats them),
and shrinks what fails.
"""

import functools

from hypothesis import HealthCheck, Phase, settings

factor = 1  # set by tests/conftest.py from --cases, before test modules are imported
ran = 0  # cases in this process so far


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
        return settings(
            max_examples=count * factor,
            derandomize=factor == 1,
            phases=[Phase.explicit, Phase.generate] + ([Phase.shrink] if factor > 1 else []),
            database=None,
            deadline=None,  # an interpreted kernel takes as long as the machine is busy
            suppress_health_check=list(HealthCheck),  # slow data and one ``scratch`` for all cases of a test are meant
        )(test)

    return decorate
