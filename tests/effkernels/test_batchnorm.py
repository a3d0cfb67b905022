"""BatchNorm's kernels against float64: statistics and their merge, the elementwise forward, the sums and the
elementwise backward."""

import pytest
import torch

from effkernels.reference import ACTIVATIONS
from support.truth import (
    assert_close_to_truth,
    batch_norm,
    batch_terms,
    guarded,
    nchw,
    nhwc,
    norm_of,
    norm_vectors,
    on_gpu,
    relative_error,
)

EPS = 1e-3
# Rows (pixels) below, at and above one block of 32 to 128, C a multiple of 8 or not and above one block of channels;
# each dtype twice.
SHAPES = [
    # N  C   H   W   dtype
    (2, 24, 9, 7, torch.float32),
    (1, 33, 17, 16, torch.bfloat16),
    (3, 8, 1, 2, torch.float16),
    (2, 3, 19, 15, torch.float32),
    (1, 140, 6, 5, torch.bfloat16),
    (2, 16, 16, 8, torch.float16),
]
REAL_SHAPES = [(16, 96, 112, 112, torch.bfloat16), (16, 1153, 7, 7, torch.float16), (8, 40, 28, 28, torch.float32)]
SHAPE = "N, C, H, W, dtype"


def ids(shape):
    return "-".join(map(str, shape)).replace("torch.", "")


every_shape = pytest.mark.parametrize(SHAPE, [pytest.param(*s, id=ids(s)) for s in SHAPES])
real_shapes = pytest.mark.parametrize(SHAPE, [pytest.param(*s, id=ids(s)) for s in REAL_SHAPES])


def data(N, C, H, W, dtype, device):
    torch.manual_seed(0)
    return (torch.randn(N, C, H, W) * (torch.rand(C, 1, 1) + 0.5) + torch.randn(C, 1, 1)).to(device, dtype)


def double(vectors):
    return [v.double() for v in vectors]


# ---- statistics
# ------------------------------------------------------------------------------------------------------------------


def check_statistics(x, momentum, batches=3):
    """Mean, rstd and running statistics of one more batch after ``batches`` - 1 others."""
    from effkernels.kernels.batchnorm import merge, statistics
    from effkernels.kernels.norm import BatchStatistics

    gamma, beta, mean, var = norm_vectors(x.shape[1], x.device)
    counter = torch.tensor(batches, device=x.device)
    running = {"fused": (mean, var), "eager": (mean.clone(), var.clone()), "truth": (mean.double(), var.double())}
    factor = 1 / batches if momentum is None else momentum

    def reference(x, name):
        _, batch_mean, rstd = torch.native_batch_norm(x, None, None, *running[name], True, factor, EPS)
        return {"mean": batch_mean, "rstd": rstd}

    results = {"eager": reference(x, "eager"), "truth": reference(x.double(), "truth")}
    tiles = statistics(nhwc(x))
    assert tiles[0].sum() == x.numel() // x.shape[1]
    results["fused"] = dict(
        zip(
            ("mean", "rstd"),
            merge(tiles, BatchStatistics(EPS, mean, var, counter, momentum)),
            strict=True,
        )
    )
    for name, result in results.items():
        result["running_mean"], result["running_var"] = running[name]
    assert_close_to_truth(results["fused"], results["eager"], results["truth"])
    assert counter == batches + (momentum is not None)  # the cumulative average counts before the launch


@pytest.mark.parametrize("momentum", [0.1, None])
@every_shape
def test_statistics(N, C, H, W, dtype, momentum, device, scratch):
    check_statistics(data(N, C, H, W, dtype, device), momentum)


@on_gpu
@real_shapes
def test_statistics_real_shapes(N, C, H, W, dtype, device, scratch):
    check_statistics(data(N, C, H, W, dtype, device), 0.1)


