"""Inference behind CUDA graphs: a whole forward started by one call, for small batches, where the host would be slower
than the GPU.

A graph reads weights where they lie, so training on, ``load_state_dict`` and optimizers, which write in place, are seen
by the next call. What a graph cannot see is looked at before each call: tensors that were replaced, modes, hooks. Then
the graph is captured again, or the model runs as it is.
"""

import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from effkernels import dispatch
from effkernels.adapters.accelerate import explain


class CudaGraphs:
    """What ``Graphed`` needs of CUDA, in one place. The tests put another one here, for the CPU."""

    WARM_UP = 3  # runs before the capture, in which kernels are compiled and libraries choose algorithms

    def problem(self, device: torch.device) -> str | None:
        """Why no graph can be captured or replayed on ``device`` now, or None."""
        if device.type != "cuda":
            return f"the input is on {device}, and a CUDA graph needs a GPU"
        if torch.cuda.is_current_stream_capturing():
            return "a CUDA graph is being captured, which takes the model's own launches"
        return None

    @contextmanager
    def _beside(self, device: torch.device) -> Iterator[torch.cuda.Stream]:
        with torch.cuda.device(device):
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                yield stream
            torch.cuda.current_stream().wait_stream(stream)

    def capture(self, run: Callable[[], object], device: torch.device) -> tuple[Callable[[], None], object]:
        """(what replays the captured ``run()`` on the current stream, its result, whose memory each replay fills)."""
        with self._beside(device):
            for _ in range(self.WARM_UP):
                run()
        with torch.cuda.device(device):
            graph = torch.cuda.CUDAGraph()
            # thread_local: a loader's thread that pins memory calls CUDA meanwhile, which must not spoil the capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                result = run()
        return graph.replay, result


def _map(function: Callable, output: object) -> object:
    """``output`` with ``function`` of its tensors; TypeError for one that holds other things than tensors."""
    if isinstance(output, torch.Tensor):
        return function(output)
    if type(output) in (tuple, list):
        return type(output)(_map(function, member) for member in output)
    if type(output) is dict:
        return {name: _map(function, member) for name, member in output.items()}
    raise TypeError(f"a {type(output).__name__}")


class _Capture:
    """One captured graph, its input's memory and its result's."""

    def __init__(self, model: nn.Module, x: torch.Tensor, graphs: CudaGraphs):
        self.x = x.detach().clone(memory_format=torch.preserve_format)
        self.replay, self.result = graphs.capture(lambda: model(self.x), x.device)

    def __call__(self, x: torch.Tensor) -> object:
        self.x.copy_(x)
        self.replay()
        return _map(torch.clone, self.result)  # the next replay overwrites the graph's own


_FIRST = "the first input of its shape, strides and dtype: the next has a graph"


