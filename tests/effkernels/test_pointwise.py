"""Both backward passes of 1x1 convolutions against float64, over several tiles and programs."""

import pytest
import torch
import torch.nn.functional as F

from effkernels.reference import ACTIVATIONS
from support.truth import assert_close_to_truth, batch_norm, batch_terms, guarded, nchw, nhwc, norm_of, norm_vectors

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


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
    """No atomics: bit for bit the same."""
    from effkernels.kernels.pointwise import project_backward

    N, H, W, E, O = 4, 5, 6, 24, 12
    y2, weight = tensor(N, H, W, E, device=device), tensor(O, E, 1, 1, device=device)
    dout, y3, gate = tensor(N, H, W, O, device=device), tensor(N, H, W, O, device=device), torch.rand(N, E, device=device)
    bn2, bn3 = norm_vectors(E, device), norm_vectors(O, device)

    def backward():
        norm3, norm2 = norm_of(bn3, bn3[3]), norm_of(bn2, bn2[3])
        return project_backward(dout, y3, y2, weight, norm3=norm3, terms3=(bn3[1], bn3[2]), norm2=norm2, act="silu", gates=gate)

    for first, second in zip(backward(), backward(), strict=True):
        assert torch.equal(first, second)
