"""BatchNorm as launchers take it and as kernels read it: the one type of its parameters and statistics, and its
coefficients.

z = (y - mean) * rstd * weight + bias = y * scale + shift,      scale = weight * rstd,  shift = bias - mean * scale
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl


class BatchNorm(NamedTuple):
    """One BatchNorm over C channels: its parameters, and the statistics that normalise. A kernel takes it as one
    argument.

    Give ``rstd`` = 1 / sqrt(var + eps) where it is known: statistics of a batch, or running ones already turned. Give
    ``var`` with ``eps`` where the statistics are the running ones of a module as they are. Exactly one of ``rstd`` and
    ``var`` is read: ``rstd`` where it is not None.

    Attributes:
        weight, bias: gamma and beta [C], of any floating dtype.
        mean: [C], fp32 where it is a batch's.
        rstd: [C] or None. var: [C] or None.
        eps: added to ``var``.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    mean: torch.Tensor
    rstd: torch.Tensor | None = None
    var: torch.Tensor | None = None
    eps: float = 0.0


class BatchStatistics(NamedTuple):
    """How a launch that produces y finishes the statistics of this batch: eps, and the running statistics to update, if
    any.

    A launch given one returns (mean, rstd) fp32 [C] of its output, with rstd = 1 / sqrt(var + eps). The running
    statistics are updated in place, with the unbiased variance. ``momentum`` None is the cumulative average 1 /
    num_batches_tracked, which the caller has already advanced; otherwise ``num_batches_tracked``, if given, is advanced
    by the launch.
    """

    eps: float
    running_mean: torch.Tensor | None = None
    running_var: torch.Tensor | None = None
    num_batches_tracked: torch.Tensor | None = None
    momentum: float | None = None


@triton.jit
def load_vector(p, c, mask):
    """The fp32 values of a vector at channels c, 0 where ``mask`` is False."""
    return tl.load(p + c, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def load_rstd(norm, c, mask):
    """1 / sqrt(var + eps) of channels c of a ``BatchNorm``, finite where ``mask`` is False."""
    if norm.rstd is not None:
        return load_vector(norm.rstd, c, mask)
    else:
        var = tl.load(norm.var + c, mask=mask, other=1.0).to(tl.float32)
        return 1.0 / tl.sqrt(var + norm.eps)


@triton.jit
def coefficients(norm, c, mask):
    """(mean, rstd, scale, shift) of channels c of a ``BatchNorm``: it maps y to y * scale + shift."""
    mean = load_vector(norm.mean, c, mask)
    rstd = load_rstd(norm, c, mask)
    scale = load_vector(norm.weight, c, mask) * rstd
    return mean, rstd, scale, load_vector(norm.bias, c, mask) - mean * scale


@triton.jit
def scale_and_shift(norm, c, mask):
    """(scale, shift) of channels c of a ``BatchNorm`` as [1, C] rows."""
    _, _, scale, shift = coefficients(norm, c, mask)
    return scale[None, :], shift[None, :]
