"""What users do to a block after building it: the gate must see it, or the kernels must compute it."""

import pytest
import torch
from torch import nn

from effkernels import BatchNormParams, FusedMBConv, functional


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
        ({"norm": BatchNormParams(torch.ones(8), torch.zeros(8), training=False)}, "running_mean and running_var must be given"),
    ],
)
def test_functional_forms_check_their_arguments(change, message, device):
    norm = change.pop("norm", BatchNormParams(torch.ones(8), torch.zeros(8)))
    weight = torch.randn(change.pop("weight", (8, 1, 3, 3)))
    with pytest.raises(ValueError, match=message):
        functional.depthwise_conv_bn_act(torch.randn(2, 8, 5, 5), weight, norm, **change)
