"""The whole block on kernels at the channel counts of real networks, and its options; test_modules.py has every kind of
block small.
"""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.static import Kept
from efficientnet import MBConv
from effkernels import FusedMBConv
from support.blocks import check_block, compare, images, random_like_output, randomise, step, twins
from support.truth import assert_close_to_truth, on_gpu

pytestmark = pytest.mark.usefixtures("small_tiles")

# Blocks of B0, B1 and B4 at reduced height and width; each dtype meets k 3 and 5, stride 1 and 2, both paddings.
REAL = [
    # model I O k s expand H W padding dtype
    ("b0", 32, 16, 3, 1, 1, 4, 5, "symmetric", torch.bfloat16),
    ("b0", 16, 24, 3, 2, 6, 6, 5, "same", None),
    ("b0", 24, 40, 5, 2, 6, 5, 6, "symmetric", torch.float16),
    ("b0", 80, 112, 5, 1, 6, 3, 3, "symmetric", torch.bfloat16),
    ("b0", 112, 192, 5, 2, 6, 4, 3, "same", None),
    ("b1", 16, 16, 3, 1, 1, 5, 4, "same", torch.float16),
    ("b1", 40, 40, 5, 1, 6, 4, 4, "symmetric", None),
    ("b4", 24, 32, 3, 2, 6, 5, 5, "same", torch.bfloat16),
    ("b4", 32, 56, 5, 2, 6, 6, 6, "symmetric", torch.bfloat16),
    ("b4", 56, 56, 5, 1, 6, 4, 3, "symmetric", torch.float16),
    ("b4", 112, 112, 3, 1, 6, 3, 3, "symmetric", None),
]


# Those of 480 channels and more in fp32, or of 5x5 at 240, take up to half a minute each in the interpreter.
@pytest.mark.parametrize(
    ("model", "I", "O", "k", "s", "expand", "H", "W", "padding", "dtype"),
    [
        pytest.param(*row, marks=pytest.mark.slow)
        if row[1] in (112, 80) or row[:2] in (("b1", 40), ("b4", 56))
        else row
        for row in REAL
    ],
)
def test_real_blocks_in_training(model, I, O, k, s, expand, H, W, padding, dtype, device):
    drop = 0.2 if s == 1 and I == O else 0.0
    check_block(device, True, I, O, k, s, expand, 0.25, padding, "silu", drop, H, W, dtype, N=4)


@pytest.mark.parametrize("I", [16, 12])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
def test_expand_inside_the_depthwise_kernel(I, padding, device, monkeypatch):
    """Inference of the first blocks: the same numbers with e1 stored and without."""
    from effkernels.kernels import expand_depthwise, pointwise_forward

    runs = []
    for module, name in ((expand_depthwise, "expand_depthwise"), (pointwise_forward, "pointwise_forward")):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *args, n=name, f=original, **kw: (runs.append(n), f(*args, **kw))[1])
    modules = twins(FusedMBConv, I, 24, 3, 2, 6, 0.25, padding=padding, device=device)
    x = images(2, I, 9, 7, device=device)
    outputs = {}
    for name, module in modules.items():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=name != "truth"):
            outputs[name] = module.eval()(x.double() if name == "truth" else x.bfloat16())
    assert runs == ["expand_depthwise", "pointwise_forward"]  # the latter projects
    assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"])


@pytest.mark.parametrize(("I", "O"), [(416, 16), (16, 140)])
def test_inference_without_a_gate(I, O, device):
    """Nothing is evaluated where the project convolution loads its input, which decides the form of its weight's copy:
    with 416 channels one for a product apart, and with 140 outputs none.
    """
    modules = twins(FusedMBConv, I, O, 3, 1, 1, 0.0, device=device)
    x = images(3, I, 19, 19, device=device)
    outputs = {}
    for name, module in modules.items():
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=name != "truth"):
            outputs[name] = module.eval()(x.double() if name == "truth" else x.bfloat16())
    assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"])


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_recompute_gives_the_same_bits(dtype, device, scratch):
    keep = twins(FusedMBConv, 16, 16, 3, 1, 4, 0.25, drop_path=0.3, device=device)["fused"]
    again = copy.deepcopy(keep)
    again.memory = "recompute"
    x = images(3, 16, 4, 5, device=device)
    gradient = torch.randn_like(x)
    first, second = step(keep, x, gradient, dtype), step(again, x, gradient, dtype)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("memory", "large"), [("keep", 3), ("recompute", 2)])
