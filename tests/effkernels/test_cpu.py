"""Inference on CPU tensors by oneDNN's fused convolutions: the numbers, weights that are never stale, and where the
plain layers run.
"""

import copy
import gc
import threading
import warnings

import pytest
import torch
from torch import nn

from efficientnet import create_model
from effkernels import FusedMBConv, accelerate, dispatch, explain
from effkernels.cpu import folded, inference
from effkernels.modules.conv_bn_act import FusedDepthwiseConvBNAct
from effkernels.modules.squeeze_excite import FusedSqueezeExcite
from support.truth import assert_close_to_truth


@pytest.fixture(autouse=True)
def as_a_user(monkeypatch):
    """No interpreter, nothing asked for by name; few pixels are fused too."""
    monkeypatch.setattr(dispatch, "FEWEST_PIXELS", 0)
    for name in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """The convolutions that oneDNN is given fused, counted as they run."""
    found, run = [], inference._convolution

    def counted(x, layer, **settings):
        found.append(settings["act"])
        return run(x, layer, **settings)

    monkeypatch.setattr(inference, "_convolution", counted)
    return found


def randomised(module, seed=0):
    """In eval, with BatchNorms that are neither ones nor zeros."""
    generator = torch.Generator().manual_seed(seed)
    for inner in module.modules():
        if isinstance(inner, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in ((inner.weight, 0.5, 1.5), (inner.bias, -0.5, 0.5)):
                tensor.data.uniform_(low, high, generator=generator)
            inner.running_mean.uniform_(-0.5, 0.5, generator=generator)
            inner.running_var.uniform_(0.5, 1.5, generator=generator)
    return module.eval()


def check(module, x, plain=None):
    """Fused against the plain layers, both judged by float64."""
    plain = plain or (lambda m, v: m.forward_reference(v))
    with torch.no_grad():
        truth = plain(copy.deepcopy(module).double(), x.double())
        assert_close_to_truth(module(x), plain(module, x), truth)


# ---- numbers ---------------------------------------------------------------------------------------------------------

BLOCKS = [
    {"kernel_size": 3, "stride": 1, "act": "silu"},
    {"kernel_size": 5, "stride": 2, "act": "relu", "padding": "same"},
    {"kernel_size": 3, "stride": 2, "act": "relu6", "padding": "same_as_even", "se_ratio": 0},
    {"kernel_size": 7, "stride": 1, "act": "hard_swish", "padding": "same"},
    {"kernel_size": 3, "stride": 1, "act": "gelu", "expand_ratio": 1},
    {"kernel_size": 5, "stride": 2, "act": "identity", "expand_ratio": 1, "se_ratio": 0, "out": 12},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", BLOCKS, ids=lambda s: f"{s['act']}-k{s['kernel_size']}s{s['stride']}")
def test_block(settings, dtype, calls):
    settings = dict(settings)
    torch.manual_seed(0)
    block = randomised(FusedMBConv(8, settings.pop("out", 8), **settings)).to(dtype)
    few = (1, 8, 4, 5)  # pixels, where 1x1 convolutions are products
    for shape, memory_format in (
        ((1, 8, 9, 7), torch.contiguous_format),
        ((5, 8, 12, 12), torch.channels_last),
        (few, torch.channels_last),
    ):
        calls.clear()
        check(block, torch.randn(shape).to(dtype).contiguous(memory_format=memory_format))
        assert len(calls) == 2 + block.expands


def test_strided_input_and_odd_channels():
    block = randomised(FusedMBConv(7, 7, expand_ratio=3))
    check(block, torch.randn(2, 14, 9, 18)[:, ::2, :, ::3])


@pytest.mark.parametrize("module", [FusedDepthwiseConvBNAct(8, 5, 2, padding="same"), FusedSqueezeExcite(8, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_layers(module, dtype):
    module, x = randomised(copy.deepcopy(module)).to(dtype), torch.randn(2, 8, 9, 7).to(dtype)
    with torch.no_grad():
        assert module.why_not_fused(x) is None
    kept = x.clone()
    check(module, x)
    assert torch.equal(x, kept), "the input is the caller's"


@pytest.mark.parametrize("name", ["efficientnet_b0", "tf_efficientnet_b0"])
def test_network(name, calls):
    torch.manual_seed(0)
    model, x = randomised(create_model(name)), torch.randn(2, 3, 64, 48)
    check(model, x, lambda m, v: m.forward_head(m.forward_features(v)) if v.dtype == torch.float64 else plain(m, v))
    assert len(calls) == 49
    with torch.no_grad():
        assert all(reason is None for reason in (explain(model, x) | explain(model, x).ends).values())


def plain(model, x):
    """With EFFKERNELS_BACKEND=reference."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("EFFKERNELS_BACKEND", "reference")
        return model(x)


def test_autocast():
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 9, 9)
    with torch.no_grad():
        truth = block.double().forward_reference(x.double())
        block.float()
        with torch.autocast("cpu", torch.bfloat16):
            fused, eager = block(x), block.forward_reference(x)
    assert fused.dtype == eager.dtype == torch.float32, "the residual keeps its own dtype"
    assert_close_to_truth(fused, eager, truth)


def test_a_large_batch_is_computed_in_parts(monkeypatch, calls):
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(5, 8, 8, 8)
    with torch.no_grad():
        whole = block(x)
        calls.clear()
        monkeypatch.setattr(inference, "LARGEST_PART", 2 * 48 * 8 * 8 * 4)
        parts = block(x)
    assert len(calls) == 3 * 3
    torch.testing.assert_close(parts, whole)


# ---- never stale -----------------------------------------------------------------------------------------------------


def train_a_step(block):
    block.train()
    optimizer = torch.optim.SGD(block.parameters(), 0.1)
    block(torch.randn(4, 8, 6, 6)).square().mean().backward()
    optimizer.step()
    block.eval()


def swap(block):
    """As a moving average is put in place and taken out: tensors change hands."""
    average = {name: p.detach() * 0.9 + 0.01 for name, p in block.named_parameters()}
    for name, p in block.named_parameters():
        p.data, average[name] = average[name], p.data


def replace(block):
    block.conv_pw.weight = nn.Parameter(block.conv_pw.weight.detach() * 2)


def round_trip(block):
    block.double().float()
    block.conv_dw.weight.data.mul_(1.5)


def where_it_was(block):
    """Other numbers at the same address, with the same version, in the same object."""
    weight = block.conv_pwl.weight
    state = weight.data_ptr(), weight._version
    weight.data.view(-1)[0] += 0.5
    assert state == (weight.data_ptr(), weight._version)


CHANGES = {
    "a step of training": train_a_step,
    "running statistics alone": lambda b: (b.train(), b(torch.randn(4, 8, 6, 6)), b.eval()),
    "load_state_dict": lambda b: b.load_state_dict(
        {k: v * 0.7 if v.is_floating_point() else v for k, v in b.state_dict().items()}
    ),
    "load_state_dict(assign=True)": lambda b: b.load_state_dict(
        {k: v * 0.7 if v.is_floating_point() else v for k, v in b.state_dict().items()}, assign=True
    ),
    "in place": lambda b: b.conv_pw.weight.mul_(1.1),
    "one number in place": lambda b: b.bn1.bias[3].add_(0.25),
    "running_var in place": lambda b: b.bn2.running_var.mul_(2),
    ".data in place": lambda b: b.conv_dw.weight.data.mul_(-1),
    ".data of one number": where_it_was,
    ".data of a BatchNorm": lambda b: b.bn3.weight.data.add_(0.5),
    ".data replaced": lambda b: setattr(b.conv_dw.weight, "data", b.conv_dw.weight.data * 1.2),
    ".data permuted": lambda b: b.conv_pw.weight.data.copy_(b.conv_pw.weight.data.flip(0)),
    "through NumPy": lambda b: b.conv_pwl.weight.detach().numpy().__imul__(0.8),
    "a moving average swapped in": swap,
    "a new parameter": replace,
    "a new layer": lambda b: setattr(b, "conv_pwl", nn.Conv2d(48, 8, 1, bias=False)),
    "a new buffer": lambda b: setattr(b.bn2, "running_mean", torch.randn(48)),
    "eps": lambda b: setattr(b.bn1, "eps", 0.3),
    "other dtypes and back": round_trip,
    "squeeze-excite": lambda b: b.se.conv_reduce.weight.data.mul_(3),
    "another memory format": lambda b: (b.to(memory_format=torch.channels_last), b.conv_dw.weight.data.mul_(2)),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_change_is_missed(change, calls):
    torch.manual_seed(0)
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        before = block(x)
        assert torch.equal(block(x), before)
        with torch.set_grad_enabled(change is train_a_step):
            change(block)
        calls.clear()
        fresh = FusedMBConv(8, 8).eval()
        fresh.load_state_dict(block.state_dict())
        fresh.bn1.eps = block.bn1.eps
        assert torch.equal(block(x), fresh(x)) and len(calls) == 6
        assert not torch.allclose(block(x), before)
    check(block, x)


def test_products_with_few_pixels_are_of_the_live_weights():
    """Nothing of them is kept; a change of any layer is seen."""
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(1, 8, 5, 4)
    gc.collect()
    before = len(folded._KEPT)
    with torch.no_grad():
        first = block(x)
        assert len(folded._KEPT) == before + 2, "the project convolution has 48 inputs, more than 20 pixels"
        block.conv_pwl.weight.data.mul_(2)
        assert not torch.allclose(block(x), first)
    check(block, x)


def test_folded_once_while_nothing_changes(monkeypatch):
    block, x, count = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 6, 6), []
    fold = folded._fold
    monkeypatch.setattr(folded, "_fold", lambda *args: count.append(1) or fold(*args))
    with torch.no_grad():
        for size in (7, 7, 9):
            block(torch.randn(1, 8, size, size))
        assert len(count) == 3
        block.bn2.bias.data.add_(1)
        block(x)
    assert len(count) == 4, "what did not change is kept"


def test_what_is_kept_goes_with_the_weights():
    gc.collect()
    before = len(folded._KEPT)
    block = FusedMBConv(8, 8).eval()
    with torch.no_grad():
        block(torch.randn(2, 8, 6, 6))
        assert len(folded._KEPT) == before + 3
        copied = copy.deepcopy(block)
        assert copied.state_dict().keys() == block.state_dict().keys()
    del block
    assert len(folded._KEPT) == before


def test_two_threads():
    """On one block, whose weights one of them has just changed; every result is that of the weights as they are."""
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 12, 12)
    for round_ in range(4):
        block.conv_pw.weight.data.mul_(1.1)
        results, start = [], threading.Barrier(2)

        def run(results=results, start=start):
            with torch.no_grad():
                start.wait()
                results.extend(block(x) for _ in range(5))

        threads = [threading.Thread(target=run) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        with torch.no_grad():
            expected = copy.deepcopy(block)(x)
        assert len(results) == 10 and all(torch.equal(result, expected) for result in results), round_


# ---- where the plain layers run --------------------------------------------------------------------------------------


def without_onednn(block, patch):
    patch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    dispatch.onednn_problem.cache_clear()


PLAIN = {
    "bn2 is in training mode": lambda b, patch: b.bn2.train(),
    "conv_dw has hooks": lambda b, patch: b.conv_dw.register_forward_hook(lambda *args: None) and None,
    "this PyTorch has no oneDNN convolutions": without_onednn,
    "oneDNN has no bfloat16 on this CPU": lambda b, patch: (
        patch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False),
        b.bfloat16(),
    ),
    "float64": lambda b, patch: b.double(),
    "on the CPU float32 and bfloat16 are fused": lambda b, patch: b.half(),
}


@pytest.mark.parametrize("reason", PLAIN)
def test_plain_layers_with_the_reason(reason, calls, monkeypatch):
    block = randomised(FusedMBConv(8, 8))
    try:
        PLAIN[reason](block, monkeypatch)
        x = torch.randn(2, 8, 6, 6).to(block.conv_dw.weight.dtype)
        with torch.no_grad():
            assert reason in block.why_not_fused(x)
            block(x)
    finally:
        monkeypatch.undo()
        dispatch.onednn_problem.cache_clear()
    assert not calls


def test_gradients_are_those_of_the_plain_layers(calls):
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 6, 6, requires_grad=True)
    block(x).sum().backward()
    assert not calls and x.grad is not None and all(p.grad is not None for p in block.parameters())
    assert "inference alone is fused" in block.why_not_fused(x)


def test_drop_path_in_training(calls):
    """With BatchNorms frozen in eval the block still drops samples."""
    block = FusedMBConv(8, 8, drop_path=0.5).train()
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.eval()
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert "drop-path is in training mode" in block.why_not_fused(x)
        block(x)
    assert not calls


def test_transforms_and_tracing(calls):
    block, x = randomised(FusedMBConv(8, 8)), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        expected = block.forward_reference(x)
        torch.testing.assert_close(torch.func.vmap(block)(x[None])[0], expected)
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            assert torch.autograd.forward_ad.unpack_dual(block(dual)).tangent is not None
        traced = torch.jit.trace(block, x)
        calls.clear()  # tracing ends with a look at what the block itself gives
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(torch.export.export(block, (x,)).module()(x), expected)
        torch.testing.assert_close(torch.compile(block, backend="eager", fullgraph=True)(x), expected)
    assert not calls


def test_emulated_bf16_is_said_once(monkeypatch):
    for name in ("avx512_bf16", "amx_tile"):
        monkeypatch.setattr(torch.cpu, f"_is_{name}_supported", lambda: False)
    dispatch._slow_bf16.cache_clear()
    block, x = FusedMBConv(8, 8).eval().bfloat16(), torch.randn(1, 8, 6, 6).bfloat16()
    try:
        with torch.no_grad():
            with pytest.warns(RuntimeWarning, match="slower than fp32"):
                block(x)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                block(x)
    finally:
        dispatch._slow_bf16.cache_clear()


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_accelerated(library, request, calls):
    module = request.getfixturevalue(library)
    torch.manual_seed(0)
    if library == "timm":
        model = module.create_model("mobilenetv2_050")
    else:
        model = module.models.mobilenet_v3_small()
    model, x = accelerate(randomised(model)), torch.randn(2, 3, 40, 40)
    check(model, x, plain)
    assert calls


def test_few_pixels_take_the_plain_layers(calls, monkeypatch):
    """Their weights weigh more than they do. All images of a batch count."""
    monkeypatch.setattr(dispatch, "FEWEST_PIXELS", 100)
    block = randomised(FusedMBConv(8, 8))
    small, enough = torch.randn(1, 8, 9, 11), torch.randn(2, 8, 5, 10)
    with torch.no_grad():
        assert torch.equal(block(small), block.forward_reference(small)) and not calls
        assert block.why_not_fused(small) == (
            "the input is on the CPU and has fewer than 100 pixels in all: fusing would not pay"
        )
        assert block.why_not_fused(enough) is None
        block(enough)
    assert calls
