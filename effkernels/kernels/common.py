"""What every kernel shares: activations and their derivatives, BatchNorm coefficients, pointer and dtype helpers.

Kernels index NHWC tensors. ``C = CV * CVEC`` with CVEC a compile-time power of two that divides C: Triton only sees divisibility
by 16 in an integer argument, and this tells it about 8, so that loads stay 16 bytes wide for C = 24, 40, 72, ...
"""

import functools
import inspect
import math
import warnings

import torch
import triton
import triton.language as tl
from triton.compiler import CompilationError
from triton.runtime.errors import OutOfResources, PTXASError

from effkernels.configs import tables

INTERPRET = triton.knobs.runtime.interpret
_INTERPRETING = tl.constexpr(INTERPRET)

TL_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


# Every size, stride and count a kernel takes. Triton would compile again for each of them that is 1 or divisible by 16.
SIZES = (
    "N H W CV C R OH OW COLS pad_top pad_left first_row first_col strips_w strips groups P TH rows tiles parts rows_per_program "
    "image_blocks row_stride total images E I O KV NV IV RV OV per_program programs splits tiles_per_part "
    "stride_n stride_c stride_h stride_w depthwise_parts project_parts"
).split()


def sized_jit(fn):
    """``triton.jit`` of a kernel whose sizes never cause a recompilation."""
    named = [name for name in inspect.signature(fn).parameters if name in SIZES]
    return triton.jit(fn, do_not_specialize=named)


def _does_not_compile(error: Exception) -> bool:
    """Whether a launch failed for its configuration's sake, before anything ran; a pass of the compiler that fails raises RuntimeError."""
    return isinstance(error, (CompilationError, OutOfResources, PTXASError)) or (
        isinstance(error, RuntimeError) and "PassManager" in str(error)
    )