def test_what_a_block_keeps(memory, large, device):
    """x and the convolutions' outputs, in the compute dtype, and vectors; nothing else the size of an image."""
    I, E, H, W, N = 16, 96, 8, 8, 2
    block = FusedMBConv(I, I, 3, 1, 6, 0.25, memory=memory).to(device)
    x = images(N, I, H, W, device=device).requires_grad_()
    with Kept(block) as saved:
        block(x)
    image = 4 * N * H * W
    wanted = sorted([image * I, image * I, *[image * E] * (large - 1)])
    assert sorted(size for size, _ in saved.storages.values() if size > 4 * N * E * 4)[-len(wanted) :] == wanted
    assert saved.bytes < sum(wanted) * 1.2


@pytest.fixture
def on_meta(monkeypatch):
    """Fused modules run their launchers on tensors without memory: the names of the kernels they would have started."""
    triton = pytest.importorskip("triton")
    from triton.runtime.interpreter import InterpretedFunction

    from effkernels import dispatch

    names = []

    def run(self, *args, **kwargs):
        names.append(self.fn.__name__)

    monkeypatch.setattr(dispatch, "why_not_fused", lambda *args, **kwargs: None)
    for cls in (InterpretedFunction, triton.runtime.jit.JITFunction):
        monkeypatch.setattr(cls, "run", run)
    return names


class Operators(TorchDispatchMode):
    sees_kernels = True  # launches are counted beside it, so it is no reason for plain PyTorch

    """Names of PyTorch's own operators that start a kernel: not views, allocations, type promotion, or a gradient
    handed over.
    """

    FREE = ("empty", "detach", "promote_types", "copy_", "_unsafe_view")

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
        if not view and not any(part in name for part in self.FREE):
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def test_launches_of_b0(on_meta):
    """A forward, and a training step with its loss, dropout and drop-path but without the optimizer."""
    from efficientnet import create_model

    x = torch.empty(256, 3, 224, 224, device="meta", dtype=torch.bfloat16)
    model = create_model("efficientnet_b0", device="meta", dtype=x.dtype)
    with Operators() as operators, torch.no_grad():
        model.eval()(x)
    assert on_meta.count("weight_copies_kernel") == 5  # where all tiles load weights that do not fit beside them
    assert sum(name.startswith("aten::mm") for name in operators.names) == 5  # more outputs than a program holds
    assert len(on_meta) + len(operators.names) <= 96
    on_meta.clear()
    model.train()
    with Operators() as operators:
        labels = torch.empty(256, dtype=torch.long, device="meta")
        nn.functional.cross_entropy(model(x), labels).backward()
    assert on_meta.count("project_dy_kernel") == 16 and on_meta.count("expand_matrix_kernel") == 15
    # Both gradients in one launch up to 24 outputs, 3 blocks of 16, elsewhere a pass between two products.
    assert [on_meta.count(f"{name}_kernel") for name in ("project_both", "gradient_sums")] == [3, 13]
    # So are weight gradients of more than 128 inputs, 4 blocks: a product with dz, one with x. Head and classifier: 4.
    assert [on_meta.count(f"expand_{name}_kernel") for name in ("pass", "data", "weight")] == [5, 10, 6]
    assert sum(name.startswith("aten::mm") for name in operators.names) == 5 + 26 + 8 + 4
    assert [on_meta.count(f"weight_{name}_kernel") for name in ("sums", "gradients")] == [16, 16]
    assert len(on_meta) + len(operators.names) <= 348, (len(on_meta), operators.names)


@pytest.mark.parametrize(
    ("size", "memory", "most"), [(64, "keep", 0.36), (64, "recompute", 0.19), (224, "keep", 0.341)]
)
def test_saved_activations_of_b0(size, memory, most, on_meta):
    """Bytes kept by a training step of B0 in bf16 as a share of plain PyTorch's; the goal is 0.36 at 64 pixels."""
    from efficientnet import create_model

    x = torch.empty(256, 3, size, size, device="meta", dtype=torch.bfloat16)
    kept = {}
    for fused in (True, False):
        model = create_model(
            "efficientnet_b0", num_classes=10, fused=fused, memory=memory, device="meta", dtype=x.dtype
        )
        with Kept(model) as saved:
            model(x)
        kept[fused] = saved.bytes
    ratio = kept[True] / kept[False]
    assert ratio <= most, f"{kept[True]} of {kept[False]} bytes, {ratio:.3f}"


