"""Each activation, its derivative and each gate, over the whole range and at the special values, against PyTorch's."""

import pytest
import torch

from effkernels.reference import ACTIVATIONS, GATES
from support.truth import assert_close_to_truth, guarded, norm_of

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy, in the interpreter, at infinities
INF, NAN = float("inf"), float("nan")
# Zeros of both signs, the kinks of relu6 and the hard functions, values where exp overflows, and what is not a number.
SPECIAL = [0.0, -0.0, 3.0, -3.0, 6.0, -6.0, 1e-30, -1e-30, 88.0, -88.0, 100.0, -100.0, 1e30, -1e30, INF, -INF, NAN]


def values(device, dtype=torch.float32):
    """[1, 1, W, 16]: the special values and a fine grid."""
    x = torch.cat([torch.tensor(SPECIAL), torch.linspace(-12, 12, 495)])
    return guarded(x.view(1, 1, -1, 16).to(device, dtype))


def identity_norm(device):
    gamma, beta, mean, rstd = (torch.full((16,), v, device=device) for v in (1.0, 0.0, 0.0, 1.0))
    return norm_of((gamma, beta, mean, None), rstd)


def assert_same_special(value, expected, x):
    """Same NaNs, same infinities."""
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        differs = kind(value) != kind(expected)
        assert not differs.any(), f"{kind.__name__} differs from PyTorch at x = {x[differs].tolist()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_activation(act, dtype, device, scratch):
    from effkernels.kernels.batchnorm import apply

    x = values(device, dtype)
    out = apply(x, identity_norm(device), act=act)
    eager, truth = ACTIVATIONS[act](x), ACTIVATIONS[act](x.double())
    if act == "gelu":
        eager = torch.where(x == INF, INF, eager)  # NaN from PyTorch's vectorised erf on the CPU
    assert_same_special(out, eager, x)
    finite = truth.isfinite() & (x.abs() < 1e4)  # apart from 1e30, beside which every error would vanish
    assert_close_to_truth(out[finite], eager[finite], truth[finite], act)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_derivative(act, dtype, device, scratch):
    """Not at NaN: PyTorch gives 0 or 1 there, for relu6 even both, by whether an element falls into a full vector."""
    from effkernels.kernels.batchnorm import apply_backward

    x = values(device, dtype)
    dx = apply_backward(guarded(torch.ones_like(x)), x, identity_norm(device), act=act)

    def derivative(x):
        x = x.detach().requires_grad_()
        return torch.autograd.grad(ACTIVATIONS[act](x).sum(), x)[0]

    eager, truth = derivative(x), derivative(x.double())
    assert_same_special(torch.where(x.isnan(), 0, dx), torch.where(x.isnan(), 0, eager), x)
    finite = truth.isfinite() & ~x.isnan()
    assert_close_to_truth(dx[finite], eager[finite], truth[finite], act)
    kinks = [SPECIAL.index(v) for v in (0.0, 3.0, -3.0, 6.0, -6.0)]
    torch.testing.assert_close(dx.flatten()[kinks], eager.flatten()[kinks])  # which side a kink belongs to


@pytest.mark.parametrize("gate", GATES)
def test_gate_and_its_derivative(gate, device, scratch):
    """Through squeeze-excite with weights that make the gate's argument the bias."""
    from effkernels.kernels.squeeze_excite import squeeze_excite_backward, squeeze_excite_forward

    bias = values(device).flatten()
    C = len(bias)
    weights = [guarded(t.to(device)) for t in (torch.ones(1, C), torch.zeros(1), torch.zeros(C, 1))] + [bias]
    gates, pooled, u = squeeze_excite_forward(
        guarded(torch.zeros(1, 1, C, device=device)), 1, *weights, act="identity", gate=gate
    )
    sums = guarded(torch.ones(1, 1, 5, C, device=device))
    _, grads, _ = squeeze_excite_backward(sums, 1, gates, pooled, u, weights, act="identity", gate=gate)

    def reference(t):
        t = t.detach().requires_grad_()
        value = GATES[gate](t)
        return value.detach(), torch.autograd.grad(value.sum(), t)[0]

    for fused, eager, truth in zip((gates[0], grads[3]), reference(bias), reference(bias.double()), strict=True):
        assert_same_special(fused, eager, bias)
        finite = truth.isfinite()
        assert_close_to_truth(fused[finite], eager[finite], truth[finite], gate)
