"""The stem against float64: kernels, functional form, operators; and the machine code of what ships."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from effkernels import BatchNormParams, functional, reference
from effkernels.geometry import pad_amounts
from effkernels.reference import ACTIVATIONS
from support.truth import (
    assert_close_to_truth,
    batch_norm,
    batch_terms,
    guarded,
    nchw,
    nhwc,
    norm_of,
    norm_vectors,
    on_gpu,
)

EPS = 1e-3
ACTS = list(ACTIVATIONS)


def channels_last(x):
    return x.to(memory_format=torch.channels_last)


def sliced(x):
    """The same values at strides of no memory format, between NaNs."""
    n, c, h, w = x.shape
    larger = torch.full((n, c + 1, h + 3, 2 * w + 1), float("nan"), dtype=x.dtype, device=x.device)
    view = larger[:, 1:, 1:-2, : 2 * w : 2]
    view.copy_(x)
    return view


# Both strides and paddings, every channel count from one to more than one block of taps, output channels below and
# above one block, not multiples of 8; each memory layout of the image and both of the weight; image dtype and compute
# dtype the same or not.
CASES = [
    # stride padding   N  H  W   I   S   layout         image           compute
    (2, "symmetric", 2, 9, 13, 3, 32, guarded, torch.float32, torch.bfloat16),
    (2, "same", 1, 8, 7, 3, 40, channels_last, torch.bfloat16, torch.bfloat16),
    (2, "same", 2, 6, 11, 1, 7, sliced, torch.float32, torch.float16),
    (1, "symmetric", 1, 5, 6, 4, 72, sliced, torch.float16, torch.float16),
    (2, "symmetric", 1, 10, 4, 16, 8, guarded, torch.float32, torch.float32),
    (1, "same", 2, 1, 9, 2, 16, channels_last, torch.float32, torch.float32),
    (2, "symmetric", 3, 1, 1, 9, 20, sliced, torch.float32, torch.float32),
]
REAL_CASES = [
    (2, "symmetric", 8, 224, 224, 3, 32, guarded, torch.float32, torch.bfloat16),
    (2, "same", 4, 301, 299, 3, 40, channels_last, torch.float16, torch.float16),
    (2, "symmetric", 2, 127, 129, 4, 64, sliced, torch.float32, torch.float32),
]
ARGUMENTS = "i, stride, padding, N, H, W, I, S, layout, image, compute"


def numbered(cases):
    names = ["-".join(getattr(v, "__name__", str(v)).replace("torch.", "") for v in case) for case in cases]
    return [pytest.param(i, *case, id=name) for i, (case, name) in enumerate(zip(cases, names, strict=True))]


def data(i, N, H, W, I, S, layout, image, device):
    torch.manual_seed(0)
    weight = guarded((torch.randn(S, I, 3, 3) / (3 * I**0.5)).to(device))
    return layout(torch.randn(N, I, H, W).to(device, image)), channels_last(weight) if i % 2 else weight


def pads(x, stride, padding):
    return *pad_amounts(x.shape[2], 3, stride, padding), *pad_amounts(x.shape[3], 3, stride, padding)


def convolve(x, weight, stride, padding):
    top, bottom, left, right = pads(x, stride, padding)
    return F.conv2d(F.pad(x, (left, right, top, bottom)), weight, None, stride)


def check_forward(i, stride, padding, N, H, W, I, S, layout, image, compute, device):
    from effkernels.kernels.norm import BatchStatistics
    from effkernels.kernels.stem import stem_forward

    x, weight = data(i, N, H, W, I, S, layout, image, device)
    act, bn = ACTS[i % len(ACTS)], norm_vectors(S, device)

    def network(x, weight):
        y = convolve(x, weight, stride, padding)
        wide = y if y.dtype == torch.float64 else y.float()
        mean, var = wide.mean((0, 2, 3)), wide.var((0, 2, 3), unbiased=False)
        return {"y": y, "mean": mean, "var": var, "out": ACTIVATIONS[act](batch_norm(y, *bn, EPS))}

    counters, momenta = (
        torch.zeros(8, dtype=torch.int32, device=device),
        (torch.zeros(S, device=device), torch.ones(S, device=device)),
    )
    statistics = BatchStatistics(EPS, *momenta, momentum=1.0)  # which leaves the running variance at the unbiased one
    where = pads(x, stride, padding)
    y, (mean, rstd) = stem_forward(x, weight, stride, where, dtype=compute, statistics=statistics, counters=counters)
    out, _ = stem_forward(x, weight, stride, where, dtype=compute, epilogue=norm_of(bn, eps=EPS), act=act)
    assert y.dtype == out.dtype == compute and not counters.any() and torch.equal(mean, momenta[0])
    count = y.numel() // S
    assert torch.allclose(momenta[1] * (count - 1) / count, rstd**-2 - EPS, rtol=1e-4, atol=1e-6)
    fused = {"y": nchw(y), "mean": mean, "var": rstd.double() ** -2 - EPS, "out": nchw(out)}
    assert_close_to_truth(fused, network(x.to(compute), weight.to(compute)), network(x.double(), weight.double()))


def check_backward(i, stride, padding, N, H, W, I, S, layout, image, compute, device):
    """With batch terms and without, by turns."""
    from effkernels.kernels.stem import stem_backward
    from effkernels.kernels.weight_gradients import LayerPartials, reduce_weight_gradients

    x, weight = data(i, N, H, W, I, S, layout, image, device)
    act = ACTS[i % len(ACTS)]
    gamma, beta, mean, var = norm_vectors(S, device)
    bn = (gamma, beta, mean, (var + EPS).rsqrt())
    y = convolve(x.to(compute), weight.to(compute), stride, padding)
    dout = torch.randn_like(y)
    vectors = [v.double()[:, None, None] for v in bn]

    def gradient(dtype, terms=None):
        """In dtype, with BatchNorm's batch terms worked out in float64; and those terms."""
        g, b, m, r = (v.to(torch.float64 if dtype == torch.float64 else torch.float32) for v in vectors)
        z = ((y.to(g.dtype) - m) * r * g + b).requires_grad_()
        (dz,) = torch.autograd.grad(ACTIVATIONS[act](z), z, dout.to(g.dtype))
        if i % 2 == 0 and terms is None:
            terms = batch_terms(dz, y.double(), *(v.double() for v in (gamma, mean, bn[3])))[2:]
        dy = g * r * dz
        if terms:
            k0, k1 = (v.to(g.dtype)[:, None, None] for v in terms)
            dy = dy + k0 + k1 * y.to(g.dtype)
        w = weight.to(dtype).requires_grad_()
        (dw,) = torch.autograd.grad(convolve(x.to(dtype), w, stride, padding), w, dy.to(dtype))
        return dw, terms

    truth, terms = gradient(torch.float64)
    terms = [guarded(v.float()) for v in terms] if terms else None
    norm = norm_of((gamma, beta, mean, var), bn[3])
    partials = stem_backward(
        nhwc(dout), nhwc(y), x, weight, stride, pads(x, stride, padding), norm, terms=terms, act=act
    )
    dw = reduce_weight_gradients(stem=LayerPartials(partials, weight))[2]
    assert dw.dtype == weight.dtype and dw.stride() == weight.stride()
    assert_close_to_truth(dw, gradient(compute, terms)[0], truth)


