"""What the functional forms take besides tensors of activations: the tensors and settings of one layer, by
reference.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class BatchNormParams(NamedTuple):
    """One BatchNorm: z = (y - mean) / sqrt(var + eps) * weight + bias, biased variance, fp32 statistics.

    training: normalise with the batch's statistics, and update the running ones (unbiased variance) where there are
    any; otherwise normalise with the running ones. momentum None is the cumulative average over num_batches_tracked.
    group: name of the process group whose batches are normalised together in training (nn.SyncBatchNorm); "" is this
        process alone.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor | None = None
    running_var: Tensor | None = None
    num_batches_tracked: Tensor | None = None
    momentum: float | None = 0.01
    eps: float = 1e-3
    training: bool = True
    group: str = ""

    @classmethod
    def of(cls, bn: nn.Module) -> "BatchNormParams":
        """The live tensors of an nn.BatchNorm2d, and whether it would use batch statistics now."""
        training = bn.training or bn.running_mean is None
        running = (bn.running_mean, bn.running_var, bn.num_batches_tracked)
        if bn.training and not bn.track_running_stats:  # switched off after construction: nothing is updated
            running = (None, None, None)
        group = _group_name(bn) if bn.training and isinstance(bn, nn.SyncBatchNorm) else ""
        return cls(bn.weight, bn.bias, *running, bn.momentum, bn.eps, training, group)

    @property
    def updates(self) -> bool:
        """Whether a forward changes the running statistics."""
        return self.training and self.running_mean is not None


def _group_name(bn: nn.SyncBatchNorm) -> str:
    """Of the processes that ``bn`` synchronises with; "" where there are none."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return ""
    group = bn.process_group or torch.distributed.group.WORLD
    return group.group_name if torch.distributed.get_world_size(group) > 1 else ""


class SqueezeExciteParams(NamedTuple):
    """Both 1x1 layers of squeeze-excite, weights [R, C, 1, 1] and [C, R, 1, 1] with biases, and the two functions'
    names.
    """

    reduce_weight: Tensor
    reduce_bias: Tensor
    expand_weight: Tensor
    expand_bias: Tensor
    act: str = "silu"
    gate: str = "sigmoid"

    @classmethod
    def of(cls, se: nn.Module) -> "SqueezeExciteParams":
        """The live tensors of a module with ``conv_reduce`` and ``conv_expand``, and its functions' names."""
        reduce, expand = se.conv_reduce, se.conv_expand
        return cls(reduce.weight, reduce.bias, expand.weight, expand.bias, se.act, se.gate)
