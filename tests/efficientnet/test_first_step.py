"""What commands do before the first step on a GPU, with the parts that need one replaced."""

import sys

import pytest
import torch

from efficientnet import create_model, devices
from efficientnet.commands import predict

TINY = "efficientnet_d0.1_w0.1_r32"


class Explained(dict):
    fused = 1


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_of_compiling(monkeypatch, capsys, terminal):
    """A line that counts on a terminal, and only its end in a file."""
    asked = []

    def warm_up(model, x, training, report):
        asked.append((tuple(x.shape), training))
        for done in (1, 2, 3):
            report(done, 3)
        return 3

    monkeypatch.setattr(devices, "explain", lambda model, x: Explained())
    monkeypatch.setattr(devices, "warm_up", warm_up)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    assert devices.compile_kernels(None, torch.zeros(2, 3, 8, 8), training=True) == 3
    assert asked == [((2, 3, 8, 8), True)]
    counted = "compiling kernels 1/3\rcompiling kernels 2/3\r" if terminal else ""
    assert capsys.readouterr().err == f"{counted}compiling kernels 3/3\n"


def test_nothing_is_compiled_where_no_block_is_fused(capsys):
    model = create_model(TINY, num_classes=2)
    assert devices.compile_kernels(model, torch.zeros(1, 3, 32, 32), training=True) == 0
    assert capsys.readouterr().err == ""


def test_predict_keeps_the_model_where_no_graph_serves():
    model = create_model(TINY, num_classes=2).eval()
    assert predict._graphed(model, torch.zeros(1, 3, 32, 32)) is model