def test_statistics_of_a_large_mean(device, scratch):
    """|mean| / std = 1000: fp32 means carry a relative error of 2^-24 * 1000 into the variance, plain sums of squares
    2^-24 * 1000^2."""
    from effkernels.kernels.batchnorm import merge, statistics
    from effkernels.kernels.norm import BatchStatistics

    torch.manual_seed(0)
    x = (torch.randn(2, 8, 20, 20) * 1e-2 + 10.0).to(device)
    mean, rstd = merge(statistics(nhwc(x)), BatchStatistics(1e-12))
    assert relative_error(mean, x.double().mean((0, 2, 3))) < 1e-6
    assert relative_error(rstd, x.double().var((0, 2, 3), unbiased=False).rsqrt()) < 2**-24 * 1000


def test_merge_of_many_uneven_tiles(device, scratch):
    """70 tiles, more than one step of the merge takes, of 1 to 4 rows and one of none."""
    from effkernels.kernels.batchnorm import merge
    from effkernels.kernels.norm import BatchStatistics

    torch.manual_seed(0)
    counts = torch.randint(1, 5, (70,))
    counts[33] = 0
    x = torch.randn(int(counts.sum()), 35, device=device) + 3
    parts = x.double().split(counts.tolist())
    means = torch.stack([part.mean(0) if len(part) else part.new_zeros(35) for part in parts])
    m2 = torch.stack([((part - mean) ** 2).sum(0) for part, mean in zip(parts, means, strict=True)])
    tiles = [guarded(t.to(device).float()) for t in (counts, means, m2)]
    mean, rstd = merge(tiles, BatchStatistics(EPS))
    assert relative_error(mean, x.double().mean(0)) < 1e-6
    assert relative_error(rstd, (x.double().var(0, unbiased=False) + EPS).rsqrt()) < 1e-6


def test_merge_keeps_the_dtype_of_the_running_statistics_and_its_nan(device, scratch):
    """bf16 buffers (a network cast as a whole) are rounded to nearest; a NaN in the batch shows in every statistic of
    its channel."""
    from effkernels.kernels.batchnorm import merge, statistics
    from effkernels.kernels.norm import BatchStatistics

    x = data(2, 8, 3, 3, torch.float32, device)
    running = [guarded(v.bfloat16()) for v in norm_vectors(8, device)[2:]]
    expected = [v.clone() for v in running]
    x[0, 5, 1, 1] = float("nan")
    torch.nn.functional.batch_norm(x.bfloat16(), *expected, training=True, momentum=0.1)
    mean, rstd = merge(statistics(nhwc(x)), BatchStatistics(EPS, *running[:2], momentum=0.1))
    for value in (mean, rstd, *running):
        assert value.isnan().tolist() == [c == 5 for c in range(8)]
    for value, wanted in zip(running, expected, strict=True):
        # One rounding of bf16, of x and of the result.
        torch.testing.assert_close(value, wanted, rtol=2**-7, atol=0, equal_nan=True)


# ---- forward
# ---------------------------------------------------------------------------------------------------------------------

# Pairwise: each option with each other once, each activation once. rstd: the vector is 1 / sqrt(var + eps) already.
FORWARD = [
    # act        bn    is_rstd gate   mask   residual
    ("silu", True, True, True, False, False),
    ("relu", True, False, False, True, True),
    ("relu6", True, True, True, True, False),
    ("hard_swish", True, False, True, False, True),
    ("gelu", True, False, False, False, False),
    ("identity", True, True, False, True, True),
    ("identity", False, True, True, False, False),
]


def forward_terms(N, C, H, W, dtype, device):
    """gate [N, C], mask [N] with a dropped sample, residual like x."""
    gate, mask = torch.rand(N, C), torch.rand(N) + 0.5
    mask[0] = 0.0
    return guarded(gate.to(device)), guarded(mask.to(device)), torch.randn(N, C, H, W).to(device, dtype)


