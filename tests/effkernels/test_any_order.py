"""Kernels that end by a ticket or wait for each other give the same bits in any order of their programs, and end.

Every launch of such a kernel in a training step of a small network is recorded in order, and repeated under schedules
that hold programs back where it hurts (``support.scheduler``). That the schedules find faults is shown by making some.
"""

import contextlib
import dataclasses
import importlib
import pkgutil
import time

import pytest
import torch

from support import cases
from support.atomics import kernel_modules, kernels_with_atomics
from support.interpreter import HAS_TRITON, INTERPRET

# Slow until their run on the present kernels has been seen whole.
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (HAS_TRITON and INTERPRET), reason="needs Triton's interpreter")]

SCHEDULES = 40  # of each recorded configuration


SMALLER = {
    "depthwise_forward_config": {"S": 4, "TW": 1, "TH": 1},
    "depthwise_backward_config": {"TW": 1, "TH": 1},
    "gate_backward_config": {"BLOCK_N": 2, "BLOCK_C": 32},
    "reduction_config": {"BLOCK_ROWS": 16},
    "pointwise_forward_config": {"BLOCK_M": 16},
    "stem_forward_config": {"BLOCK_M": 16},
}


def smaller(rule, **fields):
    """The rule of a configuration, with those of the fields that it has."""

    def changed(*args, **problem):
        config = rule(*args, **problem)
        names = {field.name for field in dataclasses.fields(config)}
        return dataclasses.replace(config, **{name: value for name, value in fields.items() if name in names})

    return changed


@contextlib.contextmanager
def small_launches():
    """Within: tiles are small and programs few, but several to a block of channels or an image."""
    from effkernels import ops
    from effkernels.configs import rules, tables

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rules, "processor_count", lambda device: 4)
        for module in kernel_modules():
            for name in SMALLER.keys() & vars(module).keys():
                patch.setattr(module, name, smaller(getattr(module, name), **SMALLER[name]))
        for module in pkgutil.iter_modules(ops.__path__):
            module = importlib.import_module(f"effkernels.ops.{module.name}")
            if hasattr(module, "zeroed_counters"):  # groups of 2 take more of them than groups of 32
                more = module.zeroed_counters
                patch.setattr(module, "zeroed_counters", lambda x, needed, more=more: more(x, needed + 64))
        tables.forget()
        try:
            yield
        finally:
            tables.forget()


@pytest.fixture(scope="module")
def recorded():
    """Launches of kernels with atomics in two training steps, one a configuration: {(kernel, how): launch}."""
    return {}


@pytest.fixture
def small_groups(monkeypatch):
    """Groups of two programs, of which the last goes on, for those who record and for those who repeat."""
    import triton.language as tl

    for module in kernel_modules():
        if hasattr(module, "GROUP"):
            monkeypatch.setattr(module, "GROUP", tl.constexpr(2))


@pytest.fixture
def launches(recorded, small_groups, device, scratch):
    """``recorded``, made on first use: memory that kernels do not share with PyTorch's operators starts as NaN."""
    from effkernels import FusedMBConv, functional
    from effkernels.parameters import BatchNormParams
    from support.scheduler import record

    if not recorded:
        torch.manual_seed(0)
        with small_launches(), record(set(kernels_with_atomics())) as kept:
            block = FusedMBConv(8, 8, 3, 1, 5, 0.25)
            block(torch.randn(4, 8, 3, 3, requires_grad=True)).square().sum().backward()
            weight, norm = torch.randn(8, 3, 3, 3, requires_grad=True), BatchNormParams.of(torch.nn.BatchNorm2d(8))
            functional.stem(torch.randn(4, 3, 6, 6), weight, norm).square().sum().backward()
        for launch in kept:
            constants = [v for v in launch.kwargs.values() if isinstance(v, (bool, str))]
            recorded.setdefault((launch.name, str(constants)), launch)
    return list(recorded.values())


def of(launches, name):
    return [launch for launch in launches if launch.name == name]


