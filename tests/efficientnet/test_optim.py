"""TensorFlow's RMSprop against timm's, learning rates against the paper's words, averages against their formula."""

import copy

import pytest
import torch
from torch import nn

from efficientnet.training.optim import RMSpropTF, average_of, create_optimizer, learning_rate
from efficientnet.training.settings import TrainConfig


@pytest.mark.parametrize("weight_decay", [0.0, 1e-2])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_rmsprop_is_timms(timm, weight_decay, momentum):
    """300 steps with gradients over six orders of magnitude, a schedule, a parameter without gradient: the same to 1e-6
    of the change.
    """
    from timm.optim import RMSpropTF as Timms

    torch.manual_seed(0)
    ours = nn.ParameterList([torch.randn(5, 4), torch.randn(7), torch.randn(3)])
    theirs = copy.deepcopy(ours)
    before = [p.detach().clone() for p in ours]
    settings = {"lr": 0.01, "alpha": 0.9, "eps": 1e-3, "momentum": momentum, "weight_decay": weight_decay}
    pair = RMSpropTF(ours.parameters(), **settings), Timms(theirs.parameters(), **settings)
    for step in range(300):
        gradients = [torch.randn(p.shape) * 10 ** (-(step % 7)) for p in before]
        for parameters, optimizer in zip((ours, theirs), pair, strict=True):
            optimizer.param_groups[0]["lr"] = 0.01 * 0.97 ** (step / 10)
            for p, gradient in zip(list(parameters)[: 2 if step < 50 else 3], gradients, strict=False):
                p.grad = gradient.clone()
            optimizer.step()
    for a, b, start in zip(ours, theirs, before, strict=True):
        assert (a - b).norm() <= 1e-6 * (b - start).norm() and (b - start).norm() > 0.01


def test_rmsprop_is_not_torchs():
    """By hand: the mean square starts at 1, epsilon is inside the root, the rate inside the momentum."""
    p = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = RMSpropTF([p], lr=0.5, alpha=0.9, momentum=0.5, eps=0.25)
    p.grad = torch.tensor([3.0], dtype=torch.float64)
    optimizer.step()
    first = 0.5 * 3 / (0.9 + 0.9 + 0.25) ** 0.5
    assert p.item() == pytest.approx(2 - first, abs=1e-12)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert p.item() == pytest.approx(2 - first - 0.5 * first, abs=1e-12)  # the old rate goes on in the momentum


@pytest.mark.parametrize("opt", ["adamw", "sgd", "rmsproptf"])
def test_optimizers_have_the_settings(opt):
    config = TrainConfig(opt=opt, lr=0.1, momentum=0.7, opt_eps=0.5, alpha=0.8)
    optimizer = create_optimizer(config, [{"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.3}])
    (group,) = optimizer.param_groups
    wanted = {"lr": 0.1, "weight_decay": 0.3} | {"adamw": {"eps": 0.5}, "sgd": {"momentum": 0.7, "nesterov": True}}.get(
        opt, {"eps": 0.5, "alpha": 0.8, "momentum": 0.7}
    )
    assert {key: group[key] for key in wanted} == wanted


def test_learning_rate_warms_up_then_falls_to_zero():
    config = TrainConfig(epochs=10, warmup_epochs=2, lr=1.0)
    rates = [learning_rate(config, step, 3, 1) for step in range(30)]
    assert rates[:6] == pytest.approx([(i + 1) / 7 for i in range(6)]) and rates[6] == 1.0
    assert all(a > b for a, b in zip(rates[6:], rates[7:], strict=False)) and 0 < rates[-1] < 0.01
    assert rates[18] == pytest.approx(0.5)  # half-way down


def test_learning_rate_falls_in_the_papers_steps():
    """x 0.97 every 2.4 epochs after a warm-up of 5, 0.016 for 256 images: 0.256 for the paper's 4096."""
    config = TrainConfig(
        sched="step", epochs=350, warmup_epochs=5, decay_epochs=2.4, decay_rate=0.97, lr_base=0.016, lr=123.0
    )
    rates = [learning_rate(config, step, 10, 4096) for step in range(3500)]
    # 5 / 2.4 is 2 steps.
    assert rates[49] == pytest.approx(0.256 * 50 / 51) and rates[50] == pytest.approx(0.256 * 0.97**2)
    changes = [i for i in range(51, 3500) if rates[i] != rates[i - 1]]
    assert changes[:3] == [72, 96, 120] and rates[96] / rates[95] == pytest.approx(0.97)
    assert rates[-1] == pytest.approx(0.256 * 0.97**145)
    assert learning_rate(config, 60, 10, 256) == pytest.approx(0.016 * 0.97**2)


def test_average_of_weights_and_statistics():
    """d = min(decay, (1 + n) / (10 + n)) by hand, counters copied, statistics of BatchNorm averaged too."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)).double()
    average = average_of(model, 0.3)
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    for n in range(5):
        with torch.no_grad():
            for tensor in [*model.parameters(), model[1].running_mean, model[1].running_var]:
                tensor.add_(torch.randn_like(tensor))
            model[1].num_batches_tracked.add_(1)
        average.update_parameters(model)
        d = 0.0 if n == 0 else min(0.3, (1 + n) / (10 + n))  # the first one is a copy
        for key, value in model.state_dict().items():
            expected[key] = d * expected[key] + (1 - d) * value if value.is_floating_point() else value.clone()
    for key, value in average.module.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=1e-12, atol=1e-12)