def check_apply(shape, act, has_bn, is_rstd, gated, masked, added, residual_dtype=None):
    from effkernels.kernels.batchnorm import apply

    x = data(*shape)
    bn = norm_vectors(x.shape[1], x.device)
    gate, mask, residual = forward_terms(*shape)
    residual = residual.to(residual_dtype or x.dtype)

    def network(x):
        if has_bn:
            x = ACTIVATIONS[act](batch_norm(x, *bn, EPS))
        if gated:
            x = x * gate.to(x.dtype)[:, :, None, None]
        if masked:
            x = x * mask.to(x.dtype)[:, None, None, None]
        return x + residual if added else x

    norm = norm_of(bn, guarded((bn[3] + EPS).rsqrt()) if is_rstd else None, EPS)
    out = apply(
        nhwc(x),
        norm if has_bn else None,
        act=act,
        gates=gate if gated else None,
        branch_draws=mask if masked else None,
        residual=nhwc(residual) if added else None,
        out_dtype=residual_dtype,
    )
    assert out.dtype == (residual_dtype or x.dtype)
    assert_close_to_truth(nchw(out), network(x), network(x.double()), "out")


@pytest.mark.parametrize("i", range(len(FORWARD)))
def test_apply(i, device, scratch):
    check_apply((*SHAPES[i % len(SHAPES)], device), *FORWARD[i])


def test_apply_to_a_wider_residual(device, scratch):
    """Under autocast the block's input is fp32 and so is the sum."""
    check_apply((*SHAPES[1], device), "identity", True, True, False, True, True, torch.float32)


@on_gpu
@pytest.mark.parametrize("i", range(len(FORWARD)))
def test_apply_real_shapes(i, device, scratch):
    check_apply((*REAL_SHAPES[i % len(REAL_SHAPES)], device), *FORWARD[i])


# ---- backward
# --------------------------------------------------------------------------------------------------------------------

BACKWARD = [
    # act        batch  masked
    ("identity", True, True),
    ("silu", True, False),
    ("relu", False, True),
    ("relu6", True, True),
    ("hard_swish", False, False),
    ("gelu", True, False),
]


