"""Shared by all tests: optional oracles (timm, torchvision) that import next to any torch, or skip with a reason."""

import importlib.util
import os
from pathlib import Path

import interpreter  # noqa: F401 (chooses how Triton is loaded)
import pytest
import torch

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


def _declare_torchvision_operators():
    """Let torchvision (and timm, which imports it) import although its compiled operators were built for another torch.

    torchvision registers shape rules for two of its operators on import and fails if they do not exist. No test calls them.
    """
    spec = importlib.util.find_spec("torchvision")
    if spec is None or spec.origin is None:
        return None
    try:
        torch.ops.load_library(str(Path(spec.origin).parent / "_C.so"))
        return None
    except (ImportError, OSError):
        library = torch.library.Library("torchvision", "DEF")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return library


_torchvision_operators = _declare_torchvision_operators()  # the operators live as long as this does


def _oracle(name):
    return pytest.importorskip(name, reason=f"{name} is not installed (oracle of this test)")


@pytest.fixture(scope="session")
def timm():
    return _oracle("timm")


@pytest.fixture(scope="session")
def torchvision():
    return _oracle("torchvision")
