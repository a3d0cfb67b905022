"""What users do to a block after building it: the gate must see it, or the kernels must compute it."""

import pytest
import torch
from torch import nn

from effkernels import BatchNormParams, FusedMBConv, SqueezeExciteParams, functional, reference


def edited(edit):
    block = FusedMBConv(8, 8, 3, stride=1, expand_ratio=2).eval()
    edit(block)
    return block


def set_(path, value):
    def edit(block):
        *owners, name = path.split(".")
        for owner in owners:
            block = getattr(block, owner)
        setattr(block, name, value)

    return edit


@pytest.mark.parametrize(
    "edit",
    [
        set_("conv_dw.dilation", (2, 2)),
        set_("conv_dw.stride", (2, 2)),
        set_("conv_dw.padding", (0, 0)),
        set_("conv_dw.padding_mode", "reflect"),
        set_("conv_dw", nn.Conv2d(16, 16, 3, padding=1, groups=4, bias=False)),
        set_("conv_pw", nn.Conv2d(8, 16, 3, padding=1, bias=False)),
        set_("conv_pw.forward", lambda x: x),
        set_("bn1.weight", nn.Parameter(torch.tensor([2.0]).expand(16))),
        set_("bn2.running_mean", torch.zeros(16, 2)[:, 0]),
        set_("conv_pwl", nn.Conv2d(24, 8, 1, bias=False)),
        set_("conv_pw", nn.Conv2d(4, 16, 1, bias=False)),
        set_("bn2", nn.BatchNorm2d(8)),
        set_("conv_dw", nn.Conv2d(40, 40, 3, padding=1, groups=40, bias=False)),
        set_("se.conv_expand", nn.Conv2d(3, 16, 1)),
    ],
)
def test_an_edited_block_is_not_fused(edit, device, monkeypatch):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    x = torch.randn(1, 8, 5, 5, device=device)
    assert edited(lambda block: None).to(device).why_not_fused(x) is None
    assert edited(edit).to(device).why_not_fused(x) is not None


def test_tracking_switched_off_updates_nothing(device):
    block = FusedMBConv(8, 8, 3, expand_ratio=2).to(device)
    for bn in (block.bn1, block.bn2, block.bn3):
        bn.track_running_stats = False
    before = {name: b.clone() for name, b in block.named_buffers()}
    block(torch.randn(2, 8, 5, 5, device=device))
    assert all(torch.equal(b, before[name]) for name, b in block.named_buffers())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"weight": (4, 1, 3, 3)}, "8 channels, got 4"),
        ({"weight": (8, 8, 3, 3)}, r"weight must be \[C, 1, k, k\]"),
        ({"weight": (8, 1, 4, 4)}, "kernel_size must be an odd integer"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"act": "swish"}, "act must be one of .* got 'swish'"),
        ({"norm": BatchNormParams(None, None)}, "weight and bias must be tensors"),
        (
            {"norm": BatchNormParams(torch.ones(8), torch.zeros(8), training=False)},
            "running_mean and running_var must be given",
        ),
    ],
)
def test_functional_forms_check_their_arguments(change, message, device):
    norm = change.pop("norm", BatchNormParams(torch.ones(8), torch.zeros(8)))
    weight = torch.randn(change.pop("weight", (8, 1, 3, 3)))
    with pytest.raises(ValueError, match=message):
        functional.depthwise_conv_bn_act(torch.randn(2, 8, 5, 5), weight, norm, **change)


def layers(I=8, E=16, O=8, R=2):
    norm = [BatchNormParams(torch.ones(C), torch.zeros(C)) for C in (E, E, O)]
    weights = torch.randn(E, I, 1, 1), torch.randn(E, 1, 3, 3), torch.randn(O, E, 1, 1)
    se = SqueezeExciteParams(torch.randn(R, E, 1, 1), torch.zeros(R), torch.randn(E, R, 1, 1), torch.zeros(E))
    return [(weights[0], norm[0]), (weights[1], norm[1]), se, (weights[2], norm[2])]


