"""From a module's BatchNorm to the one that kernels take: with the statistics of this batch, or with the running ones.

In training the kernel that produces y finishes its statistics in the same launch:

    wanted = batch_statistics(norm)
    y, found = <launcher>(..., statistics=wanted)
    bn = normalisation(norm, wanted, found, y)
"""

from typing import TYPE_CHECKING

import torch

from effkernels.ops import sync_batchnorm
from effkernels.parameters import BatchNormParams

if TYPE_CHECKING:
    from effkernels.kernels.norm import BatchNorm, BatchStatistics


def batch_statistics(norm: BatchNormParams, channels: int, device: torch.device) -> "BatchStatistics | None":
    """What the launch that produces a BatchNorm's input is to do about its statistics: a ``BatchStatistics``, or None
    to do nothing.

    It updates the running statistics, unless several processes are normalised together: then it only finds this
    process's.
    """
    from effkernels.kernels.norm import BatchStatistics

    if not norm.training:
        return None
    if norm.group:
        return sync_batchnorm.own_statistics(norm, channels, device)
    return BatchStatistics(
        eps=norm.eps,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        num_batches_tracked=norm.num_batches_tracked,
        momentum=norm.momentum,
    )


def normalisation(
    norm: BatchNormParams,
    wanted: "BatchStatistics | None",
    found: tuple[torch.Tensor, torch.Tensor] | None,
    y: torch.Tensor,
) -> "BatchNorm":
    """The ``BatchNorm`` that normalises y [..., C]: by (mean, rstd) = ``found``, or by the running statistics where
    none were wanted.
    """
    if wanted is None:
        return running_normalisation(norm)
    if norm.group:
        found = sync_batchnorm.merge_processes(norm, wanted, rows=y.numel() // y.shape[-1])
    return with_statistics(norm, *found)


def with_statistics(norm: BatchNormParams, mean: torch.Tensor, rstd: torch.Tensor) -> "BatchNorm":
    """The ``BatchNorm`` of known statistics, both fp32 [C]."""
    from effkernels.kernels.norm import BatchNorm

    return BatchNorm(norm.weight, norm.bias, mean, rstd)


def running_normalisation(norm: BatchNormParams) -> "BatchNorm":
    """The ``BatchNorm`` of the running statistics, turned to (mean, rstd) now, since the backward must not see a later
    update.
    """
    return with_statistics(norm, norm.running_mean.float().clone(), (norm.running_var.float() + norm.eps).rsqrt())


def frozen_normalisation(norm: BatchNormParams) -> "BatchNorm":
    """The ``BatchNorm`` of the running statistics as they lie in the module: kernels turn them when they read them."""
    from effkernels.kernels.norm import BatchNorm

    return BatchNorm(norm.weight, norm.bias, norm.running_mean, var=norm.running_var, eps=norm.eps)


def backward_norm(norm: BatchNormParams, mean: torch.Tensor, rstd: torch.Tensor) -> "BatchNorm":
    """The ``BatchNorm`` of a backward. Kernels round the sums that they return to the parameters' dtype, which sums
    that are still to be added over several processes must not be: those parameters are fp32.
    """
    if norm.group:
        norm = norm._replace(weight=norm.weight.float(), bias=norm.bias.float())
    return with_statistics(norm, mean, rstd)


def batch_terms(
    norm: BatchNormParams, bn: "BatchNorm", sums: tuple[torch.Tensor, ...], rows: int
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(k0, k1) of dy = scale * dz + k0 + k1 * y: None where the statistics are not a batch's, else those of all
    processes.

    sums: (dgamma, dbeta, k0, k1) as this process's kernels found them, over ``rows`` values a channel.
    """
    if not norm.training:
        return None
    dgamma, dbeta, k0, k1 = sums
    if not norm.group:
        return k0, k1
    return sync_batchnorm.batch_terms(dgamma=dgamma, dbeta=dbeta, bn=bn, rows=rows, group=norm.group)
