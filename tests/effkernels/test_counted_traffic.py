"""The interpreter's byte counter against bytes known by hand; each launch against what its formula must read and
write."""

import numpy as np
import pytest
import torch

from support.interpreter import HAS_TRITON, INTERPRET
from support.truth import norm_of, norm_vectors

if not HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if not INTERPRET:
    pytest.skip("the interpreter is off (TRITON_INTERPRET)", allow_module_level=True)

import triton
import triton.language as tl

from effkernels.tools import traffic
from effkernels.tools.cost_table import DEPTHWISE_FORWARD
from effkernels.tools.traffic import LaunchTraffic, count_steps, count_traffic, passes, summary

N, H, W, C = 2, 7, 6, 40
VECTOR = 4 * C  # bytes of an fp32 vector over channels


def toy_kernel(x, y, z, counter, count, BLOCK: tl.constexpr, AHEAD: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i + AHEAD, mask=i < count, other=0.0).to(tl.float32)
    v += tl.load(x + i - 2, mask=(i >= 2) & (i < count), other=0.0).to(tl.float32)
    tl.store(y + i, v, mask=i < count)
    tl.store(z + 2 * i, v, mask=i < count)
    tl.atomic_add(counter, 1)
    tl.store(counter + 1, tl.load(x).to(tl.int32))


@pytest.fixture
def toy(device):
    kernel = triton.jit(toy_kernel)

    def run(x, y, z, counter, count, ahead=0):
        kernel[(triton.cdiv(count, 16),)](x, y, z, counter, count, BLOCK=16, AHEAD=ahead)

    return run


def tensor(*shape, dtype=torch.bfloat16):
    return torch.randn(shape).to(dtype)


# ---- the counter itself
# ----------------------------------------------------------------------------------------------------------


def test_each_byte_once_and_active_lanes_only(toy):
    x, y, z, counter = tensor(100), torch.zeros(100), torch.zeros(100), torch.zeros(3, dtype=torch.int32)
    with count_traffic() as launches:
        toy(x, y, z, counter, 37)
    (launch,) = launches
    assert (launch.name, launch.grid) == ("toy_kernel", (3,))
    # x is read twice by lanes 2..36; z at every other element; the counter's first word in and out, its second out.
    assert launch.arguments == {"x": (74, 0), "y": (0, 148), "z": (0, 148), "counter": (4, 8)}
    assert launch.sizes == {"x": 200, "y": 400, "z": 400, "counter": 12}
    assert (launch.read, launch.written, launch.total) == (78, 304, 382)
    assert counter[0] == 3 and "toy_kernel" in summary(launches) and "x 74+0" in summary(launches)


def test_results_are_the_same_and_nothing_stays_patched(toy):
    from triton.runtime import interpreter

    before = interpreter.GridExecutor.__call__, interpreter._implicit_cvt, dict(vars(interpreter.InterpreterBuilder))
    x, counters = tensor(64), [torch.zeros(2, dtype=torch.int32) for _ in range(2)]
    outs = [torch.zeros(2, 128) for _ in range(2)]
    toy(x, *outs[0], counters[0], 50)
    with count_traffic():
        toy(x, *outs[1], counters[1], 50)
    assert torch.equal(*outs) and torch.equal(*counters) and outs[0].any()
    with pytest.raises(KeyError), count_traffic():
        raise KeyError
    assert before == (
        interpreter.GridExecutor.__call__,
        interpreter._implicit_cvt,
        dict(vars(interpreter.InterpreterBuilder)),
    )


def test_shared_memory_is_told_apart_by_argument_and_counted_once_in_all(toy):
    storage = torch.zeros(200)
    with count_traffic() as launches:
        toy(storage[:100], storage[100:], storage[100:], torch.zeros(2, dtype=torch.int32), 32)
    arguments = launches[-1].arguments
    assert arguments["x"] == (128, 0) and arguments["y"] == (0, 128) and arguments["z"] == (0, 128)
    # y holds words 100..131 of the storage, z every other one from 100 to 162: 16 in both.
    assert (launches[-1].read, launches[-1].written) == (128 + 4, 4 * (32 + 16) + 8)


