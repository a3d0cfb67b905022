"""The forward of 1x1 convolutions against float64: prologues and epilogues, live weights and their copies, several
tiles and programs.
"""

from types import MappingProxyType

import pytest
import torch
import torch.nn.functional as F

from effkernels.reference import ACTIVATIONS
from support.truth import assert_close_to_truth, batch_norm, guarded, nchw, nhwc, norm_of, norm_vectors

EPS = 1e-3
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The weight in steps as it is; in half precision also in the order of fragments, as a copy, or put there where it stays
# with a program.
FORMS = [*((dtype, "live") for dtype in DTYPES), (DTYPES[1], "copy"), *((dtype, "fragments") for dtype in DTYPES[1:])]
FORMS += [(dtype, form) for form in ("shared", "apart") for dtype in DTYPES]
every_form = pytest.mark.parametrize(("dtype", "form"), FORMS, ids=lambda p: str(p).removeprefix("torch."))
# Images, height, width, inner channels, outer channels: one row; rows of no whole tile and no channel count divisible
# by 8; several tiles a program; more inner channels than one step takes and more outer ones than one block; images
# smaller than a tile.
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


def run(x, weight, form="live", fields=MappingProxyType({}), **how):
    """``pointwise_forward`` of x [N, K, H, W] in one of FORMS, with ``fields`` of its configuration."""
    from effkernels.configs import tables
    from effkernels.kernels import pointwise_forward
    from effkernels.kernels.weight_copies import weight_copies

    if form == "copy":
        (weight,) = weight_copies([(weight, "permuted")], how.get("dtype", x.dtype))
    stays = {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "resident": True}
    forms = {
        "fragments": stays | {"ahead": 2, "fragments": True},
        "shared": stays | {"ahead": 0, "fragments": False, "stages": 3},
    }
    with pytest.MonkeyPatch.context() as patch, tables.override("pointwise_forward", **forms.get(form, {}), **fields):
        patch.setattr(pointwise_forward, "product_is_apart", lambda **problem: form == "apart" and not how.get("pool"))
        return pointwise_forward.pointwise_forward(nhwc(x), weight, **how)


@every_form
@every_shape
def test_product(N, H, W, K, O, dtype, form, device, scratch):
    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    y, statistics = run(x, weight, form)
    assert y.dtype == dtype and statistics is None
    check(nchw(y), three(conv, x, weight))


