"""The one gate between the fused kernels and their plain twins, with every reason for not fusing.

Environment: EFFKERNELS_BACKEND = auto (default: kernels where they can run), triton (kernels, or an error with the
reason) or reference (plain PyTorch). TRITON_INTERPRET=1, set before the first kernel is imported, runs the kernels on
CPU tensors.
"""

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.nn.modules import module
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

BACKENDS = ("auto", "triton", "reference")
COMPUTE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MIN_CAPABILITY = (8, 0)


def _constant(fn):
    """``torch.compiler.assume_constant_result``, which imports the whole compiler, and Triton with it."""
    fn._dynamo_marked_constant = True
    return fn


def backend() -> str:
    """EFFKERNELS_BACKEND, checked."""
    name = os.environ.get("EFFKERNELS_BACKEND", "auto").strip().lower() or "auto"
    if name not in BACKENDS:
        raise ValueError(f"EFFKERNELS_BACKEND must be one of {BACKENDS}, got {name!r}")
    return name


@functools.cache
def triton_problem() -> str | None:
    """Why Triton cannot be used, or None; does not import it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    return None


@functools.cache
def triton_import_problem() -> str | None:
    """Why Triton, which is installed, cannot be imported, or None; imports it: asked only where its kernels would
    run.
    """
    try:
        importlib.import_module("triton.language")
    except Exception as error:  # another Python's build, a missing driver library, ...: whatever its import raises
        return f"Triton cannot be imported ({type(error).__name__}: {error})"
    return None


def _switched_on(value: str) -> bool:
    return value.strip().lower() in ("1", "true", "on")


def interpreting() -> bool:
    """Whether TRITON_INTERPRET asks for Triton's interpreter, in which kernels run on CPU tensors."""
    return _switched_on(os.environ.get("TRITON_INTERPRET", ""))


# os.environ.get of a variable that is not set raises and catches inside: 15 us between convolutions, for every block.
# The dictionary behind it (its keys and values are encoded) answers in 2.
_SETTINGS = tuple(os.environ.encodekey(name) for name in ("EFFKERNELS_BACKEND", "TRITON_INTERPRET"))


@functools.lru_cache
def _without_triton_on_cpu(backend, interpret) -> bool:
    backend, interpret = ("" if value is None else os.environ.decodevalue(value) for value in (backend, interpret))
    return backend.strip().lower() in ("", "auto", "reference") and not _switched_on(interpret)


@_constant
def without_triton_on_cpu() -> bool:
    """Whether a CPU tensor takes oneDNN's fused convolutions (``effkernels.cpu``) or the plain layers, without an
    error: neither Triton's interpreter nor, by name, its kernels are asked for.

    Reads the environment at each call.
    """
    environment = os.environ._data
    return _without_triton_on_cpu(environment.get(_SETTINGS[0]), environment.get(_SETTINGS[1]))


def on_onednn(x: torch.Tensor) -> bool:
    """Whether what is fused for x is fused by ``effkernels.cpu``."""
    return x.is_cpu and without_triton_on_cpu()


def only_plain_on_cpu(x: torch.Tensor) -> bool:
    """Whether x takes the plain layers, which is known without looking at them: the whole gate of training on a CPU.

    False decides nothing: ``why_not_fused`` tells the reason, or raises.
    """
    return on_onednn(x) and (torch.compiler.is_compiling() or torch.is_grad_enabled() or few_pixels(x))


# With fewer pixels (images, rows and columns) than this a layer's weights weigh more than its images: comparing them at
# each call, which oneDNN's form asks for, costs what it saves. B0 at 224 pixels and batch 1 took 0.73 of the plain
# layers' time with this bound and 0.82 without, at 112 pixels 1.08 and 1.22 (one thread of an AMD EPYC, twelve rounds).
FEWEST_PIXELS = 1000


