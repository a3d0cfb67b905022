"""Padding and output sizes against what they mean: brute force, PyTorch's own convolution, and TensorFlow's rule as
timm has it.
"""

import pytest
import torch
import torch.nn.functional as F

from effkernels.geometry import conv_out_size, pad_amounts

SIZES = range(1, 24)
KERNELS = (1, 3, 5, 7, 9)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", KERNELS)
def test_same_is_the_least_padding_for_ceil_of_size_over_stride(k, stride):
    for size in SIZES:
        before, after = pad_amounts(size, k, stride, "same")
        wanted = (size + stride - 1) // stride
        least = next(total for total in range(100) if size + total >= k and (size + total - k) // stride + 1 >= wanted)
        assert before + after == least, size
        assert after - before in (0, 1), "TensorFlow puts the odd zero after"
        assert conv_out_size(size, k, stride, "same") == wanted


@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", KERNELS)
def test_output_size_is_the_convolution_s(k, stride, padding):
    for size in SIZES:
        x = F.pad(torch.zeros(1, 1, size), pad_amounts(size, k, stride, padding))
        assert conv_out_size(size, k, stride, padding) == F.conv1d(x, torch.zeros(1, 1, k), stride=stride).shape[-1], (
            size
        )


@pytest.mark.parametrize("k", KERNELS)
def test_symmetric_does_not_depend_on_size_or_stride(k):
    assert {pad_amounts(size, k, stride, "symmetric") for size in SIZES for stride in (1, 2)} == {(k // 2, k // 2)}


@pytest.mark.parametrize(
    "size, k, stride, expected", [(224, 3, 2, (0, 1)), (225, 3, 2, (1, 1)), (112, 5, 2, (1, 2)), (7, 5, 1, (2, 2))]
)
def test_known_values(size, k, stride, expected):
    assert pad_amounts(size, k, stride, "same") == expected


def test_same_as_timm(timm):
    from timm.layers.padding import pad_same

    for k in KERNELS:
        for stride in (1, 2):
            for height, width in ((7, 8), (5, 12), (1, 2)):
                x = torch.randn(1, 1, height, width)
                (top, bottom), (left, right) = (pad_amounts(n, k, stride, "same") for n in (height, width))
                assert torch.equal(F.pad(x, (left, right, top, bottom)), pad_same(x, (k, k), (stride, stride)))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("k", KERNELS)
def test_same_as_even_is_same_of_even_sizes_at_any_size(k, stride):
    amounts = {pad_amounts(size, k, stride, "same") for size in SIZES if size % 2 == 0}
    assert {pad_amounts(size, k, stride, "same_as_even") for size in SIZES} == amounts and len(amounts) == 1


@pytest.mark.parametrize("size", [7, 8])
def test_modules_pad_by_every_rule(size):
    from effkernels import FusedDepthwiseConvBNAct, FusedMBConv

    x = torch.randn(1, 8, size, size)
    with torch.no_grad():
        for module in (
            FusedDepthwiseConvBNAct(8, 3, 2, padding="same_as_even"),
            FusedMBConv(8, 8, 3, 2, 1, 0, padding="same_as_even"),
        ):
            out = module.eval()(x)
            for layer in module.modules():
                layer.padding = (0, 0) if isinstance(layer, torch.nn.Conv2d) else "symmetric"
            assert torch.equal(out, module(F.pad(x, (0, 1, 0, 1))))
