"""Wrong arguments and inputs: the error names the argument, the value and what is accepted, before anything is
changed.
"""

import copy

import pytest
import torch

from efficientnet import MBConv
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite
from effkernels.geometry import LARGEST_KERNEL_SIZE, pad_amounts


@pytest.mark.parametrize("cls", [FusedMBConv, MBConv])
@pytest.mark.parametrize(
    "change, message",
    [
        ({"in_channels": 0}, "in_channels must be an integer >= 1, got 0"),
        ({"in_channels": 8.0}, "in_channels must be an integer >= 1, got 8.0"),
        ({"out_channels": True}, "out_channels must be an integer >= 1, got True"),
        ({"kernel_size": 4}, f"kernel_size must be an odd integer from 1 to {LARGEST_KERNEL_SIZE}, got 4"),
        ({"kernel_size": LARGEST_KERNEL_SIZE + 2}, f"from 1 to {LARGEST_KERNEL_SIZE}, got {LARGEST_KERNEL_SIZE + 2}"),
        ({"kernel_size": 3.0}, f"kernel_size must be an odd integer from 1 to {LARGEST_KERNEL_SIZE}, got 3.0"),
        ({"kernel_size": True}, f"kernel_size must be an odd integer from 1 to {LARGEST_KERNEL_SIZE}, got True"),
        ({"stride": 3}, "stride must be 1 or 2, got 3"),
        ({"stride": True}, "stride must be 1 or 2, got True"),
        ({"stride": 1.0}, "stride must be 1 or 2, got 1.0"),
        ({"expand_ratio": 0.5}, "expand_ratio must be .*>= 1.*, got 0.5"),
        ({"expand_ratio": float("nan")}, "expand_ratio must be .*>= 1.*, got nan"),
        ({"expand_ratio": float("inf")}, "expand_ratio must be .*>= 1.*, got inf"),
        ({"expand_ratio": "6"}, "expand_ratio must be .*>= 1.*, got '6'"),
        ({"se_ratio": 1.5}, r"se_ratio must be .*\[0, 1\].*, got 1.5"),
        ({"se_ratio": None}, r"se_ratio must be .*\[0, 1\].*, got None"),
        ({"act": "swish"}, "act must be one of .*'silu'.*, got 'swish'"),
        ({"padding": "SAME"}, "padding must be one of .*'same'.*, got 'SAME'"),
        ({"padding": 1}, "padding must be one of .*'symmetric'.*, got 1"),
        ({"drop_path": 1.0}, r"drop_path must be .*\[0, 1\), got 1.0"),
        ({"drop_path": "0.2"}, r"drop_path must be .*\[0, 1\), got '0.2'"),
    ],
)
def test_mbconv_arguments(cls, change, message):
    with pytest.raises(ValueError, match=message):
        cls(**{"in_channels": 8, "out_channels": 8, **change})


@pytest.mark.parametrize(
    "cls, args, kwargs, message",
    [
        (FusedDepthwiseConvBNAct, (0,), {}, "channels must be an integer >= 1, got 0"),
        (FusedDepthwiseConvBNAct, (8, 2), {}, "kernel_size must be an odd integer"),
        (FusedDepthwiseConvBNAct, (8, 3, 0), {}, "stride must be 1 or 2, got 0"),
        (FusedDepthwiseConvBNAct, (8,), {"act": "elu"}, "act must be one of"),
        (FusedDepthwiseConvBNAct, (8,), {"padding": "valid"}, "padding must be one of"),
        (FusedSqueezeExcite, (0, 1), {}, "channels must be an integer >= 1, got 0"),
        (FusedSqueezeExcite, (8, 0.25), {}, "reduced_channels must be an integer >= 1, got 0.25"),
        (FusedSqueezeExcite, (8, 2, "elu"), {}, "act must be one of"),
        (FusedSqueezeExcite, (8, 2, "silu", "softmax"), {}, "gate must be one of .*'sigmoid'.*, got 'softmax'"),
    ],
)
def test_other_modules_arguments(cls, args, kwargs, message):
    with pytest.raises(ValueError, match=message):
        cls(*args, **kwargs)


def test_pad_amounts_padding():
    with pytest.raises(ValueError, match="padding must be one of .*, got 'valid'"):
        pad_amounts(8, 3, 1, "valid")


MODULES = [
    pytest.param(lambda: FusedMBConv(8, 8), id="mbconv"),
    pytest.param(lambda: MBConv(8, 8), id="plain"),
    pytest.param(lambda: FusedDepthwiseConvBNAct(8), id="depthwise"),
    pytest.param(lambda: FusedSqueezeExcite(8, 2), id="squeeze-excite"),
]
INPUTS = [
    ([[1.0]], TypeError, "x must be a torch.Tensor, got list"),
    (torch.zeros(8, 4, 4), ValueError, r"x must be \[N, C, H, W\], got shape \(8, 4, 4\)"),
    (torch.zeros(1, 4, 4, 8), ValueError, r"x must have 8 channels, got 4 \(shape \(1, 4, 4, 8\)\)"),
    (torch.zeros(1, 8, 4, 4, dtype=torch.int64), TypeError, "x must be a floating point tensor, got torch.int64"),
    (torch.zeros(1, 8, 0, 4), ValueError, "height 0 is too small"),
    (torch.zeros(1, 8, 4, 0), ValueError, "width 0 is too small"),
    (torch.zeros(1, 8, 4, 4, device="meta"), ValueError, "x is on meta, the weights are on cpu"),
]


@pytest.mark.parametrize("x, error, message", INPUTS, ids=[m.split(",")[0][:30] for _, _, m in INPUTS])
@pytest.mark.parametrize("module", MODULES)
def test_inputs(module, x, error, message):
    with pytest.raises(error, match=message):
        module()(x)


# One pixel of one image; and two by two pixels of which stride 2 leaves one, which the depthwise convolution's
# BatchNorm alone sees.
@pytest.mark.parametrize(
    "module, size",
    [
        (lambda: FusedMBConv(8, 8), 1),
        (lambda: FusedMBConv(8, 8, 3, 2, 1), 2),
        (lambda: FusedMBConv(8, 8, 3, 2, 6), 2),
        (lambda: FusedDepthwiseConvBNAct(8, 3, 2), 2),
    ],
    ids=["mbconv", "stride without expand", "stride with expand", "depthwise"],
)
def test_one_value_per_channel(module, size, device):
    """PyTorch's own error in training, with no running statistic touched; fine in eval."""
    module = module().to(device)
    before = copy.deepcopy(module.state_dict())
    x = torch.randn(1, 8, size, size, device=device)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        module(x)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert module.eval()(x).isfinite().all()


def test_one_value_per_channel_on_the_plain_path():
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        FusedMBConv(8, 8)(torch.randn(1, 8, 1, 1))


def test_parameters_of_another_dtype(device):
    """What a convolution would raise, not a silent cast; with the reason where kernels are asked for by name."""
    block = FusedMBConv(8, 8).to(device, torch.bfloat16)
    with pytest.raises(
        RuntimeError, match="a parameter is torch.bfloat16; it must be float32 or the compute dtype torch.float32"
    ):
        block(torch.randn(2, 8, 4, 4, device=device))
