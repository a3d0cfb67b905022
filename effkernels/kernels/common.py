"""What every kernel and every launcher shares: how kernels are compiled and started, casts, products, counters, scratch
memory.

Kernels index NHWC tensors. A kernel takes a number of channels C as two arguments, C = CV * CVEC, where CVEC is a
compile-time power of two: Triton sees of an integer argument only whether 16 divides it, and so learns about 8 as well,
which keeps loads 16 bytes wide for C = 24, 40, 72, ... An optional argument that is absent is None, also in a tuple.
Sizes are arguments of their own, never in a tuple: there Triton would compile again for a size of 1.
"""

import functools
import inspect
import math
import threading
import warnings
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from effkernels.configs import tables

INTERPRET = triton.knobs.runtime.interpret
_INTERPRETING = tl.constexpr(INTERPRET)

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Every size, stride and count that a kernel takes. Triton would compile again for each of them that is 1 or divisible
# by 16.
SIZES = (
    "N H W CV C R OH OW COLS pad_top pad_left first_row first_col strips_w strips groups P TH rows tiles parts "
    "rows_per_program "
    "image_blocks row_stride total images E I O KV NV IV RV OV EV step per_program programs splits "
    "stride_n stride_c stride_h stride_w first_parts gram_parts project_parts depthwise_parts image_parts E_rows "
    "I_rows gram_splits"
).split()


class _Recorder(threading.local):
    started: Callable | None = None


_TRITONS_RUN = triton.JITFunction.run


def launches_watched() -> bool:
    """Whether somebody wants to see every launch as Triton makes it: a profiler's hooks, or ``record_launches``."""
    hooks = triton.knobs.runtime.launch_enter_hook, triton.knobs.runtime.launch_exit_hook
    return (
        any(getattr(hook, "calls", hook) for hook in hooks)
        or triton.JITFunction.run is not _TRITONS_RUN
        or Kernel.collector is not None
    )


class Kernel(triton.JITFunction):
    """A jitted function that is started from Python, and says so to who watches.

    collector: takes (kernel, arguments, keywords) of every launch of the process instead of its being started, for
    ``effkernels.warm_up``. recorder.started, a thread's own: is told (kernel, what Triton compiled, grid, arguments,
    keywords) of launches that were started, for ``effkernels.ops.plans``.
    """

    collector: Callable | None = None
    recorder = _Recorder()

    def run(self, *args: object, grid: tuple, warmup: bool = False, **kwargs: object) -> object:
        """Triton's launch, by which ``kernel[grid](...)`` starts it."""
        if Kernel.collector is not None and not warmup:
            return Kernel.collector(self, args, kwargs)
        compiled = super().run(*args, grid=grid, warmup=warmup, **kwargs)
        if Kernel.recorder.started is not None:
            Kernel.recorder.started(self, compiled, grid, args, kwargs)
        return compiled

    def starter(self, compiled: triton.compiler.CompiledKernel, grid: tuple) -> Callable:
        """A function that starts what Triton compiled on the current stream, given every argument in order. It checks
        nothing: dtypes and alignments must be those that it was compiled for, the device the current one.
        """
        grid_0, grid_1, grid_2 = (*grid, 1, 1)[:3]
        start, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
        driver = triton.runtime.driver.active
        device, stream_of = driver.get_current_device(), driver.get_current_stream

        def start_kernel(*args: object) -> None:
            start(grid_0, grid_1, grid_2, stream_of(device), function, metadata, None, None, None, *args)

        start_kernel.starts_kernel = self.__name__
        return start_kernel


def sized_jit(fn: Callable) -> triton.JITFunction:
    """Compile a kernel by ``triton.jit``, and never again for another size."""
    parameters = inspect.signature(fn).parameters.values()
    named = [p.name for p in parameters if p.name in SIZES and p.annotation is not tl.constexpr]
    return triton.jit(fn, do_not_specialize=named) if INTERPRET else Kernel(fn, do_not_specialize=named)


def given(argument: object) -> tl.constexpr:
    """Whether a kernel was given this tuple, at compile time: ``argument is not None``.

    Triton 3.6 cannot compile that comparison for a tuple that holds a None, as a ``BatchNorm`` does. A plain pointer is
    compared with None as it is.
    """
    absent = argument is None or (isinstance(argument, tl.constexpr) and argument.value is None)
    return tl.constexpr(not absent)


given.__triton_builtin__ = True  # so that kernels may call it, with its argument as the compiler has it


def _does_not_compile(error: Exception) -> bool:
    """Whether a launch failed for its configuration's sake, before anything ran. (A pass of the compiler that fails
    raises RuntimeError.)"""
    return isinstance(error, (CompilationError, OutOfResources, PTXASError)) or (
        isinstance(error, RuntimeError) and "PassManager" in str(error)
    )


