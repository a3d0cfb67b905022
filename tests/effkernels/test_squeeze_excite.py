"""Squeeze-excite's kernels against float64: pooling, both layers, their gradients, and the two sums they finish for
BatchNorm 2."""

import pytest
import torch
import torch.nn.functional as F

from effkernels.parameters import SqueezeExciteParams
from effkernels.reference import ACTIVATIONS, GATES, squeeze_excite
from support.truth import assert_close_to_truth, batch_norm, batch_terms, guarded, nhwc, norm_of, norm_vectors, on_gpu

EPS = 1e-3
# R below, at and above the 16 a block has at least, no powers of two but 16; C above the 128 a step of the layers
# takes; N above the 32 a step of the weight gradient takes; one and several parts of pooling. Each activation and gate
# is in, BN before the gate or not.
CASES = [
    # N  C   R   H   W   dtype           act           gate            bn
    (2, 24, 6, 5, 7, torch.float32, "silu", "sigmoid", True),
    (1, 33, 1, 17, 16, torch.bfloat16, "relu", "hard_sigmoid", True),
    (35, 8, 3, 2, 1, torch.float32, "relu6", "sigmoid", True),
    (2, 140, 17, 4, 4, torch.float16, "hard_swish", "hard_sigmoid", False),
    (3, 16, 16, 13, 11, torch.float32, "gelu", "sigmoid", False),
    (1, 3, 10, 1, 1, torch.float32, "identity", "hard_sigmoid", True),
]
REAL_CASES = [
    (16, 96, 4, 56, 56, torch.bfloat16, "silu", "sigmoid", True),
    (64, 1152, 48, 7, 7, torch.float16, "silu", "sigmoid", True),
    (2, 3840, 160, 18, 18, torch.float32, "silu", "sigmoid", True),
    (16, 672, 168, 14, 14, torch.bfloat16, "relu", "hard_sigmoid", False),
]
ARGUMENTS = "N, C, R, H, W, dtype, act, gate, has_bn"
ROWS = ("w_reduce", "b_reduce", "w_expand", "b_expand")


def cases(rows):
    return pytest.mark.parametrize(ARGUMENTS, [pytest.param(*row, id="-".join(map(str, row[:5]))) for row in rows])


def weights_of(C, R, device):
    """Small enough that the gates do not saturate."""
    shapes = ((R, C, 1, 1), (R,), (C, R, 1, 1), (C,))
    return [guarded((torch.randn(s) / s[1] ** 0.5 if len(s) > 1 else torch.randn(s)).to(device)) for s in shapes]


def check(N, C, R, H, W, dtype, act, gate, has_bn, device):
    """BN2 -> silu -> squeeze-excite, forward and backward, from y to the gradients of all but y (test_modules.py has
    the whole)."""
    from effkernels.kernels import batchnorm
    from effkernels.kernels import squeeze_excite as kernels

    torch.manual_seed(0)
    y, dout = (torch.randn(N, C, H, W).to(device, dtype) for _ in range(2))
    weights = weights_of(C, R, device)
    gamma, beta, mean, var = norm_vectors(C, device)
    rstd = guarded((var + EPS).rsqrt())
    batch = (y.double().mean((0, 2, 3)), (y.double().var((0, 2, 3), unbiased=False) + EPS).rsqrt())
    if has_bn and N * H * W > 1:
        mean, rstd = (guarded(v.float()) for v in batch)
    statistics = (mean, rstd.double() ** -2 - EPS)

    def network(y):
        """One squeeze-excite over a = silu(BN(y)), by autograd; da is kept to finish BN2's sums."""
        wide = y.dtype == torch.float64
        z = y
        if has_bn:
            z = batch_norm(y, gamma, beta, statistics[0], statistics[1] if wide else statistics[1].float(), EPS)
        z = z.detach().requires_grad_()
        a = F.silu(z) if has_bn else z * 1
        w = [(t.double() if wide else t.to(dtype)).detach().requires_grad_() for t in weights]
        pooled = a.mean((2, 3))
        u = F.linear(pooled, w[0].flatten(1), w[1])
        gates = GATES[gate](F.linear(ACTIVATIONS[act](u), w[2].flatten(1), w[3]))
        out = squeeze_excite(a, SqueezeExciteParams(*w, act, gate))
        da, dz, *grads = torch.autograd.grad(out, (a, z, *w), dout.to(a.dtype))
        # Every pixel's gradient is dout * gate + dpool: dpool is what is the same for all.
        dpool = (da.double() - dout.double() * gates.detach().double()[:, :, None, None]).mean((2, 3))
        results = {"gates": gates, "pooled": pooled, "u": u, "dpool": dpool, **dict(zip(ROWS, grads, strict=True))}
        if has_bn:
            names = ("dgamma", "dbeta", "k0", "k1")
            vectors = (v.double() for v in (gamma, mean, rstd))
            results |= zip(names, batch_terms(dz.double(), y.double(), *vectors), strict=True)
        return results

    norm = norm_of((gamma, beta, mean, None), rstd) if has_bn else None
    sums = kernels.pool(nhwc(y), norm, act="silu")
    gates, pooled, u = kernels.squeeze_excite_forward(sums, H * W, *weights, act=act, gate=gate)
    sums, _ = batchnorm.gradient_sums(nhwc(dout), nhwc(y), norm, act="silu", for_gate=True)
    dpool, grads, norms = kernels.squeeze_excite_backward(
        sums, H * W, gates, pooled, u, weights, norm=norm, act=act, gate=gate
    )
    assert all(t.dtype == torch.float32 for t in (gates, pooled, u, dpool, *grads))
    fused = {"gates": gates, "pooled": pooled, "u": u, "dpool": dpool, **dict(zip(ROWS, grads, strict=True))}
    assert (norms is not None) == has_bn
    if has_bn:
        fused |= zip(("dgamma", "dbeta", "k0", "k1"), norms, strict=True)
    assert_close_to_truth(fused, network(y), network(y.double()))


