"""Optimizers, the learning rate as a function of the update, and the moving average of the weights."""

import math
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from efficientnet.training.settings import TrainConfig


class RMSpropTF(torch.optim.Optimizer):
    """RMSProp as TensorFlow has it, for which the paper's hyper-parameters were chosen.

    With ``g = grad + weight_decay * p``: ``s += (1 - alpha) * (g^2 - s)``, ``m = momentum * m + lr * g / sqrt(s +
    eps)``, ``p -= m``. ``torch.optim.RMSprop`` differs in three ways: here epsilon is inside the root, s starts at 1,
    and the learning rate is inside the momentum.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float,
        alpha: float = 0.9,
        momentum: float = 0.9,
        eps: float = 1e-3,
        weight_decay: float = 0.0,
    ):
        super().__init__(
            params, {"lr": lr, "alpha": alpha, "momentum": momentum, "eps": eps, "weight_decay": weight_decay}
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. Returns what ``closure()`` returns, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p]["square_avg"] = torch.ones_like(p)
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            grads = [p.grad for p in params]
            squares, buffers = ([self.state[p][key] for p in params] for key in ("square_avg", "momentum_buffer"))
            if group["weight_decay"]:
                grads = torch._foreach_add(grads, params, alpha=group["weight_decay"])
            torch._foreach_mul_(squares, group["alpha"])
            torch._foreach_addcmul_(squares, grads, grads, 1 - group["alpha"])
            roots = torch._foreach_add(squares, group["eps"])
            torch._foreach_sqrt_(roots)
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_addcdiv_(buffers, grads, roots, group["lr"])
            torch._foreach_sub_(params, buffers)
        return loss


def create_optimizer(config: TrainConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """The optimizer that the settings name, for the groups of ``transfer.parameter_groups``.

    The trainer sets the learning rate of every group before every update.
    """
    lr = config.lr
    if config.opt in ("adamw", "adam"):
        kind = torch.optim.AdamW if config.opt == "adamw" else torch.optim.Adam
        return kind(groups, lr=lr, eps=1e-8 if config.opt_eps is None else config.opt_eps, fused=True)
    if config.opt == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=config.momentum, nesterov=config.momentum > 0, fused=True)
    return RMSpropTF(
        params=groups,
        lr=lr,
        alpha=config.alpha,
        momentum=config.momentum,
        eps=1e-3 if config.opt_eps is None else config.opt_eps,
    )


def epochs_without_gain(accuracies: list[float]) -> int:
    """How many of the last epochs have no better held-out accuracy than the best before them."""
    return len(accuracies) - 1 - max(range(len(accuracies)), key=lambda i: (accuracies[i], -i)) if accuracies else 0


def _plateaus(accuracies, patience):
    """How often ``patience`` epochs in a row brought no better accuracy; after each, as many again must pass."""
    best, waited, found = -1.0, 0, 0
    for accuracy in accuracies:
        best, waited = (accuracy, 0) if accuracy > best else (best, waited + 1)
        if waited > patience:
            found, waited = found + 1, 0
    return found


def learning_rate(
    config: TrainConfig, step: int, steps_per_epoch: int, images: int, accuracies: Sequence[float] = ()
) -> float:
    """The learning rate of update ``step``, counted from 0.

    It grows linearly over the warm-up. Then it follows half a cosine, which reaches zero after the last update, or a
    staircase, which counts its epochs from the first update on, as the TensorFlow release does, or it steps down where
    the accuracy stays.

    Args:
        images: the images of one update of all processes, for ``config.lr_base``.
        accuracies: the held-out accuracies of the epochs behind, for ``config.sched`` "plateau".
    """
    peak = config.lr if config.lr_base is None else config.lr_base * images / config.lr_base_size
    total = config.epochs * steps_per_epoch
    warmup = min(config.warmup_epochs * steps_per_epoch, total - 1)
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    if config.sched == "step":
        return peak * config.decay_rate ** math.floor(step / (config.decay_epochs * steps_per_epoch))
    if config.sched == "plateau":
        return peak * config.decay_rate ** _plateaus(accuracies, config.patience_epochs)
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def average_of(model: nn.Module, decay: float) -> AveragedModel:
    """A moving average of the model's weights and running statistics.

    Each update makes it ``d * average + (1 - d) * model`` with d = min(decay, (1 + updates) / (10 + updates)).
    """

    @torch.no_grad()
    def update(averages, current, updates):
        if not averages[0].is_floating_point():  # counters
            for average, value in zip(averages, current, strict=True):
                average.copy_(value)
            return
        n = int(updates)
        torch._foreach_lerp_(averages, current, 1 - min(decay, (1 + n) / (10 + n)))

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