def few_pixels(x: torch.Tensor) -> bool:
    """Whether x is too small for the fused form of a CPU to pay. What is no batch of images others refuse."""
    return x.dim() == 4 and 0 < x.shape[0] * x.shape[2] * x.shape[3] < FEWEST_PIXELS


@functools.cache
def onednn_problem() -> str | None:
    """Why oneDNN's fused convolutions cannot be called, or None."""
    names = ("_convolution_pointwise", "_reorder_convolution_weight")
    if not torch.backends.mkldnn.is_available() or not all(hasattr(torch.ops.mkldnn, name) for name in names):
        return "this PyTorch has no oneDNN convolutions to fuse on the CPU"
    return None


@functools.cache
def _slow_bf16() -> None:
    """Said once a process: bf16 on a CPU that only emulates it."""
    if not any(getattr(torch.cpu, f"_is_{name}_supported", bool)() for name in ("avx512_bf16", "amx_tile")):
        warnings.warn(
            "this CPU has no bf16 instructions (AVX512_BF16 or AMX): bf16 runs, and is slower than fp32 here",
            RuntimeWarning,
            stacklevel=2,
        )


def onednn_problem_of(x: torch.Tensor) -> str | None:
    """Why oneDNN's fused convolutions cannot serve x, a CPU tensor, or None; the layers are not asked."""
    if torch.compiler.is_compiling():
        return "torch.compile is at work: on the CPU it compiles the plain layers"
    if torch.is_grad_enabled():
        return "the input is on the CPU, where inference alone is fused: call it under torch.no_grad()"
    if few_pixels(x):
        return f"the input is on the CPU and has fewer than {FEWEST_PIXELS} pixels in all: fusing would not pay"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    if not torch.backends.mkldnn.enabled:
        return "torch.backends.mkldnn.enabled is False"
    if (problem := onednn_problem()) is not None:
        return problem
    dtype = compute_dtype(x)
    if dtype == torch.float16:
        return "compute dtype float16: on the CPU float32 and bfloat16 are fused"
    if dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return "oneDNN has no bfloat16 on this CPU"
        _slow_bf16()
    return None


def in_training(layers: Iterable[tuple[str, nn.Module]], drops: bool) -> str | None:
    """The reason that a BatchNorm among them would use its batch's statistics, or a branch be dropped, or None."""
    for name, layer in layers:
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) and (layer.training or layer.running_mean is None):
            return f"{name} is in training mode: on the CPU inference alone is fused"
    return "drop-path is in training mode: on the CPU inference alone is fused" if drops else None


@_constant
def platform_problem(device_type: str, device_index: int | None) -> str | None:
    """Why kernels cannot run on a device at all, or None."""
    if (problem := triton_problem()) is not None:
        return problem
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform is active"
    if device_type == "cpu":
        return (
            triton_import_problem()
            if interpreting()
            else "the input is on the CPU (kernels need an NVIDIA GPU, or TRITON_INTERPRET=1)"
        )
    if device_type != "cuda":
        return f"kernels need an NVIDIA GPU, the input is on {device_type}"
    if torch.version.hip:
        return "AMD GPUs are not supported yet"
    capability = torch.cuda.get_device_capability(device_index)
    if capability < MIN_CAPABILITY:
        return f"the GPU is sm_{capability[0]}{capability[1]}, kernels need sm_80 or newer"
    return triton_import_problem()