@cases(CASES)
def test_squeeze_excite(N, C, R, H, W, dtype, act, gate, has_bn, device, scratch):
    check(N, C, R, H, W, dtype, act, gate, has_bn, device)


@on_gpu
@cases(REAL_CASES)
def test_squeeze_excite_real_shapes(N, C, R, H, W, dtype, act, gate, has_bn, device, scratch):
    check(N, C, R, H, W, dtype, act, gate, has_bn, device)


# ---- training's launches: pooling with both layers, and their backward with BatchNorm 2's
# ------------------------------------------

# As above, and with several parts of pooling and several blocks of images, channels and bottleneck; N no multiple of
# 16.
TRAINING_CASES = [
    # N  C    R   H   W   dtype           act           se_act        gate
    (1, 24, 6, 17, 19, torch.float32, "silu", "silu", "sigmoid"),
    (17, 35, 1, 5, 4, torch.bfloat16, "silu", "relu", "hard_sigmoid"),
    (2, 264, 67, 4, 3, torch.float32, "hard_swish", "hard_swish", "hard_sigmoid"),
    (3, 8, 16, 13, 11, torch.float16, "relu6", "gelu", "sigmoid"),
    (33, 20, 10, 1, 1, torch.bfloat16, "gelu", "identity", "sigmoid"),
    (2, 3, 70, 9, 15, torch.float32, "relu", "relu6", "sigmoid"),
    (1, 140, 33, 2, 2, torch.float16, "identity", "silu", "sigmoid"),
    (18, 70, 66, 2, 3, torch.float32, "silu", "silu", "sigmoid"),
]
training_cases = pytest.mark.parametrize("N, C, R, H, W, dtype, act, se_act, gate", TRAINING_CASES)


def frozen_norm(y, device):
    """One with statistics near to y's own."""
    from effkernels.kernels.norm import BatchNorm

    gamma, beta, _, _ = norm_vectors(y.shape[1], device)
    return BatchNorm(
        gamma,
        beta,
        guarded(y.float().mean((0, 2, 3)) + 0.1),
        guarded((y.float().var((0, 2, 3), unbiased=False) + 0.1).rsqrt()),
    )


def normalized(y, bn):
    """(yhat, z) in y's dtype, z a leaf."""
    gamma, beta, mean, rstd = bn[:4]
    yhat = ((y - mean[:, None, None]) * rstd[:, None, None]).to(y.dtype)
    return yhat, batch_norm(
        y, gamma, beta, mean, rstd.double() ** -2 if y.dtype == torch.float64 else rstd**-2, 0.0
    ).requires_grad_()


def check_pool_and_gate(N, C, R, H, W, dtype, act, se_act, gate, device):
    from effkernels.kernels.squeeze_excite import pool, squeeze_excite_forward

    torch.manual_seed(0)
    y = torch.randn(N, C, H, W).to(device, dtype)
    weights, bn = weights_of(C, R, device), frozen_norm(y, device)

    def network(y):
        a = ACTIVATIONS[act](normalized(y, bn)[1])
        w = [t.to(y.dtype) for t in weights]
        pooled = a.detach().mean((2, 3))
        u = F.linear(pooled, w[0].flatten(1), w[1])
        gates = GATES[gate](F.linear(ACTIVATIONS[se_act](u), w[2].flatten(1), w[3]))
        return {"gates": gates, "pooled": pooled, "u": u}

    fused = squeeze_excite_forward(pool(nhwc(y), bn, act=act), H * W, *weights, act=se_act, gate=gate)
    assert all(t.dtype == torch.float32 for t in fused)
    assert_close_to_truth(dict(zip(("gates", "pooled", "u"), fused, strict=True)), network(y), network(y.double()))


