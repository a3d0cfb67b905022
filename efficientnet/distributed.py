"""Processes of one run, as torchrun starts them, and BatchNorm across them."""

import os
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from efficientnet.settings import InputError, TrainingStopped


@dataclass(frozen=True)
class Processes:
    """This process's place among those of a run; alone, every operation is free."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Over all processes; float64 sums are exact enough to count in."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def gather(self, value) -> list | None:
        """Every process's value, in the first one; None elsewhere."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values

    def from_first(self, value):
        """The first process's value, everywhere."""
        if self.world == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]


def join(device: str) -> Processes:
    """The processes that torchrun's environment describes (one, without it), connected.

    Raises InputError for an environment that cannot be right, or whose processes do not find each other.
    """
    if "WORLD_SIZE" not in os.environ and "RANK" not in os.environ:
        return Processes()

    def integer(name, low, high, default=None):
        text = os.environ.get(name, default)
        if text is None or not text.lstrip("-").isdigit() or not low <= int(text) <= high:
            raise InputError(f"{name} must be an integer from {low} to {high}, got {text!r}; torchrun sets it")
        return int(text)

    world = integer("WORLD_SIZE", 1, 2**20)
    rank = integer("RANK", 0, world - 1)
    local_rank = integer("LOCAL_RANK", 0, world - 1, str(rank))
    if world == 1:
        return Processes()
    port = integer("MASTER_PORT", 1, 65535)
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise InputError("MASTER_ADDR must name the host of the first process; torchrun sets it")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(f"this machine has {count} GPUs for {local_rank + 1} processes or more: lower torchrun's --nproc-per-node")
        torch.cuda.set_device(local_rank)
    seconds = integer("EFFICIENTNET_JOIN_SECONDS", 1, 86400, "300")
    try:
        dist.init_process_group("nccl" if on_gpu else "gloo", timeout=timedelta(seconds=seconds))
    except (RuntimeError, ValueError) as error:
        line = str(error).strip().splitlines()[0]
        raise InputError(
            f"process {rank} of {world} cannot reach the others at {host}:{port} ({line}); check world size, rank and port"
        ) from error
    return Processes(rank, world, local_rank)


def leave() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class lost_process:
    """Around collective work: what torch raises when another process is gone becomes one clear error."""

    SIGNS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "NCCL", "gloo", "ProcessGroup")

    def __init__(self, processes: Processes, hint: str):
        self.processes, self.hint = processes, hint

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        if self.processes.world > 1 and isinstance(error, RuntimeError) and any(sign in str(error) for sign in self.SIGNS):
            line = str(error).strip().splitlines()[0]
            raise TrainingStopped(f"process {self.processes.rank} lost another process of the run ({line}); {self.hint}") from error


class SyncBatchNorm(nn.SyncBatchNorm):
    """``nn.SyncBatchNorm``, which refuses the CPU, for any device of a process group.

    Each process sends (count, mean, M2) of its batch, merged by Chan's formula: ``mean = sum n_i mean_i / N``,
    ``M2 = sum M2_i + n_i (mean_i - mean)^2``; biased variance to normalise, unbiased for running_var. The backward sums
    ``dy`` and ``dy * xhat`` over the processes; gradients of weight and bias stay local, as those of any other parameter.
    """

    def forward(self, x):
        group = self.process_group or dist.group.WORLD
        if x.is_cuda or not self.training or not dist.is_initialized() or dist.get_world_size(group) == 1:
            return super().forward(x) if x.is_cuda else _batch_norm(self, x)
        momentum = self.momentum
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            if momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        y, mean, var, count = _SyncedNorm.apply(x, self.weight, self.bias, self.eps, group)
        if self.track_running_stats:
            with torch.no_grad():
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * count / (count - 1).clamp(min=1), momentum)
        return y


def _batch_norm(layer, x):
    """As nn.BatchNorm2d."""
    momentum = layer.momentum or 0.0
    if layer.training and layer.track_running_stats:
        layer.num_batches_tracked.add_(1)
        if layer.momentum is None:
            momentum = 1.0 / float(layer.num_batches_tracked)
    batch = layer.training or layer.running_mean is None
    return F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, batch, momentum, layer.eps)


class _SyncedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps, group):
        axes = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        xf = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        n = torch.tensor(float(x.numel() // x.shape[1]), dtype=xf.dtype, device=x.device)
        var, mean = torch.var_mean(xf, axes, correction=0)
        local = torch.cat([n.view(1), mean, var * n])
        everyone = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(everyone, local, group)
        counts, means, m2s = (torch.stack(part) for part in zip(*(t.split([1, x.shape[1], x.shape[1]]) for t in everyone), strict=True))
        total = counts.sum(0)
        mean = (counts * means).sum(0) / total
        var = (m2s + counts * (means - mean).square()).sum(0) / total
        rstd = (var + eps).rsqrt()
        xhat = (xf - mean.view(shape)) * rstd.view(shape)
        y = xhat
        if weight is not None:
            y = xhat * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, total)
        ctx.group = group
        ctx.mark_non_differentiable(mean, var, total)
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, rstd, total = ctx.saved_tensors
        axes, shape = [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)
        dyf, xhat = dy.to(mean.dtype), (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        sum_dy, sum_dy_xhat = dyf.sum(axes), (dyf * xhat).sum(axes)
        sums = torch.cat([sum_dy, sum_dy_xhat])
        dist.all_reduce(sums, group=ctx.group)
        all_dy, all_dy_xhat = (s.view(shape) / total for s in sums.chunk(2))
        scale = rstd if weight is None else rstd * weight
        dx = scale.view(shape) * (dyf - all_dy - xhat * all_dy_xhat)
        grads = (None, None) if weight is None else (sum_dy_xhat.to(weight.dtype), sum_dy.to(weight.dtype))
        return dx.to(x.dtype), *grads, None, None


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """``nn.SyncBatchNorm.convert_sync_batchnorm``, with layers that also serve the CPU; parameters and names stay."""
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) is nn.SyncBatchNorm and not layer.weight.is_cuda:
            layer.__class__ = SyncBatchNorm
    return model


@torch.no_grad()
def share_running_statistics(model: nn.Module, processes: Processes, how: str) -> None:
    """``how`` "reduce": running means and variances averaged over the processes; "broadcast": those of the first."""
    if processes.world == 1:
        return
    buffers = [buffer for buffer in model.buffers() if buffer.is_floating_point()]
    flat = torch.cat([buffer.flatten() for buffer in buffers])
    if how == "reduce":
        dist.all_reduce(flat)
        flat /= processes.world
    else:
        dist.broadcast(flat, 0)
    for buffer, values in zip(buffers, flat.split([buffer.numel() for buffer in buffers]), strict=True):
        buffer.copy_(values.view_as(buffer))


def wrap(model: nn.Module, processes: Processes) -> nn.Module:
    """DistributedDataParallel, whose running statistics are shared by ``share_running_statistics`` only."""
    if processes.world == 1:
        return model
    device_ids = [processes.local_rank] if next(model.parameters()).is_cuda else None
    return nn.parallel.DistributedDataParallel(model, device_ids=device_ids, broadcast_buffers=False)


def without_reduction(model: nn.Module, yes: bool):
    """A context in which gradients are only added up here."""
    return model.no_sync() if yes and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
