"""Whole models: ``accelerate`` makes the MBConv blocks of a model that exists run fused, ``restore`` undoes it,
``explain`` tells why not.

A block stays the object it is. ``accelerate`` gives it a subclass of its own class, made on the spot, whose ``forward``
runs the kernels on the block's own layers, or the inherited forward where they cannot. So parameters, buffers,
submodules, their names, hooks on the block, references to it and ``isinstance`` hold without copying anything, and
``restore`` gives the class back. What a block is made of is read from it at every call
(``effkernels.adapters.registry``), so nothing that is edited later goes stale.
"""

import copyreg
import functools

import torch
from torch import nn

from effkernels import dispatch
from effkernels.adapters import judge, registry
from effkernels.adapters.fused_forward import run_block, run_network


class Swapped:
    """What every class that ``accelerate`` makes inherits from; ``_original`` is the class it stands in for."""

    _original: type

    def __prepare_scriptable__(self):
        raise ValueError(
            f"torch.jit.script compiles no kernels: give it the model that effkernels.restore returns, whose "
            f"{self._original.__name__} is as it was"
        )

    def __reduce_ex__(self, protocol):
        make, args, *state = super().__reduce_ex__(max(protocol, 2))
        if make is not copyreg.__newobj__ or args != (type(self),):
            raise TypeError(
                f"{self._original.__name__} copies itself in its own way: restore(model) before copying or pickling"
            )
        return _new, (self._original,), *state


class AcceleratedBlock(Swapped):
    """A library's MBConv block on fused kernels; its own forward where they cannot serve (``why_not_fused(x)`` tells
    the reason).
    """

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernels will serve x (or, without x, this block at all) in its present mode, else the reason why
        not.
        """
        return _judge(self, registry.read(self._reader, self), x)[0]

    def forward(self, *args, **kwargs) -> torch.Tensor:
        """The block's own forward, or the kernels where nothing about the block or its input speaks against them."""
        x, rest = (args[0], args[1:]) if args else (kwargs.get(self._input), ())
        if _only_plain(x):
            return super().forward(*args, **kwargs)
        others = {name: value for name, value in kwargs.items() if name != self._input}
        block = registry.read(self._reader, self, *rest, **others)
        reason, verdict = _judge(self, block, x)
        if reason is not None:
            return super().forward(*args, **kwargs)
        return run_block(x, block, verdict, self.training)


def _judge(module, block, x):
    """(None, settings of the kernels) or (the reason, None)."""
    if isinstance(block, str):
        return dispatch.why_not_fused(x, (), judge=lambda: block), None
    layers = judge.layers_of_block(block)
    verdict = judge.judge_block(module, block, layers)
    problem = verdict if isinstance(verdict, str) else block.now
    largest = max((layer.out_channels for _, _, layer in layers if isinstance(layer, nn.Conv2d)), default=1)
    reason = dispatch.why_not_fused(
        x,
        [(name, layer) for _, name, layer in layers],
        largest,
        judge=lambda: problem,
        drops=block.drop_rate > 0,
    )
    return reason, None if reason is not None else verdict


class AcceleratedNetwork(Swapped):
    """A library's network with its stem and head on fused kernels; its own forward where they cannot serve."""

    def why_not_fused(self, x: torch.Tensor | None = None) -> str | None:
        """None if the kernels will serve stem and head for x (or, without x, at all), else the reason why not."""
        return self._why_not(registry.read(self._reader, self), x)

    @staticmethod
    def _why_not(network, x):
        layers, largest = (
            ((), 1)
            if isinstance(network, str)
            else (judge.layers_of_network(network), judge.largest_of_network(network))
        )
        return dispatch.why_not_fused(x, layers, largest, judge=lambda: judge.judge_network(network))

    def _forward(self, x):
        if _only_plain(x):
            return super().forward(x)
        network = registry.read(self._reader, self)
        if self._why_not(network, x) is not None:
            return super().forward(x)
        return run_network(x, network)


# A network's only argument keeps its name.
_FORWARDS = {
    "x": lambda self, x: self._forward(x),
    "inputs": lambda self, inputs: self._forward(inputs),
    "pixel_values": lambda self, pixel_values: self._forward(pixel_values),
}


def _only_plain(x):
    """Whether the library's own forward runs, without asking further."""
    if not isinstance(x, torch.Tensor) or dispatch.recording(x):
        return True
    return x.dim() != 4 or x.shape[0] == 0 or dispatch.only_plain_on_cpu(x)


