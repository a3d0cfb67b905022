"""Memory: no launch reads or writes beyond its tensors, unwritten scratch is never read, offsets pass 2^31, nothing
leaks or piles up."""

import gc
import importlib
import inspect
import json
import os
import pkgutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from effkernels import BatchNormParams, FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, functional
from support.blocks import images, randomise
from support.interpreter import HAS_TRITON, INTERPRET, check_overflow

pytestmark = pytest.mark.skipif(not HAS_TRITON, reason="Triton is not installed")


def kernel_modules():
    import effkernels.kernels

    return [
        importlib.import_module(f"effkernels.kernels.{m.name}")
        for m in pkgutil.iter_modules(effkernels.kernels.__path__)
    ]


def every_kernel():
    return {name for module in kernel_modules() for name in vars(module) if name.endswith("_kernel")}


def step(module, x):
    """[out, gradients, buffers] of training, and the output in inference."""
    x = x.detach().requires_grad_()
    torch.manual_seed(1)  # for drop-path
    out = module(x)
    grads = torch.autograd.grad(
        out, [x, *module.parameters()], torch.linspace(-1, 1, out.numel(), device=x.device).view(out.shape)
    )
    buffers = [b.clone() for b in module.buffers()]
    with torch.no_grad():
        return [out, *grads, *buffers, module.eval()(x.detach())]


class Apart(torch.nn.Module):
    """What no module uses: a BatchNorm before the depthwise convolution, BatchNorm + residual, the stem and the
    head."""

    def __init__(self):
        super().__init__()
        self.pre, self.norm, self.last = (torch.nn.BatchNorm2d(10) for _ in range(3))
        self.stem, self.head = torch.nn.Conv2d(3, 10, 3, bias=False), torch.nn.Conv2d(10, 9, 1, bias=False)
        self.conv, self.headnorm = torch.nn.Conv2d(10, 10, 3, groups=10, bias=False), torch.nn.BatchNorm2d(9)

    def forward(self, x):
        norm = BatchNormParams.of
        y = functional.stem(x, self.stem.weight, norm(self.pre))
        z = functional.depthwise_conv_bn_act(
            y, self.conv.weight, norm(self.norm), pre_norm=norm(self.last), pre_act="silu"
        )
        z = functional.bn_act_add(
            z, norm(self.norm), residual=y, branch_scale=torch.tensor([1.5, 0.0], device=x.device)
        )
        return functional.head(z, self.head.weight, norm(self.headnorm))


def workloads(device):
    """(module, input) that together start every kernel; odd sizes, so that no block of any is full."""
    torch.manual_seed(0)
    yield FusedMBConv(11, 11, 3, 1, 2, 0.5, drop_path=0.3), images(2, 11, 3, 4, device=device)
    yield FusedMBConv(9, 13, 5, 2, 1, 0, padding="same", act="relu"), images(2, 9, 5, 3, device=device)
    yield FusedDepthwiseConvBNAct(35, 3, 2), images(2, 35, 5, 3, device=device)
    yield FusedSqueezeExcite(35, 9), images(2, 35, 3, 3, device=device)
    yield Apart(), images(2, 3, 7, 5, device=device)
    yield FusedMBConv(9, 13, 3, 1, 2).to(torch.bfloat16), images(2, 9, 5, 3, device=device).bfloat16()
    yield FusedMBConv(9, 13, 3, 2, 2).to(torch.bfloat16), images(2, 9, 5, 3, device=device).bfloat16()
    yield FusedMBConv(66, 9, 3, 2, 2, 0).to(torch.bfloat16), images(2, 66, 3, 2, device=device).bfloat16()


def run_all(device):
    results = []
    for module, x in workloads(device):
        randomise(module)
        results += step(module.to(device), x)
    return results


