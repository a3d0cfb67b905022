"""The head in training: a 1x1 convolution, BatchNorm, activation and the mean over the image, against autograd in
float64."""

import pytest
import torch

from effkernels import functional, reference
from effkernels.parameters import BatchNormParams
from support.interpreter import HAS_TRITON
from support.truth import assert_close_to_truth, norm_vectors, on_gpu

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)

EPS = 1e-3
# The last has more pixels and more images than one step of the loops over them takes.
CASES = [
    # N  H  W   K   O   act           autocast        batch
    (3, 5, 7, 20, 40, "silu", None, True),
    (2, 1, 1, 10, 33, "relu6", torch.bfloat16, True),
    (17, 2, 2, 24, 72, "hard_swish", torch.float16, False),
    (1, 9, 8, 7, 5, "gelu", None, False),
    (67, 6, 7, 8, 48, "silu", torch.bfloat16, True),
]
REAL = [(32, 7, 7, 320, 1280, "silu", torch.bfloat16, True), (16, 10, 10, 448, 1792, "silu", torch.float16, True)]


def run(implementation, x, weight, norm, momentum, batch, act, needs=("x", "weight", "gamma", "beta")):
    """Output, the gradients of ``needs`` (None: not wanted) and the running statistics after one step; and
    num_batches_tracked."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    leaves = dict(zip(("x", "weight", "gamma", "beta"), (x, weight, *norm[:2]), strict=True))
    leaves = {name: t.detach().to(dtype).clone().requires_grad_(name in needs) for name, t in leaves.items()}
    x, weight, gamma, beta = leaves.values()
    running = [t.detach().to(dtype).clone() for t in norm[2:4]]
    tracked = torch.tensor(3, device=x.device)
    out = implementation(x, weight, BatchNormParams(gamma, beta, *running, tracked, momentum, EPS, batch), act=act)
    torch.manual_seed(1)
    out.backward(torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype))
    return {"out": out} | {name: t.grad for name, t in leaves.items()} | {
        "mean": running[0],
        "var": running[1],
    }, tracked


def check(N, H, W, K, O, act, autocast, batch, device, momentum=0.1, **how):
    torch.manual_seed(0)
    x = torch.randn(N, K, H, W, device=device)
    weight, norm = torch.randn(O, K, 1, 1, device=device) * K**-0.5, norm_vectors(O, device)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        fused, tracked = run(functional.head, x, weight, norm, momentum, batch, act, **how)
        eager, expected = run(reference.head, x, weight, norm, momentum, batch, act, **how)
    truth, _ = run(reference.head, x.double(), weight, norm, momentum, batch, act, **how)
    assert tracked == expected == 3 + batch
    assert fused["out"].dtype == (autocast or torch.float32)
    assert_close_to_truth(fused, eager, truth)


@pytest.mark.parametrize("N, H, W, K, O, act, autocast, batch", CASES)
def test_head(N, H, W, K, O, act, autocast, batch, device, scratch):
    check(N, H, W, K, O, act, autocast, batch, device, momentum=None if N == 3 else 0.1)


@pytest.mark.parametrize("K", [400, 416])
def test_inference_of_many_channels(K, device, scratch):
    """From B4 on, more channels than stay with a program: a copy of the weight is read in the order it was made in."""
    torch.manual_seed(0)
    x, weight = torch.randn(6, K, 10, 9, device=device), torch.randn(16, K, 1, 1, device=device) * K**-0.5
    norm = BatchNormParams(*norm_vectors(16, device)[:4], eps=EPS, training=False)

    def run(implementation, x, weight, norm):
        return implementation(x, weight, norm, act="silu")

    with torch.no_grad(), torch.autocast(device, torch.bfloat16):
        fused, eager = run(functional.head, x, weight, norm), run(reference.head, x, weight, norm)
    with torch.no_grad():
        wide = norm._replace(**{name: getattr(norm, name).double() for name in norm._fields[:4]})
        truth = run(reference.head, x.double(), weight.double(), wide)
    assert_close_to_truth({"out": fused}, {"out": eager}, {"out": truth})


@on_gpu
@pytest.mark.parametrize("N, H, W, K, O, act, autocast, batch", REAL)
def test_head_real_shapes(N, H, W, K, O, act, autocast, batch, device, scratch):
    check(N, H, W, K, O, act, autocast, batch, device)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("needs", [("x",), ("weight",), ("gamma",), ("x", "beta")])
def test_gradients_of_some(needs, batch, device, scratch):
    check(2, 3, 2, 8, 20, "silu", None, batch, device, needs=needs)
