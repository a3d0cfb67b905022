"""The training step as a CUDA graph. There is no GPU here: a stand-in records and replays on the CPU, the ``gpu`` test
is for one.
"""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch import nn

from efficientnet.errors import InputError
from efficientnet.training.cuda_graph import GraphedStep
from efficientnet.training.settings import TrainConfig
from efficientnet.training.trainer import Trainer, _for_processes

TINY = "efficientnet_d0.1_w0.1_r32"


class Recorder:
    """As a graph: capturing computes nothing, replaying reads and writes the memory of the capture."""

    def __init__(self):
        self.calls = []

    @contextmanager
    def beside(self):
        self.calls.append("beside")
        yield

    def capture(self, run):
        self.calls.append("capture")
        result = torch.full((), float("nan"))

        def replay():
            self.calls.append("replay")
            result.copy_(run())

        return replay, result

    def random_state(self):
        return torch.get_rng_state()

    def set_random_state(self, state):
        torch.set_rng_state(state)


@pytest.fixture(scope="module")
def config(image_folder):
    settings = {
        "epochs": 2,
        "batch_size": 10,
        "device": "cpu",
        "img_size": 16,
        "drop_path_rate": 0.3,
        "opt": "rmsproptf",
        "mixup": 0.2,
    }
    return TrainConfig(f"imagefolder:{image_folder}", model=TINY, **settings)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_replayed_steps_are_the_steps_themselves(config, tmp_path, accumulated):
    """Bit for bit over two epochs, dropout, statistics and momentum included: warming up leaves no trace, inputs and
    gradients are read and written where the capture had them.
    """
    config = replace(config, batch_size=10 // accumulated, grad_accum_steps=accumulated)
    plain = Trainer(replace(config, output=str(tmp_path / "plain")))
    plain.run()
    trainer, graphs = Trainer(replace(config, output=str(tmp_path / "graph"))), Recorder()
    trainer.config = replace(trainer.config, cuda_graphs=True)  # the constructor refuses it without a GPU
    trainer.forward_backward = GraphedStep(trainer._forward_backward, trainer.model, graphs)
    trainer.run()
    assert graphs.calls == ["beside", "capture", *["replay"] * (6 * accumulated)]
    for key, value in plain.model.state_dict().items():
        assert torch.equal(value, trainer.model.state_dict()[key]), key
    assert [row["train_loss"] for row in trainer.history] == [row["train_loss"] for row in plain.history]


def test_gradients_are_added_to_those_that_are_there():
    model = nn.Linear(3, 2).double()

    def step(images, labels):
        loss = (model(images) - labels).square().mean()
        loss.backward()
        return loss.detach()

    graphed = GraphedStep(step, model, Recorder())
    x, y = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    model.weight.grad = torch.ones_like(model.weight)
    assert graphed(x, y).item() == pytest.approx((model(x) - y).square().mean().item())
    once = model.weight.grad - 1
    graphed(x, y)
    torch.testing.assert_close(model.weight.grad, 1 + 2 * once)
    assert x.data_ptr() not in [t.data_ptr() for t in graphed.inputs]
    with pytest.raises(
        ValueError, match=r"a CUDA graph of inputs \(4, 3\) torch.float64 cannot take \(3, 3\) torch.float64"
    ):
        graphed(x[:3], y[:3])
    with pytest.raises(ValueError, match=r"of inputs \(4, 2\) torch.float64 cannot take \(4, 2\) torch.float32"):
        graphed(x, y.float())


@pytest.mark.parametrize(
    ("change", "device", "world", "message"),
    [
        ({}, "cpu", 1, "cuda_graphs needs a CUDA device, and this run is on the CPU; leave --cuda-graphs out"),
        ({}, "cuda", 2, "cuda_graphs needs one process, and this run has 2"),
        ({"progressive_size": 8}, "cuda", 1, "cuda_graphs needs images of one size, and progressive_size is 8"),
        ({"compile": True}, "cuda", 1, "cuda_graphs needs a model that is not compiled"),
    ],
)
def test_where_a_graph_cannot_work(config, change, device, world, message):
    with pytest.raises(InputError, match=message):
        _for_processes(replace(config, cuda_graphs=True, **change), torch.device(device), world)
    _for_processes(replace(config, cuda_graphs=True), torch.device("cuda"), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("amp", ["none", "bf16", "fp16"])
def test_a_graph_on_the_gpu(config, tmp_path, amp):
    """Against the same training without: the losses of two epochs."""
    config = replace(
        config, device="cuda", img_size=64, model="efficientnet_b0", amp=amp, drop_path_rate=0.0, drop_rate=0.0
    )
    rows = []
    for graphs in (False, True):
        trainer = Trainer(replace(config, cuda_graphs=graphs, output=str(tmp_path / str(graphs))))
        trainer.run()
        rows.append([row["train_loss"] for row in trainer.history])
    assert rows[1] == pytest.approx(rows[0], rel=1e-4 if amp == "none" else 2e-2)
