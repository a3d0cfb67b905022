"""Compile the kernels of a step before the first one, in parallel.

Triton compiles a kernel where it is first started, one after the other. ``warm_up`` runs the step once with every
launch noted instead of started, and has each distinct kernel compiled by a pool of forked processes. Those compile for
the target that this process named and touch no GPU; what they compile lies in Triton's cache on disk, where this
process, and every later one, finds it.
"""

import contextlib
import functools
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, Future, ProcessPoolExecutor, as_completed
from pathlib import Path

import torch
from torch import nn

_JOBS: list[Callable] = []  # of the forked processes


class _Pointer:
    """Of a tensor what a kernel is compiled for: its dtype and the alignment of its address."""

    def __init__(self, tensor: torch.Tensor):
        self.dtype, self.address = tensor.dtype, 0 if tensor.is_meta else tensor.data_ptr() % 16

    def data_ptr(self) -> int:
        return self.address


def _without_memory(value: object) -> object:
    """A kernel's argument that holds no tensor."""
    if isinstance(value, torch.Tensor):
        return _Pointer(value)
    if isinstance(value, tuple):
        members = [_without_memory(member) for member in value]
        return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
    return value


@contextlib.contextmanager
def collected() -> Iterator[list[tuple]]:
    """Within: kernels, of every thread, are noted in the list this yields instead of started."""
    from effkernels.kernels.common import Kernel

    launches: list[tuple] = []

    def note(kernel, args, kwargs):
        args = tuple(map(_without_memory, args))
        launches.append((kernel, args, {name: _without_memory(value) for name, value in kwargs.items()}))

    Kernel.collector = staticmethod(note)
    try:
        yield launches
    finally:
        Kernel.collector = None


class Later(Executor):
    """Keeps what it is given to run."""

    def __init__(self):
        self.jobs: list[tuple[Callable, Future]] = []

    def submit(self, fn: Callable, /, *args: object, **kwargs: object) -> Future:
        """Keep it."""
        self.jobs.append((functools.partial(fn, *args, **kwargs), Future()))
        return self.jobs[-1][1]

    def cancel(self) -> None:
        """Give up what is not done."""
        for _, future in self.jobs:
            if future.cancel():
                future.set_running_or_notify_cancel()  # else who waits for it waits for good


def cores() -> int:
    """How many this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _job(i: int) -> tuple[int, float]:
    """(i, seconds of CPU) of a compilation. An error is left to the process that wants the kernel: it compiles again,
    and so raises it as Triton does.
    """
    before = os.times()
    with contextlib.suppress(Exception):
        _JOBS[i]()
    after = os.times()
    return i, sum(after[:4]) - sum(before[:4])


def compile_launches(
    launches: list[tuple], processes: int | None = None, report: Callable[[int, int], None] | None = None
) -> list[float]:
    """Compile the distinct kernels of ``collected`` launches that this process has not compiled yet; the seconds of CPU
    that each took.

    processes: how many, by default one for each core that this process may use; 1 compiles here. report(done, total) is
    told after each. A kernel that does not compile raises its error where it is started.
    """
    import triton

    cache_folder()
    later, seconds, made = Later(), [], 0
    with triton.AsyncCompileMode(later, ignore_errors=True):
        for kernel, args, kwargs in launches:
            kernel.warmup(*args, grid=(1,), **kwargs)
        total = len(later.jobs)

        def finish(i, took):
            nonlocal made
            job, future = later.jobs[i]
            try:
                future.set_result(job())
            except Exception as error:  # whatever a compiler raises: the launcher that starts this kernel handles it
                future.set_exception(error)
            seconds.append(took)
            made += 1
            if report is not None:
                report(made, total)

        processes = min(total, cores() if processes is None else processes)
        _JOBS[:] = [job for job, _ in later.jobs]
        try:
            if processes <= 1:
                for i in range(total):
                    finish(*_job(i))
            else:
                fork = multiprocessing.get_context("fork")  # workers have the kernels, and start at once
                with ProcessPoolExecutor(processes, mp_context=fork) as pool:
                    for done in as_completed([pool.submit(_job, i) for i in range(total)]):
                        finish(*done.result())
        finally:
            _JOBS.clear()
            if made < total:  # interrupted: Triton forgets what it would wait for
                later.cancel()
                for kernel, *_ in launches:
                    kernel.device_caches.clear()
    return seconds


@functools.cache
def cache_folder() -> str:
    """The folder where Triton keeps compiled kernels: TRITON_CACHE_DIR, or ~/.triton/cache.

    Where it cannot be written, a RuntimeWarning says so, and a temporary folder takes its place in this process: else
    no kernel could be compiled.
    """
    import triton

    folder = triton.knobs.cache.dir
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        temporary = tempfile.TemporaryDirectory(prefix="effkernels-")
        _FOLDERS.append(temporary)  # until the process ends
        warnings.warn(
            f"Triton's cache folder {folder!r} cannot be written ({type(error).__name__}: {error}): kernels are "
            "compiled again by every process. Let TRITON_CACHE_DIR name a folder that can be",
            RuntimeWarning,
            stacklevel=2,
        )
        triton.knobs.cache.dir = temporary.name
        return temporary.name


_FOLDERS: list[tempfile.TemporaryDirectory] = []


def _tensors(output: object) -> Iterator[torch.Tensor]:
    """The tensors of a model's output, which may be one, or a container of them."""
    if isinstance(output, torch.Tensor):
        yield output
    elif isinstance(output, (Mapping, list, tuple)):
        for member in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(member)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Within, a step may be run: modes, buffers, gradients and random numbers are put back at the end."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    devices = {t.device.index for t in (*model.parameters(), *model.buffers()) if t.is_cuda}
    try:
        with torch.random.fork_rng(devices=sorted(devices)):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)


