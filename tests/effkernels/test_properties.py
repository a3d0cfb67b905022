"""Whatever the shape, stride, layout, dtype, mode and wanted gradients: fused equals float64 within twice eager
PyTorch's own error.

Hypothesis draws the cases (``cases.py`` says how many); each compares the output, every gradient that is asked for and
every buffer. Not drawn: fewer than eight channels or values a channel, since what nearly cancels has no error to be
twice of.
"""

import collections
import contextlib
import copy
import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st
from hypothesis.internal.conjecture import providers

from efficientnet import MBConv
from effkernels import BatchNormParams, FusedMBConv, SqueezeExciteParams, functional, reference
from effkernels.geometry import conv_out_size
from effkernels.reference import ACTIVATIONS, GATES
from support.cases import cases, dealt, factor
from support.truth import batch_norm, nchw, nhwc, norm_of, norm_vectors, relative_error

pytestmark = pytest.mark.usefixtures("small_tiles")

HALF = (torch.bfloat16, torch.float16)
# How numbers are kept: fp32; autocast to a half type; parameters and buffers cast to it.
precisions = dealt([("fp32", torch.float32), *((how, dtype) for how in ("autocast", "cast") for dtype in HALF)])
dtypes = dealt([torch.float32, *HALF])
channels = st.integers(8, 40)
activations = dealt(sorted(ACTIVATIONS))
gates = dealt(sorted(GATES))
smooth = dealt(["gelu", "identity", "silu"])


def hidden(precision):
    """An activation of squeeze-excite: smooth in half precision, where a hidden unit near a kink is as often on its
    other side, and a few units do not average that out.
    """
    return activations if precision[0] == "fp32" else smooth


def gate(precision):
    return gates if precision[0] == "fp32" else st.just("sigmoid")


seeds = st.integers(0, 2**31 - 1)
CONV_AND_NORM = ["x", "weight", "norm.weight", "norm.bias"]
LAYOUTS = ("contiguous", "channels_last", "sliced", "strided", "expanded", "transposed", "offset")
layouts, gradient_layouts, residual_layouts = (dealt(LAYOUTS) for _ in range(3))


def laid_out(tensor, layout):
    """The values of ``tensor`` [N, C, H, W] (of its first column, where it is expanded) as a view of another layout."""
    N, C, H, W = tensor.shape
    if layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    if layout == "sliced":
        return tensor.new_full((N, C + 3, H + 2, W + 1), float("nan"))[:, 1:-2, 2:, :-1].copy_(tensor)
    if layout == "strided":
        return tensor.new_full((N, C, H, 2 * W), float("nan"))[..., ::2].copy_(tensor)
    if layout == "expanded":
        return tensor[..., :1].expand(N, C, H, W)
    if layout == "transposed":
        return tensor.transpose(2, 3).contiguous().transpose(2, 3)
    if layout == "offset":  # not even four-byte aligned in half precision
        return tensor.new_full((tensor.numel() + 1,), float("nan"))[1:].view(tensor.shape).copy_(tensor)
    return tensor.contiguous()


class Norm(NamedTuple):
    """How a BatchNorm is set: batch or running statistics, whether there are running ones, momentum, eps."""

    training: bool
    tracks: bool
    momentum: float | None
    eps: float

    def params(self, channels, generator, dtype=torch.float32):
        def vector(low, high):
            return (torch.rand(channels, generator=generator) * (high - low) + low).to(dtype)

        running = (
            (vector(-0.5, 0.5), vector(0.5, 1.5), torch.tensor(3)) if self.tracks or not self.training else (None,) * 3
        )
        return BatchNormParams(vector(0.5, 1.5), vector(-0.5, 1), *running, self.momentum, self.eps, self.training)


norms = st.builds(
    Norm,
    training=dealt([True, True, False]),
    tracks=dealt([True, True, False]),
    momentum=dealt([0.01, 0.3, None]),
    eps=dealt([1e-3, 1e-5, 0.1]),
)


