"""The custom operators: torch.library.opcheck on each, and torch.compile of the modules, with kernels and without."""

import copy

import pytest
import torch

from effkernels import BatchNormParams, FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, SqueezeExciteParams
from effkernels.ops.autograd import OPERATORS
from effkernels.ops.head import HeadSettings
from effkernels.ops.mbconv import BlockSettings
from effkernels.ops.single_layers import ActivationSettings, DepthwiseSettings
from effkernels.ops.stem import StemSettings
from support.truth import norm_vectors

pytestmark = pytest.mark.usefixtures("small_tiles")
N, H, W, C, R = 2, 3, 2, 4, 3


def norm(device, requires_grad=True, training=True, momentum=0.1, channels=C, counter=True):
    """A BatchNorm whose weight and bias may want gradients."""
    weight, bias, mean, var = norm_vectors(channels, device)
    batches = torch.tensor(3, device=device) if counter else None
    weight, bias = weight.requires_grad_(requires_grad), bias.requires_grad_(requires_grad)
    return BatchNormParams(weight, bias, mean, var, batches, momentum, 1e-3, training)


def squeeze(device, requires_grad=True, act="silu"):
    shapes = ((R, C, 1, 1), (R,), (C, R, 1, 1), (C,))
    return SqueezeExciteParams(*(torch.randn(s).to(device).requires_grad_(requires_grad) for s in shapes), act=act)


def nhwc(device, *shape, requires_grad=True, dtype=torch.float32):
    return torch.randn(shape or (N, H, W, C)).to(device, dtype).requires_grad_(requires_grad)


def arguments_of(name, device, dtype=torch.float32):
    """Small arguments by name of every operator with a forward, with and without what is optional; activations of
    single layers in ``dtype``. Half of an inference operator's are those of training: it takes no gradient.
    """
    x = nhwc(device, dtype=dtype)
    frozen = {"requires_grad": False, "training": False}
    weight = torch.randn(C, 1, 3, 3).to(device).requires_grad_()
    settings = DepthwiseSettings(2, "same", act1="silu", act2="relu6")
    if name == "depthwise_block":
        full = {"norm1": norm(device), "norm2": norm(device, momentum=None), "se": squeeze(device)}
        bare = {"norm1": None, "norm2": norm(device, training=False), "se": None}
        yield from ({"x": x, "weight": weight, "settings": settings} | parts for parts in (full, bare))
    elif name == "depthwise_block_inference":
        full = {"norm1": norm(device, **frozen), "norm2": norm(device, **frozen), "se": squeeze(device, False)}
        bare = {"norm1": None, "norm2": norm(device, **frozen), "se": None}
        yield from (
            {"x": x.detach(), "weight": weight.detach(), "settings": settings} | parts for parts in (full, bare)
        )
    elif name == "bn_act_add":
        scale, residual = torch.rand(N, device=device), nhwc(device, dtype=dtype)
        yield {
            "x": x,
            "norm": norm(device),
            "branch_scale": scale,
            "residual": residual,
            "settings": ActivationSettings("silu"),
        }
        yield {
            "x": x,
            "norm": norm(device, training=False, momentum=None),
            "branch_scale": None,
            "residual": None,
            "settings": ActivationSettings("identity"),
        }
    elif name == "bn_act_add_inference":
        given, residual = (
            {"x": x.detach(), "norm": norm(device, **frozen)},
            nhwc(device, requires_grad=False, dtype=dtype),
        )
        yield given | {"residual": residual, "settings": ActivationSettings("relu")}
        yield given | {"residual": None, "settings": ActivationSettings("identity")}
    elif name == "squeeze_excite":
        yield {"x": x, "se": squeeze(device)}
    elif name in ("stem", "stem_inference"):
        images, weight = torch.randn(N, 3, 5, 4).to(device), torch.randn(C, 3, 3, 3).to(device)
        same = StemSettings(torch.float32, 2, "same", "silu")
        if name == "stem_inference":
            yield {"x": images, "weight": weight, "norm": norm(device, **frozen), "settings": same}
            return
        weight.requires_grad_()
        yield {
            "x": images.clone().requires_grad_(),
            "weight": weight,
            "norm": norm(device, momentum=None),
            "settings": same,
        }
        yield {
            "x": images.to(memory_format=torch.channels_last),
            "weight": weight.detach().to(memory_format=torch.channels_last).requires_grad_(),
            "norm": norm(device, training=False),
            "settings": StemSettings(torch.bfloat16, 2, "symmetric", "relu"),
        }
    elif name in ("head", "head_inference"):
        inference = name == "head_inference"
        conv = torch.randn(R, C, 1, 1).to(device).requires_grad_(not inference)
        x = x.detach() if inference else x
        for dtype, act, training, momentum in (
            (torch.float32, "silu", True, None),
            (torch.bfloat16, "relu", False, 0.1),
        ):
            of = norm(device, not inference, training and not inference, momentum, channels=R)
            yield {"x": x, "conv_weight": conv, "norm": of, "settings": HeadSettings(dtype, act)}
    elif name in ("mbconv", "mbconv_inference"):
        yield from block_arguments(name == "mbconv_inference", device)


