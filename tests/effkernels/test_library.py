"""The custom operators: torch.library.opcheck on each, and torch.compile of the modules, with kernels and without."""

import copy

import pytest
import torch

from effkernels import FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, ops
from support.truth import norm_vectors

pytestmark = pytest.mark.usefixtures("small_tiles")
N, H, W, C, R = 2, 3, 2, 4, 3


def norm(device, counter=False, requires_grad=True):
    """weight, bias, running_mean, running_var and maybe num_batches."""
    weight, bias, mean, var = norm_vectors(C, device)
    counters = [torch.tensor(3, device=device)] if counter else []
    return [weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad), mean, var, *counters]


def squeeze(device, requires_grad=True):
    shapes = ((R, C, 1, 1), (R,), (C, R, 1, 1), (C,))
    return [torch.randn(s).to(device).requires_grad_(requires_grad) for s in shapes]


def nhwc(device, *shape, requires_grad=True, dtype=torch.float32):
    return torch.randn(shape or (N, H, W, C)).to(device, dtype).requires_grad_(requires_grad)


def operator_arguments(name, device, dtype=torch.float32):
    """Small arguments of every operator of the package, with and without what is optional; activations of single layers in ``dtype``."""
    x, dout = nhwc(device, dtype=dtype), nhwc(device, N, 2, 1, C, requires_grad=False, dtype=dtype)
    weight = torch.randn(C, 1, 3, 3).to(device).requires_grad_()
    settings = (2, "same", "silu", "relu6", "silu", "sigmoid")
    if name == "depthwise_block":
        yield (x, weight, *norm(device, True), *norm(device, True), *squeeze(device), *settings, True, 0.1, 1e-3, True, None, 1e-3)
        yield (x, weight, *[None] * 5, *norm(device, True), *[None] * 4, *settings, False, 0.1, 1e-3, False, 0.1, 1e-3)
    elif name == "depthwise_block_backward":
        vectors = [v for v in (*norm(device)[:2], *norm(device)[:2])]
        with torch.no_grad():
            args = (x, weight, *norm(device, True), *norm(device, True), *squeeze(device), *settings, True, 0.1, 1e-3, True, None, 1e-3)
            aux = ops.depthwise_block(*args)[1:]
            fixed = [t.detach() for t in (x, weight, *vectors, *squeeze(device))]
        yield (dout, *fixed, *aux, *settings, True, True, [True] * 10)
        none = torch.empty(0, device=device)
        yield (
            dout, *fixed[:2], None, None, *fixed[4:6], *[None] * 4, aux[0], none, none, *aux[3:5], *[none] * 3,
            *settings, False, False, [False, True, *[False] * 2, *[True] * 2, *[False] * 4],
        )  # fmt: skip
    elif name == "depthwise_block_inference":
        frozen = {"requires_grad": False}
        x, weight = x.detach(), weight.detach()
        yield (x, weight, *norm(device, **frozen), *norm(device, **frozen), *squeeze(device, False), *settings, 1e-3, 1e-3)
        yield (x, weight, *[None] * 4, *norm(device, **frozen), *[None] * 4, *settings, 1e-3, 1e-3)
    elif name == "bn_act_add":
        yield (x, *norm(device, True), torch.rand(N, device=device), nhwc(device, dtype=dtype), "silu", True, 0.1, 1e-3)
        yield (x, *norm(device, True), None, None, "identity", False, None, 1e-3)
    elif name == "bn_act_add_backward":
        vectors = norm(device, requires_grad=False)
        yield (dout, dout + 1, *vectors, torch.rand(N, device=device), "silu", True, True)
        yield (dout, dout + 1, *vectors, None, "identity", False, False)
    elif name == "bn_act_add_inference":
        residual = nhwc(device, requires_grad=False, dtype=dtype)
        yield (x.detach(), *norm(device, requires_grad=False), residual, "relu", 1e-3)
        yield (x.detach(), *norm(device, requires_grad=False), None, "identity", 1e-3)
    elif name == "squeeze_excite":
        yield (x, *squeeze(device), "silu", "sigmoid")
    elif name == "squeeze_excite_backward":
        weights = squeeze(device, False)
        x = x.detach()
        yield (dout.new_ones(N, H, W, C), x, *weights, *ops.squeeze_excite(x, *weights, "silu", "sigmoid")[1:], "silu",
               "sigmoid", [True] * 5)  # fmt: skip
    elif name.startswith("stem"):
        x, weight = torch.randn(N, 3, 5, 4).to(device), torch.randn(C, 3, 3, 3).to(device)
        vectors, settings = norm(device, True, requires_grad=False), ("fp32", 2, "same", "silu")
        if name == "stem":
            yield (x.requires_grad_(), weight.requires_grad_(), *norm(device, True), *settings, True, None, 1e-3, "")
            yield (
                x.to(memory_format=torch.channels_last),
                weight,
                *norm(device, True),
                "bf16",
                2,
                "symmetric",
                "relu",
                False,
                0.1,
                1e-3,
                "",
            )
        elif name == "stem_backward":
            out, *aux = ops.stem(x, weight, *vectors, *settings, True, 0.1, 1e-3, "")
            yield (out, x, weight, *vectors[:2], *aux, *settings[1:], True, "", [True] * 4)
            yield (
                out,
                x,
                weight.to(memory_format=torch.channels_last),
                *vectors[:2],
                *aux,
                *settings[1:],
                False,
                "",
                [False, True, True, True],
            )
        else:
            yield (x, weight, *vectors[:4], *settings, 1e-3)

    elif name.startswith("mbconv"):
        yield from block_arguments(name, device)
    elif name in ("head", "head_backward"):
        conv, trained = torch.randn(R, C, 1, 1).to(device), [*norm_vectors(R, device), torch.tensor(3, device=device)]
        if name == "head":
            yield (x, conv.requires_grad_(), *trained, "fp32", "silu", True, None, 1e-3, "")
            yield (x, conv, *trained, "bf16", "relu", False, 0.1, 1e-3, "")
            return
        x = x.detach()
        for dtype, batch, needs in (("fp32", True, [True] * 4), ("bf16", False, [True, False, False, True])):
            out, *aux = ops.head(x, conv, *trained, dtype, "silu", batch, 0.1, 1e-3, "")
            yield (out, x, conv, *trained[:2], *aux, "silu", batch, "", needs)
    elif name == "head_inference":
        yield (x.detach(), torch.randn(R, C, 1, 1).to(device), *norm_vectors(R, device), "fp32", "silu", 1e-3)
        yield (x.detach(), torch.randn(R, C, 1, 1).to(device), *norm_vectors(R, device), "bf16", "relu", 1e-3)


