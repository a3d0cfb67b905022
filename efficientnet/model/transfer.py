"""Transfer learning: freezing layers, learning rates by layer, feature maps.

model = create_model("efficientnet_b0", pretrained=True, num_classes=10)
freeze(model, until="stem" | 0..6 | "head" | "all" | None, bn=True | "weights" | False)
groups = parameter_groups(model, lr, weight_decay=0.0, layer_decay=1.0)
optimizer = torch.optim.AdamW(groups)
"""

import math
from functools import partial

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from efficientnet.model.network import EfficientNet, FeatureInfo
from effkernels.dispatch import recording
from effkernels.modules.stem_head import stem


def freeze(model: "EfficientNet | EfficientNetFeatures", until: str | int | None, bn: bool | str = True) -> list[str]:
    """Stop the training of everything up to and including ``until``; everything after it is trained.

    Args:
        until: "stem"; the index of a stage (0 to 6), with the stem and all stages before it; "head" for all but the
            classifier; "all"; or None for nothing, which undoes it.
        bn: True freezes BatchNorm too: no gradients, and running statistics that are used and not updated, also after
            ``train()`` of the model or of a part of it. "weights" freezes its weights and biases, and its statistics
            follow the images. False leaves the BatchNorm layers of the frozen part as they are in training.

    Returns the names of the frozen modules. A frozen tensor has ``requires_grad=False``, so build the optimizer
    afterwards (``parameter_groups`` leaves frozen ones out).

    Raises TypeError for another module, ValueError for another ``until`` or ``bn``.
    """
    if not isinstance(bn, bool) and bn != "weights":  # 1 is in (True, False) too, and would be neither below
        raise ValueError(f"bn must be True, 'weights' or False, got {bn!r}")
    if not isinstance(model, (EfficientNet, EfficientNetFeatures)):
        raise TypeError(f"model must be an EfficientNet or its features_only form, got {type(model).__name__}")
    names = _until(model, until)
    model.requires_grad_(True)
    for layer in model.modules():
        if getattr(layer.__dict__.get("train"), "func", None) is _stay_in_eval:
            del layer.train
    for name in names:
        module = model.get_submodule(name)
        module.requires_grad_(False)
        for layer in module.modules():
            if isinstance(layer, _BatchNorm):
                layer.requires_grad_(bn is False)
                if bn is True:  # of the layer itself: who switches a part of the model reaches it too
                    layer.train = partial(_stay_in_eval, layer)
    model.train(model.training)
    return names


def _stay_in_eval(layer, mode=True):
    """``train`` of a frozen BatchNorm layer."""
    return nn.Module.train(layer, False)


def _until(model, until):
    stages = [f"blocks.{i}" for i in range(len(model.blocks))]
    head = ["conv_head", "bn2", "classifier"] if isinstance(model, EfficientNet) else []
    parts = ["conv_stem", "bn1", *stages, *head]
    ends = {None: 0, "stem": 2, "head": len(parts) - bool(head), "all": len(parts)} | {
        i: i + 3 for i in range(len(stages))
    }
    if isinstance(until, bool) or not isinstance(until, (str, int, type(None))) or until not in ends:
        raise ValueError(
            f"until must be 'stem', a stage index from 0 to {len(stages) - 1}, 'head', 'all' or None, got {until!r}"
        )
    return parts[: ends[until]]


