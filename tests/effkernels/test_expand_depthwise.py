"""The depthwise kernel that expands on the fly, against float64, and where the cost model uses it."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from effkernels.configs.rules import EXPAND_DEPTHWISE_INSTRUCTIONS, expand_inside
from effkernels.geometry import pad_amounts
from effkernels.reference import ACTIVATIONS, depthwise_conv
from support.truth import assert_close_to_truth, batch_norm, guarded, nchw, nhwc, norm_of, norm_vectors, on_gpu

EPS = 1e-3
ACTS = [act for act in ACTIVATIONS if act not in ("relu", "identity")]  # relu6 is both of them, and more
# Every k x stride x padding; dtypes, channels (multiples of 8, not, below and above one block of E), sizes from 1 to
# several row chunks, and batch are spread over them.
SHAPES = [
    # k s  padding     N  H  W   I   E   dtype
    (3, 2, "symmetric", 2, 9, 13, 16, 40, torch.bfloat16),
    (3, 2, "same", 1, 8, 7, 3, 7, torch.float32),
    (3, 1, "symmetric", 2, 5, 6, 24, 33, torch.float16),
    (3, 1, "same", 1, 1, 9, 8, 16, torch.float32),
    (5, 2, "same", 2, 7, 6, 40, 72, torch.bfloat16),
    (5, 2, "symmetric", 1, 4, 3, 20, 12, torch.float32),
    (5, 1, "symmetric", 1, 3, 5, 64, 8, torch.float16),
    (5, 1, "same", 2, 4, 2, 5, 6, torch.float32),
]
REAL_SHAPES = [
    (3, 2, "symmetric", 8, 112, 112, 16, 96, torch.bfloat16),
    (5, 2, "same", 8, 56, 56, 24, 144, torch.float16),
    (3, 1, "symmetric", 4, 57, 55, 24, 144, torch.float32),
]
ARGUMENTS = "i, k, stride, padding, N, H, W, I, E, dtype"


def numbered(shapes):
    return [pytest.param(i, *s, id="-".join(map(str, s)).replace("torch.", "")) for i, s in enumerate(shapes)]


def check(i, k, stride, padding, N, H, W, I, E, dtype, device, precision="ieee"):
    from effkernels.kernels.expand_depthwise import expand_depthwise

    torch.manual_seed(0)
    act, pool = ACTS[i % len(ACTS)], i % 3 != 2
    x = torch.randn(N, I, H, W).to(device, dtype)
    w1, weight = (
        guarded((torch.randn(E, I, 1, 1) / I**0.5).to(device)),
        guarded((torch.randn(E, 1, k, k) / k).to(device)),
    )
    bn1, bn2 = norm_vectors(E, device), norm_vectors(E, device)

    def network(x, w1, weight):
        a = ACTIVATIONS[act](batch_norm(F.conv2d(x, w1), *bn1, EPS))
        y = ACTIVATIONS[act](batch_norm(depthwise_conv(a, weight, stride, padding), *bn2, EPS))
        return {"y": y, "pool": y.sum((2, 3), dtype=torch.float64) if pool else None}

    pads = *pad_amounts(H, k, stride, padding), *pad_amounts(W, k, stride, padding)
    norm1, norm2 = norm_of(bn1, eps=EPS), norm_of(bn2, eps=EPS)
    y, sums = expand_depthwise(nhwc(x), w1, norm1, weight, norm2, stride, pads, act=act, pool=pool, precision=precision)
    assert y.dtype == dtype and (sums is None) == (not pool)
    fused = {"y": nchw(y), "pool": sums.double().sum(1) if pool else None}
    assert_close_to_truth(
        fused, network(x, w1.to(dtype), weight.to(dtype)), network(x.double(), w1.double(), weight.double())
    )


@pytest.mark.parametrize(ARGUMENTS, numbered(SHAPES))
def test_expand_depthwise(i, k, stride, padding, N, H, W, I, E, dtype, device, scratch):
    check(i, k, stride, padding, N, H, W, I, E, dtype, device)


@on_gpu
@pytest.mark.parametrize(ARGUMENTS, numbered(REAL_SHAPES))
def test_expand_depthwise_real_shapes(i, k, stride, padding, N, H, W, I, E, dtype, device, scratch):
    check(i, k, stride, padding, N, H, W, I, E, dtype, device)


@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 2)])
def test_strips_that_end_inside_the_image(rows, columns, device, scratch, monkeypatch):
    """Many strips: several groups of 16 in an image, one program after the other, the last group partly empty."""
    from effkernels.kernels import expand_depthwise as module

    config = module.expand_depthwise_config
    monkeypatch.setattr(
        module, "expand_depthwise_config", lambda **problem: replace(config(**problem), TH=rows, TW=columns)
    )
    check(0, 3, 2, "same", 2, 11, 13, 6, 20, torch.float32, device)
    check(0, 3, 1, "symmetric", 1, 7, 6, 6, 5, torch.float32, device)


def test_same_as_the_launches_it_replaces(device):
    """Bit for bit in fp32: the expanded values are the same products, rounded where the stored tensor would be."""
    from effkernels.kernels.depthwise_forward import depthwise_forward
    from effkernels.kernels.expand_depthwise import expand_depthwise
    from effkernels.kernels.pointwise_forward import pointwise_forward

    torch.manual_seed(0)
    for dtype in (torch.bfloat16, torch.float32):
        x = torch.randn(1, 6, 5, 16, device=device).to(dtype)
        w1, weight = torch.randn(24, 16, 1, 1, device=device), torch.randn(24, 1, 3, 3, device=device)
        norm1, norm2 = (norm_of(norm_vectors(24, device), eps=EPS) for _ in range(2))
        a, _ = pointwise_forward(x, w1, epilogue=norm1, act2="silu")
        expected, _, pool = depthwise_forward(a, weight, 2, (1, 1, 1, 1), epilogue=norm2, act2="silu", pool=True)
        y, sums = expand_depthwise(x, w1, norm1, weight, norm2, 2, (1, 1, 1, 1), act="silu", pool=True)
        # One product summed in another order may round one expanded value to its neighbour.
        assert (y != expected).float().mean() < (0.01 if dtype is torch.bfloat16 else 1)
        torch.testing.assert_close(
            y.float(), expected.float(), rtol=2**-7 if dtype is torch.bfloat16 else 1e-5, atol=1e-3
        )
        torch.testing.assert_close(sums.sum(1), pool.sum(1), rtol=1e-2, atol=1e-2)


def test_few_images_are_cut_into_more_programs():
    """One image of B0's second stage fills an H200 only with fewer rows a program; a large batch takes the longest."""
    from effkernels.configs.rules import expand_depthwise_config

    shape = (16, 96, 56, 56, torch.bfloat16, torch.device("meta"))
    assert expand_depthwise_config(3, 2, 64, *shape).TH == 14
    assert expand_depthwise_config(3, 2, 1, *shape).TH <= 4


