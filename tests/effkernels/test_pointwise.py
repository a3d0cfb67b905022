"""1x1 convolutions against float64: every prologue and epilogue of the forward, both backward passes, several tiles and programs."""

import pytest
import torch
import torch.nn.functional as F

from effkernels.reference import ACTIVATIONS
from support.truth import assert_close_to_truth, batch_norm, batch_terms, guarded, nchw, nhwc, norm_of, norm_vectors

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
# Images, height, width, inner channels, outer channels: one row; rows of no whole tile and no channel count divisible by 8; several
# tiles an image; more inner channels than one step takes, more outer ones than one block.
SHAPES = [(1, 1, 1, 16, 24), (3, 5, 7, 12, 10), (2, 9, 10, 24, 40), (2, 3, 5, 150, 139), (17, 2, 2, 70, 33)]
every_shape = pytest.mark.parametrize(("N", "H", "W", "K", "O"), SHAPES)


def counters(device):
    return torch.zeros(64, dtype=torch.int32, device=device)


def tensor(*shape, device, dtype=torch.float32, scale=1.0):
    return guarded((torch.randn(shape) * scale + 0.3 * scale).to(dtype).to(device))


def three(function, *tensors):
    """{"eager", "truth"}: function of the tensors as they are, and in float64."""
    wide = [None if t is None else t.double() for t in tensors]
    return {"eager": function(*tensors), "truth": function(*wide)}


def check(fused, results, name=""):
    assert_close_to_truth(fused, results["eager"], results["truth"], name)


def conv(a, weight):
    return F.conv2d(a, weight.to(a.dtype))


# ---- forward ---------------------------------------------------------------------------------------------------------------------


@every_dtype
@every_shape
def test_product(N, H, W, K, O, dtype, device, scratch):
    from effkernels.kernels.pointwise import pointwise_forward

    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    y, statistics = pointwise_forward(nhwc(x), weight)
    assert y.dtype == dtype and statistics is None
    check(nchw(y), three(conv, x, weight))


