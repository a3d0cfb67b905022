"""The launches that finish all weight gradients, against float64 and layer by layer."""

import itertools

import pytest
import torch

from effkernels.reference import ACTIVATIONS
from support.truth import assert_close_to_truth, guarded, norm_vectors


def tensor(*shape, device, dtype=torch.float32):
    return guarded(torch.randn(shape).to(dtype).to(device))


def layers(N, E, I, O, R, k, splits, dtype, frozen, device, act="silu"):
    """(arguments of ``reduce_weight_gradients``, expected float64 results, the same computed plainly in fp32)."""
    from effkernels.kernels.norm import BatchNorm
    from effkernels.kernels.weight_gradients import ExpandPartials, LayerPartials, SqueezeExcitePartials

    depthwise = tensor(splits + 70, k * k + 2, E, device=device), tensor(E, 1, k, k, device=device, dtype=dtype)
    project = tensor(splits, O, E, device=device), tensor(O, E, 1, 1, device=device, dtype=dtype)
    D, weight = tensor(splits, E, I, device=device), tensor(E, I, 1, 1, device=device, dtype=dtype)
    gamma, k0, k1, rstd = norm_vectors(E, device)
    gram = tensor(splits, I + 1, I, device=device)
    dt, du, u, pooled = (tensor(N, c, device=device) for c in (E, R, R, E))
    parameters = [tensor(*s, device=device, dtype=dtype) for s in ((R, E, 1, 1), (R,), (E, R, 1, 1), (E,))]

    def expected(wide):
        dw = depthwise[0].to(wide)[:, : k * k].sum(0).T.reshape(E, 1, k, k)
        dp = project[0].to(wide).sum(0)[..., None, None]
        de = (gamma * rstd).to(wide)[:, None] * D.to(wide).sum(0)
        if not frozen:
            g = gram.to(wide).sum(0)
            de = de + k1.to(wide)[:, None] * (weight.flatten(1).to(wide) @ g[:-1]) + k0.to(wide)[:, None] * g[-1]
        v = ACTIVATIONS[act](u.to(wide))
        se = du.to(wide).T @ pooled.to(wide), du.to(wide).sum(0), dt.to(wide).T @ v, dt.to(wide).sum(0)
        return dw, dp, de[..., None, None], [g.reshape(p.shape) for g, p in zip(se, parameters, strict=True)]

    norm = BatchNorm(gamma, gamma, gamma, rstd)
    arguments = {
        "depthwise": LayerPartials(*depthwise),
        "project": LayerPartials(*project),
        "expand": ExpandPartials(D, None if frozen else gram, weight, norm, None if frozen else (k0, k1), dtype),
        "squeeze_excite": SqueezeExcitePartials(dt, du, u, pooled, parameters, act),
    }
    return arguments, expected(torch.float64), expected(torch.float32)


def check(found, eager, truth, dtype):
    for f, e, t in zip((*found[:3], *found[3]), (*eager[:3], *eager[3]), (*truth[:3], *truth[3]), strict=True):
        assert f.dtype == dtype and f.is_contiguous()
        assert_close_to_truth(f, e.to(dtype), t)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=lambda d: str(d).removeprefix("torch.")
)
@pytest.mark.parametrize(
    ("N", "E", "I", "O", "R", "k", "splits"),
    [
        (1, 16, 8, 4, 1, 1, 1),
        (3, 70, 35, 20, 5, 3, 2),
        (33, 40, 10, 12, 70, 5, 3),
        (2, 130, 66, 33, 4, 9, 1),
        (5, 24, 20, 6, 9, 3, 19),
        (70, 24, 12, 6, 20, 3, 70),  # several steps of every sum, several parts of the images
    ],
)
def test_all_layers_together(N, E, I, O, R, k, splits, dtype, frozen, device, scratch):
    from effkernels.kernels.weight_gradients import reduce_weight_gradients

    arguments, truth, eager = layers(N, E, I, O, R, k, splits, dtype, frozen, device)
    check(reduce_weight_gradients(**arguments), eager, truth, dtype)


def test_any_subset_of_layers(device, scratch):
    from effkernels.kernels.weight_gradients import reduce_weight_gradients

    arguments, *_ = layers(3, 40, 18, 12, 5, 3, 2, torch.float32, False, device)
    whole = reduce_weight_gradients(**arguments)
    for present in itertools.product((True, False), repeat=4):
        names = [name for name, there in zip(arguments, present, strict=True) if there]
        found = reduce_weight_gradients(**{name: arguments[name] for name in names})
        for name, full, part in zip(arguments, whole, found, strict=True):
            if name not in names:
                assert part is None
            elif name == "squeeze_excite":
                assert all(torch.equal(a, b) for a, b in zip(full, part, strict=True))
            else:
                assert torch.equal(full, part), name


@pytest.mark.parametrize("act", ["relu", "hard_swish", "gelu"])
def test_activation_of_squeeze_excite(act, device, scratch):
    from effkernels.kernels.weight_gradients import reduce_weight_gradients

    arguments, truth, eager = layers(5, 20, 8, 6, 7, 3, 1, torch.float32, False, device, act)
    found = reduce_weight_gradients(squeeze_excite=arguments["squeeze_excite"])[3]
    for f, e, t in zip(found, eager[3], truth[3], strict=True):
        assert_close_to_truth(f, e, t)
