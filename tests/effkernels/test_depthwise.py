"""The depthwise kernels against float64: every option of the forward and of the backward, on small and awkward
shapes."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from effkernels.configs import tables
from effkernels.configs.rules import DepthwiseConfig
from effkernels.geometry import conv_out_size, pad_amounts
from effkernels.reference import ACTIVATIONS, depthwise_conv
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
# Every k x stride x padding once; dtype, batch, odd, even and tiny H and W, and C (multiples of 8, not, above one block
# of 32) are spread over them, since a tile's masks do not depend on the padding rule and its loads not on k. Two images
# show an offset between images. k = 1 and k = 9 come once each: they share every line with the others but k = 9's
# backward, whose programs do a part each.
SHAPES = [
    # k s  padding     N  H  W  C   dtype
    (3, 1, "symmetric", 2, 7, 5, 24, torch.float32),
    (3, 1, "same", 1, 4, 9, 33, torch.bfloat16),
    (3, 2, "symmetric", 2, 5, 6, 40, torch.float16),
    (3, 2, "same", 2, 6, 7, 3, torch.float32),
    (5, 1, "symmetric", 1, 1, 9, 16, torch.float32),
    (5, 1, "same", 2, 3, 3, 7, torch.float16),
    (5, 2, "symmetric", 1, 7, 4, 12, torch.bfloat16),
    (5, 2, "same", 2, 6, 3, 8, torch.float32),
    (7, 1, "symmetric", 2, 3, 2, 8, torch.bfloat16),
    (7, 1, "same", 1, 5, 2, 5, torch.float32),
    (7, 2, "symmetric", 1, 6, 3, 9, torch.float32),
    (7, 2, "same", 2, 4, 1, 4, torch.float16),
    (9, 1, "symmetric", 1, 2, 1, 3, torch.float32),
    (1, 2, "symmetric", 2, 4, 5, 6, torch.float32),
]
# B0's blocks 0, 1, 3, 6 and 12, odd sizes and channels, and the large kernels.
REAL_SHAPES = [
    (3, 1, "symmetric", 8, 112, 112, 32, torch.bfloat16),
    (3, 2, "symmetric", 8, 112, 112, 96, torch.bfloat16),
    (5, 2, "same", 8, 56, 56, 144, torch.float16),
    (5, 1, "symmetric", 8, 14, 14, 672, torch.bfloat16),
    (5, 1, "same", 4, 7, 7, 1152, torch.float32),
    (3, 1, "same", 4, 75, 75, 201, torch.bfloat16),
    (7, 2, "symmetric", 4, 57, 33, 72, torch.float32),
    (9, 2, "same", 2, 31, 29, 40, torch.float32),
]
# test_activations.py compares each in detail; here they take turns.
ACTS = list(ACTIVATIONS)
ARGUMENTS = "i, k, stride, padding, N, H, W, C, dtype"


def numbered(shapes):
    return [pytest.param(i, *s, id="-".join(map(str, s)).replace("torch.", "")) for i, s in enumerate(shapes)]


def data(k, N, C, H, W, dtype, device):
    """x [N, C, H, W] in dtype, and an fp32 weight [C, 1, k, k]."""
    torch.manual_seed(0)
    return torch.randn(N, C, H, W).to(device, dtype), guarded((torch.randn(C, 1, k, k) / k).to(device))


def pads(x, k, stride, padding):
    return *pad_amounts(x.shape[2], k, stride, padding), *pad_amounts(x.shape[3], k, stride, padding)


def merged(tiles):
    """(mean, biased variance) from partial statistics, in float64."""
    count, mean, m2 = (t.double() for t in tiles)
    total = (count[:, None] * mean).sum(0) / count.sum()
    return total, (m2 + count[:, None] * (mean - total) ** 2).sum(0) / count.sum()


def mean_and_var(y):
    y = y if y.dtype == torch.float64 else y.float()
    return y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False)


def check_forward(i, k, stride, padding, N, H, W, C, dtype, device):
    """With statistics and pooling; BN1 on load and BN2 at the end by turns."""
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight = data(k, N, C, H, W, dtype, device)
    bn1 = norm_vectors(C, device) if i % 3 != 2 else None
    bn2 = norm_vectors(C, device) if i % 2 else None
    act1, act2 = ACTS[i % len(ACTS)], ACTS[(i + 1) % len(ACTS)]

    def network(x, weight):
        if bn1:
            x = ACTIVATIONS[act1](batch_norm(x, *bn1, EPS))
        y = depthwise_conv(x, weight, stride, padding)
        mean, var = mean_and_var(y)
        if bn2:
            y = ACTIVATIONS[act2](batch_norm(y, *bn2, EPS))
        return {"y": y, "pool": y.sum((2, 3), dtype=torch.float64), "mean": mean, "var": var}

    y, tiles, pool = depthwise_forward(
        nhwc(x),
        weight,
        stride,
        pads(x, k, stride, padding),
        prologue=norm_of(bn1, eps=EPS) if bn1 else None,
        act1=act1,
        partial_statistics=True,
        epilogue=norm_of(bn2, eps=EPS) if bn2 else None,
        act2=act2,
        pool=True,
    )
    assert y.dtype == dtype and all(t.dtype == torch.float32 for t in (*tiles, pool))
    assert tiles[0].sum() == N * y.shape[1] * y.shape[2]
    mean, var = merged(tiles)
    fused = {"y": nchw(y), "pool": pool.double().sum(1), "mean": mean, "var": var}
    assert_close_to_truth(fused, network(x, weight.to(dtype)), network(x.double(), weight.double()))


@pytest.mark.parametrize(ARGUMENTS, numbered(SHAPES))
def test_forward(i, k, stride, padding, N, H, W, C, dtype, device, scratch):
    check_forward(i, k, stride, padding, N, H, W, C, dtype, device)


@on_gpu
@pytest.mark.parametrize(ARGUMENTS, numbered(REAL_SHAPES))
def test_forward_real_shapes(i, k, stride, padding, N, H, W, C, dtype, device, scratch):
    check_forward(i, k, stride, padding, N, H, W, C, dtype, device)


# What the backward is told: BN2 (None: dq is dy), squeeze-excite's gate and its pooling gradient, BN1; by turns.
OPTIONS = [
    # bn2      gated  bn1
    ("batch", True, True),
    ("batch", False, True),
    ("frozen", True, True),
    ("batch", True, False),
    (None, False, False),
    ("frozen", False, False),
    (None, False, True),
]


def check_backward(i, k, stride, padding, N, H, W, C, dtype, device, need_dx=True, need_dw=True):
    from effkernels.kernels.depthwise_backward import depthwise_backward

    norm2, gated, has_bn1 = OPTIONS[i % len(OPTIONS)]
    x, weight = data(k, N, C, H, W, dtype, device)
    dq = torch.randn(N, C, *(conv_out_size(n, k, stride, padding) for n in (H, W))).to(device, dtype)
    gate, dpool = guarded(torch.rand(N, C).to(device)), guarded(torch.randn(N, C).to(device))
    bn1, bn2 = norm_vectors(C, device), norm_vectors(C, device)
    rstd1 = guarded((bn1[3] + EPS).rsqrt())
    act1, act2 = ACTS[i % len(ACTS)], ACTS[(i + 1) % len(ACTS)]

    def network(x, weight):
        """By autograd: gradients of the input (with BN1: of BN1's output), of the weight, and of BN2's output; and
        y."""
        z1 = (batch_norm(x, *bn1, EPS) if has_bn1 else x).detach().requires_grad_()
        weight = weight.detach().requires_grad_()
        y = depthwise_conv(ACTIVATIONS[act1](z1) if has_bn1 else z1, weight, stride, padding)
        z2 = y
        if norm2 == "frozen":
            z2 = batch_norm(y, *bn2, EPS)
        elif norm2 == "batch":
            z2 = F.batch_norm(
                y, None, None, *(v.double() if y.dtype == torch.float64 else v for v in bn2[:2]), True, 0.0, EPS
            )
        gradient = dq.to(x.dtype)
        if gated:
            gradient = gradient * gate.to(x.dtype)[:, :, None, None] + dpool.to(x.dtype)[:, :, None, None]
        dx, dw, dz2 = torch.autograd.grad(ACTIVATIONS[act2](z2) if norm2 else z2, (z1, weight, z2), gradient)
        xhat = (x.double() - bn1[2].double()[:, None, None]) * (bn1[3].double() + EPS).rsqrt()[:, None, None]
        sums = {"sum dz": dx.double().sum((0, 2, 3)), "sum dz * xhat": (dx.double() * xhat).sum((0, 2, 3))}
        return {"dx": dx, "dw": dw, **sums}, dz2, y.detach()

    truth, dz2, y = network(x.double(), weight.double())
    eager = network(x, weight.to(dtype))[0]
    extra = {"norm1": norm_of(bn1, rstd1)} if has_bn1 else {}
    if norm2:
        gamma, beta, mean, var = (v.double() for v in bn2)
        mean, var = mean_and_var(y) if norm2 == "batch" else (mean, var)
        rstd = (var + EPS).rsqrt()
        k0, k1 = batch_terms(dz2, y, gamma, mean, rstd)[2:]
        gamma, beta, mean, rstd, k0, k1 = (guarded(v.float()) for v in (gamma, beta, mean, rstd, k0, k1))
        extra |= {"norm2": norm_of((gamma, beta, mean, None), rstd), "y2": nhwc(y.to(dtype))}
        extra |= {"terms2": None if norm2 == "frozen" else (k0, k1)}
        extra |= {"gates": gate, "dpool": dpool} if gated else {}
    dx, partials, _ = depthwise_backward(
        nhwc(dq),
        nhwc(x),
        weight,
        stride,
        pads(x, k, stride, padding),
        act1=act1,
        act2=act2,
        need_dx=need_dx,
        need_dw=need_dw,
        **extra,
    )
    assert partials.dtype == torch.float32 and partials.shape[1:] == (k * k + 2, C)
    sums = partials.double().sum(0)
    fused = {"dw": sums[: k * k].T.reshape(C, 1, k, k)} if need_dw else {}
    if need_dx:
        assert dx.dtype == dtype
        fused["dx"] = nchw(dx)
        if has_bn1:
            fused |= {"sum dz": sums[k * k], "sum dz * xhat": sums[k * k + 1]}
    else:
        assert dx is None
    assert_close_to_truth(fused, {key: eager[key] for key in fused}, {key: truth[key] for key in fused})


@pytest.mark.parametrize(ARGUMENTS, numbered(SHAPES))
def test_backward(i, k, stride, padding, N, H, W, C, dtype, device, scratch):
    check_backward(i, k, stride, padding, N, H, W, C, dtype, device)


@on_gpu
@pytest.mark.parametrize(ARGUMENTS, numbered(REAL_SHAPES))
def test_backward_real_shapes(i, k, stride, padding, N, H, W, C, dtype, device, scratch):
    check_backward(i, k, stride, padding, N, H, W, C, dtype, device)


@pytest.mark.parametrize("k, stride, rows, W", [(3, 1, 1, 9), (3, 2, 2, 11), (5, 1, 2, 8), (5, 2, 1, 7), (9, 1, 3, 3)])
def test_backward_with_two_rows_an_iteration(k, stride, rows, W, device, scratch):
    """Programs of few rows, and of an odd number of them with their halo; strips that end inside and outside of the
    image."""
    with tables.override("depthwise_backward", TH=rows, unroll=2):
        check_backward(0, k, stride, "symmetric", 1, 5, W, 4, torch.float32, device)


@pytest.mark.parametrize("i, k, dtype", [(0, 3, torch.bfloat16), (0, 5, torch.float32), (5, 5, torch.bfloat16)])
def test_backward_in_strips_of_7_columns(i, k, dtype, device, scratch):
    """Of a width of 14; with batch statistics, the gate and BN1. (bf16 rounds y2 across the kink of ReLU.)"""
    from effkernels.configs.rules import depthwise_backward_config

    assert depthwise_backward_config(k, 1, 1, 3, 14, 24, dtype, torch.device(device)).TW == 7
    check_backward(i, k, 1, "symmetric", 1, 3, 14, 24, dtype, device)


@pytest.mark.parametrize("need_dx, need_dw", [(True, False), (False, True)])
@pytest.mark.parametrize("k", [3, 9])
def test_backward_of_one_side(k, need_dx, need_dw, device, scratch):
    check_backward(0, k, 2, "symmetric", 1, 5, 4, 8, torch.float32, device, need_dx, need_dw)


@pytest.mark.parametrize("k", [3, 9])
def test_backward_is_one_launch(k, device, monkeypatch):
    from effkernels.kernels import depthwise_backward as module

    kernel, grids = module.depthwise_backward_kernel, []

    class Counted:
        def __getitem__(self, grid):
            grids.append(grid)
            return kernel[grid]

    monkeypatch.setattr(module, "depthwise_backward_kernel", Counted())
    x, weight = data(k, 1, 3, 2, 1, torch.float32, device)
    module.depthwise_backward(nhwc(x), nhwc(x), weight, 1, (k // 2,) * 4)
    assert len(grids) == 1


def fewer_programs(monkeypatch, programs):
    """Tiles of two rows, walked by ``programs`` programs a block of channels."""
    from effkernels.kernels import depthwise_backward, depthwise_forward

    for module in (depthwise_forward, depthwise_backward):
        name = f"{module.__name__.rpartition('.')[2]}_config"
        config = getattr(module, name)
        monkeypatch.setattr(module, name, lambda config=config, **problem: replace(config(**problem), TH=2))
    monkeypatch.setattr(DepthwiseConfig, "programs", lambda self, tiles, *args: min(tiles, programs))


@pytest.mark.parametrize("check, programs", [(check_forward, 1), (check_forward, 2), (check_backward, 2)])
def test_several_tiles_per_program(check, programs, device, scratch, monkeypatch):
    """Few programs walk over two images, strips side by side and, with tiles of two rows, tiles one above the other."""
    fewer_programs(monkeypatch, programs)
    check(1, 3, 1, "symmetric", 2, 3, 9, 4, torch.float32, device)


# One program, a part of a group, and more than one group of 32: 37 images of one tile. C fills one block of 32 channels
# and part of another. k = 1 is the quickest to interpret; the end of a program does not depend on k.
PROGRAMS = [(2, 3, 1), (2, 3, 3), (37, 1, 37)]


@pytest.mark.parametrize("N, H, programs", PROGRAMS)
def test_last_program_finishes_the_statistics(N, H, programs, device, scratch, monkeypatch):
    """Mean, rstd and the running statistics, after one call and after another with the same counters."""
    from effkernels.kernels.depthwise_forward import depthwise_forward
    from effkernels.kernels.norm import BatchStatistics

    fewer_programs(monkeypatch, programs)
    x, weight = data(1, N, 40, H, 1, torch.float32, device)
    x = x + torch.linspace(-3, 3, 40, device=device)[:, None, None]
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    running = [
        guarded(torch.zeros(40, device=device)),
        guarded(torch.ones(40, device=device)),
        torch.zeros((), dtype=torch.int64),
    ]
    running[2] = running[2].to(device)
    truth = [torch.zeros(40).double().to(device), torch.ones(40).double().to(device)]
    eager = [v.float() for v in truth]
    for call in (1, 2):
        y, (mean, rstd), _ = depthwise_forward(
            nhwc(x), weight, 1, (0, 0, 0, 0), statistics=BatchStatistics(EPS, *running, momentum=0.3), counters=counters
        )
        results = []
        for dtype, expected in ((torch.float64, truth), (torch.float32, eager)):
            out = F.conv2d(x.to(dtype), weight.to(dtype), groups=40)
            F.batch_norm(out, *expected, training=True, momentum=0.3, eps=EPS)
            m, v = mean_and_var(out)
            results.append(
                {"mean": m, "rstd": (v + EPS).rsqrt(), "running mean": expected[0], "running var": expected[1]}
            )
        fused = {"mean": mean, "rstd": rstd, "running mean": running[0], "running var": running[1]}
        assert_close_to_truth(fused, results[1], results[0], f"call {call}")
        assert (counters == 0).all() and running[2] == call
        x = x * 2 + 1


@pytest.mark.parametrize("N, H, programs", PROGRAMS)
def test_last_program_finishes_bn1s_gradients(N, H, programs, device, scratch, monkeypatch):
    """What is finished is what dz sums to, in gamma's and beta's dtypes, and again with the same counters."""
    from effkernels.kernels.depthwise_backward import depthwise_backward

    fewer_programs(monkeypatch, programs)
    C = 40
    x, weight = data(1, N, C, H, 1, torch.float32, device)
    counters = torch.zeros(8, dtype=torch.int32, device=device)
    gamma, beta, mean, rstd = norm_vectors(C, device)
    beta = guarded(beta.bfloat16())
    for _ in range(2):
        dq = guarded(torch.randn(N, H, 1, C).to(device))
        dz, _, finished = depthwise_backward(
            dq,
            nhwc(x),
            weight,
            1,
            (0, 0, 0, 0),
            norm1=norm_of((gamma, beta, mean, None), rstd),
            act1="silu",
            counters=counters,
        )
        terms = batch_terms(nchw(dz).double(), x.double(), gamma.double(), mean.double(), rstd.double())
        assert [t.dtype for t in finished] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]
        for value, truth, tolerance in zip(finished, terms, (1e-6, 2**-8, 2e-6, 2e-6), strict=True):
            assert relative_error(value, truth) < tolerance
        assert (counters == 0).all()


def test_too_few_counters_are_refused(device):
    from effkernels.kernels.depthwise_forward import depthwise_forward
    from effkernels.kernels.norm import BatchStatistics

    x, weight = data(1, 1, 40, 2, 2, torch.float32, device)
    counters = torch.zeros(3, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="at least 4"):
        depthwise_forward(nhwc(x), weight, 1, (0, 0, 0, 0), statistics=BatchStatistics(EPS), counters=counters)


def test_forward_writes_its_output_and_nothing_else(device, scratch):
    """``out`` lies between flags, here and in every other test by the fixture ``scratch``."""
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight = data(3, 2, 5, 6, 5, torch.float32, device)
    buffer = torch.full((2 * 6 * 5 * 5 + 200,), 7.0, device=device)
    out = buffer[100:-100].view(2, 6, 5, 5)
    y, tiles, pool = depthwise_forward(nhwc(x), weight, 1, (1, 1, 1, 1), out=out)
    assert y is out and tiles is None and pool is None
    torch.testing.assert_close(nchw(out), F.conv2d(x, weight, padding=1, groups=5))
    assert (buffer[:100] == 7).all() and (buffer[-100:] == 7).all()


@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 1)])
def test_nan_reaches_its_receptive_field_alone(k, stride, device, scratch):
    """A masked tap must not be computed as 0 * NaN, nor a NaN pixel be lost; with BN and activation on load, too."""
    from effkernels.kernels.depthwise_backward import depthwise_backward
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight = data(k, 2, 4, 6, 5, torch.float32, device)
    x[0, 1, 2, 3], x[1, 0, 5, 4] = float("nan"), float("inf")
    bn, pad = norm_vectors(4, device), k // 2
    for prologue in (None, norm_of(bn, eps=EPS)):
        a = x if prologue is None else F.silu(batch_norm(x, *bn, EPS))
        y, _, _ = depthwise_forward(nhwc(x), weight, stride, (pad,) * 4, prologue=prologue, act1="silu")
        assert torch.equal(nchw(y).isfinite(), F.conv2d(a, weight, None, stride, pad, 1, 4).isfinite())
    # dz1 = dgrad * silu'(BN1(x)): not finite at such a pixel; the weight gradients of its channel are not either.
    dq = torch.randn_like(y)
    norm1 = norm_of(bn, (bn[3] + EPS).rsqrt())
    dz, partials, _ = depthwise_backward(dq, nhwc(x), weight, stride, (pad,) * 4, norm1=norm1, act1="silu")
    assert torch.equal(nchw(dz).isfinite(), x.isfinite())
    assert partials.sum(0)[:, 2:].isfinite().all()
    dq[0, 1, 2, 3] = float("nan")
    dz = depthwise_backward(dq, nhwc(x.nan_to_num(0, 0, 0)), weight, stride, (pad,) * 4)[0]
    spread = F.conv_transpose2d(nchw(dq), weight, None, stride, pad, output_padding=0, groups=4)
    finite = torch.ones_like(x, dtype=torch.bool)
    finite[:, :, : spread.shape[2], : spread.shape[3]] = spread.isfinite()
    assert torch.equal(nchw(dz).isfinite(), finite)


# Shapes of the form with products: a strip of four columns and part of one, more strips than a program has, channels
# beyond a block of 16, rows of a second tile, and paddings larger than half the kernel, which leave no column sure.
PRODUCTS = [
    # k s N  H  W  C  padding of each side  dtype
    (3, 1, 3, 5, 13, 20, 1, torch.bfloat16),
    (3, 1, 9, 3, 4, 16, 2, torch.float16),
    (5, 1, 2, 6, 9, 17, 2, torch.bfloat16),
    (5, 1, 5, 6, 12, 4, 0, torch.float16),
    (5, 2, 3, 7, 11, 40, 2, torch.bfloat16),
    (5, 2, 1, 5, 6, 24, 4, torch.bfloat16),
]


def check_products(k, stride, N, H, W, C, pad, dtype, prologue, device):
    from effkernels.configs.rules import depthwise_forward_config
    from effkernels.kernels.depthwise_forward import depthwise_forward

    assert depthwise_forward_config(k, stride, N, H, W, C, dtype, torch.device(device)).products
    x, weight = data(k, N, C, H, W, dtype, device)
    bn1, bn2 = norm_vectors(C, device), norm_vectors(C, device)

    def network(x, weight):
        a = F.silu(batch_norm(x, *bn1, EPS)) if prologue else x
        y = F.conv2d(a, weight, None, stride, pad, 1, C)
        mean, var = mean_and_var(y)
        z = y if prologue else F.silu(batch_norm(y, *bn2, EPS))
        return {"y": z, "pool": z.sum((2, 3), dtype=torch.float64), "mean": mean, "var": var}

    first = {"prologue": norm_of(bn1, eps=EPS), "act1": "silu"}
    last = {"epilogue": norm_of(bn2, eps=EPS), "act2": "silu"}
    y, tiles, pool = depthwise_forward(
        nhwc(x), weight, stride, (pad,) * 4, partial_statistics=True, pool=True, **(first if prologue else last)
    )
    mean, var = merged(tiles)
    fused = {"y": nchw(y), "pool": pool.double().sum(1), "mean": mean, "var": var}
    assert tiles[0].sum() == N * y.shape[1] * y.shape[2]
    assert_close_to_truth(fused, network(x, weight.to(dtype)), network(x.double(), weight.double()))


@pytest.mark.parametrize("prologue", [True, False])
@pytest.mark.parametrize("k, stride, N, H, W, C, pad, dtype", PRODUCTS)
def test_forward_by_products(k, stride, N, H, W, C, pad, dtype, prologue, device, scratch, monkeypatch):
    """Tiles of two rows, walked by two programs."""
    fewer_programs(monkeypatch, 2)
    check_products(k, stride, N, H, W, C, pad, dtype, prologue, device)


@pytest.mark.parametrize("k, stride, N, H, W, C, pad, dtype", PRODUCTS)
def test_forward_by_products_in_wide_strips(k, stride, N, H, W, C, pad, dtype, device, scratch):
    """Of 8 columns, as a table may ask for."""
    with tables.override("depthwise_forward", TW=8, TH=2, stages=2):
        check_products(k, stride, N, H, W, C, pad, dtype, True, device)


@pytest.mark.parametrize("k, stride", [(3, 1), (5, 1), (5, 2)])
def test_nan_by_products_stays_near(k, stride, device, scratch):
    """It reaches every output that sees it, and none of another image, of a row that does not, or of channels beyond
    the four that share a product."""
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight = data(k, 2, 32, 9, 6, torch.bfloat16, device)
    x[0, 17, 4, 3] = float("nan")
    pad = k // 2
    y = nchw(depthwise_forward(nhwc(x), weight, stride, (pad,) * 4)[0])
    seen = ~F.conv2d(x.float(), weight, None, stride, pad, 1, 32).isfinite()
    assert (~y.isfinite())[seen].all()
    rows, channels = seen.any(3).any(1), (17 % 4) + 4 * torch.arange(4, device=device) + 16
    allowed = torch.zeros_like(seen)
    allowed[:, channels] = rows[:, None, :, None]
    assert not (~y.isfinite() & ~allowed).any()


def test_channels_that_are_not_there_make_no_nan_without_eps(device, scratch):
    """In a product a zero weight of the channels beyond the last meets what BatchNorm makes of nothing."""
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight, norm = torch.randn(1, 20, 9, 9), torch.randn(20, 1, 3, 3), norm_vectors(20, device)
    x, weight = x.to(device, torch.bfloat16), weight.to(device)
    y, *_ = depthwise_forward(nhwc(x), weight, 1, (1, 1, 1, 1), prologue=norm_of(norm), act1="silu")
    assert y.isfinite().all()


def test_a_configuration_that_products_cannot_have_is_refused(device, monkeypatch):
    from effkernels.kernels import depthwise_forward as module

    config = module.depthwise_forward_config
    x, weight = data(3, 1, 4, 3, 3, torch.bfloat16, device)
    for fields in ({"TW": 6}, {"S": 4}):
        monkeypatch.setattr(
            module, "depthwise_forward_config", lambda fields=fields, **problem: replace(config(**problem), **fields)
        )
        with pytest.raises(ValueError, match="S = 8 and TW a multiple of 4"):
            module.depthwise_forward(nhwc(x), weight, 1, (1,) * 4)


def test_statistics_of_a_large_mean(device, scratch, monkeypatch):
    """|mean| / std = 1000: fp32 means carry a relative error of 2^-24 * 1000 into the variance, plain sums of squares
    2^-24 * 1000^2.

    k = 1 with weight 1 leaves the values exact. One of the four programs begins with a group of fewer strips than its
    second has.
    """
    from effkernels.kernels.depthwise_forward import depthwise_forward

    fewer_programs(monkeypatch, 4)
    x, weight = data(1, 4, 8, 6, 9, torch.float32, device)
    x = x * 1e-2 + 10.0
    _, tiles, _ = depthwise_forward(nhwc(x), torch.ones_like(weight), 1, (0, 0, 0, 0), partial_statistics=True)
    assert relative_error(merged(tiles)[1], mean_and_var(x.double())[1]) < 2**-24 * 1000


@on_gpu
def test_more_than_2_to_the_31_elements(device):
    """The last image of 1400 of 224 x 224 x 32, past int32 offsets, comes out as it does alone."""
    from effkernels.kernels.depthwise_backward import depthwise_backward
    from effkernels.kernels.depthwise_forward import depthwise_forward

    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of GPU memory")
    x = torch.empty(1400, 224, 224, 32, dtype=torch.bfloat16, device=device)
    assert x.numel() > 2**31
    x.normal_()
    weight = torch.randn(32, 1, 3, 3, device=device)
    y, _, _ = depthwise_forward(x, weight, 1, (1, 1, 1, 1))
    assert torch.equal(y[-1:], depthwise_forward(x[-1:].contiguous(), weight, 1, (1, 1, 1, 1))[0])
    dx, _, _ = depthwise_backward(y, x, weight, 1, (1, 1, 1, 1))
    assert torch.equal(
        dx[-1:], depthwise_backward(y[-1:].contiguous(), x[-1:].contiguous(), weight, 1, (1, 1, 1, 1))[0]
    )
