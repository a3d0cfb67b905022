"""The project convolution's backward against float64: both forms, every dtype and option, several tiles and
programs.
"""

import pytest
import torch

from effkernels.reference import ACTIVATIONS
from support.truth import assert_close_to_truth, batch_norm, batch_terms, guarded, nchw, nhwc, norm_vectors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Images, height, width, E, O. FUSED: O <= 24 in 16 bits. Rows and channels that fill no tile; two blocks of channels.
FUSED, FUSED_ODD = (2, 5, 7, 40, 24), (3, 3, 3, 20, 10)
SPLIT, SPLIT_ODD = (2, 5, 7, 72, 40), (2, 3, 3, 23, 150)


def tensor(*shape, device, dtype=torch.float32, scale=1.0, mean=0.3):
    return guarded((torch.randn(shape) * scale + mean * scale).to(dtype).to(device))


def slope(act, z):
    z = z.detach().requires_grad_()
    return torch.autograd.grad(ACTIVATIONS[act](z).sum(), z)[0]


class Case:
    """Tensors of one call, what it should give in float64, and what eager PyTorch gives in the same dtype."""

    def __init__(self, shape, dtype, device, act="silu", gated=True, frozen=False, drop_path=True, shift=0.0):
        from effkernels.kernels.norm import BatchNorm

        N, H, W, E, O = shape
        self.act, self.dtype, self.device = act, DTYPES[dtype], device
        self.dout, self.y3 = (tensor(N, O, H, W, device=device, dtype=self.dtype) for _ in range(2))
        self.weight = tensor(O, E, 1, 1, device=device, scale=O**-0.5)
        norm2, norm3 = norm_vectors(E, device), norm_vectors(O, device)
        norm2[2] += shift * norm2[3].sqrt()
        deviation = norm2[3].sqrt()[:, None, None]
        y2 = norm2[2][:, None, None] + deviation * torch.randn(N, E, H, W, device=device)
        self.y2 = guarded(y2.to(self.dtype))
        self.gates = torch.rand(N, E, device=device) if gated else None
        self.factor = torch.rand(N, device=device) + 0.5 if drop_path else None
        self.norm2 = BatchNorm(*norm2[:3], norm2[3].rsqrt())
        self.norm3 = BatchNorm(*norm3[:3], norm3[3].rsqrt())
        self.terms3 = None
        if not frozen:
            dz = self.dout.double() * (self.factor.double()[:, None, None, None] if drop_path else 1.0)
            vectors = [v.double() for v in (self.norm3.weight, self.norm3.mean, self.norm3.rstd)]
            *_, k0, k1 = batch_terms(dz, self.y3.double(), *vectors)
            self.terms3 = k0.float(), k1.float()
        self.eager, self.truth = self.expected(self.dtype), self.expected(torch.float64)

    def expected(self, dtype):
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def vector(v):
            return v.to(wide)[:, None, None]

        dy = self.dout.to(wide) * vector(self.norm3.weight * self.norm3.rstd)
        if self.factor is not None:
            dy = dy * self.factor.to(wide)[:, None, None, None]
        if self.terms3 is not None:
            dy = dy + vector(self.terms3[0]) + vector(self.terms3[1]) * self.y3.to(wide)
        dy, y2 = dy.to(dtype), self.y2.to(dtype)
        dq = torch.nn.grad.conv2d_input(y2.shape, self.weight.to(dtype), dy)
        norm2 = self.norm2
        var = norm2.rstd.to(wide) ** -2
        z = batch_norm(y2, norm2.weight, norm2.bias, norm2.mean, var, 0.0)
        a, dphi = ACTIVATIONS[self.act](z), slope(self.act, z)
        yhat = ((y2.to(wide) - vector(norm2.mean)) * vector(norm2.rstd)).to(dtype)
        sums = [dq * dphi, dq * dphi * yhat, dq * a, dphi, dphi * yhat][: 5 if self.gates is not None else 2]
        q = a if self.gates is None else a * self.gates[:, :, None, None].to(dtype)
        return {
            "dq": dq,
            "sums": torch.stack([s.sum((2, 3)) for s in sums], 1),
            "dw": torch.nn.grad.conv2d_weight(q, self.weight.shape, dy),
        }

    def run(self, **how):
        from effkernels.kernels.project_backward import project_backward

        arguments = {"act": self.act, "gates": self.gates, "branch_draws": self.factor} | how
        dq, sums, partials = project_backward(
            nhwc(self.dout),
            nhwc(self.y3),
            nhwc(self.y2),
            self.weight,
            norm3=self.norm3,
            terms3=self.terms3,
            norm2=self.norm2,
            **arguments,
        )
        return {
            "dq": None if dq is None else nchw(dq),
            "sums": None if sums is None else sums.sum(1),
            "dw": None if partials is None else partials.sum(0)[..., None, None],
        }

    def check(self, results):
        """All that ``results`` has is right, and all of its sums have a row of their own."""
        for name, value in results.items():
            if value is not None:
                assert_close_to_truth(value, self.eager[name], self.truth[name], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [FUSED, FUSED_ODD, SPLIT, SPLIT_ODD], ids=["fused", "fused-odd", "split", "split-odd"]
)
def test_gradients_and_sums(shape, dtype, device, scratch):
    """fp32 takes the split form whatever the shape."""
    case = Case(shape, dtype, device)
    results = case.run()
    assert None not in results.values()
    case.check(results)