def test_input_is_rounded_to_the_compute_dtype_on_load(device, scratch):
    from effkernels.kernels.pointwise import pointwise_forward

    x, weight = tensor(2, 20, 3, 5, device=device), tensor(9, 20, 1, 1, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        y, _ = pointwise_forward(nhwc(x), weight, dtype=dtype)
        assert y.dtype == dtype
        assert torch.equal(y, pointwise_forward(nhwc(x.to(dtype)), weight.to(dtype))[0])


@pytest.mark.parametrize("momentum", [0.1, None])
@every_dtype
@every_shape
def test_statistics(N, H, W, K, O, dtype, momentum, device, scratch):
    """Partial ones, and merged by the last program with the running statistics; twice, so that the counters must be zero again."""
    from effkernels.kernels.norm import BatchStatistics
    from effkernels.kernels.pointwise import pointwise_forward

    if N * H * W == 1:
        pytest.skip("one value has no variance")
    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    _, (count, mean, m2) = pointwise_forward(nhwc(x), weight, partial_statistics=True)
    assert count.sum() == N * H * W
    total = (count[:, None] * mean).sum(0) / count.sum()
    variance = (m2 + count[:, None] * (mean - total) ** 2).sum(0) / count.sum()

    def batch(x, weight):
        flat = conv(x, weight).transpose(0, 1).flatten(1).to(x.dtype if x.dtype == torch.float64 else torch.float32)
        return {"mean": flat.mean(1), "var": flat.var(1, unbiased=False)}

    results = three(batch, x, weight)
    check({"mean": total, "var": variance}, results)
    ticket = counters(device)
    for step in range(2):
        running = [torch.zeros(O, device=device), torch.ones(O, device=device)]
        tracked = torch.tensor(4, device=device)
        statistics = BatchStatistics(EPS, *running, tracked, momentum)
        _, (mean, rstd) = pointwise_forward(nhwc(x), weight, statistics=statistics, counters=ticket)
        assert not ticket.any()
        assert tracked == 4 + (momentum is not None)
        factor = 0.25 if momentum is None else momentum
        bessel = N * H * W / (N * H * W - 1)

        def with_running(r, factor=factor, bessel=bessel):
            return {
                "mean": r["mean"],
                "rstd": (r["var"] + EPS).rsqrt(),
                "running_mean": r["mean"] * factor,
                "running_var": 1 - factor + r["var"] * bessel * factor,
            }

        fused = {"mean": mean, "rstd": rstd, "running_mean": running[0], "running_var": running[1]}
        check(fused, {name: with_running(r) for name, r in results.items()}, f"call {step}")


@pytest.mark.parametrize("act", ["silu", "relu6", "hard_swish", "gelu", "identity"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "H", "W", "K", "O"), SHAPES[1:4])
def test_batch_norm_activation_and_gate_on_load(N, H, W, K, O, dtype, gated, act, device, scratch):
    from effkernels.kernels.pointwise import pointwise_forward

    y2, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    gamma, beta, mean, var = norm_vectors(K, device)
    gate = torch.rand(N, K, device=device) if gated else None

    def project(y2, gamma, beta, mean, var, gate, weight):
        a = ACTIVATIONS[act](batch_norm(y2, gamma, beta, mean, var, 0.0))
        return conv(a if gate is None else a * gate[:, :, None, None].to(a.dtype), weight)

    prologue = norm_of((gamma, beta, mean, var), var.rsqrt())
    y, _ = pointwise_forward(nhwc(y2), weight, prologue=prologue, act1=act, gates=gate)
    check(nchw(y), three(project, y2, gamma, beta, mean, var, gate, weight))


@every_dtype
@every_shape
def test_inference_epilogue(N, H, W, K, O, dtype, device, scratch):
    """The gate on load of an activated input; BN, activation and a residual of another dtype after; one image of many tiles."""
    from effkernels.kernels.pointwise import pointwise_forward

    a, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    gate, residual = torch.rand(N, K, device=device), tensor(N, O, H, W, device=device)
    norm = norm_vectors(O, device)

    def layer(a, gate, weight, residual, *norm):
        y = F.silu(batch_norm(conv(a * gate[:, :, None, None].to(a.dtype), weight), *norm, EPS))
        return y + residual

    y, _ = pointwise_forward(
        nhwc(a),
        weight,
        gates=gate,
        epilogue=norm_of(norm, eps=EPS),
        act2="silu",
        residual=nhwc(residual),
        out_dtype=torch.float32,
    )
    assert y.dtype == torch.float32
    check(nchw(y), three(layer, a, gate, weight, residual, *norm))


@every_dtype
@every_shape
def test_pooled_head(N, H, W, K, O, dtype, device, scratch):
    from effkernels.kernels.pointwise import pointwise_forward

    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    norm = norm_vectors(O, device)
    pooled, _ = pointwise_forward(nhwc(x), weight, epilogue=norm_of(norm, eps=EPS), act2="silu", pool=True)
    assert pooled.dtype == dtype
    check(pooled, three(lambda x, weight, *norm: F.silu(batch_norm(conv(x, weight), *norm, EPS)).mean((2, 3)), x, weight, *norm))


# ---- backward --------------------------------------------------------------------------------------------------------------------


def slope(act, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[act](z).sum(), z)[0]


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
@every_dtype
@pytest.mark.parametrize(("N", "H", "W", "E", "O"), [(3, 5, 7, 20, 10), (2, 9, 10, 72, 24), (2, 3, 5, 100, 150), (17, 2, 2, 40, 16)])
def test_project_backward(N, H, W, E, O, dtype, frozen, gated, device, scratch):
    from effkernels.kernels.pointwise import project_backward

    act = "silu"
    dout, y3 = tensor(N, O, H, W, device=device, dtype=dtype), tensor(N, O, H, W, device=device, dtype=dtype)
    y2, weight = tensor(N, E, H, W, device=device, dtype=dtype), tensor(O, E, 1, 1, device=device, scale=O**-0.5)
    gamma2, beta2, mean2, var2 = norm_vectors(E, device)
    gamma3, beta3, mean3, var3 = norm_vectors(O, device)
    gate = torch.rand(N, E, device=device) if gated else None
    mask = torch.rand(N, device=device)
    view = mask[:, None, None, None]
    *_, k0, k1 = batch_terms(dout.double() * view, y3.double(), gamma3.double(), mean3.double(), var3.double().rsqrt())
    k0, k1 = (None, None) if frozen else (k0.float(), k1.float())

    def backward(dout, y3, y2, weight, gamma2, beta2, mean2, var2, gamma3, var3, mask, k0, k1, gate):
        wide = [t if t is None or dout.dtype == torch.float64 else t.float() for t in (dout, y3, mask)]
        scale = (gamma3 * var3.rsqrt())[:, None, None]
        dy = wide[0] * wide[2][:, None, None, None] * scale
        if k0 is not None:
            dy = dy + k0[:, None, None] + k1[:, None, None] * wide[1]
        dy = dy.to(dout.dtype)
        dq = torch.nn.grad.conv2d_input(y2.shape, weight.to(dy.dtype), dy)
        z = batch_norm(y2, gamma2, beta2, mean2, var2, 0.0)
        a, dphi = ACTIVATIONS[act](z), slope(act, z)
        yhat = (y2 - mean2[:, None, None]) * var2.rsqrt()[:, None, None]
        sums = [dq * dphi, dq * dphi * yhat, dq * a, dphi, dphi * yhat][: 5 if gated else 2]
        q = a if gate is None else a * gate[:, :, None, None].to(a.dtype)
        dw = torch.nn.grad.conv2d_weight(q, weight.shape, dy.to(q.dtype))
        return {"dq": dq, "sums": torch.stack([s.sum((2, 3)) for s in sums], 1), "dw": dw}

    results = three(backward, dout, y3, y2, weight, gamma2, beta2, mean2, var2, gamma3, var3, mask, k0, k1, gate)

    def run(**needs):
        return project_backward(
            nhwc(dout),
            nhwc(y3),
            nhwc(y2),
            weight,
            norm3=norm_of((gamma3, beta3, mean3, var3), var3.rsqrt()),
            terms3=None if frozen else (k0, k1),
            norm2=norm_of((gamma2, beta2, mean2, var2), var2.rsqrt()),
            act=act,
            gates=gate,
            branch_draws=mask,
            **needs,
        )

    dq, sums, partials = run()
    check({"dq": nchw(dq), "sums": sums.sum(1), "dw": partials.sum(0)[..., None, None]}, results)
    # Parts of it alone.
    dq, sums, partials = run(need_dw=False)
    assert partials is None
    check(nchw(dq), {k: v["dq"] for k, v in results.items()})
    dq, sums, partials = run(need_dq=False)
    assert dq is None
    check(sums.sum(1), {k: v["sums"] for k, v in results.items()})
    dq, sums, partials = run(need_data=False, need_dq=False)
    assert dq is None and sums is None
    check(partials.sum(0)[..., None, None], {k: v["dw"] for k, v in results.items()})


def test_results_do_not_depend_on_the_run(device, scratch):
    """No atomics: bit for bit the same, and an image's product does not depend on the others in the batch."""
    from effkernels.kernels.pointwise import pointwise_forward, project_backward

    N, H, W, E, O = 4, 5, 6, 24, 12
    y2, weight = tensor(N, H, W, E, device=device), tensor(O, E, 1, 1, device=device)
    dout, y3, gate = tensor(N, H, W, O, device=device), tensor(N, H, W, O, device=device), torch.rand(N, E, device=device)
    bn2, bn3 = norm_vectors(E, device), norm_vectors(O, device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    y, _ = pointwise_forward(y2, weight, gates=gate)
    assert torch.equal(y[order], pointwise_forward(y2[order], weight, gates=gate[order])[0])

    def backward():
        norm3, norm2 = norm_of(bn3, bn3[3]), norm_of(bn2, bn2[3])
        return project_backward(dout, y3, y2, weight, norm3=norm3, terms3=(bn3[1], bn3[2]), norm2=norm2, act="silu", gates=gate)

    for first, second in zip(backward(), backward(), strict=True):
        assert torch.equal(first, second)