@pytest.mark.parametrize("form", ["live", "copy", "fragments", "shared", "apart"])
def test_input_is_rounded_to_the_compute_dtype_on_load(form, device, scratch):
    x, weight = tensor(2, 20, 3, 5, device=device), tensor(9, 20, 1, 1, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        y, _ = run(x, weight, form, dtype=dtype)
        assert y.dtype == dtype
        assert torch.equal(y, run(x.to(dtype), weight.to(dtype), form)[0])


def batch_statistics(x, weight):
    flat = conv(x, weight).transpose(0, 1).flatten(1).to(x.dtype if x.dtype == torch.float64 else torch.float32)
    return {"mean": flat.mean(1), "var": flat.var(1, unbiased=False)}


@every_form
@every_shape
def test_statistics(N, H, W, K, O, dtype, form, device, scratch):
    """Partial ones, and merged by the last programs with the running statistics; twice, so that the counters must be
    zero again.
    """
    from effkernels.kernels.norm import BatchStatistics

    if N * H * W == 1:
        pytest.skip("one value has no variance")
    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    _, (count, mean, m2) = run(x, weight, form, partial_statistics=True)
    assert count.sum() == N * H * W
    total = (count[:, None] * mean).sum(0) / count.sum()
    variance = (m2 + count[:, None] * (mean - total) ** 2).sum(0) / count.sum()
    results = three(batch_statistics, x, weight)
    check({"mean": total, "var": variance}, results)
    ticket = counters(device)
    for momentum in (0.1, None):
        running = [torch.zeros(O, device=device), torch.ones(O, device=device)]
        tracked = torch.tensor(4, device=device)
        _, (mean, rstd) = run(
            x, weight, form, statistics=BatchStatistics(EPS, *running, tracked, momentum), counters=ticket
        )
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
        check(fused, {name: with_running(r) for name, r in results.items()}, f"momentum {momentum}")


@pytest.mark.parametrize("form", ["live", "copy", "fragments", "shared", "apart"])
def test_several_slices_of_columns(form, device, scratch):
    """Programs of other columns have counts and counters of their own; one of them counts the batch."""
    from effkernels.kernels.norm import BatchStatistics

    x, weight = tensor(3, 16, 4, 9, device=device, dtype=torch.bfloat16), tensor(110, 16, 1, 1, device=device)
    results = three(batch_statistics, x, weight)
    ticket = counters(device)
    tracked = torch.tensor(4, device=device)
    running = torch.zeros(110, device=device), torch.ones(110, device=device)
    y, (mean, rstd) = run(
        x,
        weight,
        form,
        {"BLOCK_N": 48, "programs_per_sm": 1},
        statistics=BatchStatistics(EPS, *running, tracked, 0.5),
        counters=ticket,
    )
    assert not ticket.any() and tracked == 5
    check(nchw(y), three(conv, x, weight))
    expected = {
        name: {"mean": r["mean"], "rstd": (r["var"] + EPS).rsqrt(), "running": r["mean"] / 2}
        for name, r in results.items()
    }
    check({"mean": mean, "rstd": rstd, "running": running[0]}, expected)


@pytest.mark.parametrize(("N", "H", "W", "K", "O"), [SHAPES[2], SHAPES[4]])
def test_tiles_of_one_image(N, H, W, K, O, device, scratch):
    """The gate as one vector a tile, where large images pay for rows that are not there; one program walks over all of
    them.
    """
    a, weight = (
        tensor(N, K, H, W, device=device, dtype=torch.bfloat16),
        tensor(O, K, 1, 1, device=device, scale=K**-0.5),
    )
    gates = torch.rand(N, K, device=device)
    y, (count, mean, m2) = run(
        a, weight, "fragments", {"per_image": True, "programs_per_sm": 1}, gates=gates, partial_statistics=True
    )
    gated = (a.float() * gates[:, :, None, None]).bfloat16()
    assert count.sum() == N * H * W
    check(nchw(y), three(conv, gated, weight))
    check(
        (count[:, None] * mean).sum(0) / count.sum(),
        {name: r["mean"] for name, r in three(batch_statistics, gated, weight).items()},
    )


@every_form
def test_statistics_of_a_large_mean(dtype, form, device, scratch):
    """Of 14 standard deviations: sums of squares cancel 200 times over, which fp32 must not feel, and half precision
    not for its sums.
    """
    K, O = 16, 24
    weight, deviation = torch.rand(O, K, 1, 1, device=device) + 0.5, torch.randn(4, 1, 9, 10)
    deviation = (deviation - deviation.mean()) / deviation.std()
    # The same in all channels, so that their deviations add up as their means do.
    x = guarded((deviation + 14).expand(-1, K, -1, -1).to(dtype).to(device))
    _, (count, mean, m2) = run(x, weight, form, partial_statistics=True)
    total = (count[:, None] * mean).sum(0) / count.sum()
    variance = (m2 + count[:, None] * (mean - total) ** 2).sum(0) / count.sum()
    results = three(batch_statistics, x, weight)
    assert (results["truth"]["mean"] / results["truth"]["var"].sqrt()).min() > 13
    check({"mean": total, "var": variance}, results)


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize(("dtype", "form"), [FORMS[0], FORMS[3], FORMS[4]], ids=lambda p: str(p).removeprefix("torch."))
@pytest.mark.parametrize(("N", "H", "W", "K", "O"), SHAPES[1:3] + SHAPES[4:])
def test_batch_norm_activation_and_gate_on_load(N, H, W, K, O, dtype, form, gated, act, device, scratch):
    y2, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    vectors = gamma, beta, mean, var = norm_vectors(K, device)
    gates = torch.rand(N, K, device=device) if gated else None

    def project(y2, gamma, beta, mean, var, gates, weight):
        a = ACTIVATIONS[act](batch_norm(y2, gamma, beta, mean, var, 0.0))
        return conv(a if gates is None else a * gates[:, :, None, None].to(a.dtype), weight)

    y, _ = run(y2, weight, form, prologue=norm_of(vectors, rstd=var.rsqrt()), act1=act, gates=gates)
    check(nchw(y), three(project, y2, gamma, beta, mean, var, gates, weight))


@every_form
@every_shape
def test_inference_epilogue(N, H, W, K, O, dtype, form, device, scratch):
    """The gate on load of an activated input; BN, activation and a residual of another dtype after; one image of many
    tiles.
    """
    a, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    gates, residual = torch.rand(N, K, device=device), tensor(N, O, H, W, device=device)
    norm = norm_vectors(O, device)

    def layer(a, gates, weight, residual, *norm):
        y = F.silu(batch_norm(conv(a * gates[:, :, None, None].to(a.dtype), weight), *norm, EPS))
        return y + residual

    y, _ = run(
        a,
        weight,
        form,
        gates=gates,
        epilogue=norm_of(norm, eps=EPS),
        act2="silu",
        residual=nhwc(residual),
        out_dtype=torch.float32,
    )
    assert y.dtype == torch.float32
    check(nchw(y), three(layer, a, gates, weight, residual, *norm))


@every_form
@every_shape
def test_pooled_head(N, H, W, K, O, dtype, form, device, scratch):
    x, weight = tensor(N, K, H, W, device=device, dtype=dtype), tensor(O, K, 1, 1, device=device, scale=K**-0.5)
    norm = norm_vectors(O, device)
    pooled, _ = run(x, weight, form, epilogue=norm_of(norm, eps=EPS), act2="silu", pool=True)
    assert pooled.dtype == dtype
    check(
        pooled,
        three(lambda x, weight, *norm: F.silu(batch_norm(conv(x, weight), *norm, EPS)).mean((2, 3)), x, weight, *norm),
    )


@pytest.mark.parametrize("form", ["live", "copy", "fragments"])  # of others NumPy's and PyTorch's products decide
def test_results_do_not_depend_on_the_run(form, device, scratch):
    """No atomics: bit for bit the same, and an image's product does not depend on the others in the batch."""
    x, weight = tensor(4, 24, 5, 6, device=device, dtype=torch.bfloat16), tensor(12, 24, 1, 1, device=device)
    gates = torch.rand(4, 24, device=device)
    order = torch.tensor([2, 0, 3, 1], device=device)
    y, (_, mean, m2) = run(x, weight, form, gates=gates, partial_statistics=True)
    assert torch.equal(y[order], run(x[order], weight, form, gates=gates[order])[0])
    again, statistics = run(x, weight, form, gates=gates, partial_statistics=True)
    for first, second in zip((y, mean, m2), (again, *statistics[1:]), strict=True):
        assert torch.equal(first, second)


# ---- copies of the weights -------------------------------------------------------------------------------------------


def permuted(weight):
    """Column 8 q + 4 f + 2 h + e of every 32 at 16 f + 8 h + 2 q + e."""
    O, K = weight.shape
    padded = F.pad(weight, (0, -K % 32)).view(O, -1, 4, 2, 2, 2)
    return padded.permute(0, 1, 3, 4, 2, 5).reshape(O, -1, 32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=["bfloat16", "float16"])
def test_copies_of_several_weights(dtype, device, scratch):
    """Every form of weights of several shapes in one launch: rounded once, moved, nothing else; made anew from what
    they are now.
    """
    from effkernels.kernels.weight_copies import weight_copies

    weights = [tensor(*shape, 1, 1, device=device) for shape in ((24, 16), (5, 70), (1, 1), (40, 33))]
    forms = {"plain": lambda w: w, "permuted": permuted}
    wanted = [(weight, form) for weight in weights for form in forms]
    for _ in range(2):
        for (weight, form), copy in zip(wanted, weight_copies(wanted, dtype), strict=True):
            assert torch.equal(copy, forms[form](weight.flatten(1).to(dtype))), (tuple(weight.shape), form)
        weights[1].mul_(-3)


def test_a_plain_copy_in_its_own_dtype_is_the_weight(device):
    from effkernels.kernels.weight_copies import weight_copies

    weight = tensor(8, 16, 1, 1, device=device, dtype=torch.bfloat16)
    (plain,) = weight_copies([(weight, "plain")], torch.bfloat16)
    assert plain.shape == (8, 16) and plain.data_ptr() == weight.data_ptr()


def test_products_that_are_apart(device, monkeypatch):
    """More outputs than a program holds, with something to evaluate before the product: the weight is given to
    PyTorch's product as it is, or rounded once for it.
    """
    from effkernels.configs import rules
    from effkernels.kernels import pointwise_forward
    from effkernels.kernels.weight_copies import forward_weights

    monkeypatch.setattr(pointwise_forward, "pointwise_forward_fused", lambda *args, **how: pytest.fail("in one launch"))
    x, weight = tensor(3, 16, 13, 14, device=device, dtype=torch.bfloat16), tensor(150, 16, 1, 1, device=device)
    gates, rows = torch.rand(3, 16, device=device), 3 * 13 * 14
    (copy,) = forward_weights([(weight, rows, True)], x.dtype)
    assert torch.equal(copy, weight.flatten(1).to(x.dtype))
    y, _ = pointwise_forward.pointwise_forward(nhwc(x), copy, gates=gates)

    def gated(x, weight, gates):
        return conv(x * gates[..., None, None].to(x.dtype), weight)

    check(nchw(y), three(gated, x, weight, gates))
    fused = [
        (16, 128, rows, True, x.dtype),
        (16, 150, 512, True, x.dtype),
        (16, 150, rows, True, torch.float32),
        (384, 150, rows, False, x.dtype),
    ]
    assert not any(rules.product_is_apart(*case) for case in fused)
    assert rules.product_is_apart(385, 10, rows, False, x.dtype)
    assert rules.weight_form(16, 150, rows, True, False, torch.float32) == "live"


@pytest.mark.parametrize(("form", "apart"), [("plain", False), ("permuted", True)])
def test_a_copy_for_the_other_product_is_refused(form, apart, device, monkeypatch):
    """Both have as many elements where 32 divides K; read in the other order they would give wrong numbers."""
    from effkernels.kernels import pointwise_forward
    from effkernels.kernels.weight_copies import weight_copies

    monkeypatch.setattr(pointwise_forward, "product_is_apart", lambda **problem: apart)
    x, weight = tensor(1, 64, 3, 3, device=device, dtype=torch.bfloat16), tensor(12, 64, 1, 1, device=device)
    (copy,) = weight_copies([(weight, form)], x.dtype)
    with pytest.raises(ValueError, match=f"a {form} one"):
        pointwise_forward.pointwise_forward(nhwc(x), copy, gates=torch.rand(1, 64, device=device))
