"""The expand convolution's backward against float64, in each form, dtype and option."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from support.truth import assert_close_to_truth, batch_terms, guarded, nchw, nhwc, norm_of, norm_vectors

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def tensor(*shape, device, dtype=torch.float32, scale=1.0, mean=0.3):
    return guarded(((torch.randn(shape) + mean) * scale).to(dtype).to(device))


def truth_and_eager(dz, x, weight, gamma, rstd, k0, k1, dout):
    """{"eager", "truth"}: the layers' own backward, y1 at hand, in the tensors' dtype and in float64."""

    def backward(dz, x, weight, gamma, rstd, k0, k1, dout):
        wide = torch.float64 if dz.dtype == torch.float64 else torch.float32
        x16, weight = x.to(dz.dtype), weight.to(dz.dtype)
        dy = dz.to(wide) * (gamma * rstd)[:, None, None]
        if k0 is not None:
            dy = dy + k0[:, None, None] + k1[:, None, None] * F.conv2d(x16, weight).to(wide)
        dy = dy.to(dz.dtype)
        dx = torch.nn.grad.conv2d_input(x.shape, weight, dy).to(x.dtype)
        return {"dx": dx if dout is None else dx + dout, "dw": torch.nn.grad.conv2d_weight(x16, weight.shape, dy)}

    tensors = (dz, x, weight, gamma, rstd, k0, k1, dout)
    return {"eager": backward(*tensors), "truth": backward(*(None if t is None else t.double() for t in tensors))}


def case(N, H, W, I, E, dtype, device, *, frozen=False, residual=True, x_dtype=None, mean=0.3, shift=0.0):
    x_dtype = x_dtype or dtype
    dz, x = tensor(N, E, H, W, device=device, dtype=dtype), tensor(N, I, H, W, device=device, dtype=x_dtype, mean=mean)
    weight = tensor(E, I, 1, 1, device=device, scale=I**-0.5)
    dout = tensor(N, I, H, W, device=device, dtype=x_dtype) if residual else None
    gamma = norm_vectors(E, device)[0]
    y1 = F.conv2d(x.double(), weight.double())
    mean1, var1 = y1.mean((0, 2, 3)), y1.var((0, 2, 3), unbiased=False)
    *_, k0, k1 = batch_terms(dz.double() + shift * y1, y1, gamma.double(), mean1, var1.rsqrt())
    k0, k1 = (None, None) if frozen else (k0.float(), k1.float())
    return dz, x, weight, gamma, var1.rsqrt().float(), k0, k1, dout


def run(dz, x, weight, gamma, rstd, k0, k1, dout, **needs):
    """{"dx", "dw"}: what the launcher returns, and the weight gradient finished from it."""
    from effkernels.kernels.expand_backward import expand_backward
    from effkernels.kernels.norm import BatchNorm

    rounded = weight.flatten(1).to(dz.dtype)
    dx, D, gram = expand_backward(
        nhwc(dz),
        nhwc(x),
        guarded(rounded),
        norm1=BatchNorm(gamma, None, None, rstd),
        terms1=None if k0 is None else (k0, k1),
        residual=None if dout is None else nhwc(dout),
        **needs,
    )
    dw = None
    if D is not None:
        assert D.dtype == torch.float32 and (gram is None) == (k0 is None)
        dw = (gamma * rstd)[:, None] * D.sum(0)
        if gram is not None:
            gram = gram.sum(0)
            dw = dw + k1[:, None] * (rounded.float() @ gram[:-1]) + k0[:, None] * gram[-1]
        dw = dw[..., None, None]
    return {"dx": None if dx is None else nchw(dx), "dw": dw}


def check(fused, results):
    names = [name for name, value in fused.items() if value is not None]
    picked = [{name: of[name] for name in names} for of in (fused, results["eager"], results["truth"])]
    assert_close_to_truth(*picked)
    return names


# One pass with channels of dz as rows, of x as rows (I > 32); split (E > 256), with several blocks of every kind (I =
# 140).
SHAPES = [(2, 9, 10, 16, 96), (3, 5, 7, 10, 30), (2, 7, 7, 40, 240), (1, 6, 7, 70, 140)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "H", "W", "I", "E"), SHAPES)
def test_gradients(N, H, W, I, E, dtype, residual, frozen, device, scratch):
    tensors = case(N, H, W, I, E, dtype, device, frozen=frozen, residual=residual)
    results = truth_and_eager(*tensors)
    assert check(run(*tensors), results) == ["dx", "dw"]
    assert check(run(*tensors, need_dw=False), results) == ["dx"]
    assert check(run(*tensors, need_dx=False), results) == ["dw"]


def test_several_blocks_and_splits(device, scratch, monkeypatch):
    """As many programs as a GPU runs, of which some have no tile of gram; twice the same bits."""
    from effkernels.kernels import expand_backward

    config = expand_backward.expand_weight_config
    monkeypatch.setattr(
        expand_backward, "expand_weight_config", lambda *args: replace(config(*args), BLOCK_M=16, programs_per_sm=12)
    )
    tensors = case(1, 7, 9, 56, 290, torch.bfloat16, device)
    first, second = run(*tensors), run(*tensors)
    check(first, truth_and_eager(*tensors))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("I", "E"), [(24, 144), (48, 100), (70, 140)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_input_far_from_zero(I, E, dtype, device, scratch):
    """|mean| / std = 4 of x, and terms of BatchNorm's backward as large as the rest: x G and c cancel for the most
    part.
    """
    tensors = case(2, 5, 6, I, E, dtype, device, mean=4.0, shift=0.5)
    check(run(*tensors), truth_and_eager(*tensors))


@pytest.mark.parametrize(("I", "E"), [(16, 48), (70, 140)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_input_of_another_dtype(I, E, dtype, device, scratch):
    """x is rounded to the compute dtype; dx and the residual stay in x's."""
    other = torch.float32 if dtype == torch.bfloat16 else torch.bfloat16
    tensors = case(2, 5, 6, I, E, dtype, device, x_dtype=other)
    fused = run(*tensors)
    assert fused["dx"].dtype == other
    check(fused, truth_and_eager(*tensors))