@pytest.mark.parametrize("name", kernels_with_atomics() if HAS_TRITON and INTERPRET else [])
def test_any_order_gives_the_same_bits(name, launches, capsys):
    mine = [launch for launch in of(launches, name) if sum(launch.atomics)]
    assert mine, f"no launch of {name} that uses its counters was recorded: the steps of this test must reach it"
    begun, counts = time.process_time(), [0, 0, 0]
    for launch in mine:
        assert launch.programs >= 3, f"{name} ran as {launch.programs} programs, which can hardly meet"
        for schedule in launch.schedules(round(SCHEDULES * max(1, cases.factor))):
            done = launch.run(schedule)
            counts = [a + b for a, b in zip(counts, (1, done.accesses, done.switches), strict=True)]
    with capsys.disabled():
        print(
            f"\n{name}: {counts[0]} schedules of {len(mine)} launches of {[m.programs for m in mine]} programs, "
            f"{counts[1]} accesses, {counts[2]} switches, {time.process_time() - begun:.1f} s"
        )


# Kernel, function, what its source matches, what stands there instead, how it must be seen.
WAIT = r"while tl\.atomic_add\(ready, 0.*?\) == 0:"
FAULTS = {
    "a removed wait": ("gate_backward_kernel", "gate_backward_to_pool", WAIT, "while False:", "WrongResult"),
    "no barrier before the ticket": (
        "gradient_reduce_kernel",
        "last_to_arrive",
        r"tl\.debug_barrier\(\)",
        "pass",
        "WrongResult",
    ),
    "no barrier before the release": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        r"tl\.debug_barrier\(\)(?=\s+tl\.atomic_add\(readers, 1, )",
        "pass",
        "WrongResult",
    ),
    "a counter that is not reset": (
        "gradient_reduce_kernel",
        "last_to_arrive",
        r"tl\.store\(counter, 0\)",
        "pass",
        "WrongResult",
    ),
    "a ticket that is not reset": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        r"tl\.store\(counters, 0\)",
        "pass",
        "WrongResult",
    ),
    "the last but one is taken for the last": (
        "gradient_reduce_kernel",
        "last_to_arrive",
        r"total - 1",
        "total - 2",
        "WrongResult",
    ),
    "a wait for too few": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        r"(last_to_arrive\(counters \+ 1 \+ b, blocks_c)\)",
        r"\1 - 1)",
        "WrongResult",
        "Deadlock",
    ),
    "a wait for too many": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        r"(last_to_arrive\(counters \+ 1 \+ b, blocks_c)\)",
        r"\1 + 1)",
        "Deadlock",
    ),
    "work by number instead of by ticket": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        r"tl\.atomic_add\(counters, 1\)",
        "tl.program_id(0)",
        "Deadlock",
    ),
    "a load through L1": ("gradient_reduce_kernel", "finish_gradients", r', cache_modifier="\.cg"', "", "StaleLoad"),
    "a relaxed ticket": ("gradient_reduce_kernel", "last_to_arrive", "acq_rel", "relaxed", "WrongResult"),
    "a ticket that only acquires": ("gradient_reduce_kernel", "last_to_arrive", "acq_rel", "acquire", "WrongResult"),
    "a ticket that only releases": ("gradient_reduce_kernel", "last_to_arrive", "acq_rel", "release", "WrongResult"),
    "a relaxed release": (
        "gate_backward_kernel",
        "gate_backward_kernel",
        'sem="release"',
        'sem="relaxed"',
        "WrongResult",
    ),
    "a relaxed wait": (
        "gate_backward_kernel",
        "gate_backward_to_pool",
        'sem="acquire"',
        'sem="relaxed"',
        "WrongResult",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_schedules_find(fault, launches, capsys):
    from support import scheduler

    kernel, function, pattern, instead, *how = FAULTS[fault]
    how = tuple(getattr(scheduler, error) for error in how)
    function = next(vars(module)[function] for module in kernel_modules() if function in vars(module))
    (launch, *_) = of(launches, kernel)
    tried, begun = 0, time.process_time()
    with scheduler.mutated(function, pattern, instead), pytest.raises(how) as found:
        for schedule in launch.schedules(SCHEDULES):
            tried += 1
            launch.run(schedule)
    with capsys.disabled():
        print(f"\n{fault}: {found.type.__name__} in schedule {tried}, {time.process_time() - begun:.2f} s")
    launch.run(schedule)  # which the kernel as it is passes
