"""Counters for the kernels whose last program finishes what all have begun: int32, 0 before a launch, and 0 again after
it.

On a GPU one buffer a stream serves every launch there: they follow each other, and each leaves it as it found it.
Launches that are captured in a CUDA graph may be replayed on any stream, beside others, so a capture has counters of
its own, zeroed in the graph; so has every operator that torch.compile calls, since it may capture it, or count the
memory that outlives the call.
"""

import functools
import threading
from collections.abc import Callable

import numpy as np
import torch

_buffers: dict[tuple[int, int], torch.Tensor] = {}
_thread = threading.local()


class _Recorder(threading.local):
    made: Callable | None = None


# made: told (function, arguments, keywords, result) of counters that a call was given, by ``effkernels.ops.plans``,
# whose replays are given counters of their own, too.
recorder = _Recorder()


def zeroed_counters(x: torch.Tensor, needed: int) -> torch.Tensor:
    """At least ``needed`` zeros, int32, on x's device, for launches on the current stream."""
    if recorder.made is None:
        return _zeroed_counters(x, needed)
    with torch.utils._python_dispatch._disable_current_modes():
        counters = _zeroed_counters(x, needed)
    recorder.made(_zeroed_counters, (x, needed), {}, counters)
    return counters


def _zeroed_counters(x: torch.Tensor, needed: int) -> torch.Tensor:
    if x.device.type == "meta":
        return x.new_empty(needed, dtype=torch.int32)
    if not x.is_cuda:  # the interpreter, where a launch may be interrupted half-way
        return torch.from_numpy(np.zeros(needed, np.int32))
    if getattr(_thread, "own", False) or torch.cuda.is_current_stream_capturing():
        return x.new_zeros(needed, dtype=torch.int32)
    key = x.device.index, torch.cuda.current_stream(x.device).cuda_stream
    buffer = _buffers.get(key)
    if buffer is None or buffer.numel() < needed:
        buffer = _buffers[key] = x.new_zeros(max(4096, needed), dtype=torch.int32)
    return buffer


def own_counters(implementation: Callable) -> Callable:
    """``implementation`` with counters of its own in every call."""

    @functools.wraps(implementation)
    def call(*args):
        before, _thread.own = getattr(_thread, "own", False), True
        try:
            return implementation(*args)
        finally:
            _thread.own = before

    return call