@pytest.mark.parametrize("slope", [1.0, 1e-7, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_right_operand(dtype, slope, device, scratch):
    """[A w ; G ; 1] with rows of zeros after each, whatever the size of k1."""
    from effkernels.kernels.expand_backward import right_operand

    E, I = 70, 20
    weight = tensor(E, I, device=device).to(dtype)
    vectors = norm_vectors(E, device)
    norm = norm_of(vectors, rstd=vectors[3])
    k0, k1 = tensor(E, device=device), tensor(E, device=device, scale=slope)
    matrix, c = right_operand(weight, norm, (k0, k1), E_rows=96, I_rows=32, identity=True)
    assert matrix.shape == (160, I) and matrix.dtype == dtype
    w, scale = weight.double(), (norm.weight * norm.rstd).double()
    exact = {
        "scaled": scale[:, None] * w,
        "G": w.t() @ (k1.double()[:, None] * w),
        "1": torch.eye(I).double(),
        "c": k0.double() @ w,
    }
    found = dict(
        zip(("scaled", "G", "1"), (matrix[at : at + n] for at, n in ((0, E), (96, I), (128, I))), strict=True)
    ) | {"c": c}
    eager = {name: value.to(found[name].dtype) for name, value in exact.items()}
    assert_close_to_truth(found, eager, exact)
    assert not matrix[E:96].any() and not matrix[96 + I : 128].any() and not matrix[128 + I :].any()


def test_pieces():
    from effkernels.kernels.expand_backward import pieces

    assert pieces(240, 128, 16) == ((128, 64, 32, 16), (0, 128, 192, 224))
    assert pieces(30, 128, 16) == ((16, 16), (0, 16))
    assert pieces(96, 64, 64) == ((64, 64), (0, 64))
