"""How a shape is run: the variants, one timed step of each, and the check that a variant computes the right thing."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks import libraries
from benchmarks.shapes import Model, Shape

# Distinct images; a batch repeats them, so that its BatchNorm statistics, hence its results, are those of the two.
IMAGES = 2
NUM_CLASSES = 1000


@dataclass(frozen=True)
class Variant:
    """What runs: plain or fused modules or a library's model, in a memory format.

    compile_mode is torch.compile's mode (None: eager). graph says whether a step is replayed from a CUDA graph (None:
    only where it is too short to be timed otherwise).
    """

    name: str
    fused: bool = False
    memory_format: torch.memory_format = torch.channels_last
    compile_mode: str | None = None
    library: str | None = None
    graph: bool | None = None

    def __str__(self):
        return self.name

    @property
    def layout(self) -> str:
        return "NHWC" if self.memory_format == torch.channels_last else "NCHW"


EAGER = Variant("eager", memory_format=torch.contiguous_format)
CHANNELS_LAST = Variant("channels_last")
OURS = Variant("ours", fused=True)
COMPILE_MODES = ("default", "max-autotune", "reduce-overhead")


def variants(compile_modes: Sequence[str], libraries: Sequence[str] = ()) -> list[Variant]:
    """Eager in both memory formats and torch.compile in each mode, of the plain module and of each library's; then
    ours.
    """
    found = []
    for library in (None, *libraries):
        prefix = f"{library}-" if library else ""
        found += [replace(variant, name=prefix + variant.name, library=library) for variant in (EAGER, CHANNELS_LAST)]
        found += [Variant(f"{prefix}compile-{mode}", compile_mode=mode, library=library) for mode in compile_modes]
    return [*found, OURS]


def latency_variants() -> list[Variant]:
    """The variants of latency, each replayed from a CUDA graph: torch.compile's own in its mode reduce-overhead, else
    ours.
    """
    captured = [
        replace(variant, graph=True)
        for variant in (CHANNELS_LAST, Variant("compile-default", compile_mode="default"), OURS)
    ]
    return [*captured[:2], Variant("compile-reduce-overhead", compile_mode="reduce-overhead", graph=False), captured[2]]


class VariantRun:
    """One shape under one variant: weights ``state``, a batch that repeats the images ``x``, and the gradient ``dout``
    of the output.

    Inference runs without autograd, in ``dtype`` throughout. Training keeps fp32 weights under autocast to ``dtype``.
    The training step of a model is forward, cross-entropy, backward and AdamW; that of another module is forward and
    backward.
    """

    def __init__(
        self,
        shape: Shape,
        training: bool,
        variant: Variant,
        state: dict,
        x: torch.Tensor,
        dout: torch.Tensor,
        batch: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        self.training, self.batch, self.dtype, self.is_model = training, batch, dtype, isinstance(shape, Model)
        mixed = training and dtype in (torch.bfloat16, torch.float16)
        self.autocast = (
            torch.autocast(torch.device(device).type, dtype, enabled=True) if mixed else contextlib.nullcontext()
        )
        if variant.library is None:
            module = shape.build(variant.fused)
            module.load_state_dict(state)
            self.names = [name for name, _ in module.named_parameters()]
        else:
            module = libraries.build(variant.library, shape.name)
            self.names = libraries.load(module, state)
        module.to(device, torch.float32 if mixed else dtype, memory_format=variant.memory_format).train(training)
        self.fused, self.module = variant.fused, module
        self.parameters = list(module.parameters())
        self.graphs = variant.compile_mode in ("reduce-overhead", "max-autotune")
        self.call = (
            module if variant.compile_mode is None else torch.compile(module, mode=variant.compile_mode, dynamic=False)
        )
        self.images = min(IMAGES, batch)

        def repeat(images):
            images = images[: self.images].to(device, dtype)
            return images.repeat(batch // len(images), *[1] * (images.dim() - 1))

        self.x = repeat(x).contiguous(memory_format=variant.memory_format)
        self.dout = repeat(dout)
        if self.dout.dim() == 4:
            self.dout = self.dout.contiguous(memory_format=variant.memory_format)
        self.x.requires_grad_(training and not self.is_model)
        if self.is_model:
            self.labels = torch.arange(batch, device=device) % NUM_CLASSES
            self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, fused=True) if training else None

    def _begin(self):
        if self.graphs:  # outputs of the last step may be overwritten now
            torch.compiler.cudagraph_mark_step_begin()

    def _forget(self):
        self.x.grad = None
        for p in self.parameters:
            p.grad = None

    def step(self) -> None:
        """Run one step: what is timed."""
        self._begin()
        if not self.training:
            with torch.no_grad():
                self.call(self.x)
            return
        self._forget()
        with self.autocast:
            out = self.call(self.x)
            loss = F.cross_entropy(out, self.labels) if self.is_model else None
        if self.is_model:
            loss.backward()
            self.optimizer.step()
        else:
            out.backward(self.dout.to(out.dtype))

    def results(self) -> dict[str, torch.Tensor]:
        """The output and, in training, every gradient under ``dout``, as float64 on the CPU.

        Of what belongs to images only the first and the last IMAGES are returned; weight gradients are scaled as if the
        batch had but IMAGES images.
        """
        self._begin()
        if not self.training:
            with torch.no_grad():
                return {"out": self._ends(self.call(self.x))}
        self._forget()
        with self.autocast:
            out = self.call(self.x)
        out.backward(self.dout.to(out.dtype))
        found = {"out": self._ends(out.detach())}
        if self.x.grad is not None:
            found["dx"] = self._ends(self.x.grad)
        for name, p in zip(self.names, self.parameters, strict=True):
            found[name] = p.grad.double().cpu() * (self.images / self.batch)
        self._forget()
        return found

    def _ends(self, images):
        return torch.cat([images[: self.images], images[-self.images :]]).double().cpu()

    def path(self) -> str:
        """What served the call: plain PyTorch, the fused kernels, or the reasons why not them."""
        if not self.fused:
            return "PyTorch"
        with self.autocast, torch.set_grad_enabled(self.module.training):
            reasons = {m.why_not_fused(self.x) for m in self.module.modules() if hasattr(m, "why_not_fused")}
        return "; ".join(sorted(f"PyTorch: {reason}" if reason else "fused kernels" for reason in reasons))


@dataclass(frozen=True)
class Truth:
    """Seeded weights and images of a shape, the float64 results for them, and how far eager PyTorch is from those.

    Eager's own error is the larger one of its two memory formats: on B0's gradients in fp32 they differ by a factor of
    two.
    """

    shape: Shape
    training: bool
    batch: int
    device: torch.device
    dtype: torch.dtype
    state: dict
    x: torch.Tensor
    dout: torch.Tensor
    results: dict
    eager_errors: dict

    @classmethod
    def of(cls, shape: Shape, training: bool, batch: int, device: torch.device | str, dtype: torch.dtype) -> "Truth":
        """Make the truth of a shape. Raises ValueError for a batch size that does not repeat the images evenly."""
        if batch < 1 or batch % IMAGES and (batch > 1 or training):
            raise ValueError(f"the batch size must be a multiple of {IMAGES}, or 1 in inference, got {batch}")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            plain = shape.build(fused=False)
            _randomize_batch_norms(plain)
            x = torch.randn(IMAGES, shape.in_channels, shape.size, shape.size)
            _calibrate(plain, x)
            with torch.no_grad():
                dout = torch.randn_like(plain.eval()(x))
        if not training:
            plain.to(dtype)  # the truth is that of the rounded weights
        state, x, dout = plain.state_dict(), x.to(dtype), dout.to(dtype)
        results = VariantRun(
            shape=shape,
            training=training,
            variant=EAGER,
            state=state,
            x=x,
            dout=dout,
            batch=min(IMAGES, batch),
            device=device,
            dtype=torch.float64,
        ).results()
        # Gradients that are zero in exact arithmetic (a bias before another BatchNorm) have no relative error.
        largest = max(t.norm() for t in results.values())
        results = {name: t for name, t in results.items() if t.norm() > 1e-9 * largest}
        truth = cls(shape, training, batch, torch.device(device), dtype, state, x, dout, results, {})
        for variant in (EAGER, CHANNELS_LAST):
            for name, error in truth.errors(truth.runner(variant)).items():
                truth.eager_errors[name] = max(error, truth.eager_errors.get(name, 0.0))
        return truth

    def runner(self, variant: Variant) -> VariantRun:
        """The shape under a variant, with these weights and images."""
        return VariantRun(
            shape=self.shape,
            training=self.training,
            variant=variant,
            state=self.state,
            x=self.x,
            dout=self.dout,
            batch=self.batch,
            device=self.device,
            dtype=self.dtype,
        )

    def errors(self, runner: VariantRun) -> dict[str, float]:
        """The relative L2 errors of output and input gradient, and the root mean square of those of all weight
        gradients.
        """
        found = runner.results()
        errors = {name: ((found[name] - want).norm() / want.norm()).item() for name, want in self.results.items()}
        summary = {name: errors.pop(name) for name in ("out", "dx") if name in errors}
        if errors:
            summary["weights"] = (sum(e * e for e in errors.values()) / len(errors)) ** 0.5
        return summary

    def check(self, runner: VariantRun) -> dict[str, float]:
        """The errors. Raises AssertionError if one is above twice eager PyTorch's in the same dtype (plus 1e-6), or not
        a number.
        """
        errors = self.errors(runner)
        for name, error in errors.items():
            bound = 2 * self.eager_errors[name] + 1e-6
            assert error <= bound, f"{name}: relative L2 error {error:.3g} against float64, bound {bound:.3g}"
        return errors


def _randomize_batch_norms(module: nn.Module):
    for m in module.modules():
        if isinstance(m, nn.BatchNorm2d):
            for tensor in (m.weight.data, m.running_var):
                tensor.uniform_(0.5, 1.5)
            for tensor in (m.bias.data, m.running_mean):
                tensor.normal_(0, 0.1)


def _calibrate(module: nn.Module, x):
    """Bring running statistics near those of ``x``, as trained ones are.

    With others a deep network's output hardly depends on its input.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for m in norms:
        m.momentum = 0.9
    with torch.no_grad():
        module.train()(x)
    for m, momentum in zip(norms, momenta, strict=True):
        m.momentum = momentum