@functools.cache
def accelerated_class(cls: type) -> type:
    """The subclass of a block's or network's class that runs it fused."""
    namespace = {"_original": cls, "__doc__": cls.__doc__, "__module__": __name__}
    if (network := registry.known_network(cls)) is not None:
        namespace["_reader"] = staticmethod(network[0])
        if registry.runs_itself(cls):
            namespace["fused"] = property(lambda self: True)
        else:
            namespace["forward"] = _FORWARDS[registry.argument_of(cls)]
        return type(f"Accelerated{cls.__name__}", (AcceleratedNetwork, cls), namespace)
    base, reader = registry.known_block(cls)
    if reader is None:
        from effkernels.modules.mbconv import FusedMBConv

        return type(f"Accelerated{cls.__name__}", (Swapped, FusedMBConv, cls), namespace)
    namespace |= {"_reader": staticmethod(reader), "_input": base.forward.__code__.co_varnames[1]}
    return type(f"Accelerated{cls.__name__}", (AcceleratedBlock, cls), namespace)


def _new(original):
    """For copy and pickle, which cannot find the class by its name."""
    return object.__new__(accelerated_class(original))


def _view(module):
    """The module as ``accelerate`` would make it, without changing it: another object with the same attributes."""
    view = _new(type(module))
    view.__dict__ = module.__dict__
    return view


def _ineligible(module, x=None, ask=True) -> str | None:
    """Why kernels cannot serve a block of a known class, accelerated or not, or None. ask: platform and mode too."""
    cls = type(module)._original if isinstance(module, Swapped) else type(module)
    base, reader = registry.known_block(cls)
    if isinstance(reader, str):
        return reader
    if cls.forward is not base.forward:
        return f"{cls.__name__} has a forward of its own, not {base.__name__}'s"
    if "forward" in module.__dict__:
        return "the block's forward was replaced"
    view = module if isinstance(module, Swapped) else _view(module)
    if ask:
        return view.why_not_fused(x)
    if reader is None:
        return None if dispatch.requested_backend() == "reference" else view.why_not_fused()
    block = registry.read(reader, module)
    verdict = block if isinstance(block, str) else judge.judge_block(module, block, judge.layers_of_block(block))
    return verdict if isinstance(verdict, str) else None


def _network_problem(module, x=None, ask=True) -> str | None:
    """Why kernels cannot serve a known network's stem and head, or None. ask: platform too."""
    cls = type(module)._original if isinstance(module, Swapped) else type(module)
    reader, reason = registry.known_network(cls)
    if reason is not None:
        return reason
    if any(method in module.__dict__ for method in registry.methods_of(cls)):
        return "the network's forward was replaced"
    network = registry.read(reader, module)
    return AcceleratedNetwork._why_not(network, x) if ask else judge.judge_network(network)


def _networks(model):
    """(name, module) of every network whose stem and head might be fused."""
    for name, module in model.named_modules():
        if registry.known_network(type(module)._original if isinstance(module, Swapped) else type(module)) is not None:
            yield name, module


def _blocks(model):
    """(name, module, whether it is one of ours that needs no accelerate) of everything that ``explain`` speaks
    about.
    """
    from effkernels.modules.conv_bn_act import FusedDepthwiseConvBNAct
    from effkernels.modules.mbconv import FusedMBConv

    for name, module in model.named_modules():
        if isinstance(module, (FusedMBConv, FusedDepthwiseConvBNAct)) and not isinstance(module, Swapped):
            yield name, module, True
        elif (
            isinstance(module, Swapped)
            and not isinstance(module, AcceleratedNetwork)
            or registry.known_block(type(module)) is not None
        ):
            yield name, module, False