class Image(NamedTuple):
    N: int
    H: int
    W: int
    layout: str
    gradient_layout: str
    mean: float
    seed: int

    def draw(self, channels, dtype=torch.float32):
        """(x, a generator for what else is random)."""
        generator = torch.Generator().manual_seed(self.seed)
        x = torch.randn(self.N, channels, self.H, self.W, generator=generator) + self.mean
        return laid_out(x.to(dtype), self.layout), generator


def different(image):
    """Not x and its gradient constant along W at once: BatchNorm's gradient would nearly cancel."""
    both = image.layout == image.gradient_layout == "expanded"
    return image._replace(gradient_layout="sliced") if both else image


images = st.builds(
    Image,
    N=st.integers(1, 4),
    H=st.integers(1, 9),
    W=st.integers(1, 9),
    layout=layouts,
    gradient_layout=gradient_layouts,
    mean=dealt([0.0, 0.5, 3.0]),
    seed=seeds,
).map(different)


def values(image, kernel_size=1, stride=1, padding="symmetric"):
    """Values a channel of the output."""
    return (
        image.N
        * conv_out_size(image.H, kernel_size, stride, padding)
        * conv_out_size(image.W, kernel_size, stride, padding)
    )


# The large ones cost seconds each: test_depthwise.py has them.
kernel_sizes = dealt([1, 3, 3, 5] + [7, 9] * (factor > 1))
strides = dealt([1, 2])
paddings = dealt(["symmetric", "same", "same_as_even"])


@st.composite
def convolutions(draw, kernel_sizes=kernel_sizes):
    """(image, kernel size, stride, padding) that leave eight values a channel."""
    k, stride, padding = draw(kernel_sizes), draw(strides), draw(paddings)
    least = 3 if stride == 2 else 2
    size = st.integers(least, 7)
    image = draw(images)._replace(H=draw(size), W=draw(size))
    return (image if values(image, k, stride, padding) >= 8 else image._replace(N=8)), k, stride, padding


everything = dealt([True, False])


def wanted(names):
    """All gradients, half of the time; else some."""
    return everything.flatmap(
        lambda all: st.just(frozenset(names)) if all else st.frozensets(st.sampled_from(names), min_size=1)
    )


TURNS = {"fused": 1, "eager": 3, "truth": 3}  # output gradients that each is asked for


