"""Shared by all tests: optional oracles (timm, torchvision) that import next to any torch, or skip with a reason."""

import os

import interpreter  # noqa: F401 (chooses how Triton is loaded)
import pytest
import torch

from benchmarks.libraries import declare_torchvision_operators

if "PYTEST_XDIST_WORKER" in os.environ:  # one worker a core: threads within them would only wait for each other
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run tests that take minutes each")


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
