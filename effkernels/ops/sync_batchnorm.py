"""BatchNorm over the batches of several processes (``nn.SyncBatchNorm``): what the kernels of each find, put together.

    forward    each process has (count, mean, M2) of its rows: all are gathered and merged by Chan's formula, as tiles
    are backward   dgamma and dbeta stay each process's own (DistributedDataParallel averages them); their sums over all
    give the batch
               terms of dy = scale * dz + k0 + k1 * y

Two small collectives a BatchNorm and step, as in PyTorch. Processes may have different numbers of rows. ``group`` is
the name of a process group, which an operator can take.
"""

from typing import TYPE_CHECKING

import torch

from effkernels.parameters import BatchNormParams

if TYPE_CHECKING:
    from effkernels.kernels.norm import BatchNorm, BatchStatistics


def _group(name: str):
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def own_statistics(norm: BatchNormParams, channels: int, device: torch.device) -> "BatchStatistics":
    """``BatchStatistics`` that put this process's mean and unbiased variance into vectors of their own, as running ones
    of momentum 1.
    """
    from effkernels.kernels.norm import BatchStatistics

    mean, variance = torch.zeros(2, channels, dtype=torch.float32, device=device)
    return BatchStatistics(norm.eps, mean, variance, momentum=1.0)


def merge_processes(norm: BatchNormParams, own: "BatchStatistics", rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, rstd) fp32 [C] over all processes of ``norm.group``, and the running statistics of ``norm`` updated with
    them.

    own: ``own_statistics`` after the launch that filled them, over this process's ``rows`` values a channel.
    """
    from effkernels.kernels.batchnorm import merge
    from effkernels.kernels.norm import BatchStatistics

    mean, variance = own.running_mean, own.running_var
    C = mean.numel()
    m2 = variance * (rows - 1) if rows > 1 else torch.zeros_like(variance)
    sent = torch.cat([mean, m2, mean.new_full((1,), rows)])
    group = _group(norm.group)
    everyone = sent.new_empty(torch.distributed.get_world_size(group) * sent.numel())
    torch.distributed.all_gather_into_tensor(everyone, sent, group=group)
    means, m2s, counts = (t.contiguous() for t in everyone.view(-1, sent.numel()).split([C, C, 1], dim=1))
    statistics = BatchStatistics(
        eps=norm.eps,
        running_mean=norm.running_mean,
        running_var=norm.running_var,
        num_batches_tracked=norm.num_batches_tracked,
        momentum=norm.momentum,
    )
    return merge((counts.view(-1), means, m2s), statistics)


def batch_terms(
    dgamma: torch.Tensor, dbeta: torch.Tensor, bn: "BatchNorm", rows: int, group: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """(k0, k1) fp32 [C] over all processes, from this process's gradients of a ``BatchNorm`` over ``rows`` values a
    channel.
    """
    C = dgamma.numel()
    sums = torch.cat([dgamma.float(), dbeta.float(), bn.rstd.new_full((1,), rows)])
    torch.distributed.all_reduce(sums, group=_group(group))
    dgamma, dbeta, count = sums.split([C, C, 1])
    scale = bn.weight.float() * bn.rstd
    k1 = -scale * bn.rstd * dgamma / count
    return -scale * dbeta / count - k1 * bn.mean, k1
