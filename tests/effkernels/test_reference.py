"""The plain twins: bit for bit the plain modules and PyTorch's own layers; and the fused functional forms against
them.
"""

import copy
import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from efficientnet import MBConv
from effkernels import BatchNormParams, FusedMBConv, SqueezeExciteParams, functional, reference
from support.truth import assert_close_to_truth, norm_vectors


def step(module, x):
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # for drop-path
    out = module(x)
    grads = torch.autograd.grad(out, [x, *module.parameters()], torch.linspace(-1, 1, out.numel()).view(out.shape))
    return [out, *grads, *(b.clone() for b in module.buffers())]


def assert_same_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def functional_form(block, x, **changes):
    """``reference.mbconv`` with a block's tensors."""
    norm = BatchNormParams.of
    settings = {name: getattr(block, name) for name in ("stride", "padding", "act", "drop_path", "training")}
    return reference.mbconv(
        x,
        (block.conv_pw.weight, norm(block.bn1)) if block.expands else None,
        (block.conv_dw.weight, norm(block.depthwise_norm)),
        None if isinstance(block.se, nn.Identity) else SqueezeExciteParams.of(block.se),
        (block.project_conv.weight, norm(block.project_norm)),
        residual=block.has_residual,
        **{**settings, **changes},
    )


@pytest.mark.parametrize("se", [0, 0.25])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", [3, 5])
@pytest.mark.parametrize("expand", [1, 4, 6])
def test_three_ways_are_one(expand, k, stride, padding, se, monkeypatch):
    """FusedMBConv without kernels, MBConv, and reference.mbconv: the same bits in training, with frozen statistics and
    in inference.
    """
    monkeypatch.setenv("EFFKERNELS_BACKEND", "reference")
    torch.manual_seed(0)
    args, kwargs = (8, 8, k, stride, expand, se), {"padding": padding, "drop_path": 0.3}
    plain, fused = MBConv(*args, **kwargs), FusedMBConv(*args, **kwargs)
    fused.load_state_dict(plain.state_dict())
    twin = copy.deepcopy(plain)
    twin.forward = lambda x: functional_form(twin, x)
    x = torch.randn(3, 8, 7, 6)
    for training in (True, False):
        expected = step(plain.train(training), x)
        assert_same_bits(step(fused.train(training), x), expected)
        assert_same_bits(step(twin.train(training), x), expected)
    with torch.no_grad():
        expected = plain(x)
        assert_same_bits([fused(x), twin(x)], [expected, expected])


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_pytorch_s(training, track, momentum):
    torch.manual_seed(0)
    ours, theirs = (nn.BatchNorm2d(5, momentum=momentum, track_running_stats=track).train(training) for _ in range(2))
    for _ in range(2):
        x = torch.randn(3, 5, 4, 2)
        assert torch.equal(reference.batch_norm(x, BatchNormParams.of(ours)), theirs(x))
    assert_same_bits(ours.buffers(), theirs.buffers())


@pytest.mark.parametrize("act", reference.ACTIVATIONS)
def test_activate_leaves_its_input(act):
    """Somebody may hold it: a hook, or the caller of a block whose layers before are identities."""
    x = torch.randn(1000) * 4
    before = x.clone()
    for mode in (torch.enable_grad, torch.no_grad):
        with mode():
            assert torch.equal(reference.activate(x, act), reference.ACTIVATIONS[act](before)) and torch.equal(
                x, before
            )