def block_arguments(name, device):
    """A block of all parts (expand, squeeze-excite, residual, drop-path), and one of none of them that is partly frozen."""
    inference = name == "mbconv_inference"
    grad = {"requires_grad": not inference}

    def n():
        return norm(device, counter=not inference, **grad)

    def weight(*shape):
        return torch.randn(shape).to(device).requires_grad_(not inference)

    x, mask = nhwc(device, N, H, W, C, **grad), torch.rand(N, device=device)
    full = ("fp32", 1, "symmetric", "silu", "silu", "sigmoid", True)
    bare = ("bf16", 2, "same", "relu6", "identity", "sigmoid", False)
    expand, depthwise, project = (weight(C, C, 1, 1), *n()), (weight(C, 1, 3, 3), *n()), (weight(C, C, 1, 1), *n())
    no_expand, se, no_se = (None,) * (5 if inference else 6), squeeze(device, not inference), (None,) * 4
    if inference:
        yield (x, *expand, *depthwise, *se, *project, *full, 1e-3, 1e-3, 1e-3)
        yield (x, *no_expand, *depthwise, *no_se, *project, *bare, 1e-3, 1e-3, 1e-3)
        return
    batch, frozen = (True, 0.1, 1e-3), (False, 0.1, 1e-3)
    alone = [""] * 3
    images, stem = torch.randn(N, 3, 5, 4).to(device), (weight(C, 3, 3, 3), *n())
    forward = [
        (x, *expand, *depthwise, *se, *project, mask, *full, 0.5, 0, *batch, True, None, 1e-3, *batch, False, alone),
        (x, *expand, *depthwise, *se, *project, None, *full, -1.0, 0, *frozen, *frozen, *batch, True, alone),
        (x, *no_expand, *depthwise, *no_se, *project, None, *bare, -1.0, 0, *frozen, *batch, *frozen, False, alone),
        (images, *stem, *depthwise, *se, *project, None, *bare, -1.0, 2, *batch, *batch, *batch, False, alone),
    ]
    if name == "mbconv":
        yield from forward
        return
    for args, needs in zip(forward, ([True] * 14, [False] * 5 + [True] * 9, [True] + [False] * 3 + [True] * 10, [True] * 14), strict=True):
        with torch.no_grad():
            out, *aux = ops.mbconv(*args)
        tensors = [args[i] if args[i] is None else args[i].detach() for i in (0, 1, 2, 3, 7, 8, 9, *range(13, 20), 23)]
        needs = [need and t is not None for need, t in zip(needs, tensors, strict=False)]
        yield (torch.randn_like(out), *tensors, *aux, *args[24:33], args[33], args[36], args[39], alone, needs)