@pytest.mark.parametrize("part", ["conv_pw", "conv_dw", "conv_pwl", "se.conv_expand", "bn1", "bn2", "bn3", "x"])
def test_gradient_of_one_part_alone(part, device, scratch):
    """The launches that are left out change nothing in those that stay."""
    modules = twins(FusedMBConv, 16, 16, 3, 1, 2, 0.5, device=device)
    x = images(2, 16, 3, 4, device=device)
    gradient = random_like_output(modules["truth"], x)
    results = {name: step(m, x.double() if name == "truth" else x, gradient) for name, m in modules.items()}
    block = modules["fused"]
    for name, p in block.named_parameters():
        p.requires_grad_(name.startswith(part + "."))
    x.requires_grad_(part == "x")
    block(x).backward(gradient)
    leaves = {"x": x, **dict(block.named_parameters())}
    for name, leaf in leaves.items():
        assert (leaf.grad is not None) == leaf.requires_grad, name
        if leaf.requires_grad:
            assert_close_to_truth(leaf.grad, results["eager"][name], results["truth"][name], name)


def test_frozen_parameters_cost_no_launch(device):
    """Fewer wanted gradients, fewer kernels: a block of which only bn3 trains computes BatchNorm 3's sums and nothing
    else.
    """
    pytest.importorskip("triton")
    if device != "cpu":
        pytest.skip("counted in the interpreter")
    from effkernels.tools.traffic import count_traffic

    block = FusedMBConv(16, 16, 3, 1, 2, 0.5)
    x = images(2, 16, 3, 4)

    def launches(*trained):
        for name, p in block.named_parameters():
            p.requires_grad_(name.startswith(trained))
        out = block(x)
        with count_traffic() as records:
            out.backward(torch.ones_like(out))
        return [r.name for r in records if r.name.endswith("_kernel")]

    assert launches("bn3") == ["gradient_reduce_kernel"]
    block.bn3.eval()
    assert launches("conv_pwl") == [
        "project_dy_kernel",
        "apply_kernel",
        "weight_sums_kernel",
    ]  # frozen BatchNorm 3: no sums either
    block.bn3.train()
    assert launches("conv_pwl") == [
        "gradient_reduce_kernel",
        "project_dy_kernel",
        "apply_kernel",
        "weight_sums_kernel",
    ]
    names = launches("conv_dw")
    assert "expand_matrix_kernel" not in names and names[-1] == "weight_sums_kernel"


def test_evaluation_after_more_training_is_not_stale(device, scratch):
    """Nothing is folded ahead: eval, train, eval again sees the new statistics and weights."""
    modules = twins(FusedMBConv, 16, 16, 3, 1, 2, 0.25, device=device)
    x = images(3, 16, 4, 4, device=device)
    for _ in range(2):
        outputs = {}
        for name, module in modules.items():
            with torch.no_grad():
                outputs[name] = module.eval()(x.double() if name == "truth" else x)
            module.train()
            module(x.double() if name == "truth" else x).square().mean().backward()
            with torch.no_grad():
                for p in module.parameters():
                    p.sub_(p.grad, alpha=0.05)
                    p.grad = None
        assert_close_to_truth(outputs["fused"], outputs["eager"], outputs["truth"])


# ---- bad and odd input -----------------------------------------------------------------------------------------------


def test_empty_batch(device):
    for cls in (FusedMBConv, MBConv):
        block = cls(8, 12, 3, 2, 2, 0.25).to(device)
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(torch.empty(0, 8, 5, 5, device=device))
        with torch.no_grad():
            assert block.eval()(torch.empty(0, 8, 5, 5, device=device)).shape == (0, 12, 3, 3)


def test_empty_batch_through_a_network(device):
    from efficientnet import create_model

    model = create_model("efficientnet_b0", num_classes=5)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        model(torch.empty(0, 3, 32, 32))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert model.eval()(torch.empty(0, 3, 32, 32)).shape == (0, 5)


def test_replaced_halves_of_forward_are_called(device):
    from efficientnet import EfficientNet
    from efficientnet.model.config import EfficientNetConfig, StageConfig

    config = EfficientNetConfig(stages=(StageConfig(3, 2, 2, 8, 1),), stem_channels=8, head_channels=16)
    model = EfficientNet(config, num_classes=4).eval()
    original = model.forward_features
    model.forward_features = lambda x: 0 * original(x)
    assert torch.equal(model(torch.randn(1, 3, 8, 8)), model.classifier.bias[None])