def test_cost_model():
    """Used where its instructions take less than the bytes they save: 3x3 stride 2, few inputs, bf16 (tanh in one
    operation)."""
    where = {
        (k, s, I, dtype)
        for k in (3, 5, 7)
        for s in (1, 2)
        for I in (16, 24, 32, 40, 64)
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        if expand_inside(k, s, I, 6 * I, dtype)
    }
    assert where == {(3, 2, 16, torch.bfloat16)}
    assert not expand_inside(3, 2, 16, 96, torch.bfloat16, "gelu")


COMPILE = """
import json, sys, torch
from effkernels.tools.launches import record_launches
from effkernels.tools.machine_code import cost_of
from effkernels.kernels.expand_depthwise import expand_depthwise
from effkernels.kernels.norm import BatchNorm

def meta(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

rows = []
for name, k, s, I in json.loads(sys.argv[1]):
    x, pads = meta(8, 112, 112, I, dtype=getattr(torch, name)), (k // 2,) * 4
    norm = BatchNorm(meta(96), meta(96), meta(96), var=meta(96), eps=1e-3)
    with record_launches() as launches:
        expand_depthwise(x, meta(96, I, 1, 1), norm, meta(96, 1, k, k), norm, s, pads, act="silu", pool=True)
    cost, c = cost_of(launches[0]), launches[0].constants
    elements = c["S"] * c["BLOCK_E"] * c["TW"] * s * s / (32 * launches[0].options["num_warps"])
    loads = sorted(cost.loop_widths("LDG"))
    rows.append((cost.spill_bytes, cost.loop_instructions / elements, sorted(cost.opcodes), loads))
print(json.dumps(rows))
"""


@pytest.mark.slow  # the static table has these configurations too
def test_compiles_for_sm90_without_spills():
    """What the cost model picks, and the configurations nearest to 255 registers; the instructions the cost model
    counts with."""
    pytest.importorskip("triton")
    cases = [
        ("bfloat16", 3, 2, 16),
        ("bfloat16", 3, 2, 24),
        ("bfloat16", 3, 1, 24),
        ("bfloat16", 5, 2, 64),
        ("float16", 3, 2, 24),
        ("float32", 3, 2, 16),
        ("float32", 5, 2, 16),
        ("float32", 5, 1, 24),
    ]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", COMPILE, json.dumps(cases)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads(done.stdout)
    assert [(case, spill) for case, (spill, *_) in zip(cases, rows, strict=True) if spill] == []
    for (name, k, s, I), (_, instructions, opcodes, _) in zip(cases, rows, strict=True):
        assert name == "float32" or any("MMA" in code for code in opcodes), f"{name}: no tensor cores"
        expected = EXPAND_DEPTHWISE_INSTRUCTIONS.get((getattr(torch, name), k, s))
        if expected and I <= 32:
            assert 0.9 * expected < instructions < 1.1 * expected, (name, k, s, I, instructions)
    assert max(rows[1][3]) == 16, "x is not loaded 16 bytes a thread"