@pytest.mark.parametrize(
    "at, wrong, message",
    [
        (0, layers(I=12)[0], "expand weight must be"),
        (0, None, "depthwise weight must have x's 8 channels"),
        (0, (torch.randn(16, 8, 1, 1), layers(E=24)[0][1]), "expand norm's weight must be"),
        (2, layers(E=24)[2], "squeeze_excite's reduce_weight must be"),
        (2, layers(R=3)[2]._replace(reduce_bias=torch.zeros(2)), "squeeze_excite's reduce_bias must be"),
        (3, layers(E=24)[3], "project weight must be"),
        (3, (torch.randn(8, 16, 1, 1), layers(O=4)[3][1]), "project norm's weight must be"),
    ],
)
def test_functional_block_checks_that_layers_fit(at, wrong, message, device):
    arguments = layers()
    arguments[at] = wrong
    with pytest.raises(ValueError, match=message):
        functional.mbconv(torch.randn(2, 8, 5, 5), *arguments)


def test_weights_in_any_memory_format(device):
    """Functional forms take transposed and strided weights as PyTorch does."""
    x, norm = (
        torch.randn(2, 8, 3, 3),
        BatchNormParams(torch.ones(6), torch.zeros(6), torch.zeros(6), torch.ones(6), training=False),
    )
    weight = torch.randn(8, 6).t()[:, :, None, None]
    assert torch.equal(functional.head(x, weight, norm), functional.head(x, weight.contiguous(), norm))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_precision_through_the_newer_setting(precision, device):
    """torch.backends.cuda.matmul.fp32_precision: reading the older allow_tf32 after it raises."""
    from effkernels.kernels.common import matmul_precision

    before = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = precision
        assert matmul_precision() == precision
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize(
    "changed", [{"padding": 0}, {"padding": 1}, {"padding": 2, "kernel_size": 5}, {"stride": 3, "padding": 1}]
)
def test_an_edited_stem_is_what_plain_pytorch_makes_of_it(changed, padding, device, monkeypatch):
    from effkernels.modules.stem_head import stem

    monkeypatch.setenv("EFFKERNELS_BACKEND", "auto")
    conv = nn.Conv2d(3, 8, **{"kernel_size": 3, "stride": 2, "bias": False, **changed})
    bn, x = nn.BatchNorm2d(8).eval(), torch.randn(2, 3, 9, 8)
    with torch.no_grad():
        torch.testing.assert_close(stem(x, conv, bn, "silu", padding), stem(x, conv, bn, "silu", padding, fused=False))


def test_fp16_input_under_bf16_autocast(device):
    """The residual keeps its own dtype, so the sum is fp32, as in PyTorch."""
    block = FusedMBConv(8, 8, 3, expand_ratio=2).eval()
    x = torch.randn(2, 8, 4, 4).half()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused, plain = block(x), block.forward_reference(x)
    assert fused.dtype == plain.dtype == torch.float32
    torch.testing.assert_close(fused, plain, rtol=0.05, atol=0.05)


def test_mask_of_the_caller(device):
    """In place of drop-path's draw: the residual branch of each sample times its factor, with and without batch
    statistics.
    """
    arguments, x, mask = layers(), torch.randn(3, 8, 4, 4), torch.tensor([0.0, 2.0, 0.5])

    def freeze(weight, norm):
        C = weight.shape[0]
        return weight, norm._replace(training=False, running_mean=torch.zeros(C), running_var=torch.ones(C))

    frozen = [a if i == 2 else freeze(*a) for i, a in enumerate(arguments)]
    for given in (arguments, frozen):
        with torch.no_grad():
            branch = reference.mbconv(x, *given, residual=True) - x
            for twin in (functional, reference):
                out = twin.mbconv(x, *given, residual=True, branch_scale=mask)
                torch.testing.assert_close(out, x + branch * mask.view(3, 1, 1, 1), rtol=1e-4, atol=1e-4)
    for wrong in (mask.double(), mask[:2], mask.clone().requires_grad_()):
        with pytest.raises(ValueError, match="branch_scale must be fp32"):
            functional.mbconv(x, *arguments, residual=True, branch_scale=wrong)
    with pytest.raises(ValueError, match="of a block with residual"):
        functional.mbconv(x, *arguments, branch_scale=mask)


def test_drop_path_with_frozen_statistics_and_no_gradient(device):
    block = FusedMBConv(8, 8, 3, expand_ratio=2, drop_path=0.5).train()
    for layer in block.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.eval()
    x = torch.randn(8, 8, 3, 3)
    with torch.no_grad():
        torch.manual_seed(0)
        fused = block(x)
        torch.manual_seed(0)
        plain = block.forward_reference(x)
    torch.testing.assert_close(fused, plain, rtol=1e-4, atol=1e-4)
    assert 0 < sum(torch.equal(a, b) for a, b in zip(fused, x, strict=True)) < 8