@pytest.mark.parametrize("shape", [FUSED_ODD, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize(
    "options",
    [{"frozen": True, "gated": False}, {"drop_path": False, "gated": False}, {"frozen": True, "drop_path": False}],
    ids=lambda options: "-".join(options),
)
def test_without_gate_batch_terms_or_drop_path(options, shape, device, scratch):
    case = Case(shape, "bf16", device, **options)
    results = case.run()
    assert results["sums"].shape[1] == (5 if options.get("gated", True) else 2)
    case.check(results)


@pytest.mark.parametrize("act", [act for act in ACTIVATIONS if act != "silu"])
def test_every_activation(act, device, scratch):
    case = Case(FUSED_ODD, "bf16", device, act=act)
    case.check(case.run())


@pytest.mark.parametrize("shape", [FUSED_ODD, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("ratio", [4.0, 14.0])
def test_a_mean_far_from_zero(ratio, shape, device, scratch):
    """Statistics with |mean| / deviation of 4 and 14: what is rounded to bf16 is centred before."""
    case = Case(shape, "bf16", device, shift=ratio)
    case.check(case.run())


@pytest.mark.parametrize("shape", [FUSED_ODD, SPLIT], ids=["fused", "split"])
def test_parts_of_it_alone(shape, device, scratch):
    case = Case(shape, "bf16", device)
    for needs, absent in (
        ({"need_dw": False}, {"dw"}),
        ({"need_dq": False}, {"dq"}),
        ({"need_dq": False, "need_dw": False}, {"dq", "dw"}),
        ({"need_data": False, "need_dq": False}, {"dq", "sums"}),
    ):
        results = case.run(**needs)
        assert {name for name, value in results.items() if value is None} == absent
        case.check(results)


def test_draws_stand_for_factors(device, scratch):
    """Draws below ``keep`` count 1 / keep, others drop their image, whose gradient then is that of BatchNorm's
    statistics alone.
    """
    case = Case(SPLIT, "fp32", device, frozen=True)
    case.factor = torch.tensor([1 / 0.75, 0.0], device=device)
    case.eager, case.truth = case.expected(case.dtype), case.expected(torch.float64)
    results = case.run(branch_draws=torch.tensor([0.7, 0.8], device=device), keep=0.75)
    case.check(results)
    assert not results["dq"][1].any()


@pytest.mark.parametrize("shape", [FUSED, SPLIT], ids=["fused", "split"])
def test_many_programs_give_what_one_gives(shape, device, scratch, monkeypatch):
    """One program that takes all images in turn, and as many as fill three processors: the same dq, right sums and
    dw. In the split form, one part of an image and several.
    """
    from effkernels.configs import rules, tables

    case = Case(shape, "bf16", device)
    with tables.override("project_both", programs_per_sm=1):
        alone = case.run()
    case.check(alone)
    monkeypatch.setattr(rules, "processor_count", lambda device: 3)
    several, again = case.run(), case.run()
    case.check(several)
    assert torch.equal(several["dq"], alone["dq"])
    assert all(torch.equal(several[name], again[name]) for name in several)