@pytest.mark.parametrize("ahead, count", [(60, 6), (-1, 6), (64, 1)])
def test_an_access_outside_of_the_tensor_raises(toy, ahead, count):
    x, counter = torch.zeros(64), torch.zeros(2, dtype=torch.int32)
    with (
        count_traffic(),
        pytest.raises(triton.runtime.errors.InterpreterError, match="toy_kernel: 'x' is read outside of its storage"),
    ):
        toy(x, torch.zeros(64), torch.zeros(128), counter, count, ahead)


def test_a_mask_that_is_not_boolean_inside():
    """As ``mask & (step == last)`` becomes where step is a Python integer."""
    recorder = traffic._Recorder()
    x = torch.zeros(8)
    with recorder.launch("kernel", (1,), ["x"]):
        lanes = np.uint64(recorder.pointer("x", x)) + 4 * np.arange(8, dtype=np.uint64)
        real = recorder.real(lanes, np.array([0, 0, 0, 1, 0, 1, 0, 0]), 4, ("read",))
    assert real[3] == x.data_ptr() + 12 and real[5] == x.data_ptr() + 20
    assert recorder.records[0].arguments == {"x": (8, 0)}


def test_the_last_element_is_inside(toy):
    with count_traffic() as launches:
        toy(torch.zeros(64), torch.zeros(64), torch.zeros(128), torch.zeros(2, dtype=torch.int32), 4, 60)
    assert launches[-1].arguments["x"] == (4 * (4 + 2), 0)


def test_operators_of_pytorch_are_launches_too():
    x = torch.ones(8, 4)
    with count_traffic() as launches:
        torch.empty(9), x.view(-1), x.permute(1, 0), x.t().contiguous().sum()
        x.add_(1)
        torch.zeros(0)
        x.new_empty(3).fill_(2.0)
    names = [launch.name for launch in launches]
    assert names == ["aten::clone", "aten::sum", "aten::add_", "aten::fill_"]
    assert [(launch.read, launch.written) for launch in launches[:3]] == [(128, 128), (128, 4), (128, 128)]


def test_needs_the_interpreter(monkeypatch):
    from effkernels.kernels import common

    monkeypatch.setattr(common, "INTERPRET", False)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"), count_traffic():
        pass


def test_passes():
    launches = [
        LaunchTraffic("a", arguments={"x": (5, 0), "y": (0, 100)}, sizes={"x": 5, "y": 100}),
        LaunchTraffic("b", arguments={"y": (100, 0), "z": (25, 25)}, sizes={"y": 100, "z": 25}),
        LaunchTraffic("aten::add", read=100, written=100),
    ]
    assert passes(launches, 100, 25) == (2.0, 2.0)
    assert passes(launches, 100, 100) == (2.0, 0.0)
    assert passes([], 100, 25) == (0.0, 0.0)


# ---- the kernels
# -----------------------------------------------------------------------------------------------------------------


def test_apply(device):
    from effkernels.kernels import batchnorm

    y = tensor(N, H, W, C)
    vectors = norm_vectors(C, "cpu")
    norm = norm_of(vectors, vectors[3])
    size = y.numel() * 2
    read = {f"norm.{name}": (VECTOR, 0) for name in ("weight", "bias", "mean", "rstd")}
    with count_traffic() as launches:
        batchnorm.apply(y, norm, act="silu")
        batchnorm.apply(y, norm, act="silu", gates=torch.rand(N, C), branch_draws=torch.rand(N), residual=y.clone())
        batchnorm.apply(y, norm, residual=y)
    plain, whole, doubled = (launch for launch in launches if launch.name == "apply_kernel")
    assert plain.arguments == {"y": (size, 0), "out": (0, size)} | read
    more = {"gates": (N * VECTOR, 0), "branch_draws": (4 * N, 0), "residual": (size, 0)}
    assert whole.arguments == {"y": (size, 0), "out": (0, size)} | read | more
    assert doubled.read == size + 4 * VECTOR, "one tensor given twice"


