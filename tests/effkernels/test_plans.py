"""Plans: what an operator recorded gives, bit for bit, what it gives as it is written."""

import ctypes
import json

import pytest
import torch

from effkernels import FusedMBConv
from effkernels.ops import plans
from support.python import run_python


class Recorded:
    """A kernel of the interpreter, as ``plans`` sees a compiled one."""

    def __init__(self, function, run, args, kwargs):
        self.function, self.run_it, self.arg_names = function, run, function.arg_names
        self.given = dict(zip(function.arg_names, args, strict=False)) | kwargs

    @property
    def params(self):
        return [type("Parameter", (), {"name": name}) for name in self.arg_names]

    def starter(self, compiled, grid):
        def merged(given, pointers):
            if isinstance(given, tuple):
                members = [merged(*pair) for pair in zip(given, pointers, strict=True)]
                return type(given)(*members) if hasattr(given, "_fields") else tuple(members)
            if isinstance(given, torch.Tensor) and isinstance(pointers, int):
                elements = 1 + sum((n - 1) * s for n, s in zip(given.shape, given.stride(), strict=True))
                memory = (ctypes.c_char * (elements * given.element_size())).from_address(pointers)
                memory = torch.frombuffer(memory, dtype=given.dtype)
                addresses.append(given.numel())
                return memory.as_strided(given.shape, given.stride())
            # Only the address of a tensor reaches a kernel, so any tensor that begins there does.
            return given if pointers is None else pointers

        def start(*pointers):
            starts.append(self.function.fn.__name__)
            arguments = dict(zip(self.arg_names, pointers, strict=True))
            self.run_it(
                self.function,
                grid=grid,
                warmup=False,
                **{n: merged(v, arguments.get(n)) for n, v in self.given.items()},
            )

        start.starts_kernel = self.function.fn.__name__
        return start


starts: list[str] = []
addresses: list[int] = []  # sizes of what shares an allocation