def test_one_value_per_channel_in_training(device):
    for cls in (FusedMBConv, MBConv):
        block = cls(8, 8, 3, 1, 2, 0.25).to(device)
        before = copy.deepcopy(block.state_dict())
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            block(torch.randn(1, 8, 1, 1, device=device))
        if cls is FusedMBConv:  # nn.BatchNorm2d counts the batch before it looks at it
            assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("training", [True, False])
def test_non_finite_input_spreads_as_in_pytorch(bad, training, device):
    """In training to the whole batch through the statistics; in eval to the image it is in."""
    results = []
    for cls in (FusedMBConv, MBConv):
        torch.manual_seed(0)
        block = cls(8, 8, 3, 1, 2, 0.25).to(device)
        torch.manual_seed(1)
        randomise(block)
        x = images(3, 8, 4, 4, device=device)
        x[1, 2, 1, 3] = bad
        x.requires_grad_()
        out = block.train(training)(x)
        out.sum().backward()
        results.append([t.isfinite() for t in (out, x.grad, block.conv_dw.weight.grad, block.conv_pw.weight.grad)])
    if training:
        assert not results[0][0].any()
    else:
        assert results[0][0][[0, 2]].all()
    for fused, plain in zip(*results, strict=True):
        assert torch.equal(fused, plain)


@pytest.mark.parametrize("memory", ["drop", None])
def test_unknown_memory(memory):
    with pytest.raises(ValueError, match="memory must be 'keep' or 'recompute'"):
        FusedMBConv(8, 8, memory=memory)


