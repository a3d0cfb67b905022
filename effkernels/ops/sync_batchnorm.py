"""BatchNorm over the batches of several processes (``nn.SyncBatchNorm``): what the kernels of each find, put together.

    forward    each process has (count, mean, M2) of its rows: all are gathered and merged by Chan's formula, as tiles are
    backward   dgamma and dbeta stay each process's own (DistributedDataParallel averages them); their sums over all give the batch
               terms of dy = scale * dz + k0 + k1 * y

Two small collectives a BatchNorm and step, as in PyTorch. Processes may have different numbers of rows. ``group`` is the name of a
process group, which an operator can take.
"""

import torch


def _group(name: str):
    return torch.distributed.distributed_c10d._resolve_process_group(name)


def merged(kernel, like: torch.Tensor, statistics, group: str):
    """(output, (mean, rstd)) of ``kernel(statistics=...)``, with those of all processes finished as ``statistics`` says.

    like: any vector over the output's channels on its device.
    """
    from effkernels.kernels import batchnorm
    from effkernels.kernels.norm import BatchStatistics

    C = like.numel()
    mean, variance = torch.zeros(2, C, dtype=torch.float32, device=like.device)
    out, _ = kernel(statistics=BatchStatistics(statistics.eps, mean, variance, momentum=1.0))  # puts the unbiased variance there
    rows = out.numel() // C
    m2 = variance * (rows - 1) if rows > 1 else torch.zeros_like(variance)
    own = torch.cat([mean, m2, mean.new_full((1,), rows)])
    everyone = own.new_empty(torch.distributed.get_world_size(_group(group)) * own.numel())
    torch.distributed.all_gather_into_tensor(everyone, own, group=_group(group))
    means, m2s, counts = (t.contiguous() for t in everyone.view(-1, own.numel()).split([C, C, 1], dim=1))
    return out, batchnorm.merge((counts.view(-1), means, m2s), statistics)


def batch_terms(dgamma, dbeta, bn, rows: int, group: str):
    """(k0, k1) fp32 [C] from this process's gradients of one BatchNorm, (gamma, mean, rstd), over ``rows`` values a channel."""
    gamma, mean, rstd = bn
    C = gamma.numel()
    sums = torch.cat([dgamma.float(), dbeta.float(), rstd.new_full((1,), rows)])
    torch.distributed.all_reduce(sums, group=_group(group))
    dgamma, dbeta, count = sums.split([C, C, 1])
    scale = gamma.float() * rstd
    k1 = -scale * rstd * dgamma / count
    return -scale * dbeta / count - k1 * mean, k1