@_constant
def requested_backend() -> str:
    """What EFFKERNELS_BACKEND asks for: auto, triton or reference. ValueError for another value."""
    return backend()


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype a convolution of x would run in: autocast's where it is on, else x's."""
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def tensor_problem(
    x: torch.Tensor, weights: Iterable[torch.Tensor] = (), buffers: Iterable[torch.Tensor] = ()
) -> str | None:
    """Why kernels cannot run on x [N, C, H, W] with these weights, or None."""
    dtype = compute_dtype(x)
    if dtype not in COMPUTE_DTYPES:
        return f"compute dtype {dtype} is not one of float32, bfloat16, float16"
    if x.numel() == 0:
        return "the input is empty"
    for weight in weights:
        if weight.dtype != torch.float32 and weight.dtype != dtype:
            return f"a parameter is {weight.dtype}; it must be float32 or the compute dtype {dtype}"
    for kind, tensor in (*(("parameter", w) for w in weights), *(("buffer", b) for b in buffers)):
        if tensor.device != x.device:
            return f"a {kind} is on {tensor.device}, the input on {x.device}"
        if not tensor.is_contiguous() and not (
            tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
        ):
            return f"a {kind} is not contiguous"
    return None


def unusual_tensor(tensors: Iterable[torch.Tensor]) -> str | None:
    """The reason that one of them is more than numbers in memory, or None."""
    for tensor in tensors:
        if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
            return f"a tensor is a {type(tensor).__name__} of layout {tensor.layout}"
    return None


def recording(x: object) -> bool:
    """Whether x only stands for a tensor (torch.fx), or torch.jit writes down what is done with it: nothing about it
    can be checked.
    """
    return not torch.compiler.is_compiling() and (isinstance(x, torch.fx.Proxy) or torch.jit.is_tracing())


def watched(x: object) -> str | None:
    """Who wants to see torch's own operators or modules, which kernels bypass, or None."""
    if torch.compiler.is_compiling():  # the compiler has modes of its own
        return None
    if recording(x):
        return "torch.jit or torch.fx is tracing: it records torch's own operators"
    modes = _get_current_dispatch_mode_stack() if torch._C._len_torch_dispatch_stack() else ()
    if any(not getattr(mode, "sees_kernels", False) for mode in modes):  # traffic.Operators counts launches too
        return "a TorchDispatchMode is active (FlopCounterMode, say): it sees torch's own operators"
    if module._global_forward_hooks or module._global_forward_pre_hooks or module._global_backward_hooks:
        return "hooks on all modules are registered"
    return None


def has_hooks(layer: nn.Module) -> bool:
    """Whether somebody listens to a layer's forward or backward."""
    return bool(layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks)


def pads_itself(layer: nn.Module) -> bool:
    """Whether what stands for a convolution puts zeros around its input, so that nobody else must."""
    return any(isinstance(conv, nn.Conv2d) and fixed_padding(conv) != (0, 0) for conv in layer.modules())


