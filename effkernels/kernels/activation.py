"""Activations and the gate functions of squeeze-excite, their derivatives, also of a BatchNorm's output; drop-path's
factor.

Every activation maps 0 to 0. The kernels rely on it: what lies outside of an image is loaded as 0 and stays 0 through
the activation. FAST (bf16 only) allows ``tanh.approx``, one operation of the special-function unit, good to 2^-11.
"""

import triton
import triton.language as tl

from effkernels.kernels.norm import scale_and_shift


@triton.jit
def fast_tanh(x):
    """tanh(x) in one operation, good to 2^-11."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def sigmoid(x, FAST: tl.constexpr):
    """1 / (1 + exp(-x)), which is 0.5 + 0.5 tanh(x / 2)."""
    if FAST:
        return 0.5 * fast_tanh(0.5 * x) + 0.5
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def activate(x, ACT: tl.constexpr, FAST: tl.constexpr):
    """phi(x) of fp32 x, for the activation of this name."""
    if ACT == "silu":
        if FAST:
            h = 0.5 * x
            return h * fast_tanh(h) + h
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
    """(phi(x), phi'(x)) of fp32 x, which share the transcendental function."""
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
    """The gate of squeeze-excite, of fp32 x."""
    if GATE == "sigmoid":
        return sigmoid(x, False)
    else:
        tl.static_assert(GATE == "hard_sigmoid")
        return tl.clamp(x * (1.0 / 6.0) + 0.5, 0.0, 1.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def gate_derivative(g, GATE: tl.constexpr):
    """The derivative of the gate function, from its value g."""
    if GATE == "sigmoid":
        return g * (1.0 - g)
    else:
        return tl.where((g > 0.0) & (g < 1.0), 1.0 / 6.0, 0.0)


@triton.jit
def branch_factor(draw, keep):
    """The factor that drop-path gives a branch: 1 / keep where ``draw`` lies below ``keep``, else 0; a negative
    ``keep`` says that ``draw`` is the factor."""
    return tl.where(keep > 0.0, tl.where(draw < keep, 1.0 / keep, 0.0), draw)


@triton.jit
def activation_row(norm, c, mask, ACT: tl.constexpr, FAST: tl.constexpr):
    """(scale, shift) [1, BLOCK_C] for ``normalise_activate``."""
    scale, shift = scale_and_shift(norm, c, mask)
    if FAST and ACT == "silu":
        return 0.5 * scale, 0.5 * shift
    else:
        return scale, shift


@triton.jit
def normalise_activate(x, scale, shift, ACT: tl.constexpr, FAST: tl.constexpr):
    """phi(BN(x)); silu(2h) = h + h tanh(h) takes h from halved coefficients, one multiplication less."""
    if FAST and ACT == "silu":
        h = x * scale + shift
        return h * fast_tanh(h) + h
    else:
        return activate(x * scale + shift, ACT, FAST)


@triton.jit
def normalise_activate_and_grad(x, scale, shift, ACT: tl.constexpr, FAST: tl.constexpr):
    """(phi(z), phi'(z)) of z = BN(x), coefficients from ``activation_row``; the fast SiLU's derivative is doubled:
    callers halve a factor that stays the same along the rows.

    With z = 2h and t = tanh(h): silu = h + h t and 2 silu' = (1 + t) (1 + h - h t).
    """
    if FAST and ACT == "silu":
        h = x * scale + shift
        t = fast_tanh(h)
        up = t + 1.0
        return h * t + h, up * (h - h * t) + up
    else:
        return activate_and_grad(x * scale + shift, ACT, FAST)