def test_pool(device):
    from effkernels.kernels import squeeze_excite

    y = tensor(N, H, W, C)
    with count_traffic() as launches:
        sums = squeeze_excite.pool(y, norm_of(norm_vectors(C, "cpu"), torch.rand(C)), act="silu")
    vectors = {f"norm.{name}": (VECTOR, 0) for name in ("weight", "bias", "mean", "rstd")}
    assert launches[-1].arguments == {"y": (y.numel() * 2, 0), "sums": (0, sums.numel() * 4)} | vectors


def others(launch, *names):
    return sum(sum(counts) for name, counts in launch.arguments.items() if name not in names)


@pytest.mark.parametrize("k, stride", [(3, 1), (3, 2), (5, 2)])
def test_depthwise(k, stride, device, small_tiles):
    """One pass over each activation in both directions, whatever the overlap of tiles; the rest are vectors and
    partials."""
    from effkernels.kernels.depthwise_backward import depthwise_backward
    from effkernels.kernels.depthwise_forward import depthwise_forward

    x, weight = tensor(N, H, W, C), torch.randn(C, 1, k, k)
    norm1, norm2 = (norm_of(norm_vectors(C, "cpu"), torch.rand(C)) for _ in range(2))
    pads = (k // 2,) * 4
    with count_traffic() as launches:
        y, *_ = depthwise_forward(x, weight, stride, pads, prologue=norm1, act1="silu", partial_statistics=True)
    forward = next(launch for launch in launches if launch.name in DEPTHWISE_FORWARD)
    e1, e2 = x.numel() * 2, y.numel() * 2
    expected = {"x": (e1, 0), "y": (0, e2), "w": (C * k * k * 4, 0)}
    expected |= {name: (VECTOR, 0) for name in ("norm1.weight", "norm1.bias", "norm1.mean", "norm1.rstd")}
    assert expected.items() <= forward.arguments.items()
    programs = forward.arguments["tile_count"][1] // 4
    assert others(forward, *expected) == programs * (4 + 2 * VECTOR)
    assert passes(launches, e1, e2) == ((1, 1) if stride == 2 else (2, 0))

    dq, gate, dpool = tensor(*y.shape), torch.rand(N, C), torch.randn(N, C)
    with count_traffic() as launches:
        _, partials, *_ = depthwise_backward(
            dq,
            x,
            weight,
            stride,
            pads,
            norm2=norm2,
            y2=y,
            terms2=(torch.randn(C), torch.randn(C)),
            act2="silu",
            gates=gate,
            dpool=dpool,
            norm1=norm1,
            act1="silu",
        )
    backward = next(launch for launch in launches if launch.name == "depthwise_backward_kernel")
    expected = {"dq": (e2, 0), "y": (e2, 0), "x": (e1, 0), "dx": (0, e1), "w": (C * k * k * 4, 0)}
    expected |= {"gates": (N * VECTOR, 0), "dpool": (N * VECTOR, 0), "partials": (0, partials.numel() * 4)}
    assert expected.items() <= backward.arguments.items()
    assert others(backward, *expected) == 10 * VECTOR
    assert passes(launches, e1, e2) == ((2, 2) if stride == 2 else (4, 0))


def on_a_gpu(launches):
    """Without what only a CPU does: PyTorch has no product there with wider results, so operands are widened first."""
    return [found for found in launches if found.name != "aten::_to_copy" or found.written < found.read]


# ---- a whole block
# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, stride, outputs, backward", [(3, 2, 24, (3, 4, 10)), (3, 1, 16, (3, 4, 10)), (3, 2, 40, (3, 5, 13))]
)
def test_a_block_keeps_to_its_budget(k, stride, outputs, backward, device, small_tiles):
    """Passes over e1 and e2, the expanded tensors before and after the depthwise convolution, and launches, PyTorch's
    included.

    Training forward 2 e1 + 3 e2 in 7 and the draw of drop-path, inference 2 e1 + 2 e2 in 5; backward 3 e1 + 4 e2 in 10,
    or 5 e2 in 13 where PyTorch makes two products of the project convolution, with more than 24 outputs: they write and
    read e2 once more, which is not counted here. Each byte counts once a launch, so overlapping tiles are no excuse:
    one pass too many over the smaller tensor is 6 % or more.
    """
    from effkernels import FusedMBConv

    block = FusedMBConv(16, outputs, k, stride, 6, drop_path=0.2)
    x = torch.randn(2, 16, 12, 12).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    e1 = 2 * 12 * 12 * 96 * 2
    e2 = e1 // stride**2
    budgets = {"forward": (2, 3, 8), "backward": backward, "inference": (2, 2, 5)}
    for name, launches in count_steps(block, x).items():
        most_e1, most_e2, most_launches = budgets[name]
        launches = on_a_gpu(launches)
        over_e1, over_e2 = passes(launches, e1, e2)
        moved, budget = over_e1 * e1 + over_e2 * e2, most_e1 * e1 + most_e2 * e2
        # Which may expand inside the depthwise kernel, and store no e1.
        least = 0 if name == "inference" else 0.9 * budget
        assert least <= moved <= 1.02 * budget, f"{name}: {over_e1:.2f} e1 + {over_e2:.2f} e2\n{summary(launches)}"
        assert len(launches) <= most_launches, f"{name}\n{summary(launches)}"


