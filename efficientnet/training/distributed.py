"""The processes of one run, as torchrun starts them, and BatchNorm across them."""

import atexit
import inspect
import os
import socket
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist
from torch import nn

from efficientnet.errors import InputError, TrainingStopped


@dataclass(frozen=True)
class Processes:
    """The place of this process among those of a run. In a run of one process every operation returns at once."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes files."""
        return self.rank == 0

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Add ``values`` over all processes, in place, and return them. Sums in float64 are exact enough to count
        in.
        """
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether ``flag`` is true in any process. The exchange is between CPUs, so that a GPU need not be waited
        for.
        """
        return bool(self.sum(torch.tensor(float(flag))))

    def gather(self, value: object) -> list | None:
        """The values of all processes, in the first one; None in the others."""
        if self.world == 1:
            return [value]
        values = [None] * self.world if self.first else None
        dist.gather_object(value, values)
        return values

    def by_first(self, do: Callable) -> object:
        """Run ``do()`` in the first process only and return its result in every process.

        An InputError that it raises there is raised in every process.
        """
        if self.world == 1:
            return do()
        result, error = None, None
        if self.first:
            try:
                result = do()
            except InputError as caught:
                error = caught
        box = [(result, error)]
        dist.broadcast_object_list(box)
        result, error = box[0]
        if error is not None:
            raise error
        return result


def join(device: str, timeout: float = 600) -> Processes:
    """Connect the processes that torchrun's environment describes; without such an environment there is one process.

    Args:
        device: "cpu", or any other name for GPUs, of which each process takes the one with its local rank.
        timeout: seconds that the processes wait for each other, here and in every later exchange.

    A group that exists already is used. ``leave`` ends it; a program that does not call ``leave`` leaves at its exit.

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
    if dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size(), local_rank)
    port = integer("MASTER_PORT", 1, 65535)
    host = os.environ.get("MASTER_ADDR")
    if not host:
        raise InputError("MASTER_ADDR must name the host of the first process; torchrun sets it")
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        count = torch.cuda.device_count()
        if local_rank >= count:
            raise InputError(
                f"this machine has {count} GPUs for {local_rank + 1} processes or more: lower torchrun's "
                "--nproc-per-node"
            )
        torch.cuda.set_device(local_rank)
    problem = (
        f"process {rank} of {world} cannot reach the others at {host}:{port} ({{}}); check world size, rank and port"
    )
    # The functions of this module have the group that there is when it is imported as a default argument. So it is
    # imported before there is one, which it would otherwise keep for ever.
    import_module("torch.distributed.nn.functional")

    try:
        if rank:
            _wait_for(host, port, timeout)
        with _at_most(2 * timeout + 5, problem.format("somebody else listens there")):
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout))
    except (OSError, RuntimeError, ValueError) as error:
        raise InputError(problem.format(str(error).strip().splitlines()[0])) from error
    atexit.register(leave)
    return Processes(rank, world, local_rank)


def _wait_for(host, port, seconds):
    """Wait until the first process listens. Torch waits too, but where nobody comes it ends with forty lines of its
    own.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return socket.create_connection((host, port), timeout=max(0.1, deadline - time.monotonic())).close()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextmanager
def _at_most(seconds, problem):
    """End the process with one line if what is within takes longer than ``seconds``.

    Torch waits for good, and is deaf to signals, for the answer of a server that is no process of the run.
    """

    def end():
        print(f"efficientnet: error: {problem}", file=sys.stderr, flush=True)
        os._exit(2)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


# What ``wrap`` returned and nobody has released.
_wrapped: weakref.WeakSet[nn.parallel.DistributedDataParallel] = weakref.WeakSet()


def release(model: nn.Module) -> None:
    """Take the process group out of a DistributedDataParallel, which cannot be called from here on; the model in it
    can.

    Its Reducer, an object of C++, would keep the group beyond its end, until the collector of cycles frees both while
    it holds the interpreter's lock. The group's destructor then waits for gloo's threads, and one of these may wait for
    that lock: for ever, or for the process to end in an abort. The order matters: the last reference is one of
    Python's, which lets go of the lock.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        _wrapped.discard(model)
        model.reducer = model.logger = None
        model.process_group = None


def leave() -> None:
    """End the group that ``join`` found, if there is one, with every model that ``wrap`` put into it: no thread of it
    is left.
    """
    for model in list(_wrapped):
        release(model)
    error = sys.exc_info()[1] or getattr(sys, "last_value", None)
    # An error that is under way, or has ended the program, keeps the calls that it left, and these keep the group.
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


LOST = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "Timed out",
    "NCCL",
    "gloo",
    "ProcessGroup",
)


@contextmanager
def lost_process(processes: Processes, hint: Callable[[], str]) -> Iterator[None]:
    """Around work with other processes: turn what torch raises when one of them is gone into one clear TrainingStopped.

    Its message ends in ``hint()``, which says how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if processes.world == 1 or isinstance(error, TrainingStopped) or not any(sign in str(error) for sign in LOST):
            raise
        line = str(error).strip().splitlines()[0]
        raise TrainingStopped(f"process {processes.rank} lost another process of the run ({line}); {hint()}") from error


