import pytest
import torch

from benchmarks.shapes import (
    Block,
    Depthwise,
    Model,
    SqueezeExciteLayer,
    blocks,
    depthwise_layers,
    model,
    squeeze_excite_layers,
)
from efficientnet import create_model

# (channels, input pixels, kernel size, stride) of Table 1 of the paper.
B0_DEPTHWISE = [
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 3, 1),
    (144, 56, 5, 2),
    (240, 28, 5, 1),
    (240, 28, 3, 2),
    (480, 14, 3, 1),
    (480, 14, 5, 1),
    (672, 14, 5, 1),
    (672, 14, 5, 2),
    (1152, 7, 5, 1),
    (1152, 7, 3, 1),
]
# (channels, a quarter of the block's input channels, pixels after the depthwise convolution).
B0_SQUEEZE_EXCITE = [
    (32, 8, 112),
    (96, 4, 56),
    (144, 6, 56),
    (144, 6, 28),
    (240, 10, 28),
    (240, 10, 14),
    (480, 20, 14),
    (672, 28, 14),
    (672, 28, 7),
    (1152, 48, 7),
]


def test_b0_layers_are_those_of_the_paper():
    assert depthwise_layers("b0") == [Depthwise(*row) for row in B0_DEPTHWISE]
    assert squeeze_excite_layers("b0") == [SqueezeExciteLayer(*row) for row in B0_SQUEEZE_EXCITE]


@pytest.mark.parametrize("name, image_size", [("b0", 224), ("b4", 380), ("b0", 97)])
def test_blocks_are_what_the_network_computes(name, image_size):
    network = create_model(name, fused=False, device="meta").eval()
    seen = []
    for stage in network.blocks:
        for block in stage:
            block.conv_dw.register_forward_hook(
                lambda conv, args, out: seen.append([*args[0].shape[1:], *out.shape[2:]])
            )
            block.se.conv_reduce.register_forward_hook(lambda conv, args, out: seen[-1].append(out.shape[1]))
            block.register_forward_hook(lambda block, args, out: seen[-1].extend([args[0].shape[1], out.shape[1]]))
    network(torch.empty(1, 3, image_size, image_size, device="meta"))
    expected = [
        [b.expanded, b.size, b.size, b.out_size, b.out_size, b.reduced, b.in_channels, b.out_channels]
        for b in blocks(name, image_size)
    ]
    assert seen == expected


def test_shrinking_rounds_up():
    assert model("b0").shrunk(2) == Model("b0", 112)
    assert Depthwise(1152, 7, 5, 1).shrunk(2) == Depthwise(1152, 4, 5, 1)


SMALL = [Depthwise(24, 9, 5, 2), SqueezeExciteLayer(24, 6, 5), Block(8, 8, 3, 1, 6, 0.25, 48, 2, 7), Model("b0", 64)]


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: type(shape).__name__)
def test_fused_and_plain_are_one_network(shape):
    plain, fused = shape.build(fused=False).eval(), shape.build(fused=True).eval()
    fused.load_state_dict(plain.state_dict())
    x = torch.randn(2, shape.in_channels, shape.size, shape.size)
    with torch.no_grad():
        expected = plain(x)
        torch.testing.assert_close(fused(x), expected)
    if not isinstance(shape, Model):
        assert expected.shape[2:] == (getattr(shape, "out_size", shape.size),) * 2


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: type(shape).__name__)
def test_only_fused_modules_ask_for_the_kernels(shape, monkeypatch):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "triton")  # which raises for a tensor on the CPU
    x = torch.randn(2, shape.in_channels, shape.size, shape.size)
    shape.build(fused=False)(x)
    with pytest.raises(RuntimeError, match="EFFKERNELS_BACKEND=triton"):
        shape.build(fused=True)(x)