def gradient_of(out, seed, turn):
    """Other numbers than those of x, which BatchNorm's backward would take out again."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed + 1 + turn)).to(out.dtype)


def of_one_tap(want, weight, k, norm):
    """Without the gradient of a 1x1 depthwise weight before batch statistics: they undo its scale, and all but eps
    cancels.
    """
    return want - {weight} if k == 1 and norm.training else want


def past_kinks(want, precision, *acts):
    """No gradients in half precision where an activation has kinks: one value of thousands that comes to lie on the
    other side is more than the bound, and who is hit is chance. fp32 has them, and test_modules.py's cases.
    """
    return frozenset() if precision[0] != "fp32" and not {"relu", "relu6", "hard_swish"}.isdisjoint(acts) else want


def copies(case, kind):
    """(tensors, norms) of a kind of their own: leaves that require the wanted gradients."""
    tensors, layers, want = case

    def own(name, tensor):
        if tensor is None:
            return None
        tensor = tensor.detach().double() if kind == "truth" and tensor.is_floating_point() else tensor.detach()
        # A leaf of the same strides, also where several elements are one.
        return tensor.requires_grad_(True) if name in want else tensor

    mine = {name: own(name, tensor) for name, tensor in tensors.items()}
    mine_layers = {}
    for name, norm in layers.items():
        fields = {f: getattr(norm, f) for f in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}
        fields = {f: None if t is None else own(f"{name}.{f}", t.clone()) for f, t in fields.items()}
        mine_layers[name] = norm._replace(**fields)
    return mine, mine_layers


def check(call, case, precision=("fp32", torch.float32), gradient_layout="contiguous", seed=0):
    """``call(module, tensors, norms)`` with the fused forms, their twins and the twins in float64."""
    how, dtype = precision
    event(f"{how} {dtype}")
    results = {}
    for kind, module in (("fused", functional), ("eager", reference), ("truth", reference)):
        tensors, layers = copies(case, kind)
        cast = torch.autocast("cpu", dtype) if how == "autocast" and kind != "truth" else contextlib.nullcontext()
        with cast:
            out = call(module, tensors, layers)
        leaves = {name: t for name, t in tensors.items() if name in case[2]}
        leaves |= {
            f"{n}.{f}": getattr(norm, f)
            for n, norm in layers.items()
            for f in ("weight", "bias")
            if f"{n}.{f}" in case[2]
        }
        found = {"out": out.detach()}
        for name, norm in layers.items():
            found |= {
                f"{name}.{f}": getattr(norm, f) for f in ("running_mean", "running_var") if getattr(norm, f) is not None
            }
            if norm.num_batches_tracked is not None:
                assert norm.num_batches_tracked == 3 + norm.training
        results[kind] = []
        for turn in range(TURNS[kind]):
            gradient = gradient_of(out, seed, turn)
            gradient = laid_out(gradient, gradient_layout) if out.dim() == 4 else gradient
            last = turn == TURNS[kind] - 1
            grads = torch.autograd.grad(out, list(leaves.values()), gradient, retain_graph=not last) if leaves else ()
            results[kind].append(found | dict(zip(leaves, grads, strict=True)))
    compare(*results.values(), dtype)


def compare(fused, eager, truth, dtype):
    """Twice eager's error, or twice what rounding one number to the compute dtype costs.

    Lists of results: eager's error is its largest of a few output gradients, as with a few numbers it is lucky with one
    now and then.
    """
    (fused,) = fused
    assert fused.keys() == eager[0].keys() == truth[0].keys()
    assert {name: t.dtype for name, t in fused.items()} == {name: t.dtype for name, t in eager[0].items()}
    for name in fused:
        error = relative_error(fused[name], truth[0][name])
        eager_error = max(relative_error(e[name], t[name]) for e, t in zip(eager, truth, strict=True))
        bound = 2 * max(eager_error, torch.finfo(dtype).eps / 2) + 1e-6
        assert error <= bound, f"{name}: relative error {error:.3g}, eager PyTorch's {eager_error:.3g}"


def precise(precision):
    """The dtype of parameters."""
    return precision[1] if precision[0] == "cast" else torch.float32


# ---- depthwise -------------------------------------------------------------------------------------------------------

before, gated = dealt([True, False]), dealt([True, False, False])
pre_activations = dealt(sorted(ACTIVATIONS))


@st.composite
def depthwise_cases(draw):
    image, k, stride, padding = draw(convolutions())
    precision, C = draw(precisions), draw(channels)
    settings = {"stride": stride, "padding": padding, "act": draw(activations)}
    pre = draw(before)
    layers = {"norm": draw(norms), **({"pre": draw(norms)} if pre else {})}
    se = (draw(st.integers(8, 12)), draw(hidden(precision)), draw(gate(precision))) if draw(gated) else None
    names = ["x", "weight", *(f"{n}.{f}" for n in layers for f in ("weight", "bias"))] + (
        ["wr", "br", "we", "be"] if se else []
    )
    pre_act = draw(pre_activations) if pre else "identity"
    want = past_kinks(of_one_tap(draw(wanted(names)), "weight", k, layers["norm"]), precision, settings["act"], pre_act)
    return image, C, k, precision, settings, layers, pre_act, se, want


@cases(12)
@given(case=depthwise_cases())
def test_depthwise(case, device, scratch):
    image, C, k, precision, settings, layers, pre_act, se, want = case
    dtype = precise(precision)
    x, g = image.draw(C, precision[1] if "pre" in layers else dtype)
    tensors = {"x": x, "weight": torch.randn(C, 1, k, k, generator=g).to(dtype)}
    if se:
        R = se[0]
        shapes = {"wr": (R, C, 1, 1), "br": (R,), "we": (C, R, 1, 1), "be": (C,)}
        tensors |= {name: (torch.randn(shape, generator=g) * 0.5).to(dtype) for name, shape in shapes.items()}
    layers = {name: norm.params(C, g, dtype) for name, norm in layers.items()}

    def call(module, t, norm):
        squeeze = SqueezeExciteParams(*(t[name] for name in ("wr", "br", "we", "be")), *se[1:]) if se else None
        return module.depthwise_conv_bn_act(
            t["x"],
            t["weight"],
            norm["norm"],
            pre_norm=norm.get("pre"),
            pre_act=pre_act,
            squeeze_excite=squeeze,
            **settings,
        )

    check(call, (tensors, layers, want), precision, image.gradient_layout, image.seed)


# ---- batchnorm -------------------------------------------------------------------------------------------------------

added, masked = dealt([True, False]), dealt([True, False])


@st.composite
def batchnorm_cases(draw):
    image = draw(images)
    image = image if values(image) >= 8 else image._replace(N=8)
    residual, names = draw(added), ["x", "norm.weight", "norm.bias"]
    return (
        image,
        draw(channels),
        draw(dtypes),
        draw(norms),
        draw(activations),
        draw(masked),
        draw(residual_layouts) if residual else None,
        draw(wanted(names + (["residual"] if residual else []))),
    )


@cases(50)
@given(case=batchnorm_cases())
def test_batchnorm(case, device, scratch):
    image, C, dtype, norm, act, masked, residual, want = case
    x, g = image.draw(C, dtype)
    tensors = {"x": x, "mask": torch.rand(image.N, generator=g) if masked else None}
    if residual:
        tensors["residual"] = laid_out(torch.randn(x.shape, generator=g).to(dtype), residual)

    def call(module, t, norm):
        return module.bn_act_add(t["x"], norm["norm"], act=act, branch_scale=t["mask"], residual=t.get("residual"))

    check(call, (tensors, {"norm": norm.params(C, g)}, want), ("fp32", dtype), image.gradient_layout, image.seed)


# ---- squeeze-excite --------------------------------------------------------------------------------------------------


@st.composite
def squeeze_cases(draw):
    image = draw(images)
    image = image if values(image) >= 8 else image._replace(N=8)
    names = ["x", "wr", "br", "we", "be"]
    precision = draw(precisions)
    functions = draw(hidden(precision)), draw(gate(precision))
    return image, draw(channels), draw(st.integers(8, 20)), precision, *functions, draw(wanted(names))


@cases(45)
@given(case=squeeze_cases())
def test_squeeze_excite(case, device, scratch):
    image, C, R, precision, act, gate, want = case
    dtype = precise(precision)
    x, g = image.draw(C, dtype)
    shapes = {"wr": (R, C, 1, 1), "br": (R,), "we": (C, R, 1, 1), "be": (C,)}
    tensors = {"x": x, **{name: (torch.randn(shape, generator=g) * 0.5).to(dtype) for name, shape in shapes.items()}}

    def call(module, t, norm):
        return module.squeeze_excite(t["x"], SqueezeExciteParams(*(t[name] for name in shapes), act, gate))

    check(call, (tensors, {}, want), precision, image.gradient_layout, image.seed)


# ---- pointwise, stem and head ----------------------------------------------------------------------------------------


FLAGS = ("prologue", "gate", "epilogue", "residual")
flags = dealt([dict(zip(FLAGS, on, strict=True)) for on in itertools.product([True, False], repeat=4)])


@st.composite
def pointwise_cases(draw):
    return (
        draw(images),
        draw(st.integers(8, 150)),
        draw(st.integers(8, 150)),
        draw(dtypes),
        draw(activations),
        draw(flags),
    )


@cases(50)
@given(case=pointwise_cases())
def test_pointwise(case, device, scratch):
    from effkernels.kernels.pointwise_forward import pointwise_forward
    from effkernels.kernels.weight_copies import weight_copies

    image, K, O, dtype, act, flags = case
    x, g = image._replace(layout="contiguous").draw(K, dtype)
    weight = torch.randn(O, K, 1, 1, generator=g) * K**-0.5
    torch.manual_seed(image.seed)
    before, after, gate = norm_vectors(K, "cpu"), norm_vectors(O, "cpu"), torch.rand(image.N, K)
    residual = torch.randn(image.N, O, image.H, image.W).to(dtype)

    def layer(x, weight, gate, residual, before, after):
        a = ACTIVATIONS[act](batch_norm(x, *before, 0.0)) if flags["prologue"] else x
        a = a * gate[:, :, None, None].to(a.dtype) if flags["gate"] else a
        y = torch.nn.functional.conv2d(a, weight.to(a.dtype))
        y = ACTIVATIONS[act](batch_norm(y, *after, 1e-3)) if flags["epilogue"] else y
        return y + residual if flags["residual"] and flags["epilogue"] else y

    tensors = (x, weight, gate, residual, before, after)
    eager = layer(*tensors)
    truth = layer(*(t.double() if torch.is_tensor(t) else [v.double() for v in t] for t in tensors))
    epilogue = {"epilogue": norm_of(after, eps=1e-3), "act2": act} if flags["epilogue"] else {}
    if flags["residual"] and flags["epilogue"]:
        epilogue["residual"] = nhwc(residual)
    prologue = {"prologue": norm_of(before, before[3].rsqrt()), "act1": act} if flags["prologue"] else {}
    if image.seed % 2 and dtype != torch.float32:
        (weight,) = weight_copies([(weight, "permuted")], dtype)
    fused, _ = pointwise_forward(nhwc(x), weight, gates=gate if flags["gate"] else None, **prologue, **epilogue)
    compare([{"out": nchw(fused)}], [{"out": eager}], [{"out": truth}], dtype)


@st.composite
def stem_cases(draw):
    image, _, stride, padding = draw(convolutions(st.just(3)))
    precision, act = draw(precisions), draw(activations)
    want = past_kinks(draw(wanted(CONV_AND_NORM)), precision, act)
    return image, draw(st.integers(1, 5)), draw(channels), precision, stride, padding, act, draw(norms), want


@cases(20)
@given(case=stem_cases())
def test_stem(case, device, scratch):
    image, I, S, precision, stride, padding, act, norm, want = case
    dtype = precise(precision)
    x, g = image.draw(I, dtype)
    tensors = {"x": x, "weight": torch.randn(S, I, 3, 3, generator=g).to(dtype)}

    def call(module, t, norm):
        return module.stem(t["x"], t["weight"], norm["norm"], stride=stride, padding=padding, act=act)

    check(call, (tensors, {"norm": norm.params(S, g, dtype)}, want), precision, image.gradient_layout, image.seed)


@st.composite
def head_cases(draw):
    image = draw(images)
    # Pooling's gradient is constant in each image.
    image = image if values(image) >= 8 and image.N > 1 else image._replace(N=8)
    precision, act = draw(precisions), draw(activations)
    want = past_kinks(draw(wanted(CONV_AND_NORM)), precision, act)
    return image, draw(channels), draw(channels), precision, act, draw(norms), want


@cases(20)
@given(case=head_cases())
def test_head(case, device, scratch):
    image, K, O, precision, act, norm, want = case
    dtype = precise(precision)
    x, g = image.draw(K, dtype)
    tensors = {"x": x, "weight": (torch.randn(O, K, 1, 1, generator=g) * K**-0.5).to(dtype)}

    def call(module, t, norm):
        return module.head(t["x"], t["weight"], norm["norm"], act=act)

    check(call, (tensors, {"norm": norm.params(O, g, dtype)}, want), precision, seed=image.seed)


# ---- the whole block -------------------------------------------------------------------------------------------------


class Block(NamedTuple):
    """Arguments of FusedMBConv, precision, mode, the settings of its BatchNorms in order, and the gradients wanted."""

    arguments: dict
    precision: tuple
    mode: str
    norms: tuple
    want: frozenset


same_channels = dealt([True, False])
se_ratios, expand_ratios = dealt([0, 0.5, 1.0]), dealt([1, 1.5, 2, 4])
drop_paths, memories = dealt([0.0, 0.4]), dealt(["keep", "recompute"])
modes = dealt(["train", "train", "train", "eval", "inference"])


@st.composite
def block_cases(draw):
    image, k, stride, padding = draw(convolutions())
    I = draw(st.integers(8, 20))
    O = I if draw(same_channels) else draw(st.integers(8, 24))
    precision, se_ratio = draw(precisions), draw(se_ratios)
    arguments = {
        "in_channels": I,
        "out_channels": O,
        "kernel_size": k,
        "stride": stride,
        "padding": padding,
        "act": draw(hidden(precision) if se_ratio else activations),
        "se_ratio": se_ratio,
        "expand_ratio": draw(expand_ratios),
        "drop_path": draw(drop_paths),
        "memory": draw(memories),
    }
    names = [name for name, _ in FusedMBConv(**arguments).named_parameters()]
    mode, norms_drawn = draw(modes), tuple(draw(norms) for _ in range(3))
    second = norms_drawn[1 if arguments["expand_ratio"] != 1 else 0]
    want = past_kinks(of_one_tap(draw(wanted(["x", *names])), "conv_dw.weight", k, second), precision, arguments["act"])
    return image, Block(arguments, precision, mode, norms_drawn, want)


def run_block(module, x, case, image, dtype, turn):
    """{name: tensor}: the output, gradients that are wanted, buffers."""
    x = x.detach().requires_grad_("x" in case.want and case.mode != "inference")
    for name, p in module.named_parameters():
        p.requires_grad_(name in case.want)
    autocast = (
        torch.autocast("cpu", dtype)
        if case.precision[0] == "autocast" and x.dtype != torch.float64
        else contextlib.nullcontext()
    )
    torch.manual_seed(image.seed)  # for drop-path
    with autocast, torch.set_grad_enabled(case.mode != "inference"):
        out = module(x)
    found = {"out": out.detach()}
    if case.mode != "inference" and case.want:
        gradient = gradient_of(out, image.seed, turn)
        out.backward(laid_out(gradient, image.gradient_layout))
        leaves = {"x": x, **dict(module.named_parameters())}
        assert {name for name, leaf in leaves.items() if leaf.grad is not None} == case.want
        found |= {name: leaf.grad for name, leaf in leaves.items() if name in case.want}
    return found | {name: b for name, b in module.named_buffers() if not name.endswith("num_batches_tracked")}


@cases(20)
@given(case=block_cases())
def test_block(case, device, scratch):
    image, case = case
    how, dtype = case.precision
    event(f"{case.mode}, {how}, {dtype}")
    torch.manual_seed(image.seed)
    modules = {"fused": FusedMBConv(**case.arguments), "eager": MBConv(**case.arguments)}
    x, generator = image.draw(case.arguments["in_channels"], precise(case.precision))
    layers = [name for name in ("bn1", "bn2", "bn3") if hasattr(modules["fused"], name)]
    for name, norm in zip(layers, case.norms, strict=False):
        for module in modules.values():
            old = getattr(module, name)
            new = torch.nn.BatchNorm2d(old.num_features, norm.eps, norm.momentum, track_running_stats=norm.tracks)
            setattr(module, name, new)
        values = norm.params(old.num_features, generator)
        fields = ("weight", "bias", "running_mean", "running_var")
        new.load_state_dict({f: getattr(values, f) for f in fields if getattr(new, f) is not None}, strict=False)
    modules["fused"].load_state_dict(modules["eager"].state_dict())
    for module in modules.values():
        module.to(precise(case.precision)).train(case.mode == "train")
        for name, norm in zip(layers, case.norms, strict=False):
            getattr(module, name).train(case.mode == "train" and norm.training)
    modules["truth"] = copy.deepcopy(modules["eager"]).double()
    results = {}
    for name, module in modules.items():
        start = [copy.deepcopy(module) for _ in range(TURNS[name] - 1)] + [module]
        inputs = x.double() if name == "truth" else x
        results[name] = [run_block(m, inputs, case, image, dtype, turn) for turn, m in enumerate(start)]
    for name, buffer in modules["fused"].named_buffers():
        if name.endswith("num_batches_tracked"):
            assert buffer == modules["eager"].get_buffer(name)
    compare(*results.values(), dtype)


# ---- what is drawn ---------------------------------------------------------------------------------------------------


def dimensions(value, name=""):
    """(dimension, value) of all that a case is made of; strings tell by themselves what they are."""
    if isinstance(value, (Image, Norm, Block)):
        value = value._asdict()
    if isinstance(value, dict):
        for key, part in value.items():
            yield from dimensions(part, key)
    elif isinstance(value, frozenset):
        yield "gradients", value
    elif isinstance(value, tuple) and isinstance(value[-1], torch.dtype):
        yield "precision", value
    elif isinstance(value, tuple):
        for part in value:
            yield from dimensions(part, name)
    elif value in ACTIVATIONS:
        yield "activation", value
    elif value in GATES:
        yield "gate", value
    elif value in ("symmetric", "same", "same_as_even"):
        yield "padding", value
    else:
        yield name, value


def test_cases_do_not_depend_on_what_is_loaded():
    """Hypothesis would draw numbers that stand in the sources of the modules loaded so far (tests/support/cases.py)."""
    assert len(test_stem.drawn()) >= 5 and len(providers._get_local_constants()) == 0


@pytest.mark.skipif(factor != 1, reason="of the cases that each run draws")
def test_every_value_of_every_dimension_is_drawn():
    """By the cases that each run draws: nearly all for each operator, all of them for all operators."""
    met = {}
    for test in (test_depthwise, test_batchnorm, test_squeeze_excite, test_stem, test_head, test_block):
        found = met[test.__name__] = collections.defaultdict(set)
        for name, value in (pair for case in test.drawn() for pair in dimensions(case)):
            found[name].add(value)
    together = collections.defaultdict(set)
    for found in met.values():
        for name, values in found.items():
            together[name] |= values
    five = {("fp32", torch.float32), *((how, dtype) for how in ("autocast", "cast") for dtype in HALF)}
    wanted = {
        "layout": set(LAYOUTS),
        "gradient_layout": set(LAYOUTS),
        "precision": five,
        "activation": set(ACTIVATIONS),
        "gate": set(GATES),
        "kernel_size": {1, 3, 5},
        "stride": {1, 2},
        "padding": {"symmetric", "same", "same_as_even"},
        "se_ratio": {0, 0.5, 1.0},
        "expand_ratio": {1, 1.5, 2, 4},
        "drop_path": {0.0, 0.4},
        "memory": {"keep", "recompute"},
        "mode": {"train", "eval", "inference"},
        "training": {True, False},
        "tracks": {True, False},
        "momentum": {0.01, 0.3, None},
        "eps": {1e-3, 1e-5, 0.1},
    }
    assert {name: values - together[name] for name, values in wanted.items() if not values <= together[name]} == {}
    for name, found in met.items():
        assert len(found["layout"]) >= 6 and len(found["gradient_layout"]) >= 6 and len(found["activation"]) >= 4, (
            name,
            found,
        )
        assert name == "test_batchnorm" or found["precision"] == five, name
    assert len(together["gradients"]) >= 25