@pytest.mark.parametrize(ARGUMENTS, numbered(CASES))
def test_forward(i, stride, padding, N, H, W, I, S, layout, image, compute, device, scratch):
    check_forward(i, stride, padding, N, H, W, I, S, layout, image, compute, device)


@pytest.mark.parametrize(ARGUMENTS, numbered(CASES))
def test_backward(i, stride, padding, N, H, W, I, S, layout, image, compute, device, scratch):
    check_backward(i, stride, padding, N, H, W, I, S, layout, image, compute, device)


@on_gpu
@pytest.mark.parametrize(ARGUMENTS, numbered(REAL_CASES))
def test_real_shapes(i, stride, padding, N, H, W, I, S, layout, image, compute, device, scratch):
    check_forward(i, stride, padding, N, H, W, I, S, layout, image, compute, device)
    check_backward(i, stride, padding, N, H, W, I, S, layout, image, compute, device)


def test_several_tiles_and_programs(device, scratch, monkeypatch):
    """Tiles that end inside an image, several tiles a program, several programs, the last with fewer."""
    from effkernels.kernels import stem

    for name in ("stem_forward_config", "stem_backward_config"):
        config = getattr(stem, name)
        monkeypatch.setattr(
            stem,
            name,
            lambda *args, config=config: replace(config(*args), BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, programs_per_sm=9),
        )
    case = (2, "symmetric", 2, 13, 15, 3, 20, guarded, torch.float32, torch.float32)
    check_forward(0, *case, device)
    check_backward(0, *case, device)