@pytest.fixture(scope="module")
def counted():
    """(results, launches) of all workloads, every address checked by the interpreter: one outside of its tensor raises
    IndexError."""
    if not INTERPRET:
        pytest.skip("needs the interpreter")
    from dataclasses import replace

    from effkernels.kernels import depthwise_backward, depthwise_forward, weight_copies
    from effkernels.tools.traffic import count_traffic

    def small(config):
        return replace(config, TH=1) if config.products else replace(config, S=32, TW=1, TH=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("EFFKERNELS_BACKEND", "triton")
        for module in (depthwise_forward, depthwise_backward):
            name = f"{module.__name__.rpartition('.')[2]}_config"
            config = getattr(module, name)
            patch.setattr(module, name, lambda config=config, **problem: small(config(**problem)))
        # As of many rows and columns, which would take too long here.
        patch.setattr(
            weight_copies, "weight_form", lambda *, dtype, **how: "permuted" if dtype.itemsize == 2 else "live"
        )
        with count_traffic() as launches:
            results = run_all("cpu")
        yield results, launches, patch


def test_no_launch_leaves_its_tensors(counted):
    """Every kernel ran, each tensor in memory of exactly its size."""
    _, launches, _ = counted
    assert {launch.name for launch in launches if launch.name.endswith("_kernel")} == every_kernel()
    for launch in launches:
        for name, size in launch.sizes.items():
            assert max(launch.arguments[name]) <= size, (launch.name, name)


def test_poisoned_scratch_changes_nothing(counted, device, scratch):
    """NaN in all that launchers allocate, and margins around it that stay as they were: the same bits as from fresh
    memory."""
    results, _, _ = counted
    for i, (fresh, poisoned) in enumerate(zip(results, run_all(device), strict=True)):
        assert torch.equal(fresh, poisoned), i
        assert poisoned.isfinite().all(), i


# ---- offsets past 2^31
# -----------------------------------------------------------------------------------------------------------


class Recorded:
    """Launches on ``meta`` tensors, kept instead of started: (interpreted function, arguments by name, grid)."""

    def __init__(self, monkeypatch):
        from triton.runtime.interpreter import InterpretedFunction

        from effkernels import dispatch
        from effkernels.configs import rules

        self.launches = []
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        monkeypatch.setattr(dispatch, "why_not_fused", lambda *args, **kwargs: None)
        # A program for each tile: then the last one is at the end of memory after a few steps. (More than there are
        # counters for.)
        monkeypatch.setattr(rules, "processor_count", lambda device: 10**7)
        for module in kernel_modules():
            if hasattr(module, "check_counters"):
                monkeypatch.setattr(module, "check_counters", lambda *args: None)

        def run(function, *args, grid, warmup=False, **kwargs):
            arguments = inspect.getcallargs(
                function.fn, *args, **{k: v for k, v in kwargs.items() if k in function.arg_names}
            )
            self.launches.append((function, arguments, tuple(grid)))

        monkeypatch.setattr(InterpretedFunction, "run", run)


def tensors_of(arguments) -> dict:
    """A launch's tensors by argument, those in tuples too."""
    from effkernels.tools.launches import members

    found = {path: v for name, value in arguments.items() for path, v in members(name, value).items()}
    return {path: v for path, v in found.items() if isinstance(v, torch.Tensor)}


def addresses(function, arguments, grid, monkeypatch):
    """{argument: (first, last) byte touched} by the last program, of tensors that are not there: loads give zeros.

    IndexError for an access outside of its tensor.
    """
    import triton.language as tl
    from triton.runtime import interpreter

    slots, touched = {}, {}

    def convert(arg):
        if isinstance(arg, tuple):
            return type(arg)(*map(convert, arg)) if hasattr(arg, "_fields") else tuple(map(convert, arg))
        if not isinstance(arg, torch.Tensor):
            return original(arg)
        known = next((slot for slot, (_, tensor, _) in slots.items() if tensor is arg), None)
        slot = len(slots) + 1 if known is None else known
        if known is None:
            slots[slot] = (names.get(id(arg), "?"), arg, arg.numel() * arg.element_size())
        converted = original(torch.empty(1, dtype=arg.dtype))
        converted.handle.data = np.array([(slot << 48) + (1 << 47)], np.uint64)
        return converted

    def check(pointers, mask, what):
        width = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        at = pointers.data[np.broadcast_to(np.asarray(mask, bool), pointers.data.shape)]
        for slot in np.unique(at >> np.uint64(48)):
            if int(slot) not in slots:
                raise IndexError(f"{function.fn.__name__}: an address of no argument is {what}")
            name, tensor, size = slots[int(slot)]
            if tensor.dtype == torch.int32:
                continue  # counters
            offsets = (at[at >> np.uint64(48) == slot]).astype(np.int64) - ((int(slot) << 48) + (1 << 47))
            low, high = int(offsets.min()), int(offsets.max()) + width
            if low < 0 or high > size:
                raise IndexError(f"{function.fn.__name__}: {name} of {size} bytes is {what} at [{low}, {high})")
            first, last = touched.get(name, (low, high))
            touched[name] = min(first, low), max(last, high)

    def zeros(pointers):
        element = pointers.get_element_ty()
        return interpreter.TensorHandle(np.zeros(pointers.data.shape, interpreter._get_np_dtype(element)), element)

    def load(self, ptrs, mask, *rest, **named):
        check(ptrs, mask.data, "read")
        return zeros(ptrs)

    def store(self, ptrs, value, mask, *rest, **named):
        check(ptrs, mask.data, "written")

    def rmw(self, op, ptr, val, mask, *rest):
        first = not touched
        check(ptr, mask.data, "updated")
        counter = 0
        if first:  # a ticket: the last program's
            counter = np.prod(grid) - 1
        elif not np.any(val.data):  # waiting for others: all have come
            counter = 2**30
        return interpreter.TensorHandle(np.full(ptr.data.shape, counter, np.int32), tl.int32)

    names = {id(t): name for name, t in tensors_of(arguments).items()}
    original, builder = interpreter._implicit_cvt, interpreter.InterpreterBuilder

    def typed_range(*bounds):
        """Counts in int64 where a bound is int64, as compiled code does; the interpreter forgets the type."""
        counts = range(*(int(b) for b in bounds))
        wide = any(getattr(b, "dtype", None) == tl.int64 for b in bounds)
        return (
            tl.tensor(interpreter.TensorHandle(np.array([i], np.int64), tl.int64), tl.int64) if wide else i
            for i in counts
        )

    def patch_lang(fn, patched=interpreter._patch_lang):
        scope = patched(fn)
        tl.range = lambda *bounds, **how: typed_range(*bounds)  # put back with the scope
        return scope

    executor = interpreter.GridExecutor(function.rewrite(), function.arg_names, grid, [])
    with monkeypatch.context() as patch:
        for name, hook in (("create_masked_load", load), ("create_masked_store", store), ("create_atomic_rmw", rmw)):
            patch.setattr(builder, name, hook)
        for module in kernel_modules():
            patch.setitem(vars(module), "range", typed_range)
        patch.setattr(interpreter, "_patch_lang", patch_lang)  # helpers of kernels call it again
        scope = patch_lang(executor.fn)
        check_overflow(True)
        try:
            bound = {
                name: value if name in executor.constexprs else convert(value) for name, value in arguments.items()
            }
            size = (*grid, 1, 1)[:3]
            interpreter.interpreter_builder.set_grid_dim(*size)
            interpreter.interpreter_builder.set_grid_idx(*(n - 1 for n in size))
            executor.fn(**bound)
        finally:
            check_overflow(False)
            scope.restore()
    return touched


class Ends(torch.nn.Module):
    """A network's stem, a BatchNorm with activation and residual, and its head."""

    def __init__(self, device):
        super().__init__()
        self.stem, self.head = (
            torch.nn.Conv2d(3, 48, 3, bias=False, device=device),
            torch.nn.Conv2d(48, 64, 1, bias=False, device=device),
        )
        self.first, self.second, self.last = (torch.nn.BatchNorm2d(c, device=device) for c in (48, 48, 64))

    def forward(self, x):
        norm = BatchNormParams.of
        y = functional.stem(x[:, :3], self.stem.weight, norm(self.first), stride=2)
        y = functional.bn_act_add(y, norm(self.second), act="silu", residual=y)
        return functional.head(y, self.head.weight, norm(self.last))


LARGE = [
    # what, the module, x's shape: tensors inside have 2^31 elements before their last image begins; kernels that meet
    # them
    (
        "expanded",
        lambda: FusedMBConv(16, 24, 3, 2, 6, 0.25, device="meta"),
        (11000, 16, 112, 112),
        "depthwise_backward depthwise_forward expand_pass expand_depthwise pointwise_forward pool project_both",
    ),
    (
        "expanded, stride 1",
        lambda: FusedMBConv(16, 16, 3, 1, 6, 0.25, drop_path=0.2, device="meta"),
        (1800, 16, 112, 112),
        "depthwise_backward depthwise_products expand_pass pointwise_forward pool project_both",
    ),
    (
        "expanded, more channels",
        lambda: FusedMBConv(48, 48, 3, 1, 6, 0.25, device="meta"),
        (600, 48, 112, 112),
        "depthwise_backward depthwise_products expand_data expand_weight pointwise_forward gradient_sums pool",
    ),
    (
        "not expanded",
        lambda: FusedMBConv(48, 48, 3, 1, 1, 0.25, device="meta"),
        (3600, 48, 112, 112),
        "apply gradient_reduce depthwise_backward depthwise_products pointwise_forward gradient_sums pool project_dy",
    ),
    (
        "smaller modules",
        lambda: torch.nn.Sequential(
            FusedDepthwiseConvBNAct(48, device="meta"), FusedSqueezeExcite(48, 2, device="meta")
        ),
        (3600, 48, 112, 112),
        "apply apply_backward depthwise_backward depthwise_products gradient_sums pool",
    ),
    (
        "stem and head",
        lambda: Ends("meta"),
        (3600, 3, 224, 224),
        "apply apply_backward gradient_reduce gradient_sums pointwise_forward pooled_norm pooled_norm_backward "
        "statistics stem_backward "
        "stem_forward",
    ),
]
# Kernels over what has no pixels: vectors of a channel, of an image's channels, and partial sums.
WITHOUT_PIXELS = (
    "expand_matrix gate_backward gradient_merge merge pooled_norm_gradients squeeze excite squeeze_excite_dgrad "
    "squeeze_excite_wgrad "
    "sum_partials weight_copies weight_gradients weight_sums"
)


def kernels(names):
    return {f"{name}_kernel" for name in names.split()}


def test_every_kernel_over_pixels_meets_large_tensors():
    met = set().union(*(kernels(row[3]) for row in LARGE))
    assert met | kernels(WITHOUT_PIXELS) == every_kernel() and met.isdisjoint(kernels(WITHOUT_PIXELS))


@pytest.mark.parametrize("make, shape, names", [pytest.param(*row[1:], id=row[0]) for row in LARGE])
def test_offsets_pass_2_to_the_31(make, shape, names, small_tiles, monkeypatch):
    """The last program of each launch on tensors of more elements than an int32 counts works at their end, inside of
    them."""
    if not INTERPRET:
        pytest.skip("needs the interpreter")
    from effkernels.kernels import project_backward

    config = project_backward.project_both_config  # whole images at once, so that a program ends soon
    monkeypatch.setattr(project_backward, "project_both_config", lambda *args: replace(config(*args), BLOCK_M=4096))
    recorded = Recorded(monkeypatch)
    module = make().to(torch.bfloat16)
    x = torch.empty(shape, device="meta", dtype=torch.bfloat16).to(memory_format=torch.channels_last).requires_grad_()
    out = module(x)
    out.backward(torch.empty_like(out))
    with torch.no_grad():
        module.eval()(x)
    seen = set()
    for function, arguments, grid in recorded.launches:
        # Activations.
        large = {
            name: t for name, t in tensors_of(arguments).items() if t.numel() >= 2**31 and t.dtype == torch.bfloat16
        }
        if large:
            touched = addresses(function, arguments, grid, monkeypatch)
            for name in large.keys() & touched.keys():
                assert touched[name][1] > 2**31 * large[name].element_size(), (
                    f"{function.fn.__name__} does not reach the end of {name}"
                )
                seen.add(function.fn.__name__)
    assert seen == kernels(names)


# ---- nothing piles up
# ------------------------------------------------------------------------------------------------------------

# In a process without the interpreter: kernels as the compiler would be asked for them.
LAUNCHES = f"""
import json, re, torch
from effkernels import BatchNormParams, FusedDepthwiseConvBNAct, FusedMBConv, FusedSqueezeExcite, dispatch, functional
from effkernels.tools.launches import call_launches
from effkernels.tools.machine_code import compile_launch

{inspect.getsource(Ends)}
dispatch.why_not_fused = lambda *args, **kwargs: None  # meta tensors are no reason here

def launches(module, *shape):
    for part in module.modules():
        part.why_not_fused = lambda x=None: None
    for training in (True, False):
        x = torch.empty(shape, dtype=torch.bfloat16, device="meta")
        yield from call_launches(module.train(training), x, training)
"""

CACHE_KEYS = """
with torch.device("meta"):
    MODULES = [
        FusedMBConv(16, 16, 3, 1, 6, 0.25), FusedMBConv(16, 16, 3, 1, 17, 0.25), FusedMBConv(16, 24, 3, 2, 6, 0.25),
        FusedMBConv(16, 24, 5, 2, 1, 0, padding="same"), FusedMBConv(16, 32, 3, 1, 6, 0.25),
        FusedDepthwiseConvBNAct(16), FusedSqueezeExcite(16, 8), Ends(None),
    ]

def keys(batch, size):
    found = [l for module in MODULES for l in launches(module, batch, 16, size, size)]
    return sorted({(l.name, repr(l.specialization()), repr(sorted(l.options.items()))) for l in found})

print(json.dumps([keys(*case) for case in ((64, 56), (65, 56), (63, 56), (8000, 56), (256, 57), (33, 224))]))
"""

# The types of offsets that are added to a pointer to 2^31 elements or more, in the code that the compiler makes of each
# kernel.
OFFSET_TYPES = """
WORKLOADS = [
    (FusedMBConv(16, 24, 3, 2, 6, 0.25, device="meta"), 11000, 16, 112, 112),
    (FusedMBConv(48, 48, 3, 1, 6, 0.25, device="meta"), 600, 48, 112, 112),
    (FusedMBConv(48, 48, 3, 1, 1, 0.25, device="meta"), 3600, 48, 112, 112),
    (
        torch.nn.Sequential(FusedDepthwiseConvBNAct(48, device="meta"), FusedSqueezeExcite(48, 2, device="meta")),
        3600, 48, 112, 112,
    ),
    (Ends("meta"), 3600, 3, 224, 224),
]

def offset_types(code, name):
    "Of what is added to the pointer, or to a tile that is filled with it."
    for variable in (name, *re.findall(rf"%(\\w+) = tt.splat %{name} : !tt.ptr", code)):
        yield from re.findall(rf"tt\\.addptr %{variable}, \\S+ : \\S+, (?:tensor<[\\dx]+)?(i\\d+)", code)

found = {}
for module, *shape in WORKLOADS:
    for launch in launches(module, *shape):
        large = {id(v): n for n, v in reversed(launch.tensors.items()) if v.numel() >= 2**31}
        if large and launch.name not in found:
            code = compile_launch(launch, 90).asm["ttir"]
            found[launch.name] = {name: list(offset_types(code, name)) for name in large.values()}
print(json.dumps(found))
"""


def compiled(code):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "EFFKERNELS_BACKEND")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_offsets_are_compiled_to_64_bits():
    """In every kernel that meets tensors so large, to each of them."""
    found = compiled(LAUNCHES + OFFSET_TYPES)
    assert found.keys() == set().union(*(kernels(row[3]) for row in LARGE))
    for name, tensors in found.items():
        assert tensors and all(types and set(types) == {"i64"} for types in tensors.values()), (name, tensors)