def launcher(fn):
    """A function that asks rules of configs/rules.py for a configuration and starts one kernel with it.

    Where that does not compile, or needs more than the GPU has, the next of ``tables.FALLBACKS`` is tried, from now on at once, and
    a RuntimeWarning says so; RuntimeError when none is left. A configuration under ``tables.override`` stands as it is.
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
            warnings.warn(f"{fn.__name__}: {type(failure).__name__}: {failure}. Used instead: {used}", RuntimeWarning, stacklevel=2)
            return result
        raise RuntimeError(
            f"{fn.__name__}: no configuration of its kernel compiles here; EFFKERNELS_BACKEND=reference runs the plain layers"
        ) from failure

    return start


@triton.jit
def cast(x, dtype: tl.constexpr):
    """x (fp32) rounded to nearest even; the interpreter's own cast to bf16 truncates."""
    if _INTERPRETING:
        if dtype == tl.bfloat16:
            bits = x.to(tl.int32, bitcast=True)
            rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
            x = tl.where(x == x, rounded.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)); FAST is one special-function op, 0.5 + 0.5 tanh(x / 2), good to 2^-11 (bf16 only)."""
    if FAST:
        t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [0.5 * x], dtype=tl.float32, is_pure=True, pack=1)
        return 0.5 * t + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """phi(x) in fp32."""
    if ACT == "silu":
        if FAST:
            h = 0.5 * x
            t = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [h], dtype=tl.float32, is_pure=True, pack=1)
            return h * t + h
        else:
            return x / (1.0 + tl.exp(-x))
    elif ACT == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "relu6":
        return tl.clamp(x, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACT == "hard_swish":
        return x * tl.clamp(x + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1.0 / 6.0)
    elif ACT == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACT == "identity")
        return x


@triton.jit
def activate_and_grad(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """(phi(x), phi'(x)) in fp32, sharing the transcendental."""
    if ACT == "silu":
        s = sigmoid(x, FAST)
        phi = x * s
        return phi, s + phi * (1.0 - s)
    elif ACT == "relu":
        return activate(x, ACT, FAST), tl.where(x > 0.0, 1.0, 0.0)
    elif ACT == "relu6":
        return activate(x, ACT, FAST), tl.where((x > 0.0) & (x < 6.0), 1.0, 0.0)
    elif ACT == "hard_swish":
        inner = tl.where(x < 3.0, x * (1.0 / 3.0) + 0.5, 1.0)
        return activate(x, ACT, FAST), tl.where(x > -3.0, inner, 0.0)
    elif ACT == "gelu":
        cdf = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        return x * cdf, cdf + x * tl.exp(-0.5 * x * x) * 0.3989422804014327
    else:
        tl.static_assert(ACT == "identity")
        return x, tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def gate_function(x, GATE: tl.constexpr):
    if GATE == "sigmoid":
        return sigmoid(x, False)
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        return tl.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gate_derivative(g, GATE: tl.constexpr):
    """d gate / d (its argument), from the gate's own value."""
    if GATE == "sigmoid":
        return g * (1.0 - g)
    else:
        return tl.where((g > 0.0) & (g < 1.0), 1.0 / 6.0, 0.0)


@triton.jit
def branch_factor(draw, keep):
    """Stochastic depth's factor of an image's branch: 1 / keep where ``draw`` lies below it, else 0; the draw if keep is negative."""
    return tl.where(keep > 0.0, tl.where(draw < keep, 1.0 / keep, 0.0), draw)


@triton.jit
def load_vector(p, c, mask):
    return tl.load(p + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def bn_coefficients(gamma, beta, mean, var, eps, c, mask, VAR_IS_RSTD: tl.constexpr):
    """(mean, rstd, scale, shift) of channels c, with BN(y) = y * scale + shift, from live parameters and statistics."""
    m = load_vector(mean, c, mask)
    v = load_vector(var, c, mask)
    if VAR_IS_RSTD:
        rstd = v
    else:
        rstd = 1.0 / tl.sqrt(v + eps)
    scale = load_vector(gamma, c, mask) * rstd
    return m, rstd, scale, load_vector(beta, c, mask) - m * scale


@triton.jit
def bn_row(gamma, beta, mean, var, eps, c, mask, VAR_IS_RSTD: tl.constexpr):
    """(scale, shift) of channels c as [1, BC] rows."""
    m, rstd, scale, shift = bn_coefficients(gamma, beta, mean, var, eps, c, mask, VAR_IS_RSTD)
    return scale[None, :], shift[None, :]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b with fp32 sums; PRECISION of fp32 operands. The interpreter's product of bf16 blocks is garbage, of fp32 it is right."""
    if _INTERPRETING:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def last_to_arrive(counter, total):
    """True in the one program that comes last of ``total`` to this line, when what all of them stored before it can be read.

    The counter (int32) must be 0 before the first arrives, and is 0 again after the last. What the others stored is to be
    loaded with ``cache_modifier=".cg"``. Which program is last changes nothing as long as it sums in a fixed order.
    """
    tl.debug_barrier()
    last = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == total - 1
    if last:
        tl.store(counter, 0)
    tl.debug_barrier()
    return last


def check_counters(counters, needed: int) -> None:
    """ValueError unless there are as many int32 counters as a launch's ``last_to_arrive`` indexes."""
    if counters is None or counters.dtype != torch.int32 or counters.numel() < needed:
        found = None if counters is None else f"{counters.dtype} and {counters.numel()}"
        raise ValueError(f"counters must be int32 and at least {needed}, got {found}")


def fp32(device, *shape):
    """Memory for statistics, sums and partial results."""
    return torch.empty(shape, device=device, dtype=torch.float32)


def channel_vector_width(channels: int, itemsize: int = 2) -> int:
    """CVEC: the power of two, at most 16 bytes of elements, that divides the channel count."""
    return math.gcd(channels, 16 // itemsize)


def fast_math(dtype: torch.dtype) -> bool:
    """Whether tanh.approx is accurate enough for ``dtype``, and can run (the interpreter has no inline PTX)."""
    return dtype is torch.bfloat16 and not INTERPRET