class SyncBatchNorm(nn.BatchNorm2d):
    """``nn.SyncBatchNorm`` for the CPU, where torch's own, and DistributedDataParallel with it, refuse to run.

    Each process sends (count, mean, M2) of its batch. They are merged by Chan's formula: ``mean = sum n_i mean_i / N``,
    ``M2 = sum M2_i + n_i (mean_i - mean)^2``. The biased variance normalises, the unbiased one goes to running_var. The
    backward adds ``dy`` and ``dy * xhat`` over the processes. Gradients of weight and bias stay local, as those of any
    other parameter do, until DistributedDataParallel averages them.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [N, C, H, W] normalised by the statistics of all processes' batches, of x alone in a single process."""
        if not self.training or not dist.is_initialized():
            return super().forward(x)  # one process's BatchNorm
        y, mean, var, count = _SyncedNorm.apply(x, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self.num_batches_tracked.add_(1)
            momentum = 1 / self.num_batches_tracked.item() if self.momentum is None else self.momentum
            with torch.no_grad():
                self.running_mean.lerp_(mean.to(self.running_mean.dtype), momentum)
                self.running_var.lerp_((var * count / (count - 1).clamp(min=1)).to(self.running_var.dtype), momentum)
        return y


class _SyncedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        axes, shape = _axes(x)
        xf = x.to(torch.promote_types(x.dtype, torch.float32))
        var, mean = torch.var_mean(xf, axes, correction=0)
        count = torch.full_like(mean[:1], x.numel() / x.shape[1])
        local = torch.cat([count, mean, var * count])
        everyone = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, local)
        counts, means, m2s = torch.stack(everyone).split([1, x.shape[1], x.shape[1]], dim=1)
        total = counts.sum()
        mean = (counts * means).sum(0) / total
        var = (m2s + counts * (means - mean).square()).sum(0) / total
        rstd = (var + eps).rsqrt()
        y = (xf - mean.view(shape)) * rstd.view(shape)
        if weight is not None:
            y = y * weight.view(shape) + bias.view(shape)
        ctx.save_for_backward(x, weight, mean, rstd, total)
        ctx.mark_non_differentiable(mean, var, total)
        return y.to(x.dtype), mean, var, total

    @staticmethod
    def backward(ctx, dy, *_):
        x, weight, mean, rstd, total = ctx.saved_tensors
        axes, shape = _axes(x)
        dyf, xhat = dy.to(mean.dtype), (x.to(mean.dtype) - mean.view(shape)) * rstd.view(shape)
        local = torch.stack([dyf.sum(axes), (dyf * xhat).sum(axes)])
        sums = local.clone()
        dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = (s.view(shape) / total for s in sums)
        scale = rstd if weight is None else rstd * weight
        dx = scale.view(shape) * (dyf - mean_dy - xhat * mean_dy_xhat)
        grads = (None, None) if weight is None else (local[1].to(weight.dtype), local[0].to(weight.dtype))
        return dx.to(x.dtype), *grads, None


def _axes(x):
    """(All axes but that of the channels, the shape in which a vector over channels broadcasts.)"""
    return [0, *range(2, x.dim())], [1, -1] + [1] * (x.dim() - 2)


def synchronize_batch_norm(model: nn.Module) -> nn.Module:
    """Make every BatchNorm of the model see the batches of all processes; parameters and their names stay.

    It is ``nn.SyncBatchNorm.convert_sync_batchnorm`` on a GPU, and ``SyncBatchNorm`` above on the CPU.
    """
    if next(model.buffers()).device.type != "cpu":
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for layer in model.modules():
        if type(layer) is nn.BatchNorm2d:
            layer.__class__ = SyncBatchNorm
    return model


@torch.no_grad()
def share_running_statistics(model: nn.Module, processes: Processes, how: str) -> None:
    """Give every process the same running means and variances.

    Args:
        how: "reduce" averages them over the processes, "broadcast" takes those of the first.
    """
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
    """The model in DistributedDataParallel, until ``release`` or ``leave``; in a run of one process the model itself.

    It does not share running statistics at every step: ``share_running_statistics`` does so when it is called.
    """
    if processes.world == 1:
        return model
    kind = nn.parallel.DistributedDataParallel
    device_ids = [processes.local_rank] if next(model.parameters()).is_cuda else None
    # The second name is that of torch 2.12 and older.
    name = (
        "forward_sync_buffers" if "forward_sync_buffers" in inspect.signature(kind).parameters else "broadcast_buffers"
    )
    wrapped = kind(model, device_ids=device_ids, **{name: False})
    _wrapped.add(wrapped)
    return wrapped


def without_reduction(model: nn.Module, yes: bool) -> AbstractContextManager:
    """A context in which, if ``yes``, gradients are only added up in this process and not averaged over all of them."""
    return model.no_sync() if yes and isinstance(model, nn.parallel.DistributedDataParallel) else nullcontext()
