"""The networks that are predicted by name: B0 to B7, as the package ``efficientnet`` makes them.

The rest of the tools takes any module of fused blocks; this file alone knows that package.
"""

from collections.abc import Callable

import torch
from torch import nn

from efficientnet import create_model
from effkernels.configs.gpus import GPUS
from effkernels.tools.simulator.steps import Step, predict_launches, step_launches

MODELS = tuple(f"b{i}" for i in range(8))
MODES = ("train", "infer")


def network(name: str, training: bool, images: int, device: str = "meta") -> tuple[nn.Module, torch.Tensor]:
    """(model, images) of a network on ``device``, bf16. In training its blocks keep fp32 weights, as under
    autocast; those of the head and classifier are bf16, as autocast hands them over."""
    bf16 = torch.bfloat16
    model = create_model(name, device=device, dtype=None if training else bf16)
    if training:
        for layer in (model.conv_head, model.bn2, model.classifier):
            layer.to(bf16)
    size = model.config.resolution
    return model, torch.empty(images, 3, size, size, device=device, dtype=bf16).to(memory_format=torch.channels_last)


def predict_step(
    model: str,
    mode: str,
    batch: int,
    gpu: str,
    processes: int | None = None,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> Step:
    """Predict a step of B0 to B7 ("b0"), "train" or "infer", of ``batch`` images in bf16. ValueError for a name that is
    not known."""
    for name, value, known in (("model", model, MODELS), ("mode", mode, MODES), ("gpu", gpu, tuple(GPUS))):
        if value not in known:
            raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    module, x = network(model, mode == "train", batch)
    launches, operators = step_launches(module, x, mode == "train", gpu)
    return Step(
        model=model,
        mode=mode,
        batch=batch,
        gpu=gpu,
        predictions=predict_launches(launches, gpu, processes, report),
        operators=operators,
    )
