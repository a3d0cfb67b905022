"""Parameters and multiply-accumulates, counted on the model itself: every convolution and linear layer of a forward
without data.
"""

import copy
from typing import NamedTuple

import torch
from torch import nn


class StageRow(NamedTuple):
    """A row of ``stage_table``. Sizes are (height, width); expand_ratio is None outside MBConv stages."""

    operator: str
    kernel_size: int
    stride: int
    expand_ratio: float | None
    channels: int
    repeats: int
    input_size: tuple[int, int]
    output_size: tuple[int, int]
    params: int
    macs: int


def count_parameters(model: nn.Module) -> int:
    """The trained numbers of the model: biases and BatchNorm's weights included, its running statistics not."""
    return sum(p.numel() for p in model.parameters())


def count_macs(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """The multiply-accumulates of one image in every nn.Conv2d and nn.Linear, which the papers call "FLOPs".

    A layer has ``outputs * (in_channels / groups) * k * k`` of them. Taps on padding count; BatchNorm, activations and
    gates do not. Nothing is computed and nothing allocated, since the forward runs on the meta device: L2 at 800 pixels
    takes half a second.

    Args:
        model: any image model; an EfficientNet, fused or not, knows its channels and size.
        image_size: pixels, or (height, width). None: ``model.config.resolution``.
    """
    return sum(macs for macs, *_ in _trace(model, image_size).values())


def count_activations(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> int:
    """The numbers that every nn.Conv2d and nn.Linear puts out for one image.

    The RegNet paper calls them "activations", timm "macts".
    """
    return sum(outputs for *_, outputs in _trace(model, image_size).values())


def stage_table(model: nn.Module, image_size: int | tuple[int, int] | None = None) -> list[StageRow]:
    """A row for each of ``model.stage_parts()``, in order; their parameters and MACs add up to the totals of the model.

    The model is an EfficientNet, or another network of ``efficientnet.scaling_study``.
    """
    trace = _trace(model, image_size)
    rows, size = [], _image_hw(model, image_size)
    for operator, layers, *description in model.stage_parts():
        inside = [
            traced for name, traced in trace.items() if f"{name}.".startswith(tuple(f"{layer}." for layer in layers))
        ]
        before, size = size, inside[-1][1]
        params = sum(count_parameters(model.get_submodule(layer)) for layer in layers)
        rows.append(StageRow(operator, *description, before, size, params, sum(macs for macs, *_ in inside)))
    return rows


def _image_hw(model, image_size):
    if image_size is None:
        if not hasattr(model, "config"):
            raise ValueError("image_size is needed for a model without a config")
        image_size = model.config.resolution
    hw = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(hw) != 2 or not all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in hw):
        raise ValueError(f"image_size must be a positive integer or a tuple (height, width), got {image_size!r}")
    return hw


def _trace(model, image_size):
    """{layer name: (MACs, (out_height, out_width), numbers put out)} of every Conv2d, Linear and MaxPool2d, in the
    order they run.

    A MaxPool2d counts as putting out none.
    """
    hw = _image_hw(model, image_size)
    # A copy whose tensors are all on meta: deepcopy takes what memo already holds, so no weight is read.
    memo = {id(p): nn.Parameter(p.to("meta"), p.requires_grad) for p in model.parameters()}
    memo |= {id(b): b.to("meta") for b in model.buffers()}
    model = copy.deepcopy(model, memo).eval()
    trace = {}

    def record(name, taps):
        def hook(layer, args, out):
            macs, _, outputs = trace.get(name, (0, None, 0))
            trace[name] = (
                macs + out.numel() * taps,
                tuple(out.shape[2:]) or (1, 1),
                outputs + (out.numel() if taps else 0),
            )

        return hook

    channels = None
    for name, module in model.named_modules():
        if hasattr(module, "forward_reference"):
            module.forward = module.forward_reference  # a fused block does not call its layers
        elif isinstance(module, nn.Conv2d):
            channels = channels or module.in_channels
            module.register_forward_hook(record(name, module.weight[0].numel()))
        elif isinstance(module, nn.Linear):
            module.register_forward_hook(record(name, module.in_features))
        elif isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(record(name, 0))  # for the size it leaves
    with torch.no_grad():
        model(torch.empty(1, channels, *hw, device="meta", dtype=next(model.parameters()).dtype))
    return trace