# expand_ratio, se_ratio, k, stride; passes over e1 and e2 and launches of forward, backward, inference. Without
# squeeze-excite no pass pools y2. Without expand e1 is the block's input: read forward; read, and its gradient written,
# backward.
KINDS = [
    pytest.param(6, 0.25, 5, 2, {"forward": (2, 3, 7), "backward": (3, 4, 10), "inference": (2, 2, 5)}, id="5x5"),
    pytest.param(
        6, 0.0, 5, 1, {"forward": (2, 2, 4), "backward": (3, 4, 10), "inference": (2, 2, 3)}, id="5x5, stride 1, no SE"
    ),
    pytest.param(1, 0.25, 3, 2, {"forward": (1, 3, 6), "backward": (2, 4, 8), "inference": (1, 2, 4)}, id="no expand"),
]


@pytest.mark.parametrize("expand, se, k, stride, budgets", KINDS)
def test_blocks_of_other_kinds_keep_to_their_budget(expand, se, k, stride, budgets, device, small_tiles):
    from effkernels import FusedMBConv

    N, I, size = 3, 16 if expand > 1 else 48, 8  # so that no weight has the size of an activation
    block = FusedMBConv(I, 20, k, stride, expand, se)
    x = torch.randn(N, I, size, size).bfloat16().contiguous(memory_format=torch.channels_last).requires_grad_()
    e1 = N * size**2 * I * expand * 2
    e2 = e1 // stride**2
    for name, launches in count_steps(block, x).items():
        most_e1, most_e2, most_launches = budgets[name]
        launches = on_a_gpu(launches)
        over_e1, over_e2 = passes(launches, e1, e2)
        moved, budget = over_e1 * e1 + over_e2 * e2, most_e1 * e1 + most_e2 * e2
        least = 0 if name == "inference" else 0.9 * budget
        assert least <= moved <= 1.02 * budget, f"{name}: {over_e1:.2f} e1 + {over_e2:.2f} e2\n{summary(launches)}"
        assert len(launches) <= most_launches, f"{name}\n{summary(launches)}"