def _check_model(model):
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def accelerate(model: nn.Module, strict: bool = True) -> nn.Module:
    """Make every eligible MBConv block of ``model`` run fused, and stem and head around them, in place; returns
    ``model``.

    Blocks: timm's InvertedResidual and DepthwiseSeparableConv (EfficientNet, MobileNetV2/V3, MnasNet, ...),
    torchvision's EfficientNet, MobileNetV2/V3 and MnasNet, efficientnet_pytorch, transformers' EfficientNet, and
    efficientnet.MBConv. Parameters, buffers, submodules and state_dict keys are the same objects and names, so an
    optimizer, a moving average, DistributedDataParallel or a checkpoint made before goes on working. Padding, BatchNorm
    settings, activation, squeeze-excite, drop-path are read from the block. Where kernels cannot serve an input (no
    GPU, say) the block's own forward runs. Twice is once. Before torch.jit.script or an export: ``restore``.

    strict: raise ValueError, with the reason for each block, if no block is eligible; False returns the model as it is.
    """
    _check_model(model)
    reasons, swaps, fused = {}, [], 0
    for name, module, ours in _blocks(model):
        if ours or isinstance(module, Swapped):
            fused += 1
        elif (reason := _ineligible(module, ask=False)) is None:
            swaps.append(module)
        else:
            reasons[name] = reason
    if strict and not swaps and not fused:
        listed = "".join(f"\n  {name or 'the model itself'}: {reason}" for name, reason in reasons.items())
        raise ValueError(
            f"{type(model).__name__} has no block that effkernels can "
            f"run{':' if listed else ', nor any of a known class'}{listed}"
        )
    if swaps or fused:
        plain = [
            m
            for _, m in _networks(model)
            if not isinstance(m, Swapped) and not (registry.runs_itself(type(m)) and m.fused)
        ]
        swaps += [m for m in plain if _network_problem(m, ask=False) is None]
    for module in swaps:
        module.__class__ = accelerated_class(type(module))
    return model


def restore(model: nn.Module) -> nn.Module:
    """Undo ``accelerate``, in place; returns ``model``. Every block is the object it always was, of its own class
    again.
    """
    _check_model(model)
    swapped = [module for module in model.modules() if isinstance(module, Swapped)]
    for module in swapped:
        if "_original" not in vars(type(module)):
            raise TypeError(
                f"{type(module).__name__} was made of an accelerated block by another library: undo that first"
            )
    for module in swapped:
        module.__class__ = type(module)._original
    return model


class Explanation(dict):
    """{name of each block: None if kernels serve it, else the reason}; ``print`` shows it line by line.

    plain: names of the blocks that ``accelerate`` has not made fused. waiting: those of them that it would.
    ends: {name of each network's stem or head: None if kernels serve it, else the reason}, which are not blocks.
    """

    def __init__(
        self, reasons: dict[str, str | None], plain: set[str], kinds: dict[str, str], ends: dict[str, str | None]
    ):
        super().__init__(reasons)
        self.plain, self._kinds, self.ends = plain, kinds, ends

    @property
    def waiting(self) -> set[str]:
        """The blocks that ``accelerate`` would make fused, and has not."""
        return {name for name in self.plain if self[name] is None}

    @property
    def fused(self) -> int:
        """How many blocks run fused now."""
        return sum(reason is None for reason in self.values()) - len(self.waiting)

    def __str__(self):
        if not self:
            return "no MBConv block of a known class"
        width, kinds = max(len(name) for name in self), max(len(kind) for kind in self._kinds.values())
        lines = [f"{self.fused} of {len(self)} MBConv blocks run fused"]
        for name, reason in self.items():
            state = reason or ("eligible, accelerate(model) fuses it" if name in self.waiting else "fused")
            lines.append(f"  {name:{width}}  {self._kinds[name]:{kinds}}  {state}")
        lines += [f"  {name}: {reason or 'kernels serve it'}" for name, reason in self.ends.items()]
        return "\n".join(lines)


def explain(model: nn.Module, x: torch.Tensor | None = None) -> Explanation:
    """{name of each block: None if kernels serve it as it is now, else the reason why not}, for every block of a known
    library.

    With x [N, C, H, W] (an input of the MODEL) the platform, dtype and device are judged too; without it only the
    blocks are. Before ``accelerate`` None means that it will make the block fused (``Explanation.waiting`` has those
    names), after it that it is. A block is judged in its present mode: dropout of single elements, say, is a reason in
    training only.
    """
    _check_model(model)
    reasons, plain, kinds = {}, set(), {}
    for name, module, ours in _blocks(model):
        reasons[name] = module.why_not_fused(x) if ours else _ineligible(module, x)
        kinds[name] = type(module)._original.__name__ if isinstance(module, Swapped) else type(module).__name__
        if not ours and not isinstance(module, Swapped):
            plain.add(name)
    ends = {}
    for name, module in _networks(model):
        problem, network = _network_problem(module, x), None
        if problem is None:
            network = registry.known_network(type(module)._original if isinstance(module, Swapped) else type(module))[
                0
            ](module)
        prefix = f"{name}." if name else ""
        ends[f"{prefix}stem"] = problem
        if network is not None and network.separable is not None:
            ends[f"{prefix}{network.separable[0]}"] = problem
        ends[f"{prefix}head"] = problem if network is None or not isinstance(network.head, str) else network.head
    return Explanation(reasons, plain, kinds, ends)
