"""Custom operators: where kernels meet autograd, torch.compile and fake tensors. This file: what all of them share.

Each differentiable operator is a pair ``name`` / ``name_backward`` in the ``effkernels`` namespace with a fake implementation for
each, and one ``torch.autograd.Function`` (``differentiable``). Eager calls go through the Function straight to the launchers; the
dispatcher (under torch.compile, opcheck, ...) enters the same Function from the Autograd key and records the operators.
``torch.library.custom_op`` is not used because the forwards update running statistics in place, which it does not allow together with
an autograd formula. Tensors are NHWC and contiguous here. Absent results are tensors of no elements.
"""

import functools

import torch
from torch.autograd.function import once_differentiable

from effkernels.geometry import pad_amounts
from effkernels.ops import sync_batchnorm
from effkernels.ops.counters import own_counters

LIB = torch.library.Library("effkernels", "DEF")


def absent(x):
    return x.new_empty(0, dtype=torch.float32)


def fp32(x, *shape):
    return x.new_empty(shape, dtype=torch.float32)


def pads_of(x, weight, stride, padding):
    k = weight.shape[-1]
    return (*pad_amounts(x.shape[1], k, stride, padding), *pad_amounts(x.shape[2], k, stride, padding))


def batch_or_running(batch, tiles, running_mean, running_var, num_batches, momentum, eps):
    """(mean, rstd) fp32 [C] to normalise with; merges ``tiles()`` and updates the running statistics when ``batch``."""
    from effkernels.kernels import batchnorm
    from effkernels.kernels.norm import BatchStatistics

    if batch:
        return batchnorm.merge(tiles(), BatchStatistics(eps, running_mean, running_var, num_batches, momentum))
    return running_mean.float().clone(), (running_var.float() + eps).rsqrt()


def normalised(kernel, weight, batch, running_mean, running_var, num_batches, momentum, eps, group=""):
    """(output, mean, rstd) of ``kernel(statistics=...)``, which returns (output, (mean, rstd)); its output alone where ``batch`` is False.

    weight: the BatchNorm's. group: of the processes whose batches are normalised together.
    """
    if not batch:
        out, _ = kernel()
        return out, running_mean.float().clone(), (running_var.float() + eps).rsqrt()
    from effkernels.kernels.norm import BatchStatistics

    statistics = BatchStatistics(eps, running_mean, running_var, num_batches, momentum)
    out, found = sync_batchnorm.merged(kernel, weight, statistics, group) if group else kernel(statistics=statistics)
    return out, *found


def on_its_device(implementation):
    """Kernels start on the current GPU: make that the tensors' own."""

    @functools.wraps(implementation)
    def guarded(x, *args):
        if not x.is_cuda:
            return implementation(x, *args)
        with torch.cuda.device(x.device):
            return implementation(x, *args)

    return guarded


def contiguous_like(t):
    return torch.empty_like(t, memory_format=torch.contiguous_format)


def call(name, implementation, dispatched, args):
    """The operator below autograd when the call came through the dispatcher, else its implementation at once."""
    if not dispatched:
        return implementation(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.effkernels, name)(*args)


def differentiable(name, forward, backward, inputs, settings, also=()):
    """The ``torch.autograd.Function`` of operator ``name``: a gradient for its first result, none for the others, which are kept.

    Args:
        inputs: positions of the forward's arguments that have a gradient; also: of tensors that are kept beside them; settings: of what
            else its backward takes.
        backward: called as backward(dout, *inputs, *also, *the forward's other results, *settings, needs); a gradient for each of
            ``inputs``, read where ``needs``, a list of booleans, says so.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, dispatched, *args):
            results = call(name, forward, dispatched, args)
            out, *aux = results
            ctx.save_for_backward(*(args[i] for i in (*inputs, *also)), *aux)
            ctx.settings = [args[i] for i in settings]
            ctx.dispatched, ctx.count = dispatched, len(args)
            ctx.mark_non_differentiable(*aux)
            ctx.set_materialize_grads(False)
            return tuple(results)

        @staticmethod
        @once_differentiable
        def backward(ctx, dout, *unused):
            grads = [None] * ctx.count
            if dout is not None:
                needs = [ctx.needs_input_grad[1 + i] for i in inputs]
                args = (dout.contiguous(), *ctx.saved_tensors, *ctx.settings, needs)
                results = call(f"{name}_backward", backward, ctx.dispatched, args)
                for i, grad, need in zip(inputs, results, needs, strict=True):
                    grads[i] = grad if need else None
            return None, *grads

    Node.__name__ = Node.__qualname__ = name.title().replace("_", "")
    return Node


def register(name, implementation, fake, function=None):
    for key in ("CPU", "CUDA"):
        LIB.impl(name, own_counters(implementation), key)
    torch.library.register_fake(f"effkernels::{name}", fake, lib=LIB)
    if function is not None:
        LIB.impl(name, lambda *args: function.apply(True, *args), "Autograd")


def run(name, function, implementation, args):
    """Call operator ``name``: recorded by torch.compile, straight to the launchers in eager mode (a custom op costs ~60 us a call)."""
    if torch.compiler.is_compiling():
        return getattr(torch.ops.effkernels, name)(*args)
    return implementation(*args) if function is None else function.apply(False, *args)
