"""Inference behind CUDA graphs. There is no GPU here: a stand-in records and replays on the CPU; the ``gpu`` tests are
for one.
"""

import pickle

import pytest
import torch
from torch import nn

from effkernels import FusedMBConv, graphed, graphs


class Recorder:
    """As a graph: capturing computes nothing, replaying reads and writes the memory of the capture."""

    def __init__(self):
        self.calls = []

    def problem(self, device):
        return None

    def capture(self, run, device):
        self.calls.append("capture")
        result = run()
        memory = graphs._map(lambda t: torch.full_like(t, float("nan")), result)

        def replay():
            self.calls.append("replay")
            found = run()
            pairs = zip(found, memory, strict=True) if isinstance(memory, tuple) else [(found, memory)]
            for new, old in pairs:
                old.copy_(new)

        return replay, memory


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = FusedMBConv(8, 8)

    def forward(self, x):
        return self.block(x).mean((2, 3))


@pytest.fixture
def recorder(monkeypatch):
    recorder = Recorder()
    monkeypatch.setattr(graphs, "CudaGraphs", lambda: recorder)
    return recorder


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


def x_of(n=2, size=6):
    return torch.randn(n, 8, size, size)


def test_a_replay_is_the_call_itself(recorder, net):
    fast = graphed(net, x_of())
    assert recorder.calls == ["capture", "replay"]
    first, second = x_of(), x_of()
    with torch.no_grad():
        a, b = fast(first), fast(second)
        assert torch.equal(a, net(first)) and torch.equal(b, net(second)), "results are the caller's own"
    assert recorder.calls == ["capture"] + ["replay"] * 3 and fast.reason is None


def test_training_on_is_seen(recorder, net):
    """In place, by load_state_dict, and where a parameter or a buffer is another one, which needs another graph."""
    fast, x = graphed(net, x_of()), x_of()

    def check(captures):
        with torch.no_grad():
            assert torch.equal(fast(x), net(x))
        assert recorder.calls.count("capture") == captures and fast.reason is None

    check(1)
    net.train()
    net(x_of()).square().sum().backward()
    net.eval()
    torch.optim.SGD(net.parameters(), lr=0.5).step()
    check(1)
    net.load_state_dict({name: value * 1.5 for name, value in net.state_dict().items()})
    check(1)
    old = net.block.conv_dw.weight
    net.block.conv_dw.weight = nn.Parameter(old.detach() * 2)
    check(2)
    net.block.bn1.running_mean = net.block.bn1.running_mean + 1
    check(3)
    net.block.conv_dw.weight.data = old.detach()
    check(4)


def test_one_graph_a_shape_and_the_oldest_goes(recorder, net):
    fast = graphed(net, x_of(1), most=2)
    with torch.no_grad():
        for n in (2, 1, 3, 3, 1, 2, 2):  # 3 drops 2, and 2 drops 3, which were used the longest ago
            x = x_of(n)
            assert torch.equal(fast(x), net(x))
    assert recorder.calls.count("capture") == 3 and len(fast._captures) == 2
    fast.forget()
    assert not fast._captures
    strided = x_of().to(memory_format=torch.channels_last)
    with torch.no_grad():
        for x in (x_of(), x_of(), strided, strided):
            fast(x)
    assert recorder.calls.count("capture") == 5, "other strides, another graph"


def test_what_comes_once_is_not_captured(recorder, net):
    """As the last batch of a data set."""
    fast = graphed(net, x_of(4))
    with torch.no_grad():
        for n in (4, 4, 3):
            x = x_of(n)
            assert torch.equal(fast(x), net(x))
    assert recorder.calls.count("capture") == 1 and fast.reason.startswith("the first input of its shape")


def test_why_no_graph_serves(recorder, net, monkeypatch):
    fast, x = graphed(net, x_of()), x_of()
    recorder.calls.clear()

    def reason(x=x, grad=False):
        with torch.set_grad_enabled(grad):
            assert torch.equal(fast(x), net(x)) or net.training
        assert not recorder.calls
        return fast.reason

    assert "gradients are wanted" in reason(grad=True)
    handle = net.block.conv_pw.register_forward_hook(lambda *args: None)
    assert "block.conv_pw has hooks" in reason()
    handle.remove()
    net.block.train()
    assert "block is in training mode" in reason()
    net.eval()
    monkeypatch.setattr(recorder, "problem", lambda device: "no graph here")
    assert reason() == "no graph here"


def test_a_forward_that_cannot_be_captured_runs(recorder, net, monkeypatch):
    def capture(run, device):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(recorder, "capture", capture)
    with pytest.warns(RuntimeWarning, match="it cannot be captured: CUDA error: operation not permitted"):
        fast = graphed(net, x_of())
    x = x_of()
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
    assert fast.reason.startswith("it cannot be captured")


def test_bad_input(recorder, net):
    with pytest.raises(ValueError, match=r"model has no block that runs fused: effkernels.accelerate"):
        graphed(nn.Linear(3, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"does not take an example of shape \(1, 3, 6, 6\): .*8"):
        graphed(net, torch.zeros(1, 3, 6, 6))
    with pytest.raises(TypeError, match="example must be a Tensor, got list"):
        graphed(net, [1])
    with pytest.raises(TypeError, match="model must be a Module, got function"):
        graphed(lambda x: x, x_of())
    with pytest.raises(ValueError, match="most must be an integer >= 1, got 0"):
        graphed(net, x_of(), most=0)
    assert net(x_of()).shape == (2, 8), "the model still runs"


def test_on_a_cpu_the_model_runs(net):
    fast, x = graphed(net, x_of()), x_of()
    with torch.no_grad():
        assert torch.equal(fast(x), net(x))
    assert fast.reason == "the input is on cpu, and a CUDA graph needs a GPU"
    copy = pickle.loads(pickle.dumps(fast))
    with torch.no_grad():
        assert torch.equal(copy(x), net(x))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_graphs_of_b0_on_the_gpu():
    from efficientnet import create_model

    model = create_model("b0", num_classes=10).cuda().eval()
    x = torch.randn(1, 3, 64, 64, device="cuda")
    fast = graphed(model, x)
    for n in (1, 4, 1):
        x = torch.randn(n, 3, 64, 64, device="cuda")
        with torch.no_grad():
            fast(x)
            torch.testing.assert_close(fast(x), model(x))
            for p in model.parameters():
                p.mul_(1.01)
            torch.testing.assert_close(fast(x), model(x))
        assert fast.reason is None
    with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
        torch.testing.assert_close(fast(x), model(x))
    with pytest.raises(ValueError):
        graphed(model, torch.randn(1, 4, 64, 64, device="cuda"))
