"""A step of a module: its launches recorded on the ``meta`` device, each predicted, in parallel and once where they are
the same."""

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from effkernels.tools.simulator import project
from effkernels.tools.simulator.baselines import PRODUCT_SHARE
from effkernels.tools.simulator.launch import Prediction, predict
from effkernels.tools.simulator.machine import Machine, machine_of
from effkernels.tools.traffic import Operator, Operators

# Of PyTorch's operators those that start no kernel on a GPU: allocations, gradients handed over.
FREE = ("empty", "detach", "copy_")


@contextlib.contextmanager
def recorded(gpu: str | None = None) -> Iterator[tuple[list[project.Launch], list[Operator]]]:
    """Within: (kernel launches, operators) of fused modules on ``meta`` tensors, as on a GPU that runs every kernel:
    with the configurations of ``gpu``, or those of the rules.
    """
    from effkernels import dispatch

    original, dispatch.why_not_fused = dispatch.why_not_fused, lambda *args, **kwargs: None
    operators: list[Operator] = []
    try:
        with (
            project.record_launches(project.GPUS[gpu] if gpu else None) as launches,
            Operators(operators.append, FREE),
        ):
            yield launches, operators
    finally:
        dispatch.why_not_fused = original


def step_of(module: nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    """A function that runs one step: a forward, and in training a cross entropy or a given gradient, and the
    backward.
    """
    module.train(training)

    def step():
        with torch.set_grad_enabled(training):
            out = module(x)
            if training and out.dim() == 2:
                labels = torch.empty(len(x), dtype=torch.long, device=x.device)
                F.cross_entropy(out, labels if x.is_meta else labels.zero_()).backward()
            elif training:
                out.backward(torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=out.device))

    return step


def step_launches(
    module: nn.Module, x: torch.Tensor, training: bool, gpu: str | None = None
) -> tuple[list[project.Launch], list[Operator]]:
    """(kernel launches, operators) of a step, as ``recorded`` has them."""
    step = step_of(module, x, training)
    with recorded(gpu) as (launches, operators):
        step()
    return launches, operators


@dataclass
class Step:
    """One step of a network, by name: a prediction for each launch, in order, and PyTorch's own operators."""

    model: str
    mode: str
    batch: int
    gpu: str
    predictions: list[Prediction]
    operators: list[Operator]

    @property
    def operators_time(self) -> float:
        """At their bytes, and products at ``PRODUCT_SHARE`` of the matrix rate where that takes longer."""
        gpu = project.GPUS[self.gpu]
        return sum(max(o.moved / gpu.bandwidth, o.flops / (PRODUCT_SHARE * gpu.matrix)) for o in self.operators)

    @property
    def time(self) -> float:
        """Predicted seconds of all launches and operators, one after the other."""
        return sum(prediction.time for prediction in self.predictions) + self.operators_time

    @property
    def bytes_time(self) -> float:
        """Seconds that their distinct bytes take at the bandwidth."""
        moved = sum(operator.moved for operator in self.operators)
        return sum(prediction.bytes_time for prediction in self.predictions) + moved / project.GPUS[self.gpu].bandwidth


def held_by_l2(launches: Sequence[project.Launch], capacity: float) -> list[dict[int, float]]:
    """Before each launch: {storage: bytes} that L2 still holds, if it keeps the ``capacity`` bytes that launches
    touched last."""
    kept: OrderedDict[int, float] = OrderedDict()
    found = []
    for launch in launches:
        recent, held = 0.0, {}
        for storage in reversed(kept):
            recent += kept[storage]
            if recent > capacity:
                break
            held[storage] = kept[storage]
        found.append(held)
        for tensor in project.tensors(launch):
            kept.pop(tensor.storage, None)
            kept[tensor.storage] = min(tensor.bytes, tensor.storage_bytes)
    return found


def identity(launch: project.Launch, machine: Machine, cached: dict[int, float]) -> tuple:
    """What a launch's time depends on, besides the machine and the simulator."""
    tensors = [
        (tensor.slot, tensor.address, tensor.bytes, tensor.storage_bytes, cached.get(tensor.storage, 0.0))
        for tensor in project.tensors(launch)
    ]
    numbers = [(name, value) for name, value in project.arguments(launch) if isinstance(value, (int, float))]
    return launch.digest(machine.arch), launch.grid, tuple(tensors), tuple(numbers)