def block_arguments(inference, device):
    """A block of all parts (expand, squeeze-excite, residual, drop-path), one of none of them, each partly frozen, and
    one of a stem.
    """
    grad = not inference

    def n(training=True, momentum=0.1):
        return norm(device, grad, training and grad, momentum)

    def weight(*shape):
        return torch.randn(shape).to(device).requires_grad_(grad)

    full = BlockSettings(torch.float32, 1, "symmetric", "silu", residual=True)
    bare = BlockSettings(torch.bfloat16, 2, "same", "relu6", residual=False)
    draws = {} if inference else {"branch_draws": None}
    fixed = {
        "x": nhwc(device, N, H, W, C, requires_grad=grad),
        "depthwise_weight": weight(C, 1, 3, 3),
        "project_weight": weight(C, C, 1, 1),
    }
    everything = fixed | draws | {"expand_weight": weight(C, C, 1, 1), "se": squeeze(device, grad)}
    nothing = fixed | draws | {"expand_weight": None, "norm1": None, "se": None}
    if inference:
        yield everything | {"norm1": n(), "norm2": n(), "norm3": n(), "settings": full}
        yield nothing | {"norm2": n(), "norm3": n(), "settings": bare}
        return
    yield everything | {
        "norm1": n(),
        "norm2": n(momentum=None),
        "norm3": n(),
        "branch_draws": torch.rand(N, device=device),
        "settings": full._replace(keep=0.5),
    }
    yield everything | {"norm1": n(False), "norm2": n(False), "norm3": n(), "settings": full._replace(recompute=True)}
    yield nothing | {"norm2": n(), "norm3": n(False), "settings": bare}
    stem = {"x": torch.randn(N, 3, 5, 4).to(device), "expand_weight": weight(C, 3, 3, 3)}
    yield everything | stem | {"norm1": n(), "norm2": n(), "norm3": n(), "settings": bare._replace(stem_stride=2)}


def backward_arguments(operator, device, dtype=torch.float32):
    """Of an operator's backward: after each of its forward's arguments, for all gradients and for a third of them."""
    for given in arguments_of(operator.name, device, dtype):
        with torch.no_grad():
            results = operator.forward(**given)
        flat = operator.flatten(**given)
        kept = [
            value.detach() if isinstance(value, torch.Tensor) else value
            for leaf, value in zip(operator.leaves, flat, strict=True)
            if leaf.reaches_backward
        ]
        out, *saved = results
        saved = [torch.empty(0, device=device) if t is None else t for t in saved]
        present = {leaf.name for leaf, value in zip(operator.leaves, flat, strict=True) if value is not None}
        wanted = [name for name in operator.inputs if name in present]
        for needs in (wanted, wanted[::3]):
            yield (torch.randn_like(out), *kept, *saved, needs)


def operator_arguments(name, device, dtype=torch.float32):
    """What the dispatcher takes, of every operator of the package."""
    operator = OPERATORS[name.removesuffix("_backward")]
    if name.endswith("_backward"):
        return backward_arguments(operator, device, dtype)
    return (operator.flatten(**given) for given in arguments_of(name, device, dtype))


REGISTERED = sorted(
    name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("effkernels::")
)


@pytest.mark.parametrize("name", REGISTERED)
def test_opcheck(name, device):
    """Schema (what is mutated, what is aliased), autograd registration, fake tensors, and AOT dispatch with dynamic
    shapes.
    """
    torch.manual_seed(0)
    cases = list(operator_arguments(name, device))
    assert cases, f"no arguments for {name} in this test"
    # The others are told the compute dtype, and have both above.
    if name.startswith(("depthwise", "bn_act_add", "squeeze_excite")):
        cases.append(next(operator_arguments(name, device, torch.bfloat16)))
    for args in cases:
        torch.library.opcheck(getattr(torch.ops.effkernels, name), args)


# ---- torch.compile ---------------------------------------------------------------------------------------------------


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
    """Training (at all ``shapes``), frozen statistics and inference, each without a graph break; buffers change exactly
    as eager's.
    """
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


# test_compiled_cumulative_momentum has it.
@pytest.mark.parametrize("name", [name for name in MODULES if name != "depthwise"])
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
    """The default backend once: it reorders and fuses what is around the operators. Its own random numbers would differ
    from eager's.
    """
    torch.manual_seed(0)
    with torch._inductor.config.patch(fallback_random=True):
        assert_compiled_is_eager(MODULES["mbconv"]().to(device), SHAPES[:1], backend="inductor", modes=["train"])