# ---- the functional form and its operators
# ---------------------------------------------------------------------------------------


def run(implementation, x, params, weight, norm, dtype, need_x, **settings):
    """Output, gradients and buffers after one step."""
    x = x.detach().requires_grad_(need_x)
    weight, gamma, beta = (t.detach().to(dtype).requires_grad_() for t in (weight, *norm[:2]))
    buffers = [t.detach().clone().to(dtype) if t.is_floating_point() else t.clone() for t in norm[2:5]]
    out = implementation(x, weight, BatchNormParams(gamma, beta, *buffers, *params), **settings)
    torch.manual_seed(1)
    dout = torch.randn(out.shape, dtype=torch.float64).to(out.device, out.dtype)
    inputs = {"weight": weight, "gamma": gamma, "beta": beta} | ({"x": x} if need_x else {})
    grads = dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), dout), strict=True))
    return {"out": out} | grads | {"mean": buffers[0], "var": buffers[1]}, buffers[2]


@pytest.mark.parametrize("need_x", [False, True])
@pytest.mark.parametrize("momentum, training", [(0.1, True), (None, True), (0.1, False)])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
def test_functional(autocast, momentum, training, need_x, device, scratch):
    """Batch and running statistics; gradients of everything, under autocast, both paddings."""
    torch.manual_seed(0)
    padding = "same" if need_x else "symmetric"
    x = torch.randn(2, 3, 8, 7, device=device)
    weight = torch.randn(12, 3, 3, 3, device=device) / 5
    norm = (*norm_vectors(12, device), torch.tensor(3, device=device))
    args = (x, (momentum, EPS, training), weight, norm)
    with torch.autocast(device, autocast or torch.bfloat16, enabled=autocast is not None):
        fused, counter = run(functional.stem, *args, torch.float32, need_x, padding=padding)
        eager, expected = run(reference.stem, *args, torch.float32, need_x, padding=padding)
    truth, _ = run(reference.stem, x.double(), *args[1:], torch.float64, need_x, padding=padding)
    assert counter == expected == 3 + training
    assert fused["out"].dtype == (autocast or torch.float32) and fused["out"].is_contiguous(
        memory_format=torch.channels_last
    )
    assert_close_to_truth(fused, eager, truth)