def digest(launches: Sequence[project.Launch], operators: Sequence[Operator], gpu: str) -> str:
    """Of all that the predictions of a step depend on: two steps with the same digest take the same time."""
    machine = machine_of(gpu)
    held = held_by_l2(launches, machine.l2_kept)
    keys = [identity(launch, machine, cached) for launch, cached in zip(launches, held, strict=True)]
    parts = project.version(), project.GPUS[gpu], machine, keys, PRODUCT_SHARE, operators
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


_JOBS: list[list[tuple[project.Launch, dict[int, float]]]] = []  # of the forked processes


def _job(j: int, gpu: str, machine: Machine | None) -> list[Prediction | RuntimeError]:
    """Predictions of the launches of a job, or what the compiler has against them."""
    try:
        return [predict(launch, gpu, cached=cached, machine=machine) for launch, cached in _JOBS[j]]
    except RuntimeError as error:
        return [error] * len(_JOBS[j])


@contextlib.contextmanager
def predictor(
    launches: Sequence[project.Launch], gpu: str, held: Sequence[dict[int, float]], processes: int | None = None
) -> Iterator[Callable[..., list[Prediction]]]:
    """Within: predict(machine=None, report=..., raises=True) predicts the launches, as ``predict_launches`` does; each
    call with other figures of the GPU, all in the same ``processes`` processes (default: one a core).

    held: what L2 holds before each launch.
    """
    figures = machine_of(gpu)
    jobs: dict[str, dict[tuple, tuple]] = {}
    keys = []
    for launch, cached in zip(launches, held, strict=True):
        keys.append(identity(launch, figures, cached))
        jobs.setdefault(keys[-1][0], {}).setdefault(keys[-1], (launch, cached))
    ordered = sorted(jobs.values(), key=len, reverse=True)
    _JOBS[:] = [list(job.values()) for job in ordered]
    total = sum(map(len, ordered))
    processes = min(processes or os.cpu_count() or 1, len(ordered))
    fork = multiprocessing.get_context("fork")
    pool = concurrent.futures.ProcessPoolExecutor(processes, mp_context=fork) if processes > 1 else None

    def predict_all(
        machine: Machine | None = None,
        report: Callable[[int, int], None] = lambda done, total: None,
        raises: bool = True,
    ) -> list[Prediction]:
        made: dict[tuple, Prediction] = {}

        def keep(j, predictions):
            if raises and isinstance(predictions[0], RuntimeError):
                raise predictions[0]
            made.update(zip(ordered[j], predictions, strict=True))
            report(len(made), total)

        if pool is None:
            for j in range(len(ordered)):
                keep(j, _job(j, gpu, machine))
        else:
            running = {pool.submit(_job, j, gpu, machine): j for j in range(len(ordered))}
            for job in concurrent.futures.as_completed(running):
                keep(running[job], job.result())
        return [made[key] for key in keys]

    try:
        yield predict_all
    finally:
        if pool is not None:
            pool.shutdown(cancel_futures=True)
        _JOBS.clear()


def predict_launches(
    launches: Sequence[project.Launch],
    gpu: str,
    processes: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
    machine: Machine | None = None,
    held: list[dict] | None = None,
    raises: bool = True,
) -> list[Prediction]:
    """A prediction for each launch, in order; where it does not compile a RuntimeError is raised, or stands for it.

    Equal launches are predicted once, in ``processes`` processes (default: one a core), those of the same machine code
    in the same one, which compiles and reads it once. report(done, total) is told how many are. machine: other figures
    than the GPU's. held: what L2 holds before each launch; by default as if they followed one another.
    """
    held = held_by_l2(launches, (machine or machine_of(gpu)).l2_kept) if held is None else held
    with predictor(launches, gpu, held, processes) as predict_all:
        return predict_all(machine, report, raises)


def predict_calls(calls: list[list[project.Launch]], gpu: str) -> list[list[Prediction] | RuntimeError]:
    """The predictions of each call's launches, or the error of a call of which one does not compile.

    Nothing is in L2 when a call begins.
    """
    machine = machine_of(gpu)
    held = [cached for launches in calls for cached in held_by_l2(launches, machine.l2_kept)]
    found = iter(predict_launches([launch for launches in calls for launch in launches], gpu, held=held, raises=False))
    grouped = [[next(found) for _ in launches] for launches in calls]
    return [next((each for each in group if isinstance(each, RuntimeError)), group) for group in grouped]
