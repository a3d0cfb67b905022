"""Which classes are known: one row a library, whose file lists its blocks and networks by the path of their class.

Only a whole forward is fused, and only of a forward that is, by the names in its code, the one known here: a library
may change it.
"""

import functools
from collections.abc import Callable

from torch import nn

from effkernels.adapters import lukemelas, own, timm, torchvision, transformers
from effkernels.adapters.equivalents import path_of
from effkernels.adapters.parts import Block, Network

LIBRARIES = (own, timm, torchvision, lukemelas, transformers)
BLOCKS = {path: reader for library in LIBRARIES for path, reader in library.BLOCKS.items()}
NETWORKS = {path: reader for library in LIBRARIES for path, reader in library.NETWORKS.items()}


@functools.cache
def known_block(cls: type) -> tuple[type, Callable | str | None] | None:
    """(the library's class that ``cls`` is or inherits from, its reader or the reason why it has none); None for any
    other class.
    """
    for base in cls.__mro__:
        if (path := path_of(base)) in BLOCKS:
            return base, BLOCKS[path]
    return None


def known_network(cls: type) -> tuple[Callable | None, str | None] | None:
    """(reader, None) or (None, why its forward is not fused) of a network's class; None for any other class."""
    for base in cls.__mro__:
        if (path := path_of(base)) in NETWORKS:
            reader, methods, names = NETWORKS[path]
            if any(getattr(cls, method, None) is not getattr(base, method, None) for method in methods):
                return None, f"{cls.__name__} has a forward of its own"
            used = {name for method in methods for name in getattr(base, method).__code__.co_names}
            if names is not None and used != set(names.split()):
                return None, f"{base.__name__}'s forward is not the one known here"
            return reader, None
    return None


def read(reader: Callable, module: nn.Module, *args, **kwargs) -> Block | Network | str:
    """What ``reader`` finds in a module, or, as a string, that somebody has taken out what it looks for."""
    try:
        return reader(module, *args, **kwargs)
    except (AttributeError, IndexError, StopIteration) as error:
        return f"it was edited: {str(error) or type(error).__name__}"


def methods_of(cls: type) -> tuple[str, ...]:
    """What a known network's forward consists of."""
    return next(NETWORKS[path_of(base)].methods for base in cls.__mro__ if path_of(base) in NETWORKS)


def runs_itself(cls: type) -> bool:
    """Whether a network's own forward takes kernels for stem and head where its attribute ``fused`` is set."""
    return any(path_of(base) in NETWORKS and NETWORKS[path_of(base)].read is own.read_network for base in cls.__mro__)


def argument_of(cls: type) -> str:
    """The name of the input in a class's forward."""
    return cls.forward.__code__.co_varnames[1]
