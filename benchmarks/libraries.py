"""timm's and torchvision's EfficientNets to compare with, where these are installed, with our weights in them."""

import functools
import importlib
import importlib.metadata
import importlib.util

from torch import nn

from efficientnet.data.torchvision_modules import declare_torchvision_operators

LIBRARIES = ("timm", "torchvision")


@functools.cache
def problem(library: str) -> str | None:
    """Why the library's models cannot be measured here, or None."""
    if importlib.util.find_spec(library) is None:
        return f"{library} is not installed"
    declare_torchvision_operators()
    try:
        importlib.import_module(library)
    except Exception as error:  # whatever it has against this torch
        return f"{library} cannot be imported: {type(error).__name__}: {error}"
    return None


def versions() -> dict[str, str]:
    """The versions of those libraries that are installed."""
    return {
        library: importlib.metadata.version(library)
        for library in LIBRARIES
        if importlib.util.find_spec(library) is not None
    }


def build(library: str, name: str) -> nn.Module:
    """The library's network of a short name such as "b0", with fresh weights, without dropout and drop-path."""
    if library == "timm":
        import timm

        return timm.create_model(f"efficientnet_{name}", drop_rate=0.0, drop_path_rate=0.0)
    import torchvision

    model = getattr(torchvision.models, f"efficientnet_{name}")(dropout=0.0, stochastic_depth_prob=0.0)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps, module.momentum = 1e-5, 0.1  # ours, and torchvision's own up to B4
    return model


def load(model: nn.Module, state: dict) -> list[str]:
    """Put the plain model's ``state`` into a library's, and give the plain names of its parameters, in order.

    timm's names are ours; torchvision's differ, in the same order. The check of every row's results would see a
    mistake.
    """
    own = model.state_dict()
    if set(own) != set(state):
        if len(own) != len(state):
            raise ValueError(f"the library's model has {len(own)} tensors, ours {len(state)}")
        names = dict(zip(own, state, strict=True))
    else:
        names = {name: name for name in own}
    model.load_state_dict({name: state[ours] for name, ours in names.items()})
    return [names[name] for name, _ in model.named_parameters()]