OPERATORS = sorted(name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("effkernels::"))


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name, device):
    """Schema (what is mutated, what is aliased), autograd registration, fake tensors, and AOT dispatch with dynamic shapes."""
    torch.manual_seed(0)
    cases = list(operator_arguments(name, device))
    assert cases, f"no arguments for {name} in this test"
    if name.startswith(("depthwise", "bn_act_add", "squeeze_excite")):  # the others are told the compute dtype, and have both above
        cases.append(next(operator_arguments(name, device, torch.bfloat16)))
    for args in cases:
        torch.library.opcheck(getattr(torch.ops.effkernels, name), args)


# ---- torch.compile ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def step(module, x, seed=1):
    """out, gradients of x and of the parameters, buffers after it."""
    x = x.detach().requires_grad_()
    torch.manual_seed(seed)  # for drop-path
    out = module(x)
    gradient = torch.linspace(-1, 1, out.numel(), device=out.device).view(out.shape)
    grads = torch.autograd.grad(out, [x, *module.parameters()], gradient)
    return [out, *grads, *(b.clone() for b in module.buffers())]


def assert_compiled_is_eager(module, shapes, backend="aot_eager", modes=("train", "eval", "inference")):
    """Training (at all ``shapes``), frozen statistics and inference, each without a graph break; buffers change exactly as eager's."""
    module.train()
    reference = copy.deepcopy(module)
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for mode in modes:
        for m in (module, reference):
            m.train(mode == "train")
        for shape in shapes if mode == "train" else shapes[:1]:
            x = torch.randn(shape, device=next(module.parameters()).device)
            if mode == "inference":
                with torch.no_grad():
                    found, expected = [compiled(x)], [reference(x)]
            else:
                found, expected = step(compiled, x), step(reference, x)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for m in module.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            assert m.num_batches_tracked == len(shapes)  # one for each training step


MODULES = {
    "mbconv": lambda: FusedMBConv(4, 4, 3, 1, 2, 0.5, drop_path=0.4),
    "mbconv without expand": lambda: FusedMBConv(4, 6, 3, 2, 1, 0, padding="same", act="relu"),
    "depthwise": lambda: FusedDepthwiseConvBNAct(4),
    "squeeze-excite": lambda: FusedSqueezeExcite(4, 2),
}
SHAPES = [(3, 4, 3, 2), (2, 4, 3, 2)]


@pytest.mark.parametrize("name", [name for name in MODULES if name != "depthwise"])  # test_compiled_cumulative_momentum has it
def test_compiled_kernels(name, device, fresh_compiler):
    torch.manual_seed(0)
    assert_compiled_is_eager(MODULES[name]().to(device), SHAPES)


@pytest.mark.parametrize("name", MODULES)
def test_compiled_plain_path(name, fresh_compiler, monkeypatch):
    monkeypatch.setenv("EFFKERNELS_BACKEND", "reference")
    torch.manual_seed(0)
    assert_compiled_is_eager(MODULES[name](), SHAPES)


class Autocast(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.module(x)


def test_compiled_under_autocast(device, fresh_compiler):
    torch.manual_seed(0)
    assert_compiled_is_eager(Autocast(MODULES["mbconv"]()).to(device), SHAPES[:1], modes=["train", "inference"])


def test_compiled_cumulative_momentum(device, fresh_compiler):
    """Kernels read the counter on the device; nn.BatchNorm2d reads it on the host, which no full graph can."""
    torch.manual_seed(0)
    module = FusedDepthwiseConvBNAct(4, bn_momentum=None).to(device)
    assert_compiled_is_eager(module, SHAPES, modes=["train"])


def test_inductor(device, fresh_compiler):
    """The default backend once: it reorders and fuses what is around the operators. Its own random numbers would differ from eager's."""
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiled_is_eager(MODULES["mbconv"]().to(device), SHAPES[:1], backend="inductor", modes=["train"])