def test_inference_is_one_launch_and_equals_frozen(device, monkeypatch):
    from effkernels.kernels import batchnorm

    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 9, 8, device=device), torch.randn(8, 3, 3, 3, device=device, requires_grad=True)
    norm = BatchNormParams(*norm_vectors(8, device), None, 0.1, EPS, False)
    frozen = functional.stem(x, weight, norm)
    assert frozen.requires_grad
    monkeypatch.setattr(batchnorm, "apply", None)
    with torch.no_grad():
        out = functional.stem(x, weight, norm)
    torch.testing.assert_close(out, frozen)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x": (2, 4, 8, 8)}, "3 channels"),
        ({"weight": (8, 3, 5, 5)}, r"\[S, I, 3, 3\]"),
        ({"stride": 3}, "stride"),
        ({"padding": "valid"}, "padding"),
        ({"act": "tanh"}, "act"),
        ({"x": (1, 3, 2, 2)}, "more than 1 value"),
    ],
)
def test_bad_arguments(change, message, device):
    x, weight = (
        torch.randn(change.pop("x", (2, 3, 8, 8)), device=device),
        torch.randn(change.pop("weight", (8, 3, 3, 3)), device=device),
    )
    with pytest.raises(ValueError, match=message):
        functional.stem(x, weight, BatchNormParams(*norm_vectors(8, device)), **change)


def test_compiled(device):
    """One graph, training twice at two sizes and inference; buffers as eager's."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    weight = torch.randn(8, 3, 3, 3, device=device, requires_grad=True)
    tensors = norm_vectors(8, device)
    results = []
    for implementation in (functional.stem, torch.compile(functional.stem, fullgraph=True, backend="aot_eager")):
        norm = BatchNormParams(*(t.clone() for t in tensors), torch.tensor(0, device=device))
        values = []
        for size in (6, 9):
            x = channels_last(
                torch.randn(2, 3, size, 7, generator=torch.Generator().manual_seed(size)).to(device)
            ).requires_grad_()
            out = implementation(x, weight, norm, padding="same")
            values += [out, *torch.autograd.grad(out.square().sum(), [x, weight])]
        with torch.no_grad():
            values.append(implementation(x, weight, norm._replace(training=False)))
        results.append([*values, *norm[2:5]])
    torch._dynamo.reset()
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


# ---- machine code
# ----------------------------------------------------------------------------------------------------------------

COMPILE = """
import json, torch
from effkernels import BatchNormParams, ops
from effkernels.ops.stem import StemSettings
from effkernels.tools.launches import record_launches
from effkernels.tools.machine_code import cost_of

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

rows = []
for dtype, S, I in ((torch.bfloat16, 32, 3), (torch.float16, 40, 3), (torch.float32, 64, 3), (torch.bfloat16, 64, 16)):
    x, weight = meta(8, I, 224, 224), meta(S, I, 3, 3)
    norm = BatchNormParams(*(meta(S) for _ in range(4)), momentum=0.1)
    settings = StemSettings(dtype, 2, "same", "silu")
    with record_launches() as launches:
        ops.stem_inference(x, weight, norm, settings._replace(padding="symmetric"))
        given = {"x": x, "weight": weight, "norm": norm, "settings": settings}
        saved = ops.stem.forward(**given)
        ops.stem.backward(saved.out, **given, saved=saved, needs={"weight", "norm_weight", "norm_bias"})
    for launch in launches:
        if launch.name.startswith("stem"):
            cost = cost_of(launch)
            pixels = launch.constants["BLOCK_M"] / (32 * launch.options["num_warps"])
            name_and_shape = f"{launch.name} {dtype} {S} {I}"
            rows.append((name_and_shape, cost.spill_bytes, cost.loop_instructions / pixels, sorted(cost.opcodes)))
print(json.dumps(rows))
"""


@pytest.mark.slow  # the static table has these configurations too
def test_compiles_for_sm90_without_spills():
    pytest.importorskip("triton")
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert len(rows) == 12
    assert [(name, spill) for name, spill, _, _ in rows if spill] == []
    for name, _, _, opcodes in rows:
        if "float32" not in name:
            assert any("MMA" in code for code in opcodes), f"{name}: no tensor cores"
    # At copy speed an H200 has about 600 instructions for a pixel of 32 bf16 channels (88 bytes).
    assert rows[0][2] < 800, rows[0]
