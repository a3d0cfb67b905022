"""Shared by all tests: optional oracles (timm, torchvision) that import next to any torch, or skip with a reason."""

import os

import pytest
import torch
from hypothesis import settings

import support.interpreter  # noqa: F401 (chooses how Triton is loaded)
from efficientnet.data.torchvision_modules import declare_torchvision_operators
from support import cases

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads within them would only wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes each")
    parser.addoption(
        "--cases", type=float, default=1, metavar="N", help="draw N times as many cases in property tests, afresh"
    )


def pytest_configure(config):
    cases.factor = config.getoption("--cases")
    settings.register_profile("repeatable", derandomize=cases.factor <= 1, deadline=None, database=None)
    settings.load_profile("repeatable")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = cases.ran
    cases.shuffle()
    try:
        return (yield)
    finally:
        if cases.ran > before:
            # Travels from xdist's workers with the report.
            item.user_properties.append(("property cases", cases.ran - before))


def pytest_terminal_summary(terminalreporter):
    reports = [
        r
        for kind in ("passed", "failed")
        for r in terminalreporter.getreports(kind)
        if getattr(r, "when", None) == "call"
    ]
    counts = [count for report in reports for name, count in report.user_properties if name == "property cases"]
    if counts:
        terminalreporter.write_line(f"{sum(counts)} property cases drawn in {len(counts)} tests")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if item.get_closest_marker("slow"):
                item.add_marker(pytest.mark.skip(reason="takes minutes (--slow runs it)"))


declare_torchvision_operators()


def _oracle(name):
    return pytest.importorskip(name, reason=f"{name} is not installed (oracle of this test)")


@pytest.fixture(scope="session")
def timm():
    return _oracle("timm")


@pytest.fixture(scope="session")
def torchvision():
    return _oracle("torchvision")