def test_a_new_batch_compiles_nothing():
    """What Triton keys compiled kernels by is the same for every batch, past 2^31 elements too. A new image size
    compiles depthwise convolutions only, whose strips divide the width.
    """
    first, *batches, odd, large = compiled(LAUNCHES + CACHE_KEYS)
    assert {name for name, *_ in first} == every_kernel()
    for other in batches:
        assert other == first

    def others(keys):
        return [key for key in keys if key[0] not in ("depthwise_products_kernel", "depthwise_backward_kernel")]

    assert others(odd) == others(large) == others(first)


def test_nothing_leaks_over_a_thousand_steps(monkeypatch):
    """Launchers, autograd and saved tensors of training steps on tensors without memory: freed without the garbage
    collector."""
    if not INTERPRET:
        pytest.skip("needs the interpreter")
    recorded = Recorded(monkeypatch)
    block = FusedMBConv(8, 8, 3, 1, 2, 0.25, drop_path=0.2, device="meta")
    x = torch.empty(2, 8, 4, 4, device="meta")
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1, momentum=0.9)

    def steps(count):
        for _ in range(count):
            block(x).backward(x)
            optimizer.step()
            optimizer.zero_grad()
            recorded.launches.clear()

    def alive():
        """(tensors, all objects that the garbage collector knows)."""
        objects = gc.get_objects()
        return sum(issubclass(type(o), torch.Tensor) for o in objects), len(objects)

    steps(10)
    gc.collect()
    tensors, objects = alive()
    gc.disable()
    try:
        steps(1000)
        now = alive()
        # Of 1,000 steps not one object each.
        assert now[0] == tensors and now[1] < objects + 500, (now, tensors, objects)
    finally:
        gc.enable()