def launcher(fn: Callable) -> Callable:
    """Wrap a function that asks the rules of configs/rules.py for a configuration and starts one kernel with it.

    Where the configuration does not compile, or needs more than the GPU has, the next of ``tables.FALLBACKS`` is tried,
    and from then on used at once; a RuntimeWarning says so. RuntimeError is raised when none is left. A configuration
    under ``tables.override`` stands as it is.
    """

    @functools.wraps(fn)
    def start(*args, **kwargs):
        try:
            return fn(*args, **kwargs)
        except Exception as error:
            if tables.overridden() or not _does_not_compile(error):
                raise
            failure = error
        for fields in tables.FALLBACKS:
            try:
                with tables.falling_back(fields) as asked:
                    result = fn(*args, **kwargs)
            except Exception as error:
                if not _does_not_compile(error):
                    raise
                continue
            used = ", ".join(f"{config} for {family} at {key or 'any size'}" for family, key, config in asked)
            warnings.warn(
                f"{fn.__name__}: {type(failure).__name__}: {failure}. Used instead: {used}",
                RuntimeWarning,
                stacklevel=2,
            )
            return result
        raise RuntimeError(
            f"{fn.__name__}: no configuration of its kernel compiles here; EFFKERNELS_BACKEND=reference runs the plain "
            "layers"
        ) from failure

    return start


@triton.jit
def cast(x, dtype: tl.constexpr):
    """fp32 x in ``dtype``, rounded to nearest even. (The interpreter's own cast to bf16 truncates.)"""
    if _INTERPRETING:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with fp32 sums. PRECISION is that of fp32 operands, "ieee" or "tf32".

    The interpreter multiplies fp32 blocks only: its product of bf16 blocks is garbage.
    """
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def exact_dot(a, b, acc):
    """acc + a b of fp32 blocks, as exact as fp32 sums of fp32 products: each value is the sum of three in bf16, for
    tensor cores. Plain multiply-adds would wait for shared memory.
    """
    PRECISION: tl.constexpr = "ieee" if _INTERPRETING else "bf16x6"  # which the interpreter does not know
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def load_tile(x, i, c, C, ok, mc):
    """Rows i of x [BLOCK_M, C] at channels c; 0 outside."""
    return tl.load(x + i[:, None] * C + c[None, :], mask=ok[:, None] & mc[None, :], other=0.0)


@triton.jit
def fold_rows(v):
    """Sum of rows r and r + 8 of every 16 of v [BLOCK_M, BLOCK_N]: a thread holds both in the layout of the tensor
    cores' results.
    """
    return tl.sum(tl.reshape(v, [v.shape[0] // 16, 2, 8, v.shape[1]]), 1)


@triton.jit
def sum_rows(folded):
    """The sum of all rows of what ``fold_rows`` returned."""
    return tl.sum(tl.sum(folded, 0), 0)


@triton.jit
def last_to_arrive(counter, total):
    """Whether this program is the last of ``total`` to come to this line. The last one can read what all of them stored
    before it.

    The counter (int32) must be 0 before the first program arrives, and is 0 again after the last. What the others
    stored must be loaded with ``cache_modifier=".cg"``, past the L1 cache. Which program is last changes no result as
    long as it sums in a fixed order.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


def check_counters(counters: torch.Tensor | None, needed: int) -> None:
    """Raise ValueError unless there are as many int32 counters as a launch's programs count in."""
    if counters is None or counters.dtype != torch.int32 or counters.numel() < needed:
        found = None if counters is None else f"{counters.dtype} and {counters.numel()}"
        raise ValueError(f"counters must be int32 and at least {needed}, got {found}")


def fp32(device: torch.device, *shape: int) -> torch.Tensor:
    """Allocate fp32 memory for statistics, sums and partial results."""
    return torch.empty(shape, device=device, dtype=torch.float32)


def channel_vector_width(channels: int, itemsize: int = 2) -> int:
    """CVEC: the largest power of two that divides the number of channels and is at most 16 bytes of elements."""
    return math.gcd(channels, 16 // itemsize)


def product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """out = a b by PyTorch's own product (cuBLAS on NVIDIA's GPUs), of a and b in one dtype; out in that, or in fp32.

    With ``out`` given, since autocast leaves those products as they are.
    """
    if a.dtype == out.dtype:
        return torch.mm(a, b, out=out)
    if a.device.type == "cpu":  # PyTorch has no such product on CPUs
        return torch.mm(a.to(out.dtype), b.to(out.dtype), out=out)
    return torch.mm(a, b, out_dtype=out.dtype, out=out)


def fast_math(dtype: torch.dtype) -> bool:
    """Whether tanh.approx is accurate enough for ``dtype``, and can run: the interpreter has no inline PTX."""
    return dtype is torch.bfloat16 and not INTERPRET


def matmul_precision() -> str:
    """PRECISION of fp32 products, as ``torch.backends.cuda.matmul`` says (the older ``allow_tf32`` is reflected there
    too).
    """
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
