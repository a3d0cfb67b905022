"""The one rule for errors: against float64, a fused result may be at most twice as far off as eager PyTorch in the same
dtype.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """||value - truth|| / ||truth||, or ||value|| where the truth is zero."""
    assert value.shape == truth.shape, f"shape {tuple(value.shape)}, expected {tuple(truth.shape)}"
    value, truth = value.detach().double(), truth.detach().double()
    return ((value - truth).norm() / (truth.norm().item() or 1.0)).item()


def assert_close_to_truth(fused, eager, truth, name=""):
    """Relative L2 error of ``fused`` at most 2x that of ``eager`` + 1e-6; tensors, or dictionaries of tensors by name.

    truth is float64; a NaN in ``fused`` fails. In a dictionary, None (no gradient) must be None in all three.
    """
    if isinstance(truth, dict):
        assert fused.keys() == eager.keys() == truth.keys()
        for key in truth:
            assert_close_to_truth(fused[key], eager[key], truth[key], f"{name} {key}".strip())
        return
    if truth is None:
        assert fused is None and eager is None, f"{name}: a gradient where there is none"
        return
    assert truth.dtype == torch.float64
    error, eager_error = relative_error(fused, truth), relative_error(eager, truth)
    assert error <= 2 * eager_error + 1e-6, f"{name}: relative error {error:.3g}, eager PyTorch's {eager_error:.3g}"


class Kinks(TorchDispatchMode):
    """How near a value came to where the derivative of its activation jumps."""

    WHERE = {"relu": (0,), "hardtanh": (0, 6), "hardswish": (-3, 3), "hardsigmoid": (-3, 3)}

    def __init__(self):
        super().__init__()
        self.margin = float("inf")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        for kink in self.WHERE.get(function.overloadpacket.__name__.rstrip("_"), ()):
            self.margin = min(self.margin, (args[0] - kink).abs().min().item())
        return function(*args, **(kwargs or {}))


def images_away_from_kinks(truth, draw, enough, tries=100):
    """What ``draw()`` gives, of several the one whose values in training keep farthest from kinks, or the first by
    ``enough``.

    A value that rounding puts on the other side of a kink has another derivative altogether: one among a network's
    300000 changes a gradient by a thousand times its rounding error. That befalls eager PyTorch as often as the
    kernels, but not for the same value, so such images compare chance.
    """
    best, margin = None, -1.0
    for _ in range(tries):
        x = draw()
        with torch.no_grad(), Kinks() as kinks:
            copy.deepcopy(truth).train()(x.double())
        if kinks.margin > margin:
            best, margin = x, kinks.margin
        if margin >= enough:
            break
    return best


on_gpu = pytest.mark.parametrize("device", [pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True)


def guarded(tensor):
    """A contiguous copy; under the fixture ``scratch`` it lies between NaNs that a kernel must not read."""
    return torch.empty_like(tensor, memory_format=torch.contiguous_format).copy_(tensor)


def norm_vectors(channels, device):
    """gamma, beta, mean, var of a BatchNorm, fp32: neither ones nor zeros, so that a forgotten one is seen."""
    vectors = (
        torch.rand(channels) + 0.5,
        torch.randn(channels) * 0.5,
        torch.randn(channels) * 0.5,
        torch.rand(channels) + 0.5,
    )
    return [guarded(v.to(device)) for v in vectors]


def norm_of(vectors, rstd=None, eps=0.0):
    """The ``BatchNorm`` of (gamma, beta, mean, var), with the variance and eps as they are or with ``rstd`` instead."""
    from effkernels.kernels.norm import BatchNorm

    gamma, beta, mean, var = vectors
    return BatchNorm(gamma, beta, mean, var=var, eps=eps) if rstd is None else BatchNorm(gamma, beta, mean, rstd)


def batch_norm(y, gamma, beta, mean, var, eps):
    """BatchNorm of y [N, C, H, W] with given statistics, in y's dtype (fp32 vectors, as under autocast)."""
    vectors = [v.double() if y.dtype == torch.float64 else v for v in (mean, var, gamma, beta)]
    return F.batch_norm(y, *vectors, False, 0.0, eps)


def nhwc(x):
    return guarded(x.permute(0, 2, 3, 1))


def nchw(x):
    return x.permute(0, 3, 1, 2)


def batch_terms(dz, y, gamma, mean, rstd):
    """(dgamma, dbeta, k0, k1) of dy = scale * dz + k0 + k1 * y, the backward of a BatchNorm with batch statistics;
    float64 [C].
    """
    count = dz.numel() // dz.shape[1]
    yhat = (y - mean[:, None, None]) * rstd[:, None, None]
    dgamma, dbeta = (dz * yhat).sum((0, 2, 3)), dz.sum((0, 2, 3))
    k1 = -gamma * rstd**2 * dgamma / count
    return dgamma, dbeta, -gamma * rstd * dbeta / count - k1 * mean, k1
