"""A step of a whole network: its launches recorded on the ``meta`` device, each predicted, in parallel and once where
they are the same."""

import concurrent.futures
import contextlib
import hashlib
import multiprocessing
import os
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from effkernels.tools.simulator import project
from effkernels.tools.simulator.baselines import PRODUCT_SHARE
from effkernels.tools.simulator.launch import VERSION, Prediction, predict
from effkernels.tools.simulator.machine import machine_of
from effkernels.tools.traffic import Operator, Operators

MODELS = tuple(f"b{i}" for i in range(8))
MODES = ("train", "infer")
# Of PyTorch's operators those that start no kernel on a GPU: allocations, gradients handed over.
FREE = ("empty", "detach", "copy_")


@contextlib.contextmanager
def recorded():
    """Within: (kernel launches, operators) of fused modules on ``meta`` tensors, as on a GPU that runs every kernel."""
    from effkernels import dispatch

    original, dispatch.why_not_fused = dispatch.why_not_fused, lambda *args, **kwargs: None
    operators: list[Operator] = []
    try:
        with (
            project.record_launches() as launches,
            Operators(operators.append, FREE),
        ):
            yield launches, operators
    finally:
        dispatch.why_not_fused = original


def step_of(module, x, training: bool):
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


def step_launches(module, x, training: bool):
    """(kernel launches, operators) of a step."""
    step = step_of(module, x, training)
    with recorded() as (launches, operators):
        step()
    return launches, operators


def network(name: str, training: bool, images: int, device: str = "meta"):
    """(model, images) of a network on ``device``, bf16. In training its blocks keep fp32 weights, as under
    autocast; those of the head and classifier are bf16, as autocast hands them over."""
    try:
        from efficientnet import create_model
    except ImportError as error:
        raise RuntimeError("predicting a network needs the package efficientnet") from error
    bf16 = torch.bfloat16
    model = create_model(name, device=device, dtype=None if training else bf16)
    if training:
        for layer in (model.conv_head, model.bn2, model.classifier):
            layer.to(bf16)
    size = model.config.resolution
    return model, torch.empty(images, 3, size, size, device=device, dtype=bf16).to(memory_format=torch.channels_last)


@dataclass
class Step:
    """One step of a network: a prediction for each launch, in order, and PyTorch's own operators."""

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
        return sum(prediction.time for prediction in self.predictions) + self.operators_time

    @property
    def bytes_time(self) -> float:
        moved = sum(operator.moved for operator in self.operators)
        return sum(prediction.bytes_time for prediction in self.predictions) + moved / project.GPUS[self.gpu].bandwidth


def held_by_l2(launches, capacity: float) -> list[dict[int, float]]:
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


def identity(launch: project.Launch, arch: int, cached: dict[int, float]) -> tuple:
    """What a prediction depends on."""
    values = []
    for name, value in project.arguments(launch):
        if isinstance(value, torch.Tensor):
            values.append(
                (name, tuple(value.shape), str(value.dtype), cached.get(value.untyped_storage()._cdata, 0.0) > 0)
            )
        else:
            values.append((name, value))
    slots = tuple(tensor.slot for tensor in project.tensors(launch))
    return launch.digest(arch), launch.grid, tuple(values), slots


def digest(launches, gpu: str) -> str:
    """Of all that the predictions of a step depend on: two steps with the same digest take the same time."""
    machine = machine_of(gpu)
    keys = [
        identity(*pair)
        for pair in zip(launches, [machine.arch] * len(launches), held_by_l2(launches, machine.l2_kept), strict=True)
    ]
    return hashlib.sha256(repr((VERSION, gpu, project.GPUS[gpu], machine, keys)).encode()).hexdigest()[:16]


_JOBS: list = []


def _job(j: int) -> Prediction:
    return predict(*_JOBS[j][:2], cached=_JOBS[j][2])


def predict_launches(
    launches, gpu: str, processes: int | None = None, report=lambda done, total: None
) -> list[Prediction]:
    """A prediction for each launch, in order; equal ones are made once, in ``processes`` processes (default: one a
    core)."""
    machine = machine_of(gpu)
    held = held_by_l2(launches, machine.l2_kept)
    keys = [identity(launch, machine.arch, cached) for launch, cached in zip(launches, held, strict=True)]
    first: dict[tuple, int] = {}
    for j, key in enumerate(keys):
        first.setdefault(key, j)
    _JOBS[:] = [(launches[j], gpu, held[j]) for j in first.values()]
    processes = min(processes or os.cpu_count() or 1, len(_JOBS))
    made: dict[tuple, Prediction] = {}
    if processes <= 1:
        for j, key in enumerate(first):
            made[key] = _job(j)
            report(j + 1, len(first))
    else:
        with concurrent.futures.ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
            jobs = {pool.submit(_job, j): key for j, key in enumerate(first)}
            try:
                for done, job in enumerate(concurrent.futures.as_completed(jobs), 1):
                    made[jobs[job]] = job.result()
                    report(done, len(first))
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    _JOBS.clear()
    return [made[key] for key in keys]


def predict_step(
    model: str, mode: str, batch: int, gpu: str, processes: int | None = None, report=lambda done, total: None
) -> Step:
    """Predict a step of B0 to B7 ("b0"), "train" or "infer", of ``batch`` images in bf16. ValueError for a name that is
    not known."""
    for name, value, known in (("model", model, MODELS), ("mode", mode, MODES), ("gpu", gpu, tuple(project.GPUS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    module, x = network(model, mode == "train", batch)
    launches, operators = step_launches(module, x, mode == "train")
    return Step(model, mode, batch, gpu, predict_launches(launches, gpu, processes, report), operators)