@training_cases
def test_pool_and_gate(N, C, R, H, W, dtype, act, se_act, gate, device, scratch):
    check_pool_and_gate(N, C, R, H, W, dtype, act, se_act, gate, device)


def test_pool_and_gate_with_many_parts(device, scratch, monkeypatch):
    """9 parts an image, more than one step of what adds those of one image; 2 of each of many images."""
    from effkernels.configs import rules

    if device == "cpu":
        monkeypatch.setattr(rules, "processor_count", lambda device: 8)
    for N, H in ((1, 250), (17, 60)):
        check_pool_and_gate(N, 35, 5, H, 38, torch.float32, "silu", "silu", "sigmoid", device)


@on_gpu
@pytest.mark.parametrize("N, C, R, H, W, dtype, act, gate, has_bn", REAL_CASES)
def test_pool_and_gate_real_shapes(N, C, R, H, W, dtype, act, gate, has_bn, device, scratch):
    check_pool_and_gate(N, C, R, H, W, dtype, act, act, gate, device)


def check_gate_backward(N, C, R, H, W, dtype, act, se_act, gate, device, parts=1, weight_dtype=torch.float32):
    """From dq's sums, random, to the gradients of the gate's argument, the bottleneck, the pooling and BatchNorm 2."""
    from effkernels.configs.rules import gate_backward_config
    from effkernels.kernels.squeeze_excite import gate_backward

    torch.manual_seed(0)
    y, dq = (torch.randn(N, C, H, W).to(device, dtype) for _ in range(2))
    weights, bn = [guarded(w.to(weight_dtype)) for w in weights_of(C, R, device)], frozen_norm(y, device)
    pixels = H * W

    def network(y):
        """Squeeze-excite by autograd, its sums over pixels exact."""
        yhat, z = normalized(y, bn)
        a = ACTIVATIONS[act](z)
        w = [t.to(y.dtype) for t in weights]
        pooled = a.mean((2, 3))
        u = F.linear(pooled, w[0].flatten(1), w[1])
        t = F.linear(ACTIVATIONS[se_act](u), w[2].flatten(1), w[3])
        gates = GATES[gate](t)
        out = a * gates[:, :, None, None]
        da, dz, dt, du, dpooled = torch.autograd.grad(out, (a, z, t, u, pooled), dq.to(out.dtype))
        vectors = (v.double() if y.dtype == torch.float64 else v for v in (bn.weight, bn.mean, bn.rstd))
        results = {"dt": dt, "du": du, "dpool": dpooled / pixels}
        return results | dict(zip(("dgamma", "dbeta", "k0", "k1"), batch_terms(dz, y, *vectors), strict=True))

    yhat, z = normalized(y.double(), [v.double() for v in bn[:4]])
    phi = ACTIVATIONS[act](z)
    (dphi,) = torch.autograd.grad(phi.sum(), z)
    pooled = phi.detach().mean((2, 3))
    u = F.linear(pooled, weights[0].double().flatten(1), weights[1].double())
    gates = GATES[gate](F.linear(ACTIVATIONS[se_act](u), weights[2].double().flatten(1), weights[3].double()))
    moments = [dq.double() * t.detach() for t in (dphi, dphi * yhat, phi)] + [dphi, dphi * yhat.detach()]
    sums = torch.stack([t.sum((2, 3)) for t in moments], 1)
    split = torch.randn(N, parts, 5, C, dtype=torch.float64, device=device)
    split += (sums[:, None] - split.sum(1, keepdim=True)) / parts
    vectors = (gates, u)
    counters = torch.zeros(gate_backward_config(R).counters(N, C), dtype=torch.int32, device=device)
    results = gate_backward(
        guarded(split.float()),
        *(guarded(v.float()) for v in vectors),
        weights,
        bn,
        pixels,
        act=se_act,
        gate=gate,
        counters=counters,
    )
    assert not counters.any()
    *fused, norm = results
    assert all(t.dtype == torch.float32 for t in (*fused, *norm))
    fused = dict(zip(("dt", "du", "dpool", "dgamma", "dbeta", "k0", "k1"), (*fused, *norm), strict=True))
    assert_close_to_truth(fused, network(y), network(y.double()))