def check_backward(shape, act, batch, masked, one_launch=False, dout_dtype=None):
    """out = mask * phi(BN(x)): the sums, their merge, in two launches or one, and dx."""
    from effkernels.kernels.batchnorm import apply_backward, gradient_merge, gradient_reduce, gradient_sums

    x = data(*shape)
    N, C, H, W, dtype, device = shape
    dout = torch.randn(N, C, H, W).to(device, dout_dtype or dtype)
    mask = forward_terms(*shape)[1] if masked else None
    gamma, beta, mean, var = norm_vectors(C, device)
    if batch:
        mean, var = (
            guarded(v.float()) for v in (x.double().mean((0, 2, 3)), x.double().var((0, 2, 3), unbiased=False))
        )
    rstd = guarded((var + EPS).rsqrt())

    def network(x):
        wide = x.dtype == torch.float64
        x, g, b = (t.detach().to(torch.float64 if wide else t.dtype).requires_grad_() for t in (x, gamma, beta))
        statistics = (None, None) if batch else (mean.to(g.dtype), var.to(g.dtype))
        out = ACTIVATIONS[act](torch.nn.functional.batch_norm(x, *statistics, g, b, batch, 0.0, EPS))
        if masked:
            out = out * mask.to(x.dtype)[:, None, None, None]
        return dict(zip(("dx", "dgamma", "dbeta"), torch.autograd.grad(out, (x, g, b), dout.to(x.dtype)), strict=True))

    norm = norm_of((gamma, beta, mean, var), rstd)
    if one_launch:
        counters = torch.zeros(-(-C // 16), dtype=torch.int32, device=device)
        dgamma, dbeta, k0, k1 = gradient_reduce(
            nhwc(dout), nhwc(x), norm, act=act, branch_draws=mask, counters=counters
        )
        assert not counters.any()
    else:
        sums, _ = gradient_sums(nhwc(dout), nhwc(x), norm, act=act, branch_scale=mask)
        dgamma, dbeta, k0, k1 = gradient_merge(sums.view(-1, 2, C), norm, x.numel() // C)
    terms = (k0, k1) if batch else None
    dx = apply_backward(nhwc(dout), nhwc(x), norm, terms=terms, act=act, branch_scale=mask, out_dtype=dtype)
    assert dx.dtype == dtype
    assert_close_to_truth({"dx": nchw(dx), "dgamma": dgamma, "dbeta": dbeta}, network(x), network(x.double()))


@pytest.mark.parametrize("i", range(len(BACKWARD)))
def test_backward(i, device, scratch):
    check_backward((*SHAPES[i], device), *BACKWARD[i])


@pytest.mark.parametrize("i", range(len(BACKWARD)))
def test_backward_in_one_launch(i, device, scratch):
    """C above one block has one program a block, C below several; programs and their steps span images."""
    check_backward((*SHAPES[i], device), *BACKWARD[i], one_launch=True)


def test_gradient_reduce_of_many_small_images_and_another_dtype(device, scratch, monkeypatch):
    """Under autocast the gradient may be fp32. Five programs for each of three blocks of channels; their steps span
    images, kept and dropped ones."""
    from effkernels.configs import rules

    if device == "cpu":
        monkeypatch.setattr(rules, "processor_count", lambda device: 4)
    check_backward(
        (17, 35, 5, 7, torch.bfloat16, device), "identity", True, True, one_launch=True, dout_dtype=torch.float32
    )


def test_gradient_reduce_keeps_the_dtype_of_the_parameters(device, scratch):
    """A network cast to bf16 as a whole: dgamma and dbeta are rounded once, to nearest."""
    from effkernels.kernels.batchnorm import gradient_reduce

    x = data(3, 9, 13, 11, torch.bfloat16, device)
    dout = torch.randn(x.shape).to(device, torch.bfloat16)
    gamma, beta, mean, var = norm_vectors(9, device)
    counters = torch.zeros(1, dtype=torch.int32, device=device)
    narrow = [guarded(t.bfloat16()) for t in (gamma, beta)]
    results = [
        gradient_reduce(
            nhwc(dout),
            nhwc(x),
            norm_of((*parameters, mean, var), guarded((var + EPS).rsqrt())),
            act="relu",
            counters=counters,
        )
        for parameters in (narrow, [guarded(t.float()) for t in narrow])
    ]
    for a, b, dtype in zip(*results, [torch.bfloat16] * 2 + [torch.float32] * 2, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@on_gpu
@pytest.mark.parametrize("i", range(len(BACKWARD)))
def test_backward_real_shapes_in_one_launch(i, device, scratch):
    check_backward((*REAL_SHAPES[i % len(REAL_SHAPES)], device), *BACKWARD[i], one_launch=True)


@on_gpu
@pytest.mark.parametrize("i", range(len(BACKWARD)))
def test_backward_real_shapes(i, device, scratch):
    check_backward((*REAL_SHAPES[i % len(REAL_SHAPES)], device), *BACKWARD[i])


@pytest.mark.parametrize("act", ["silu", "hard_swish", None])
def test_gradient_sums_for_a_gate(act, device, scratch):
    """The five sums per image and channel that serve squeeze-excite and BN2, by their definition; without BN only the
    gate's."""
    from effkernels.kernels.batchnorm import gradient_sums

    x = data(2, 20, 13, 9, torch.float32, device)
    dq = torch.randn(x.shape).to(device)
    bn = norm_vectors(20, device) if act else None

    def reference(x):
        if bn is None:
            return {"gate": (dq.to(x.dtype) * x).sum((2, 3))}
        gamma, beta, mean, rstd = (v.to(x.dtype)[:, None, None] for v in bn)
        xhat = (x - mean) * rstd
        z = (xhat * gamma + beta).requires_grad_()
        phi = ACTIVATIONS[act](z)
        (dphi,) = torch.autograd.grad(phi.sum(), z)
        terms = {
            "dz": dq * dphi,
            "dz xhat": dq * dphi * xhat,
            "gate": dq * phi.detach(),
            "dphi": dphi,
            "dphi xhat": dphi * xhat,
        }
        return {name: term.sum((2, 3)) for name, term in terms.items()}

    norm = None if bn is None else norm_of(bn, bn[3])
    sums, _ = gradient_sums(nhwc(dq), nhwc(x), norm, act=act or "identity", for_gate=True)
    sums = sums.double().sum(1)
    names = ("dz", "dz xhat", "gate", "dphi", "dphi xhat")
    fused = {name: sums[:, i] for i, name in enumerate(names) if bn is not None or name == "gate"}
    assert_close_to_truth(fused, reference(x), reference(x.double()))


def test_gradient_merge_of_many_parts(device, scratch):
    """70 rows, more than one step takes, inside a larger buffer, as the depthwise backward leaves them."""
    from effkernels.kernels.batchnorm import gradient_merge

    torch.manual_seed(0)
    gamma, beta, mean, rstd = norm_vectors(35, device)
    partials = guarded(torch.randn(70, 11, 35).to(device))
    fused = gradient_merge(partials[:, 9:], norm_of((gamma, beta, mean, None), rstd), 500)
    dbeta, dgamma = partials.double().sum(0)[9:]
    g, m, r = double((gamma, mean, rstd))
    k1 = -g * r * r * dgamma / 500
    for value, truth in zip(fused, (dgamma, dbeta, -g * r * dbeta / 500 - k1 * m, k1), strict=True):
        assert relative_error(value, truth) < 1e-6


def test_batch_terms_are_autograd(device):
    """The closed form that these tests and test_depthwise.py use for k0 and k1."""
    x = data(2, 5, 4, 3, torch.float64, device).requires_grad_()
    gamma = torch.rand(5, dtype=torch.float64, device=device)
    dz = torch.randn_like(x)
    (dx,) = torch.autograd.grad(torch.nn.functional.batch_norm(x, None, None, gamma, None, True, 0.0, EPS), x, dz)
    mean, rstd = x.mean((0, 2, 3)), (x.var((0, 2, 3), unbiased=False) + EPS).rsqrt()
    _, _, k0, k1 = batch_terms(dz, x, gamma, mean, rstd)
    scale = (gamma * rstd)[:, None, None]
    torch.testing.assert_close(scale * dz + k0[:, None, None] + k1[:, None, None] * x, dx)


def test_apply_backward_through_a_gate(device, scratch):
    """Squeeze-excite alone: dx = dq * gate + dpool, no BatchNorm."""
    from effkernels.kernels.batchnorm import apply_backward

    dq = data(2, 20, 13, 9, torch.float32, device)
    gate, dpool = (guarded(torch.randn(2, 20).to(device)) for _ in range(2))
    truth = dq.double() * gate.double()[:, :, None, None] + dpool.double()[:, :, None, None]
    assert relative_error(nchw(apply_backward(nhwc(dq), None, None, gates=gate, dpool=dpool)), truth) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_partials(dtype, device, scratch):
    """The weight gradient in the weight's dtype and layout; rows after the taps (BN1's sums, or NaN) are not read."""
    from effkernels.kernels.batchnorm import sum_partials

    torch.manual_seed(0)
    partials = torch.randn(70, 11, 21).to(device)
    partials[:, 9:] = float("nan")
    weight = torch.empty(21, 1, 3, 3, dtype=dtype, device=device)
    dw = sum_partials(guarded(partials), 9, weight)
    truth = partials[:, :9].double().sum(0).T.reshape(21, 1, 3, 3)
    assert dw.dtype == dtype and dw.is_contiguous()
    assert_close_to_truth(dw, truth.to(dtype), truth, "dw")