def fixed_padding(conv: nn.Conv2d) -> tuple[int, int] | None:
    """Zeros that a convolution puts on either side of height and width itself; None if the two sides differ."""
    if conv.padding == "valid":
        return (0, 0)
    if conv.padding == "same":
        total = [d * (k - 1) for k, d in zip(conv.kernel_size, conv.dilation, strict=True)]
        return None if total[0] % 2 or total[1] % 2 else (total[0] // 2, total[1] // 2)
    return tuple(conv.padding)


def layer_problem(
    name: str,
    layer: nn.Module,
    depthwise: tuple[int, int, int | str] = (1, 1, 0),
    shape: tuple | None = None,
    *,
    role: str | None = None,
    kind: type | None = None,
) -> str | None:
    """Why a submodule's own forward must run (hooks, a subclass, settings the kernels do not have), or None.

    depthwise: (kernel_size, stride, padding) that a grouped convolution, or a stem's, must have; the others must be
        1x1.
    shape: what the first two sizes of its weight must be, so that it fits its neighbours.
    role: the layer's name in FusedMBConv, where ``name`` is another. kind: the class of torch.nn that the layer
    computes as, where its own is another.
    """
    role, kind = role or name, kind or type(layer)
    if has_hooks(layer):
        return f"{name} has hooks"
    if "forward" in layer.__dict__:
        return f"{name}.forward was replaced"
    if kind not in (nn.Conv2d, nn.BatchNorm2d, nn.SyncBatchNorm):
        return f"{name} is a {type(layer).__name__}"
    if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not layer.affine:
        return f"{name} has no weight and bias (affine=False)"
    if shape is not None and layer.weight.shape[: len(shape)] != shape:
        return f"{name} does not fit its neighbours: its weight is {tuple(layer.weight.shape)}, {shape} wanted"
    if isinstance(layer, nn.Conv2d):
        grouped = role in ("conv_dw", "conv")
        k, stride, pad = depthwise if grouped or role == "conv_stem" else (1, 1, 0)
        groups = layer.out_channels if grouped else 1
        inputs = groups if grouped else layer.in_channels
        names = ("kernel_size", "stride", "padding", "dilation", "groups", "in_channels", "padding_mode")
        found = (
            tuple(layer.kernel_size),
            tuple(layer.stride),
            fixed_padding(layer),
            tuple(layer.dilation),
            layer.groups,
            layer.in_channels,
            layer.padding_mode,
        )
        wanted = ((k, k), (stride, stride), (pad, pad), (1, 1), groups, inputs, "zeros")
        if found != wanted:
            setting, found, wanted = next(each for each in zip(names, found, wanted, strict=True) if each[1] != each[2])
            return f"{name} has {setting} {found}, kernels need {wanted}: {layer}"
    if isinstance(layer, nn.Conv2d) and (layer.bias is None) == role.endswith(("conv_reduce", "conv_expand")):
        return f"{name} has {'no' if layer.bias is None else 'a'} bias"  # after BatchNorm folding, say
    return None


def why_not_fused(
    x: torch.Tensor | None,
    layers: dict[str, nn.Module] | Iterable[tuple[str, nn.Module]],
    largest: int = 1,
    depthwise: tuple[int, int, int] = (1, 1, 0),
    shapes: dict | None = None,
    judge: Callable | None = None,
    drops: bool = False,
) -> str | None:
    """None if kernels will run for ``layers`` on x [N, C, H, W], else the reason they will not.

    Args:
        x: the input, or None to ask about the layers alone.
        layers: a dictionary, or an iterable of pairs, of names and the submodules the kernels stand in for.
        depthwise: kernel size, stride and padding of the layer named conv_dw or conv.
        shapes: {name: first two sizes of the layer's weight}, for layers that must fit each other.
        largest: channels of the widest tensor inside, for the int32 offsets within an image.
        judge: called for the reason that the layers give, instead of ``layer_problem`` of each.
        drops: whether samples' branches are dropped now, which is training whatever the BatchNorms are in.

    Raises RuntimeError with the reason when EFFKERNELS_BACKEND=triton asks for kernels that cannot serve x, ValueError
    for another value of it than auto, triton, reference.
    """
    wanted = requested_backend()
    if wanted == "reference":
        return "EFFKERNELS_BACKEND=reference"
    cpu = x is not None and on_onednn(x)
    reason = None
    if x is not None:
        reason = watched(x) or (onednn_problem_of(x) if cpu else platform_problem(x.device.type, x.device.index))
    if reason is None:
        layers = dict(layers)
        if judge is not None:
            reason = judge()
        else:
            problems = (
                layer_problem(name, layer, depthwise, (shapes or {}).get(name)) for name, layer in layers.items()
            )
            reason = next((problem for problem in problems if problem is not None), None)
    if reason is None and x is not None:
        parameters = [p for layer in layers.values() for p in layer._parameters.values() if p is not None]
        reason = tensor_problem(
            x, parameters, [b for layer in layers.values() for b in layer._buffers.values() if b is not None]
        )
        if reason is None and largest * x.shape[2] * x.shape[3] >= 2**31:
            reason = "one image of the widest tensor has 2**31 elements or more"
        if reason is None and cpu:
            reason = in_training(layers.items(), drops) or unusual_tensor([x, *parameters])
    if reason is not None and wanted == "triton" and x is not None:
        raise RuntimeError(f"EFFKERNELS_BACKEND=triton, but the fused kernels cannot serve: {reason}")
    return reason
