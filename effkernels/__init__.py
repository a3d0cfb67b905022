"""Fused Triton kernels for MBConv blocks (EfficientNet, MobileNetV2/V3, MnasNet).

Importing this package touches no GPU and imports neither torch nor Triton; each name below is loaded when first used.
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "FusedMBConv": "effkernels.modules.mbconv",
    "FusedDepthwiseConvBNAct": "effkernels.modules.conv_bn_act",
    "FusedSqueezeExcite": "effkernels.modules.squeeze_excite",
    "BatchNormParams": "effkernels.parameters",
    "SqueezeExciteParams": "effkernels.parameters",
    "accelerate": "effkernels.adapters.accelerate",
    "restore": "effkernels.adapters.accelerate",
    "explain": "effkernels.adapters.accelerate",
    "why_not_fused": "effkernels.dispatch",
    "warm_up": "effkernels.compilation",
    "graphed": "effkernels.graphs",
}
_MODULES = ("functional", "reference")

__all__ = [*_HOME, *_MODULES]


def __getattr__(name):
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"effkernels.{name}")
    raise AttributeError(f"module 'effkernels' has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *__all__])