def test_drop_path():
    """Per sample, kept samples divided by 1 - rate; nothing in eval or at rate 0; one draw a sample, here or by the
    caller.
    """
    x = torch.randn(4000, 2, 1, 1)
    assert reference.drop_path(x, 0.3, False) is x and reference.drop_path(x, 0.0, True) is x
    torch.manual_seed(0)
    out = reference.drop_path(x, 0.25, True)
    torch.manual_seed(0)
    draws = reference.drop_path_draws(4000, "cpu")
    mask = (draws < 0.75) / torch.tensor(0.75)
    assert torch.equal(out, x * mask.view(-1, 1, 1, 1)) and torch.equal(reference.drop_path(x, 0.25, True, draws), out)
    assert set(mask.tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs((mask > 0).float().mean() - 0.75) < 0.03  # four standard deviations


# ---- fused against plain ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["depthwise_conv_bn_act", "bn_act_add", "squeeze_excite", "mbconv"])
def test_twins_take_the_same_arguments(name):
    parameters = [inspect.signature(getattr(module, name)).parameters.values() for module in (functional, reference)]
    described = [[(p.name, p.kind, p.default) for p in each] for each in parameters]
    assert described[0] == described[1]


def compare(name, tensors, norms, call):
    """``call(module, tensors, norms)`` with fused and plain module: output, gradients and running statistics.

    norms: {name: (weight, bias, running_mean, running_var, training)}.
    """
    results = {}
    for kind, module in (("fused", functional), ("eager", reference), ("truth", reference)):
        dtype = torch.float64 if kind == "truth" else torch.float32
        mine = {key: t.detach().to(dtype, copy=True).requires_grad_(t.requires_grad) for key, t in tensors.items()}
        layers = {
            key: BatchNormParams(*(v.to(dtype, copy=True) for v in vectors), torch.tensor(2), 0.1, 1e-3, training)
            for key, (*vectors, training) in norms.items()
        }
        for norm in layers.values():
            norm.weight.requires_grad_(), norm.bias.requires_grad_()
        out = call(module, mine, layers)
        leaves = {key: t for key, t in mine.items() if t.requires_grad}
        for key, norm in layers.items():
            leaves |= {f"{key}.weight": norm.weight, f"{key}.bias": norm.bias}
        gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
        results[kind] = dict(
            zip(leaves, torch.autograd.grad(out, leaves.values(), gradient), strict=True), out=out.detach()
        )
        with torch.no_grad():
            results[kind]["inference"] = call(
                module, mine, {key: norm._replace(training=False) for key, norm in layers.items()}
            )
        for key, norm in layers.items():
            results[kind] |= {f"{key}.running_mean": norm.running_mean, f"{key}.running_var": norm.running_var}
            assert norm.num_batches_tracked == 2 + norm.training
    assert_close_to_truth(results["fused"], results["eager"], results["truth"], name)


def leaves(device, **shapes):
    torch.manual_seed(0)
    return {key: (torch.randn(shape) + 0.3).to(device).requires_grad_() for key, shape in shapes.items()}


SQUEEZE = {"wr": (9, 24, 1, 1), "br": (9,), "we": (24, 9, 1, 1), "be": (24,)}


@pytest.mark.parametrize("trainings", [(True, True), (True, False), (False, True)])
def test_depthwise_conv_bn_act(trainings, device, scratch, small_tiles):
    """With a BatchNorm before, squeeze-excite after, and either BatchNorm in its own mode."""
    tensors = leaves(device, x=(2, 24, 5, 4), w=(24, 1, 3, 3), **SQUEEZE)

    def call(module, t, norms):
        params = SqueezeExciteParams(t["wr"] * 0.3, t["br"], t["we"] * 0.3, t["be"], "relu", "hard_sigmoid")
        return module.depthwise_conv_bn_act(
            t["x"],
            t["w"],
            norms["norm"],
            stride=2,
            padding="same",
            act="hard_swish",
            pre_norm=norms["pre"],
            pre_act="silu",
            squeeze_excite=params,
        )

    norms = {
        key: (*norm_vectors(24, device), training) for key, training in zip(("pre", "norm"), trainings, strict=True)
    }
    compare("depthwise_conv_bn_act", tensors, norms, call)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked, added", [(True, True), (True, False), (False, True), (False, False)])
def test_bn_act_add(masked, added, training, device, scratch):
    tensors = leaves(device, x=(3, 24, 5, 4), residual=(3, 24, 5, 4))
    tensors["residual"].requires_grad_(added)
    tensors["branch_scale"] = torch.tensor([1.5, 0.0, 0.7], device=device)

    def call(module, t, norms):
        extra = {name: t[name] for name, wanted in (("branch_scale", masked), ("residual", added)) if wanted}
        return module.bn_act_add(t["x"], norms["norm"], act="gelu", **extra)

    compare("bn_act_add", tensors, {"norm": (*norm_vectors(24, device), training)}, call)


def test_squeeze_excite(device, scratch):
    tensors = leaves(device, x=(2, 24, 5, 4), **SQUEEZE)

    def call(module, t, norms):
        return module.squeeze_excite(t["x"], SqueezeExciteParams(t["wr"] * 0.3, t["br"], t["we"] * 0.3, t["be"]))

    compare("squeeze_excite", tensors, {}, call)


def test_depthwise_conv_against_its_definition():
    """The twin itself: out[n, c, i, j] = sum over taps of the zero-padded input, for both padding rules."""
    torch.manual_seed(0)
    for k, stride, padding in itertools.product((3, 5), (1, 2), ("symmetric", "same")):
        x, weight = torch.randn(1, 2, 6, 5, dtype=torch.float64), torch.randn(2, 1, k, k, dtype=torch.float64)
        out = reference.depthwise_conv(x, weight, stride, padding)
        total = max((-(-6 // stride) - 1) * stride + k - 6, 0), max((-(-5 // stride) - 1) * stride + k - 5, 0)
        top, left = (k // 2, k // 2) if padding == "symmetric" else (total[0] // 2, total[1] // 2)
        wide = F.pad(x, (left, k + 8, top, k + 8))
        for i, j in itertools.product(range(out.shape[2]), range(out.shape[3])):
            window = wide[:, :, i * stride : i * stride + k, j * stride : j * stride + k]
            torch.testing.assert_close(out[:, :, i, j], (window * weight[:, 0]).sum((2, 3)))


@pytest.mark.parametrize("residual", [True, False])
def test_a_given_mask_scales_the_branch(residual):
    """x [N, ...] + mask[n] * branch, whatever drop_path says: efficientnet_pytorch draws its own."""
    torch.manual_seed(0)
    block = MBConv(8, 8, 3, expand_ratio=2, se_ratio=0).eval()
    layers = [
        (conv.weight, BatchNormParams.of(bn)) for conv, bn in ((block.conv_pw, block.bn1), (block.conv_dw, block.bn2))
    ]
    x, mask = torch.randn(3, 8, 4, 4), torch.tensor([0.0, 1.0, 2.5])
    arguments = (x, layers[0], layers[1], None, (block.conv_pwl.weight, BatchNormParams.of(block.bn3)))
    with torch.no_grad():
        branch = reference.mbconv(*arguments)
        masked = reference.mbconv(*arguments, residual=residual, drop_path=0.5, training=True, branch_scale=mask)
    expected = branch * mask[:, None, None, None] + (x if residual else 0)
    torch.testing.assert_close(masked, expected)
