"""The fused modules on kernels against the plain ones and float64: outputs, gradients, running statistics; and their
life as modules.
"""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from efficientnet import MBConv
from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite
from support.blocks import check_block, compare, images, random_like_output, randomise, step, twins
from support.truth import assert_close_to_truth, on_gpu

pytestmark = pytest.mark.usefixtures("small_tiles")


# ---- FusedMBConv -----------------------------------------------------------------------------------------------------

# Pairwise over: expand ratio 1, 4, 6; k 3, 5; stride 1, 2; both paddings; squeeze-excite or not; residual (stride 1 and
# I = O) or not; drop-path; dtype; odd, even and tiny H and W; each activation once. Not here: k = 7 and 9 and more
# channels, which the kernels' own tests have; fewer than eight channels or hidden units, since a gradient of two or
# three numbers may vanish by chance, and its bound with it.
BLOCKS = [
    # I  O  k  s expand se  padding      act           drop H  W   dtype
    (8, 8, 3, 1, 6, 0.5, "symmetric", "silu", 0.3, 5, 4, None),
    (9, 12, 5, 2, 6, 1.0, "same", "silu", 0.0, 6, 5, torch.bfloat16),
    (16, 16, 5, 1, 1, 0.0, "same", "relu6", 0.4, 3, 4, None),
    (10, 10, 3, 1, 4, 0.0, "same", "hard_swish", 0.0, 2, 5, torch.float16),
    (17, 17, 3, 1, 1, 0.5, "symmetric", "relu", 0.0, 5, 5, torch.bfloat16),
    (11, 8, 3, 2, 4, 1.0, "symmetric", "gelu", 0.0, 5, 4, None),
    (16, 9, 5, 2, 1, 0.5, "symmetric", "identity", 0.0, 7, 1, torch.float16),
    (8, 8, 5, 1, 4, 1.0, "symmetric", "silu", 0.5, 2, 3, torch.bfloat16),
    (8, 12, 3, 2, 2, 0.5, "symmetric", "relu6", 0.0, 5, 4, torch.bfloat16),
]
REAL_BLOCKS = [
    (32, 16, 3, 1, 1, 0.25, "symmetric", "silu", 0.0, 112, 112, torch.bfloat16),
    (16, 24, 3, 2, 6, 0.25, "same", "silu", 0.0, 112, 112, torch.bfloat16),
    (40, 40, 5, 1, 6, 0.25, "symmetric", "silu", 0.2, 28, 28, torch.float16),
    (192, 192, 5, 1, 6, 0.25, "symmetric", "silu", 0.2, 7, 7, None),
    (48, 80, 3, 2, 6, 0.25, "symmetric", "silu", 0.0, 29, 31, None),
]
BLOCK = "I, O, k, s, expand, se, padding, act, drop, H, W, autocast"


def blocks(rows):
    ids = ["-".join(map(str, row)).replace("torch.", "") for row in rows]
    return pytest.mark.parametrize(BLOCK, [pytest.param(*row, id=id) for row, id in zip(rows, ids, strict=True)])


@blocks(BLOCKS)
def test_mbconv_in_training(I, O, k, s, expand, se, padding, act, drop, H, W, autocast, device, scratch):  # noqa: E741
    check_block(device, True, I, O, k, s, expand, se, padding, act, drop, H, W, autocast)


@blocks(BLOCKS[::2])
def test_mbconv_with_frozen_statistics(I, O, k, s, expand, se, padding, act, drop, H, W, autocast, device, scratch):  # noqa: E741
    """eval() with gradients: BatchNorm's own backward, without batch terms, and no change of the buffers."""
    check_block(device, False, I, O, k, s, expand, se, padding, act, drop, H, W, autocast)


