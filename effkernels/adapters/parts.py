"""What a reader finds: the layers of a block and of a network, each with its name, and how they are put together.

A reader takes a module and returns a ``Block`` or a ``Network``, read from the module as it is at that moment, so
nothing that is changed later goes stale; or a string, the reason why kernels cannot serve it.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from effkernels import reference
from effkernels.adapters.equivalents import GATED, is_identity, path_of


class Stage(NamedTuple):
    """A convolution, its BatchNorm and its activation, and what pads for it; each (name, module), or None where there
    is none.

    act may be a name of ``effkernels.reference.ACTIVATIONS`` in place of the module, pad one of
    ``effkernels.geometry.PADDINGS``.
    """

    conv: tuple[str, nn.Module]
    bn: tuple[str, nn.Module]
    act: tuple[str, nn.Module | str] | None = None
    pad: tuple[str, nn.Module | str] | None = None


class Gate(NamedTuple):
    """Squeeze-excite: 1x1 convolution, activation, 1x1 convolution, gate function."""

    reduce: tuple[str, nn.Module]
    act: tuple[str, nn.Module]
    expand: tuple[str, nn.Module]
    gate: tuple[str, nn.Module] | None  # None: torch.sigmoid


def draw_drop_path(x: torch.Tensor, rate: float) -> torch.Tensor:
    """A factor for each sample's branch, fp32 [N], drawn as timm draws it."""
    return reference.drop_path_scale(x.shape[0], rate, x.device)


class Block(NamedTuple):
    """What a reader finds in a block."""

    expand: Stage | None
    depthwise: Stage
    gate: Gate | None
    project: Stage
    residual: bool
    identities: tuple = ()  # modules that must not change what goes through them
    drop_rate: float = 0.0  # of samples of the residual branch, in this mode
    draw_branch_scale: Callable = draw_drop_path  # (x, rate) -> fp32 [N], one draw as the library's own
    now: str | None = None  # a reason that holds in the block's present mode only
    # The residual is added in place: under autocast the sum keeps the branch's dtype, not an fp32 input's.
    in_place: bool = False


class Network(NamedTuple):
    """What a reader finds in a network."""

    stem: Stage
    middle: object  # what comes between stem and head, a function of one tensor
    head: Stage | str  # the 1x1 convolution before the pooling, or why there is none that kernels have
    tail: object  # what follows the pooling (the stem's successor ``middle``, where there is no head)
    bypassed: tuple  # (name, module) of everything inside that is not called by name any more
    separable: tuple[str, Block] | None = None  # after the stem: a block whose layers are no module by themselves


DENSE = "a dense k x k convolution in place of expand and depthwise (EfficientNetV2's Fused-MBConv)"


class Reader(NamedTuple):
    """How a network's class is read: its reader, the methods its forward consists of, and the names in their code.

    A library may change its forward; where the names are others than these, it is not the forward that is known here
    (None: any).
    """

    read: Callable
    methods: tuple[str, ...]
    names: str | None = None


def squeeze_excite(name: str, module: nn.Module) -> Gate | str | None:
    """``Gate`` of a library's squeeze-excite module, None for nn.Identity, else the reason as a string."""
    path = path_of(type(module))
    if is_identity(module):
        return None
    if path not in GATED:
        return f"{name} is a {type(module).__name__}, which is not squeeze-excite as kernels have it"
    *names, identities = GATED[path]
    if getattr(module, "add_maxpool", False):
        return f"{name} adds maximum pooling"
    for inner in identities:
        if not is_identity(getattr(module, inner)):
            return f"{name}.{inner} is a {type(getattr(module, inner)).__name__}"
    return Gate(*((f"{name}.{inner}", getattr(module, inner)) for inner in names))


def with_drop_path(block: Block, name: str, module: nn.Module | None) -> Block | str:
    """The block with timm's DropPath or torchvision's StochasticDepth; the two draw alike."""
    if module is None or not block.residual or is_identity(module):
        return block
    path = path_of(type(module))
    if path == "timm.layers.drop.DropPath":
        rate, per_sample = module.drop_prob, module.scale_by_keep
    elif path == "torchvision.ops.stochastic_depth.StochasticDepth":
        rate, per_sample = module.p, module.mode == "row"
    else:
        return f"{name} is a {type(module).__name__}"
    if not module.training or not rate:
        return block
    if not per_sample or not 0 < rate < 1:
        return block._replace(
            now=f"in training, {name} is {module}: kernels drop samples at a rate below 1 and scale the others"
        )
    return block._replace(drop_rate=rate)


def is_global_average(pool: nn.Module) -> bool:
    """Whether a pooling layer averages whole images."""
    return type(pool) is nn.AdaptiveAvgPool2d and pool.output_size in (1, (1, 1))