def warm_up(
    model: nn.Module,
    x: torch.Tensor,
    training: bool = True,
    *,
    processes: int | None = None,
    report: Callable[[int, int], None] | None = None,
) -> int:
    """Compile the kernels that a step of ``model`` on inputs like ``x`` starts, in parallel; returns how many.

    Args:
        model: with fused blocks, on the device where it will run; under DistributedDataParallel, what that wraps.
        x: an input of the shape, dtype and memory format to come. Call it under the autocast to come.
        training: a forward in training and its backward; else a forward in evaluation mode without gradients.
        processes: that compile; by default as many as there are cores for this process.
        report: told (kernels compiled, kernels in all) after each.

    The step runs with launches left out, so its memory is needed and its numbers mean nothing; weights, buffers,
    gradients, modes and random numbers are as before. Other threads must not run fused blocks meanwhile. Raises
    ValueError where no kernel would run, with the reason, or for an x that the model does not take.
    """
    for name, value, kind in (("model", model, nn.Module), ("x", x, torch.Tensor)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    launches: list[tuple] = []
    problem = why_no_kernels(model, x)
    if problem is None:
        with unchanged(model), collected() as launches, torch.set_grad_enabled(training):
            model.train(training)
            try:
                output = model(x)
            except (ValueError, TypeError) as error:
                raise ValueError(f"the model does not take x of shape {tuple(x.shape)}: {error}") from error
            if training:
                wanted = [t for t in _tensors(output) if t.requires_grad]
                if wanted:
                    torch.autograd.backward(wanted, [torch.empty_like(t) for t in wanted])
        if not launches:
            problem = "it has no fused block (effkernels.accelerate makes those of other libraries fused)"
    if problem is not None:
        raise ValueError(f"model runs no fused kernels for x of shape {tuple(x.shape)}: {problem}")
    return len(compile_launches(launches, processes, report))


def why_no_kernels(model: nn.Module, x: torch.Tensor) -> str | None:
    """Why no block of ``model`` would run compiled kernels for x, or None. (It may have other fused layers than blocks:
    then only a run tells.)
    """
    from effkernels import dispatch
    from effkernels.adapters.accelerate import explain

    if dispatch.interpreting():
        return "TRITON_INTERPRET runs kernels without compiling them"
    reasons = explain(model, x)
    if not reasons:
        return dispatch.platform_problem(x.device.type, x.device.index)
    if reasons.fused:
        return None
    return next((reason for reason in reasons.values() if reason is not None), "effkernels.accelerate(model) first")