@training_cases
def test_gate_backward(N, C, R, H, W, dtype, act, se_act, gate, device, scratch):
    check_gate_backward(N, C, R, H, W, dtype, act, se_act, gate, device)


def test_gate_backward_of_many_parts_channel_blocks_and_bf16_weights(device, scratch):
    """More blocks of channels than one step of du sums takes, more images than a program takes, five parts an image."""
    check_gate_backward(
        17, 1100, 6, 2, 2, torch.bfloat16, "silu", "silu", "sigmoid", device, parts=5, weight_dtype=torch.bfloat16
    )


def test_gate_backward_keeps_the_dtype_of_batchnorms_parameters(device, scratch):
    from effkernels.kernels.squeeze_excite import gate_backward

    torch.manual_seed(0)
    sums, vectors = torch.randn(2, 1, 5, 9).to(device), [torch.rand(2, size).to(device) for size in (9, 4)]
    gamma, beta, mean, rstd = norm_vectors(9, device)
    narrow = [gamma.bfloat16(), beta.bfloat16()]
    weights, counters = weights_of(9, 4, device), torch.zeros(4, dtype=torch.int32, device=device)
    norms = [
        gate_backward(
            sums,
            *vectors,
            weights,
            norm_of((*parameters, mean, None), rstd),
            4,
            act="silu",
            gate="sigmoid",
            counters=counters,
        )[3]
        for parameters in (narrow, [t.float() for t in narrow])
    ]
    for a, b, dtype in zip(*norms, [torch.bfloat16] * 2 + [torch.float32] * 2, strict=True):
        assert a.dtype == dtype
        assert torch.equal(a, b.to(dtype))


@on_gpu
@pytest.mark.parametrize("N, C, R, H, W, dtype, act, gate, has_bn", REAL_CASES)
def test_gate_backward_real_shapes(N, C, R, H, W, dtype, act, gate, has_bn, device, scratch):
    check_gate_backward(N, C, R, H, W, dtype, act, act, gate, device, parts=3)


def test_pool_with_running_variance(device, scratch):
    """The variance itself and eps instead of rstd, as in inference."""
    from effkernels.kernels.squeeze_excite import pool

    torch.manual_seed(0)
    y, bn = torch.randn(2, 20, 9, 15).to(device), norm_vectors(20, device)

    def reference(y):
        return F.hardswish(batch_norm(y, *bn, EPS)).sum((2, 3))

    assert_close_to_truth(
        pool(nhwc(y), norm_of(bn, eps=EPS), act="hard_swish").sum(1), reference(y), reference(y.double()), "sums"
    )


def test_weights_in_the_compute_dtype(device, scratch):
    """A network cast to bf16 as a whole: weight gradients come in bf16, rounded once from fp32 sums."""
    from effkernels.kernels.squeeze_excite import squeeze_excite_backward, squeeze_excite_forward

    torch.manual_seed(0)
    weights = [w.bfloat16() for w in weights_of(20, 5, device)]
    wide = [guarded(w.float()) for w in weights]
    sums, back = guarded(torch.randn(2, 1, 20).to(device)), guarded(torch.randn(2, 1, 5, 20).to(device))
    results = []
    for w in (weights, wide):
        forward = squeeze_excite_forward(sums, 4, *map(guarded, w))
        results.append((forward, squeeze_excite_backward(back, 4, *forward, w)[1]))
    (narrow_forward, narrow_grads), (wide_forward, wide_grads) = results
    for a, b in zip(narrow_forward, wide_forward, strict=True):
        assert torch.equal(a, b)
    for a, b in zip(narrow_grads, wide_grads, strict=True):
        assert a.dtype == torch.bfloat16
        assert torch.equal(a, b.bfloat16())


@pytest.mark.parametrize("spread", [1.0, 30.0])
def test_six_products_of_bf16_are_as_exact_as_fp32(spread):
    """What ``exact_dot`` compiles to, which the interpreter does not run: operands as sums of three in bf16, without
    the three smallest of the nine products."""
    torch.manual_seed(0)
    a, b = (torch.randn(16, 64) * torch.exp2(spread * torch.rand(16, 64)) for _ in range(2))

    def pieces(x):
        for _ in range(3):
            yield x.bfloat16().float()
            x = x - x.bfloat16().float()

    found = torch.zeros(16, 16)
    for i, left in reversed(list(enumerate(pieces(a)))):
        for j, right in reversed(list(enumerate(pieces(b)))):
            if i + j <= 2:
                found += left @ right.T
    assert_close_to_truth(found, a @ b.T, a.double() @ b.double().T)