class Graphed(nn.Module):
    """``graphed(model, example)``: the model for inference, behind one CUDA graph for each kind of input.

    reason: why the last call ran the model without a graph, or None where it did not. ``model`` is the model itself.
    """

    def __init__(self, model: nn.Module, most: int, graphs: CudaGraphs):
        super().__init__()
        self.model, self.most, self.graphs = model, most, graphs
        self.reason: str | None = None
        self._captures: OrderedDict[tuple, _Capture | str] = OrderedDict()
        self.train(model.training)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_captures": OrderedDict()}  # a graph belongs to its process, and to this model

    def forget(self) -> None:
        """Free every graph and its memory."""
        self._captures.clear()

    def forward(self, x: torch.Tensor) -> object:
        """``model(x)``; of a graph where one can serve, in memory of the caller's own."""
        self.reason = self._why_not(x)
        if self.reason is None:
            capture = self._capture_for(x)
            if not isinstance(capture, str):
                return capture(x)
            self.reason = capture
        return self.model(x)

    def _why_not(self, x) -> str | None:
        if torch.compiler.is_compiling():
            return "torch.compile is at work"
        if not isinstance(x, torch.Tensor):
            return f"the input is a {type(x).__name__}"
        if torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.model.parameters())):
            return "gradients are wanted: call it under torch.inference_mode() or torch.no_grad()"
        problem = self.graphs.problem(x.device) or dispatch.watched(x)
        if problem is not None:
            return problem
        for name, module in self.model.named_modules():
            if module.training:
                return f"{name or 'the model'} is in training mode"
            if dispatch.has_hooks(module):
                return f"{name or 'the model'} has hooks, which a graph would not call"
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            if tensor.device != x.device:
                return f"{name} is on {tensor.device}, the input on {x.device}"
        return None

    def _kind_of(self, x):
        """What a graph serves: inputs like this, weights that lie where they lie, and the settings at hand."""
        weights = tuple((t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self.model.state_dict().values())
        autocast = torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type)
        precision = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
        return (x.shape, x.stride(), x.dtype, x.device), (weights, autocast, precision, dispatch.backend())

    def _capture_for(self, x) -> "_Capture | str":
        """The graph for inputs like x, or why there is none. It is captured when such an input comes a second time: the
        last batch of a data set comes once.
        """
        kind, state = self._kind_of(x)
        found = self._captures.pop(kind, None)
        if found is None:
            while len(self._captures) >= self.most:
                self._captures.popitem(last=False)
            found = state, _FIRST
        elif found[0] != state or found[1] is _FIRST:
            del found  # the old graph's memory is free before the new one's is taken
            found = state, self._try(x)
        self._captures[kind] = found
        return found[1]

    def _try(self, x) -> "_Capture | str":
        try:
            capture = _Capture(self.model, x, self.graphs)
            _map(torch.Tensor.dim, capture.result)
        except TypeError as error:
            return f"the model returns {error}, not tensors in tuples, lists and dictionaries"
        except RuntimeError as error:  # what a capture does not allow: waiting for the GPU, choosing by a value, ...
            reason = f"it cannot be captured: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
            warnings.warn(f"graphed: the model runs without a graph, {reason}", RuntimeWarning, stacklevel=4)
            return reason
        return capture


def graphed(model: nn.Module, example: torch.Tensor, *, most: int = 8) -> Graphed:
    """``model`` for inference behind a CUDA graph: low latency at small batches. Call what it returns as the model.

    Args:
        model: in eval mode, with fused blocks, on the GPU.
        example: an input; its graph is captured now. Inputs of other shapes, strides or dtypes have graphs of their
            own, captured when they come a second time.
        most: graphs that are kept; beyond, the one that was used the longest ago is dropped. Each keeps the memory of
            one forward.

    Weights are read where they lie: what an optimizer or ``load_state_dict`` writes there is seen by the next call, and
    where a weight or buffer was replaced the graph is captured again. A call returns tensors of its own. Where no graph
    can serve (a CPU, gradients wanted, training mode, hooks, an input on another device, a forward that waits for the
    GPU or chooses by a value) the model runs as it is, and ``.reason`` says why. ``.forget()`` frees all graphs.

    A graph is replayed on the caller's stream; calls must not overlap on several, since each graph has one memory. The
    forward must depend on x and the weights alone: what else Python decides in it is decided at the capture.

    Raises TypeError for arguments of another type, ValueError for a model without a block that runs fused (with the
    reasons), or an example that the model does not take.
    """
    for name, value, kind in (("model", model, nn.Module), ("example", example, torch.Tensor)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if not isinstance(most, int) or most < 1:
        raise ValueError(f"most must be an integer >= 1, got {most!r}")
    return _checked(Graphed(model, most, CudaGraphs()), example)


def _checked(model: Graphed, example: torch.Tensor) -> Graphed:
    """``model`` once it has run ``example``; ValueError where its blocks or the example will not do."""
    reasons = explain(model.model)
    if not reasons.fused:
        found = next((reason for reason in reasons.values() if reason is not None), None)
        raise ValueError(
            f"model has no block that runs fused: {found or 'effkernels.accelerate(model) makes those it knows fused'}"
        )
    try:
        with torch.no_grad():
            for _ in range(2):
                model(example)
    except (ValueError, TypeError) as error:
        raise ValueError(f"the model does not take an example of shape {tuple(example.shape)}: {error}") from error
    return model
