"""The forward and backward pass of a training step as one CUDA graph, which is launched once instead of kernel by
kernel.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn


class CudaGraphs:
    """What ``GraphedStep`` needs of CUDA, in one place. The tests put another one here, for the CPU."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)

    @contextmanager
    def beside(self) -> Iterator[None]:
        """Run what is within on a side stream, as capturing does.

        The first pass of autograd on a stream sets up state of that stream, which must not happen during the capture.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream().wait_stream(self.stream)

    def capture(self, run: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
        """(What replays the captured ``run()``, its result, whose memory each replay fills again.)"""
        graph = torch.cuda.CUDAGraph()
        # thread_local: the loader's thread that pins memory calls CUDA meanwhile, which must not spoil the capture.
        with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
            result = run()
        return graph.replay, result

    def random_state(self) -> torch.Tensor:
        """The state of the GPU's random numbers."""
        return torch.cuda.get_rng_state()

    def set_random_state(self, state: torch.Tensor) -> None:
        """Go back to a state that ``random_state`` returned."""
        torch.cuda.set_rng_state(state)


class GraphedStep:
    """``step(images, labels) -> loss``, which adds to the gradients of ``model``, captured at the first call and then
    replayed.

    The graph reads and writes fixed memory. Inputs are copied there. Gradients stay in the tensors that they have at
    the capture, so they must be zeroed in place: ``zero_grad(set_to_none=False)``. Optimizers change weights in place,
    and BatchNorm its running statistics. The passes that warm up leave no trace: gradients, buffers and random numbers
    are put back.

    Raises ValueError for inputs of another shape or dtype than the first.
    """

    WARM_UP = 3  # passes: libraries choose algorithms and allocate workspaces in the first ones

    def __init__(
        self,
        step: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        model: nn.Module,
        graphs: CudaGraphs | None = None,
    ):
        self.step, self.model, self.graphs = step, model, graphs
        self.inputs, self.replay, self.loss = None, None, None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Run the step and return its loss, in memory that the next call overwrites."""
        if self.replay is None:
            self._capture(images, labels)
        for static, given in zip(self.inputs, (images, labels), strict=True):
            if given.shape != static.shape or given.dtype != static.dtype:
                raise ValueError(
                    f"a CUDA graph of inputs {tuple(static.shape)} {static.dtype} cannot take {tuple(given.shape)} "
                    f"{given.dtype}"
                )
            static.copy_(given)
        self.replay()
        return self.loss

    def _capture(self, images, labels):
        self.graphs = self.graphs or CudaGraphs(images.device)
        self.inputs = images.clone(), labels.clone()
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        kept = [p.grad for p in self.model.parameters() if p.grad is not None] + list(self.model.buffers())
        before, random_state = [tensor.clone() for tensor in kept], self.graphs.random_state()
        with self.graphs.beside():
            for _ in range(self.WARM_UP):
                self.step(*self.inputs)
        self.replay, self.loss = self.graphs.capture(lambda: self.step(*self.inputs))
        self.graphs.set_random_state(random_state)
        with torch.no_grad():
            for tensor, value in zip(kept, before, strict=True):
                tensor.copy_(value)