# ---- networks --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_three_steps_of_b0_follow_the_reference(device):
    """Weights after three optimizer steps, B0 at 64 pixels: as near to float64's as plain PyTorch's, channels_last as
    the kernels are.

    At 32 pixels the last maps have one pixel, and a BatchNorm over four values makes 1e-3 of each rounding of 1e-7:
    plain PyTorch is a quarter off after three steps.
    """
    from efficientnet import create_model

    torch.manual_seed(0)
    models = {
        name: create_model("efficientnet_b0", num_classes=10, drop_rate=0.0, fused=name == "fused")
        for name in ("fused", "eager")
    }
    models["eager"].load_state_dict(models["fused"].state_dict())
    models["truth"] = copy.deepcopy(models["eager"]).double()
    batches = [(images(4, 3, 64, 64, device=device), torch.randint(10, (4,), device=device)) for _ in range(3)]
    start = {name: p.detach().clone().double() for name, p in models["truth"].named_parameters()}
    moved = {}
    for name, model in models.items():
        model.to(device, memory_format=torch.channels_last).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        torch.manual_seed(7)  # drop-path
        for x, y in batches:
            loss = nn.functional.cross_entropy(model(x.double() if name == "truth" else x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        moved[name] = torch.cat(
            [(p.detach().double() - start[n].to(device)).flatten() for n, p in model.named_parameters()]
        )
        moved[name + " buffers"] = torch.cat([b.detach().double().flatten() for b in model.buffers()])
    for what in ("", " buffers"):
        assert_close_to_truth(*(moved[name + what] for name in ("fused", "eager", "truth")), what)


def test_compiled_network(device):
    """torch.compile(fullgraph=True) over stem, blocks and head: training and inference."""
    from efficientnet import EfficientNet
    from efficientnet.model.config import EfficientNetConfig, StageConfig

    torch._dynamo.reset()
    stages = (StageConfig(3, 1, 1, 8, 1), StageConfig(3, 2, 2, 8, 2))
    model = EfficientNet(
        EfficientNetConfig(stages=stages, stem_channels=8, head_channels=16), num_classes=4, drop_rate=0.0
    ).to(device)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    reference = copy.deepcopy(model)
    x = images(2, 3, 12, 12, device=device)
    for m, call in ((model, compiled), (reference, reference)):
        torch.manual_seed(5)
        call(x).square().sum().backward()
        m.eval()
    for (name, p), q in zip(model.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@on_gpu
def test_cuda_graph_of_a_training_step(device):
    """Forward and backward can be captured: no host synchronisation, no allocation that a replay would miss."""
    block = FusedMBConv(16, 16, 3, 1, 4, 0.25).to(device)
    randomise(block)
    eager = copy.deepcopy(block)
    static, new = (images(4, 16, 14, 14, device=device).requires_grad_() for _ in range(2))
    gradient = torch.randn(4, 16, 14, 14, device=device)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        block(static).backward(gradient)  # compiles
    torch.cuda.current_stream().wait_stream(stream)
    for t in (static, *block.parameters()):
        t.grad = None
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(static)
        out.backward(gradient)
    with torch.no_grad():
        static.copy_(new)
    for _ in range(2):  # the counters are zero again after the first
        graph.replay()
    expected = eager(new)
    expected.backward(gradient)
    assert torch.equal(out, expected) and torch.equal(static.grad, new.grad)
    for (name, p), q in zip(block.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_input_layouts_of_the_network(device):
    from efficientnet import EfficientNet
    from efficientnet.model.config import EfficientNetConfig, StageConfig

    config = EfficientNetConfig(stages=(StageConfig(3, 2, 2, 8, 1),), stem_channels=8, head_channels=16, padding="same")
    model = EfficientNet(config, num_classes=4).to(device).eval()
    x = images(2, 3, 9, 11, device=device)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(model(x.contiguous(memory_format=torch.channels_last)), expected)
        assert torch.equal(model.to(memory_format=torch.channels_last)(x), expected)
        torch.testing.assert_close(model.forward_head(model.forward_features(x)), expected, rtol=1e-5, atol=1e-6)


def test_compare_would_notice(device):
    """The comparison of this file fails when one parameter differs by a part in a thousand."""
    modules = twins(FusedMBConv, 16, 16, 3, 1, 2, 0.25, device=device)
    with torch.no_grad():
        modules["fused"].bn2.weight.mul_(1.001)
    x = images(3, 16, 4, 4, device=device)
    with pytest.raises(AssertionError):
        compare(modules, x, random_like_output(modules["truth"], x))


# ---- what a network does for its blocks together ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_are_the_factors_they_stand_for(dtype, device, scratch):
    """Bit for bit: the kernels make 1 / keep of a draw below it, 0 of another, and leave factors as they are."""
    from effkernels import functional
    from effkernels.parameters import BatchNormParams, SqueezeExciteParams

    block = FusedMBConv(16, 16, 3, 1, 2, 0.25, drop_path=0.4).to(device, dtype)
    randomise(block)
    norm = BatchNormParams.of
    layers = (
        (block.conv_pw.weight, norm(block.bn1)),
        (block.conv_dw.weight, norm(block.bn2)),
        SqueezeExciteParams.of(block.se),
        (block.conv_pwl.weight, norm(block.bn3)),
    )
    x = images(6, 16, 4, 5, device=device).to(dtype)
    draws = torch.tensor([0.0, 0.59, 0.61, 0.2, 0.99, 0.5], device=device)
    gradient, results = torch.randn_like(x), []
    for how in ({"drop_path": 0.4, "draws": draws}, {"branch_scale": (draws < 0.6).float() / 0.6}):
        leaf = x.clone().requires_grad_()
        out = functional.mbconv(leaf, *layers, residual=True, training=True, **how)
        results.append((out, *torch.autograd.grad(out, [leaf, *block.parameters()], gradient)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(results[0][0][2], x[2]) and not torch.equal(results[0][0][1], x[1])


@pytest.mark.parametrize("memory", ["keep", "recompute"])
@pytest.mark.parametrize("padding", ["symmetric", "same"])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_stem_and_first_block_as_one(autocast, padding, memory, device, scratch):
    """Output, gradients of the images and of every parameter, running statistics, at odd sizes; a channels_last stem
    weight too.
    """
    from effkernels.modules.stem_head import stem, stem_and_block

    blocks = twins(FusedMBConv, 16, 24, 3, 2, 1, 0.5, padding=padding, memory=memory, device=device)
    torch.manual_seed(2)
    conv = nn.Conv2d(3, 16, 3, 2, 1 if padding == "symmetric" else 0, bias=False)
    if memory == "keep":
        conv.to(memory_format=torch.channels_last)
    ends = nn.Sequential(conv, nn.BatchNorm2d(16)).to(device)
    randomise(ends)
    x, results = images(4, 3, 13, 11, device=device), {}
    gradient = None
    for name, block in blocks.items():
        module = copy.deepcopy(ends).double() if name == "truth" else copy.deepcopy(ends)
        leaf = (x.double() if name == "truth" else x.clone()).requires_grad_()
        with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None and name != "truth"):
            if name == "fused":
                out = stem_and_block(leaf, *module, "silu", padding, block)
            else:
                out = block(stem(leaf, *module, "silu", padding, fused=False))
        gradient = torch.randn(out.shape, dtype=torch.float64).to(device) if gradient is None else gradient
        out.backward(gradient.to(out.dtype))
        named = [*module.named_parameters("stem"), *block.named_parameters("block")]
        results[name] = {"out": out, "x": leaf.grad} | {key: p.grad for key, p in named}
        results[name] |= {
            f"{i} {key}": b
            for i, m in enumerate((module, block))
            for key, b in m.named_buffers()
            if b.is_floating_point()
        }
    assert_close_to_truth(results["fused"], results["eager"], results["truth"])


def test_when_stem_and_first_block_are_not_one(device):
    from effkernels.modules.stem_head import stem_and_block

    conv, bn, x = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), images(2, 3, 8, 8, device=device)

    def one(block, act="silu"):
        return stem_and_block(x, conv.to(device), bn.to(device), act, "symmetric", block.to(device)) is not None

    assert one(FusedMBConv(8, 16, 3, 1, 1))
    assert not one(FusedMBConv(8, 8, 3, 1, 1)), "a residual needs the stem's output"
    assert not one(FusedMBConv(8, 16, 3, 1, 4)), "a block that expands has a first convolution of its own"
    assert not one(FusedMBConv(8, 16, 3, 1, 1), "relu") and not one(FusedMBConv(8, 16, 3, 1, 1, padding="same"))
    assert not one(FusedMBConv(16, 24, 3, 1, 1)), "the channels differ"
    block = FusedMBConv(8, 16, 3, 1, 1)
    block.register_forward_hook(lambda *args: None)
    assert not one(block), "its hook would see images"
    bn.eval()
    assert not one(FusedMBConv(8, 16, 3, 1, 1).eval()), "nothing is trained: the stem's output is one launch away"


class Wrapped(nn.Module):
    """A stage as activation checkpointing wraps it."""

    def __init__(self, stage, reentrant=None):
        super().__init__()
        self.stage, self.reentrant = stage, reentrant

    def forward(self, x):
        if self.reentrant is None:
            return self.stage(x)
        return torch.utils.checkpoint.checkpoint(self.stage, x, use_reentrant=self.reentrant)


def small_network(device, **how):
    from efficientnet import EfficientNet
    from efficientnet.model.config import EfficientNetConfig, StageConfig

    torch.manual_seed(0)
    stages = (StageConfig(3, 1, 1, 8, 1), StageConfig(3, 1, 2, 8, 2))
    config = EfficientNetConfig(stages=stages, stem_channels=8, head_channels=16)
    return EfficientNet(config, num_classes=3, drop_rate=0.0, drop_path_rate=0.6, **how).to(device)


def test_draws_of_a_network(device):
    """One draw for all its blocks, the same for plain layers; a checkpointed stage, which runs twice, draws its own
    twice alike.
    """
    x = images(6, 3, 8, 8, device=device)
    fused, plain = small_network(device), small_network(device, fused=False)

    def gradients(model):
        model.zero_grad()
        torch.manual_seed(3)
        with Operators() as operators:
            out = model(x)
        out.square().sum().backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters()])
        return operators.names.count("aten::rand"), out.detach(), grads

    results = [gradients(model) for model in (fused, plain)]
    assert [count for count, *_ in results] == [1, 1]
    torch.testing.assert_close(results[0][1:], results[1][1:], rtol=1e-3, atol=1e-3)
    stage, results = fused.blocks[1], []
    for reentrant in (None, False, True):
        fused.blocks[1] = Wrapped(stage, reentrant)
        results.append(gradients(fused))
    assert results[0][0] == 2, "each of its two blocks drops"
    for result in results[1:]:
        torch.testing.assert_close(result[1:], results[0][1:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [True, False])
def test_draws_do_not_depend_on_the_default_dtype(fused, device):
    model, x = small_network(device, fused=fused), images(6, 3, 8, 8, device=device)
    results = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(3)
        torch.set_default_dtype(dtype)
        try:
            results.append(model(x))
        finally:
            torch.set_default_dtype(torch.float32)
    assert torch.equal(*results)
