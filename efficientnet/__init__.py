"""The EfficientNet family (Tan & Le, 2019) on fused MBConv kernels. Importing this package imports neither torch nor
Triton.
"""

from importlib import import_module

__version__ = "0.1.0"

_EXPORTS = {
    "EfficientNet": "efficientnet.model.network",
    "create_model": "efficientnet.weights.factory",
    "list_models": "efficientnet.model.config",
    "MBConv": "efficientnet.model.plain_mbconv",
    "compound_scale": "efficientnet.model.scaling",
    "load_checkpoint": "efficientnet.weights.checkpoints",
    "freeze": "efficientnet.model.transfer",
    "parameter_groups": "efficientnet.model.transfer",
    "list_pretrained": "efficientnet.weights.pretrained",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name):  # PEP 562: a name is imported when it is first used
    if name not in _EXPORTS:
        raise AttributeError(f"module 'efficientnet' has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_EXPORTS[name]), name)
    return value


def __dir__():
    return sorted({*globals(), *_EXPORTS})