def parameter_groups(model: nn.Module, lr: float, weight_decay: float = 0.0, layer_decay: float = 1.0) -> list[dict]:
    """Groups for an optimizer of torch: ``lr * layer_decay^d`` at depth d below the classifier, no weight decay on
    vectors.

    Layers are, as in timm, the classifier (d = 0), the last block with the head (1), each block before it, and the
    stem. Biases and BatchNorm have no weight decay. Frozen parameters (``requires_grad=False``) and empty groups are
    left out.

    Args:
        layer_decay: in (0, 1]; 1 gives every layer the same rate, for any module; less needs an ``EfficientNet``.

    Each group has "params", "lr", "weight_decay", "lr_scale" (its lr over ``lr``: a schedule multiplies by it) and
    "name".

    Raises ValueError for a value out of range or nothing to train, TypeError for another module.
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be a finite number > 0, got {lr!r}")
    if not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay must be a finite number >= 0, got {weight_decay!r}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be in (0, 1], got {layer_decay!r}")
    if layer_decay != 1 and not isinstance(model, EfficientNet):
        raise TypeError(f"layer_decay needs an EfficientNet, got {type(model).__name__}")
    layers = _layers(model) if layer_decay != 1 else [("all", "")]
    groups = {}
    for key, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        index, layer = next((i, name) for i, (name, prefix) in enumerate(layers) if key.startswith(prefix))
        scale = layer_decay**index
        decays = parameter.dim() > 1
        group = {"params": [], "lr": lr * scale, "weight_decay": weight_decay if decays else 0.0, "lr_scale": scale}
        name = f"{layer}.{'decay' if decays else 'no_decay'}"
        groups.setdefault(name, group | {"name": name})["params"].append(parameter)
    if not groups:
        raise ValueError("no parameter to train: all are frozen")
    return list(groups.values())


def _layers(model):
    """(layer, prefixes of its parameters), from the classifier to the stem."""
    blocks = [f"blocks.{s}.{b}" for s, stage in enumerate(model.blocks) for b in range(len(stage))]
    layers = [("stem", ("conv_stem.", "bn1.")), *((name, (f"{name}.",)) for name in blocks[:-1])]
    last = (blocks[-1], (f"{blocks[-1]}.", "conv_head.", "bn2."))
    return [*layers, last, ("classifier", "classifier.")][::-1]


class EfficientNetFeatures(nn.Module):
    """The feature maps of an ``EfficientNet`` at several resolutions, for detection and segmentation.

    The stem and the stages keep their names (``conv_stem bn1 blocks.S.B.*``). Stages after the last one asked for, the
    head and the classifier are dropped. The modules are shared with the given model.

    Args:
        out_indices: indices into ``model.feature_info``: 0 to 4 are at 1/2, 1/4, 1/8, 1/16, 1/32 of the image (less
            with ``output_stride``); negative ones count from the end. None: all.

    Shapes: images [N, in_chans, H, W] -> list of [N, C_i, H_i, W_i] in the order of ``out_indices``. ``feature_info``
    has C_i under "num_chs" and H / H_i under "reduction".

    Raises ValueError for an index that there is not.
    """

    def __init__(self, model: EfficientNet, out_indices: tuple[int, ...] | None = None):
        super().__init__()
        info = model.feature_info
        indices = tuple(range(len(info))) if out_indices is None else tuple(out_indices)
        for index in indices:
            if not isinstance(index, int) or isinstance(index, bool) or not -len(info) <= index < len(info):
                raise ValueError(f"out_indices must be integers from {-len(info)} to {len(info) - 1}, got {index!r}")
        if not indices:
            raise ValueError("out_indices must have at least one index, got none")
        self.feature_info = FeatureInfo((info[index] for index in indices), info)
        self.config, self.in_chans, self.fused = model.config, model.in_chans, model.fused
        self.grad_checkpointing = model.grad_checkpointing
        self.pretrained_cfg = model.pretrained_cfg
        self.conv_stem, self.bn1 = model.conv_stem, model.bn1
        self.blocks = model.blocks[: max(feature["stage"] for feature in self.feature_info)]

    set_grad_checkpointing, _run = EfficientNet.set_grad_checkpointing, EfficientNet._run
    __prepare_scriptable__ = EfficientNet.__prepare_scriptable__

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        """Images [N, in_chans, H, W] -> the features of the stages that were asked for, finest first."""
        if not recording(x):
            EfficientNet._check_input(self, x)
        x = stem(
            x=x, conv=self.conv_stem, bn=self.bn1, act=self.config.act, padding=self.config.padding, fused=self.fused
        )
        outputs = {}
        for number, stage in enumerate(self.blocks, start=1):
            x = outputs[number] = self._run(stage, x)
        return [outputs[feature["stage"]] for feature in self.feature_info]
