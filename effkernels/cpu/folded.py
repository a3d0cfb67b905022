"""A convolution and its BatchNorm as one set of weights in oneDNN's own layout, made again when anything changed.

With running statistics BatchNorm is affine, so ``BN(W x) = (s W) x + (beta - s mean)`` with
``s = gamma / sqrt(var + eps)``. The folded weights are reordered once, as oneDNN wants them, and kept beside a copy of
what they were made of.

At every call the live tensors are compared with that copy, bit by bit. Nothing less is sound: an edit through
``.data``, NumPy, shared memory or another library moves no version counter, and a new tensor may lie where an old one
did. The comparison reads both at the speed of memory; docs/benchmarks.md has what it costs.
"""

import ctypes
import os
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from effkernels.parameters import BatchNormParams

# memcmp stops at the first difference, knows no NaN, and lets other threads run. Its result is below, at or above 0.
_memcmp = (ctypes.cdll.msvcrt if os.name == "nt" else ctypes.CDLL(None)).memcmp
_memcmp.argtypes, _memcmp.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t), ctypes.c_int


class Geometry(NamedTuple):
    """What oneDNN chooses a layout by, besides the weights. padding: (rows, columns) of zeros on either side."""

    stride: int
    padding: tuple[int, int]
    groups: int
    dtype: torch.dtype


class Copy(NamedTuple):
    """A tensor as it was, and what must be equal of a live one before their bytes can be compared."""

    tensor: torch.Tensor
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]
    address: int
    nbytes: int


def _copy(tensor):
    copy = tensor.detach().clone()  # its own memory, with the same strides where ``tensor`` has no holes
    return Copy(
        tensor=copy,
        dtype=copy.dtype,
        shape=copy.shape,
        stride=copy.stride(),
        address=copy.data_ptr(),
        nbytes=copy.nbytes,
    )


def _unchanged(live, copies):
    """Whether each of ``live`` has the same numbers, of the same type in the same order, as its copy, bit by bit."""
    for tensor, (_, dtype, shape, stride, address, nbytes) in zip(live, copies, strict=True):
        if tensor.dtype != dtype or tensor.shape != shape or tensor.stride() != stride:
            return False
        if _memcmp(tensor.data_ptr(), address, nbytes):
            return False
    return True


class Folded(NamedTuple):
    """weight: s W in oneDNN's layout, an opaque tensor. bias [O]. copies: of what they were made of."""

    weight: torch.Tensor
    bias: torch.Tensor
    copies: tuple[Copy, ...]
    eps: float
    geometry: Geometry


# By the convolution's weight, and gone with it. A weight that two layers share is folded again at each call.
_KEPT = WeakTensorKeyDictionary()


def folded(weight: torch.Tensor, norm: BatchNormParams, geometry: Geometry, shape: torch.Size) -> Folded:
    """``weight`` [O, I / groups, k, k] and its BatchNorm with running statistics, for inputs like ``shape``.

    Folded in fp64 and rounded once. The layout is chosen for the first shape that is seen; others are computed right.
    Two threads may fold at once: each uses what it made or found whole.
    """
    live = weight, norm.weight, norm.bias, norm.running_mean, norm.running_var
    kept = _KEPT.get(weight)
    if kept is None or kept.eps != norm.eps or kept.geometry != geometry or not _unchanged(live, kept.copies):
        _KEPT[weight] = kept = _fold(tuple(map(_copy, live)), norm.eps, geometry, shape)
    return kept


def _fold(copies, eps, geometry, shape):
    weight, gamma, beta, mean, var = (copy.tensor.double() for copy in copies)
    scale = gamma / torch.sqrt(var + eps)
    scaled = (weight * scale.view(-1, 1, 1, 1)).to(geometry.dtype)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        scaled.contiguous(),
        list(geometry.padding),
        [geometry.stride, geometry.stride],
        [1, 1],
        geometry.groups,
        list(shape),
    )
    bias = (beta - scale * mean).to(geometry.dtype)
    return Folded(weight=packed, bias=bias, copies=copies, eps=eps, geometry=geometry)