@blocks(BLOCKS)
def test_mbconv_inference(I, O, k, s, expand, se, padding, act, drop, H, W, autocast, device, scratch):  # noqa: E741
    modules = twins(FusedMBConv, I, O, k, s, expand, se, act=act, padding=padding, drop_path=drop, device=device)
    x = images(1, I, H, W, device=device)
    outputs, before = {}, copy.deepcopy(modules["fused"].state_dict())
    for name, module in modules.items():
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None and name != "truth"):
            outputs[name] = module.eval()(x.double() if name == "truth" else x)
    assert outputs["fused"].dtype == outputs["eager"].dtype
    assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"], "out")
    for name, value in modules["fused"].state_dict().items():
        assert torch.equal(value, before[name]), name


@on_gpu
@pytest.mark.parametrize("training", [True, False])
@blocks(REAL_BLOCKS)
def test_mbconv_real_shapes(training, I, O, k, s, expand, se, padding, act, drop, H, W, autocast, device, scratch):  # noqa: E741
    check_block(device, training, I, O, k, s, expand, se, padding, act, drop, H, W, autocast, N=8)


# The cheapest block with every part: expand, squeeze-excite, residual.
SMALL = (16, 16, 3, 1, 2, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mbconv_cast_as_a_whole(dtype, device, scratch):
    """Parameters, buffers and gradients in the compute dtype."""
    modules = twins(FusedMBConv, *SMALL, device=device)
    modules["fused"].to(dtype)
    modules["eager"].to(dtype)
    for name in ("eager", "truth"):
        modules[name].load_state_dict(modules["fused"].state_dict())
    x = images(3, 16, 4, 5, device=device).to(dtype)
    compare(modules, x, random_like_output(modules["truth"], x))


def test_dropped_samples_are_the_same(device, scratch):
    """A dropped sample is its input, bit for bit; the same samples drop in both, and both leave the generator in the
    same state.
    """
    modules = twins(FusedMBConv, *SMALL, drop_path=0.5, device=device)
    x = images(8, 16, 2, 2, device=device)
    dropped, following = {}, {}
    for name in ("fused", "eager"):
        torch.manual_seed(3)
        out = modules[name](x)
        dropped[name] = [torch.equal(a, b) for a, b in zip(out, x, strict=True)]
        following[name] = torch.rand(1, device=device)
    assert dropped["fused"] == dropped["eager"] and 0 < sum(dropped["fused"]) < 8
    assert following["fused"] == following["eager"]


# x and the incoming gradient in every layout a network can hand over; "expanded" has a stride of zero, along W alone
# since the last BatchNorm takes a constant gradient to nearly zero. test_summed_output has all strides zero.
def laid_out(tensor, layout):
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        wide = torch.randn(
            tensor.shape[0], tensor.shape[1] + 3, tensor.shape[2] + 2, 2 * tensor.shape[3], device=tensor.device
        )
        view = wide[:, 1:-2, 2:, ::2]
        return view.copy_(tensor)
    if layout == "expanded":
        return tensor[..., :1].expand_as(tensor)
    return tensor.contiguous()


@pytest.mark.parametrize(
    "x_layout, gradient_layout",
    [("contiguous", "expanded"), ("channels_last", "sliced"), ("sliced", "channels_last"), ("expanded", "contiguous")],
)
def test_mbconv_layouts(x_layout, gradient_layout, device, scratch):
    modules = twins(FusedMBConv, *SMALL, device=device)
    x = laid_out(images(3, 16, 4, 5, device=device), x_layout)
    compare(modules, x, laid_out(torch.randn(3, 16, 4, 5, device=device), gradient_layout))


def test_output_is_channels_last(device):
    block = FusedMBConv(*SMALL).to(device)
    for training in (True, False):
        assert block.train(training)(images(2, 16, 4, 5, device=device)).is_contiguous(
            memory_format=torch.channels_last
        )


# ---- BatchNorm's variants --------------------------------------------------------------------------------------------


def test_cumulative_momentum(device, scratch):
    """momentum None: after two batches the running statistics are their mean."""
    modules = twins(FusedMBConv, *SMALL, bn_momentum=None, device=device)
    for _ in range(2):
        x = images(3, 16, 3, 3, device=device)
        compare(modules, x, torch.randn_like(x))
    assert modules["fused"].bn1.num_batches_tracked == 2


@pytest.mark.parametrize("training", [True, False])
def test_without_running_statistics(training, device, scratch):
    """track_running_stats=False: the batch's statistics in eval too."""
    modules = twins(FusedMBConv, *SMALL, device=device)
    for module in modules.values():
        for name in ("bn1", "bn2", "bn3"):
            old = getattr(module, name)
            new = nn.BatchNorm2d(old.num_features, eps=old.eps, track_running_stats=False).to(old.weight)
            new.load_state_dict({"weight": old.weight, "bias": old.bias})
            setattr(module, name, new)
        module.train(training)
    x = images(3, 16, 3, 4, device=device)
    compare(modules, x, torch.randn_like(x))


@pytest.mark.parametrize("frozen", [("bn1",), ("bn2", "bn3")])
def test_each_norm_has_its_own_settings(frozen, device, scratch):
    """Fine-tuning with some BatchNorms in eval; and a momentum and an eps for each."""
    modules = twins(FusedMBConv, *SMALL, device=device)
    for module in modules.values():
        for name, momentum, eps in (("bn1", 0.1, 1e-5), ("bn2", 0.5, 1e-1), ("bn3", 0.9, 1e-3)):
            getattr(module, name).momentum, getattr(module, name).eps = momentum, eps
        for name in frozen:
            getattr(module, name).eval()
    x = images(3, 16, 3, 4, device=device)
    compare(modules, x, torch.randn_like(x))


# ---- autograd --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("expand", [1, 2])
@pytest.mark.parametrize(
    "wanted",
    [
        ("conv_dw.weight",),  # no gradient of the depthwise input
        ("se.conv_reduce.weight", "se.conv_expand.bias"),  # none of the depthwise convolution
        ("bn1.bias",),
        ("bn1.weight", "x"),
    ],
)
def test_only_some_gradients(wanted, expand, device, scratch):
    """Asked for alone, gradients are what they are among all others, and the rest stay None."""
    block = twins(FusedMBConv, 16, 16, 3, 1, expand, device=device)["fused"]
    x, gradient = images(2, 16, 3, 3, device=device), torch.randn(2, 16, 3, 3, device=device)
    everything = step(block, x, gradient)
    for name, p in block.named_parameters():
        p.requires_grad_(name in wanted)
    x.requires_grad_("x" in wanted)
    block(x).backward(gradient)
    leaves = {"x": x, **dict(block.named_parameters())}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == (name in wanted), name
        if name in wanted:
            assert torch.equal(leaf.grad, everything[name]), name


def test_accumulation_and_determinism(device, scratch):
    """A second backward adds the same bits again: no atomics, no state in the graph."""
    block = twins(FusedMBConv, *SMALL, device=device)["fused"]
    x = images(3, 16, 4, 4, device=device).requires_grad_()
    out = block(x)
    gradient = torch.randn_like(out)
    out.backward(gradient, retain_graph=True)
    once = {name: p.grad.clone() for name, p in block.named_parameters()}
    out.backward(gradient)
    for name, p in block.named_parameters():
        assert torch.equal(p.grad, 2 * once[name]), name


def test_checkpoint(device, scratch):
    """Recomputation gives the same bits; as in plain PyTorch it updates the running statistics a second time."""
    block = twins(FusedMBConv, *SMALL, device=device)["fused"]
    again = copy.deepcopy(block)
    x = images(3, 16, 3, 3, device=device)
    gradient = torch.randn_like(x)
    expected = step(block, x, gradient)
    found = step(_Checkpointed(again), x, gradient)
    for name, value in expected.items():
        if "running" not in name and "num_batches" not in name:
            assert torch.equal(found[f"block.{name}"] if name not in ("out", "x") else found[name], value), name
    assert again.bn1.num_batches_tracked == 2


class _Checkpointed(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


def test_double_backward_is_refused(device):
    block = FusedMBConv(*SMALL).to(device)
    x = images(2, 16, 3, 3, device=device).requires_grad_()
    (dx,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@on_gpu
def test_cuda_graph(device):
    """Inference can be captured: no host synchronisation, no tuning. A replay on new pixels is a call on them."""
    block = FusedMBConv(*SMALL).to(device).eval()
    randomise(block)
    static, new = images(2, 16, 14, 14, device=device), images(2, 16, 14, 14, device=device)
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            block(static)  # compiles
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = block(static)
        static.copy_(new)
        graph.replay()
        assert torch.equal(out, block(new))


# ---- the smaller modules ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "args, kwargs, autocast",
    [
        ((8, 3, 2), {"padding": "same", "act": "relu"}, torch.bfloat16),
        ((9, 5, 1), {"act": "silu"}, None),
        ((12, 7, 2), {"act": "hard_swish"}, None),
    ],
)
def test_depthwise_conv_bn_act(args, kwargs, autocast, training, device, scratch):
    modules = twins(FusedDepthwiseConvBNAct, *args, **kwargs, device=device)
    for module in modules.values():
        module.train(training)
    x = images(2, args[0], 5, 4, device=device)
    compare(modules, x, random_like_output(modules["truth"], x), autocast)
    outputs = {}
    for name, module in modules.items():
        with torch.no_grad(), torch.autocast(device, autocast, enabled=autocast is not None and name != "truth"):
            outputs[name] = module.eval()(x.double() if name == "truth" else x)
    assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"], "inference")


def test_summed_output(device, scratch):
    """out.sum().backward(): the incoming gradient is one number expanded."""
    modules = twins(FusedDepthwiseConvBNAct, 16, 3, device=device)
    x = images(2, 16, 4, 5, device=device)
    compare(modules, x, torch.ones((), device=device).expand(2, 16, 4, 5))


@pytest.mark.parametrize(
    "args, autocast",
    [((24, 9), None), ((33, 12, "relu", "hard_sigmoid"), torch.bfloat16), ((10, 8, "hard_swish"), torch.float16)],
)
def test_squeeze_excite(args, autocast, device, scratch):
    modules = twins(FusedSqueezeExcite, *args, device=device)
    x = images(2, args[0], 5, 3, device=device)
    compare(modules, laid_out(x, "sliced"), laid_out(torch.randn_like(x), "expanded"), autocast)


# ---- as modules (no kernel runs) -------------------------------------------------------------------------------------


@pytest.mark.parametrize("args", [SMALL, (16, 6, 5, 2, 1, 0.25), (16, 16, 3, 1, 6, 0)])
def test_state_dict_is_the_plain_block_s(args):
    fused, plain = FusedMBConv(*args), MBConv(*args)
    shapes = [{name: (v.shape, v.dtype) for name, v in m.state_dict().items()} for m in (fused, plain)]
    assert shapes[0] == shapes[1] and list(shapes[0]) == list(shapes[1])
    randomise(fused)
    plain.load_state_dict(fused.state_dict())
    third = FusedMBConv(*args)
    third.load_state_dict(plain.state_dict())
    x = images(2, 16, 5, 5)
    assert torch.equal(third.eval()(x), fused.eval()(x)) and torch.equal(plain.eval()(x), fused(x))


def _saved(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["deepcopy", "pickle", "save"]
)
@pytest.mark.parametrize(
    "cls, args", [(FusedMBConv, SMALL), (FusedDepthwiseConvBNAct, (16,)), (FusedSqueezeExcite, (16, 2))]
)
def test_duplicates(cls, args, duplicate):
    """A copy computes the same and shares nothing."""
    module = cls(*args)
    randomise(module)
    x = images(2, 16, 5, 5)
    expected = module.eval()(x)
    copied = duplicate(module)
    assert type(copied) is cls and torch.equal(copied(x), expected)
    for p in copied.parameters():
        p.data.zero_()
    assert torch.equal(module(x), expected)


def test_duplicate_after_kernels_ran(device):
    """Kernels leave nothing in the module that cannot be copied."""
    module = FusedDepthwiseConvBNAct(16).to(device)
    x = images(2, 16, 3, 3, device=device)
    module(x).sum().backward()
    for copied in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(copied.eval()(x), module.eval()(x))