@pytest.fixture
def replayed(device, monkeypatch):
    """Plans of the interpreter's kernels; the names of those that plans start."""
    from triton.runtime.interpreter import InterpretedFunction

    from effkernels.kernels.common import Kernel

    if device != "cpu":
        pytest.skip("the interpreter's kernels")
    original = InterpretedFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        started, Kernel.recorder.started = Kernel.recorder.started, None
        with torch.utils._python_dispatch._disable_current_modes():
            original(self, *args, grid=grid, warmup=warmup, **kwargs)
        Kernel.recorder.started = started
        if started is not None:
            started(Recorded(self, original, args, kwargs), self, grid, args, kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", run)
    monkeypatch.setattr(plans, "possible", lambda: True)
    plans._plans.clear()
    starts.clear()
    addresses.clear()
    yield starts
    plans._plans.clear()


def steps(block, dtype, size, planned, monkeypatch):
    """Four steps of SGD on inputs that differ: all outputs, gradients and statistics."""
    monkeypatch.setattr(plans, "possible", lambda: planned)
    found = []
    for i in range(4):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(4, block.in_channels, size, size, generator=generator).to(memory_format=torch.channels_last)
        x = x.to(dtype)[i % 3 : i % 3 + 2].detach().requires_grad_()  # begins elsewhere in its storage each time
        draws = torch.rand(2, generator=generator)
        out = block(x, draws) if block.drops else block(x)
        if block.training:
            out.backward(torch.randn(out.shape, generator=generator).to(out.dtype))
            found += [x.grad.clone()] + [p.grad.clone() for p in block.parameters()]
            with torch.no_grad():
                for p in block.parameters():
                    p -= 0.1 * p.grad
                    p.grad = None
        found += [out.detach().clone()] + [b.clone() for b in block.buffers()]
    return found


@pytest.mark.parametrize(
    ("arguments", "training", "dtype"),
    [
        ((8, 8, 3, 1, 4), True, torch.float32),
        ((8, 16, 3, 2, 1), True, torch.bfloat16),
        ((8, 8, 3, 1, 4), False, torch.bfloat16),
    ],
)
def test_replayed_steps_are_the_steps_themselves(replayed, monkeypatch, arguments, training, dtype):
    """Weights that change in between are read where they lie."""
    torch.manual_seed(0)
    block = FusedMBConv(*arguments, drop_path=0.3).train(training)
    state = {name: value.clone() for name, value in block.state_dict().items()}
    with torch.set_grad_enabled(training):
        wanted = steps(block, dtype, 6, False, monkeypatch)
        assert not replayed
        block.load_state_dict(state)
        found = steps(block, dtype, 6, True, monkeypatch)
    launches = len(replayed)
    assert launches > 0 and launches % 2 == 0, "the third and the fourth step are replayed"
    assert addresses and max(addresses) * 4 <= plans.SMALL
    assert len(wanted) == len(found)
    for a, b in zip(wanted, found, strict=True):
        assert torch.equal(a, b)


def test_what_a_plan_depends_on(replayed):
    """The alignment of addresses, sizes, strides, dtypes and settings; not the values of tensors."""
    memory = torch.zeros(100)
    key = plans.key_of("name", (memory[:32], 0.5))
    assert key == plans.key_of("name", (torch.ones(100)[:32], 0.5))
    for other in ((memory[1:33], 0.5), (memory[:31], 0.5), (memory[:64:2], 0.5), (memory[:32], 0.25)):
        assert plans.key_of("name", other) != key
    assert plans.key_of("other", (memory[:32], 0.5)) != key


def test_two_arguments_that_were_one_tensor(replayed):
    """A block whose BatchNorms share a weight, then one of the same shapes with a weight for each."""
    torch.manual_seed(0)
    tied, apart = FusedMBConv(8, 8, 3, 1, 4).eval(), FusedMBConv(8, 8, 3, 1, 4).eval()
    tied.bn2.weight = tied.bn1.weight
    with torch.no_grad():
        apart.bn2.weight.uniform_(2, 3)
        x = torch.randn(2, 8, 5, 5)
        wanted = apart(x)
        plans._plans.clear()
        for _ in range(3):
            tied(x)
        assert replayed
        for _ in range(3):
            assert torch.equal(apart(x), wanted)


def test_no_plan_where_somebody_watches(replayed):
    from effkernels.configs import tables

    x = (torch.zeros(4),)
    assert plans.key_of("name", x) is not None
    with tables.override("apply", BLOCK_ROWS=1):
        assert plans.key_of("name", x) is None
    with plans._Recorder(()):
        assert plans.key_of("name", x) is None
    assert plans.key_of("name", (torch.zeros(4, device="meta"),)) is None


def test_a_table_that_changes_forgets_plans(replayed):
    from effkernels.configs import tables

    plans._plans["key"] = None
    tables.forget()
    assert not plans._plans


def recorded(implementation, arguments):
    """(the results of a call, a plan of it or None)."""
    with plans._recording(arguments) as recorder:
        results = implementation(*arguments)
    return results, recorder.plan(results)


def test_a_tensor_from_outside_makes_no_plan(replayed):
    """What a graph would hold for good is not replayed."""
    outside = torch.ones(3)
    library = torch.library.Library("effkernels_test", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")
    results, plan = recorded(lambda x: x + outside, (torch.ones(3),))
    assert torch.equal(results, torch.full((3,), 2.0)) and plan is None
    assert recorded(lambda x: torch.ops.effkernels_test.twice(x), (torch.ones(3),))[1] is None
    results, plan = recorded(lambda x: (x + 1) * 2, (torch.ones(3),))
    assert torch.equal(plan(torch.zeros(3))[0], torch.full((3,), 2.0))


def test_a_view_is_of_the_argument_wherever_that_begins(replayed):
    def tail(x):
        return (x.view(-1)[2:] + 0, x.new_empty(9)[3:].zero_())

    memory = torch.arange(40.0)
    _, plan = recorded(tail, (memory[8:16],))
    found, zeros = plan(memory[16:24])[0]
    assert torch.equal(found, memory[18:24]) and torch.equal(zeros, torch.zeros(6))
    assert recorded(lambda x: x.as_strided((2,), (1,), 9) + 0, (memory[8:16],))[1] is None


def test_an_unaligned_pointer_runs_a_kernel_of_its_own():
    """Through Triton's own launcher, above a driver that starts nothing: what Triton assumes of each kernel's
    pointers, in order of compilation.
    """
    found = run_python(
        """
        import json
        import torch
        from effkernels import FusedMBConv, dispatch
        from effkernels.tools import stand_in_driver
        dispatch.platform_problem = lambda *device: None
        dispatch.without_triton_on_cpu = lambda: False
        compiled, compile = [], stand_in_driver._compile
        def noting(source, *args, **rest):
            compiled.append((source.fn.__name__, sum(map(bool, source.attrs.values()))))
            return compile(source, *args, **rest)
        stand_in_driver._compile = noting
        block = FusedMBConv(16, 16).eval().requires_grad_(False)
        memory = torch.zeros(16 * 8 * 8 + 1)
        def image(offset):
            return memory[offset : offset + 16 * 64].view(1, 8, 8, 16).permute(0, 3, 1, 2)
        counts, launches = [], []
        with stand_in_driver.standing_in() as started, torch.no_grad():
            for offset in (0, 0, 0, 1, 1, 1, 0):
                before = started()
                block(image(offset))
                launches.append(started() - before)
                counts.append(len(compiled))
        print(json.dumps([counts, launches, compiled]))
        """,
        TRITON_INTERPRET="0",
    )
    counts, launches, compiled = json.loads(found)
    assert len(set(launches)) == 1 and launches[0] >= 3
    assert counts[0] > 0 and counts[:3] == [counts[0]] * 3
    assert counts[3] > counts[0] and counts[3:] == [counts[3]] * 4
    aligned = dict(compiled[: counts[0]])  # {kernel: arguments that Triton takes to be divisible by 16}
    for name, divisible in compiled[counts[0] :]:
        assert divisible < aligned[name]


def test_autocast_and_numbers_read_from_tensors(replayed):
    """Products are cast under autocast, so a plan serves one state of it; what ``item`` gave may be another later."""
    x = (torch.ones(4),)
    key = plans.key_of("name", x)
    with torch.autocast("cpu", torch.bfloat16):
        assert plans.key_of("name", x) != key
    assert recorded(lambda x: x * x[0].item(), x)[1] is None
