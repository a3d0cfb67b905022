"""Fused operators on NCHW tensors (any memory format; channels_last costs no copy), twins of ``effkernels.reference``.

They run fused unconditionally: ``effkernels.dispatch.why_not_fused`` tells whether they can, the modules ask it: in
inference on CPU tensors by ``effkernels.cpu``, unless Triton's interpreter is asked for, else by Triton's kernels.
Results are channels_last. Autocast decides the compute dtype as for a convolution; sums, statistics and gates are fp32.
"""

import torch

from effkernels import ops
from effkernels.cpu import inference as cpu
from effkernels.dispatch import compute_dtype, on_onednn
from effkernels.geometry import check_activation, check_conv_args, conv_out_size, conv_out_sizes
from effkernels.ops.head import HeadSettings
from effkernels.ops.mbconv import BlockSettings
from effkernels.ops.single_layers import ActivationSettings, DepthwiseSettings
from effkernels.ops.stem import StemSettings
from effkernels.parameters import BatchNormParams, SqueezeExciteParams
from effkernels.reference import ACTIVATIONS, check_batch, check_memory, drop_path_draws


def _nhwc(x, dtype=None):
    return x.permute(0, 2, 3, 1).to(dtype or x.dtype).contiguous()


def _nchw(x):
    return x.permute(0, 3, 1, 2)


def _advance(*norms):
    """num_batches_tracked + 1 where the average is cumulative, before the kernels that read it (they count the others
    themselves).
    """
    counters = [
        n.num_batches_tracked
        for n in norms
        if n is not None and n.updates and n.num_batches_tracked is not None and n.momentum is None
    ]
    if counters:
        torch._foreach_add_(counters, 1)


def _parameters(*norms: BatchNormParams) -> list:
    return [t for norm in norms for t in (norm.weight, norm.bias)]


def _tensors(se: SqueezeExciteParams | None) -> list:
    return [] if se is None else [se.reduce_weight, se.reduce_bias, se.expand_weight, se.expand_bias]


def _differentiable(tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _check(x, weight, *norms, stride=1, padding="symmetric", acts=()):
    """ValueError/TypeError naming what is wrong with the arguments of a functional form."""
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be [C, 1, k, k], got shape {tuple(weight.shape)}")
    check_conv_args(weight.shape[-1], stride, padding)
    check_activation(
        x=x,
        weight=weight,
        channels=x.shape[1] if x.dim() == 4 else 0,
        kernel_size=weight.shape[-1],
        stride=stride,
        padding=padding,
    )
    _check_norms(*norms, acts=acts)


def _check_norms(*norms, acts=()):
    for norm in norms:
        if norm.weight is None or norm.bias is None:
            raise ValueError("a BatchNorm's weight and bias must be tensors, got None (affine=False)")
        if not norm.training and norm.running_mean is None:
            raise ValueError("running_mean and running_var must be given when training is False, got None")
    for act in acts:
        if act not in ACTIVATIONS:
            raise ValueError(f"act must be one of {sorted(ACTIVATIONS)}, got {act!r}")


def _check_alone(*norms):
    for norm in norms:
        if norm.group:
            raise ValueError(
                f"a BatchNorm that synchronises processes is for mbconv, stem and head, got group {norm.group!r}"
            )


def depthwise_conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: BatchNormParams,
    *,
    stride: int = 1,
    padding: str = "symmetric",
    act: str = "silu",
    pre_norm: BatchNormParams | None = None,
    pre_act: str = "identity",
    squeeze_excite: SqueezeExciteParams | None = None,
) -> torch.Tensor:
    """``act(BN(depthwise(pre_act(pre_BN(x)))))``, times squeeze-excite's gate; each part optional but the convolution
    and its BN.

    x [N, C, H, W], weight [C, 1, k, k] -> [N, C, H', W'].
    """
    norms = [norm] if pre_norm is None else [norm, pre_norm]
    _check_alone(*norms)
    _check(x, weight, *norms, stride=stride, padding=padding, acts=(act, pre_act))
    if weight.shape[0] != x.shape[1]:
        raise ValueError(f"weight must have x's {x.shape[1]} channels, got {weight.shape[0]}")
    check_batch(norm, x.shape, weight.shape[-1], stride, padding)
    if pre_norm is not None:
        check_batch(pre_norm, x.shape)
    if x.shape[0] == 0:
        size = (conv_out_size(n, weight.shape[-1], stride, padding) for n in x.shape[2:])
        return x.new_empty(0, weight.shape[0], *size, dtype=compute_dtype(x))
    _advance(norm, pre_norm)
    batch = any(n.training for n in norms)
    inference = not batch and not _differentiable([x, weight, *_parameters(*norms), *_tensors(squeeze_excite)])
    if inference and pre_norm is None and squeeze_excite is None and on_onednn(x):
        return cpu.depthwise_conv_bn_act(x, weight, norm, stride=stride, padding=padding, act=act)
    args = (
        _nhwc(x, compute_dtype(x)),
        weight,
        pre_norm,
        norm,
        squeeze_excite,
        DepthwiseSettings(stride, padding, act1=pre_act, act2=act),
    )
    if inference:
        return _nchw(ops.depthwise_block_inference(*args))
    return _nchw(ops.depthwise_block(*args))


def bn_act_add(
    x: torch.Tensor,
    norm: BatchNormParams,
    *,
    act: str = "identity",
    branch_scale: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> torch.Tensor:
    """``act(BN(x)) * branch_scale[n] + residual``; x and residual [N, C, H, W], branch_scale fp32 [N]."""
    _check_norms(norm, acts=(act,))
    _check_alone(norm)
    check_batch(norm, x.shape)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if branch_scale is not None and (branch_scale.shape != x.shape[:1] or branch_scale.requires_grad):
        raise ValueError(
            f"branch_scale must be [{x.shape[0]}] and need no gradient, got shape {tuple(branch_scale.shape)}"
        )
    _advance(norm)
    shortcut = None if residual is None else _nhwc(residual)
    settings = ActivationSettings(act)
    if not norm.training and branch_scale is None and not _differentiable([x, *_parameters(norm), residual]):
        return _nchw(ops.bn_act_add_inference(_nhwc(x), norm, shortcut, settings))
    return _nchw(ops.bn_act_add(x=_nhwc(x), norm=norm, branch_scale=branch_scale, residual=shortcut, settings=settings))


def squeeze_excite(x: torch.Tensor, params: SqueezeExciteParams) -> torch.Tensor:
    """``x * gate(W_e act(W_r mean_hw(x) + b_r) + b_e)``; x [N, C, H, W]."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    if on_onednn(x) and not _differentiable([x, *_tensors(params)]):
        return cpu.squeeze_excite(x, params)
    return _nchw(ops.squeeze_excite(_nhwc(x), params))  # the product keeps its dtype, also under autocast


def _check_stem_weight(x, weight, stride, padding):
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be [S, I, 3, 3], got shape {tuple(weight.shape)}")
    check_conv_args(3, stride, padding)
    check_activation(x=x, weight=weight, channels=weight.shape[1], kernel_size=3, stride=stride, padding=padding)


def _check_block(x, expand_weight, norm1, depthwise_weight, norm2, squeeze_excite, project_weight, norm3, expand_size):
    """ValueError unless the layers of a block fit x and each other."""
    E, O, k = depthwise_weight.shape[0], project_weight.shape[0], depthwise_weight.shape[-1]
    wanted = {
        "depthwise weight": (depthwise_weight, (E, 1, k, k)),
        "project weight": (project_weight, (O, E, 1, 1)),
    }
    if expand_weight is not None:
        wanted["expand weight"] = expand_weight, (E, x.shape[1], expand_size, expand_size)
    elif x.shape[1] != E:
        raise ValueError(f"depthwise weight must have x's {x.shape[1]} channels, got {E}")
    for layer, norm, C in (("depthwise", norm2, E), ("project", norm3, O), ("expand", norm1, E)):
        if norm is not None:
            for name in ("weight", "bias", "running_mean", "running_var"):
                wanted[f"{layer} norm's {name}"] = getattr(norm, name), (C,)
    if squeeze_excite is not None:
        R = squeeze_excite.reduce_weight.shape[0]
        for name, shape in zip(squeeze_excite._fields, ((R, E, 1, 1), (R,), (E, R, 1, 1), (E,)), strict=False):
            wanted[f"squeeze_excite's {name}"] = getattr(squeeze_excite, name), shape
    for name, (tensor, shape) in wanted.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must be {list(shape)}, got shape {tuple(tensor.shape)}")


def mbconv(
    x: torch.Tensor,
    expand: tuple[torch.Tensor, BatchNormParams] | None,
    depthwise: tuple[torch.Tensor, BatchNormParams],
    squeeze_excite: SqueezeExciteParams | None,
    project: tuple[torch.Tensor, BatchNormParams],
    *,
    stride: int = 1,
    padding: str = "symmetric",
    act: str = "silu",
    residual: bool = False,
    drop_path: float = 0.0,
    draws: torch.Tensor | None = None,
    training: bool = False,
    memory: str = "keep",
    branch_scale: torch.Tensor | None = None,
    stem_stride: int = 0,
) -> torch.Tensor:
    """One MBConv block as one autograd node; each of expand, depthwise, project is (convolution weight,
    BatchNormParams).

    x [N, I, H, W] -> [N, O, H', W']. drop_path applies to the residual branch in training only. memory "keep" holds the
    three convolutions' outputs for the backward; "recompute" computes the first (the largest) again from x there.
    draws: fp32 [N] from [0, 1), of drop_path; else they are drawn here. A sample's branch is kept where its draw lies
    below 1 - drop_path. branch_scale: fp32 [N], factors of the residual branch that the caller drew, in place of
    drop_path's. stem_stride, 1 or 2: ``expand`` is a network's stem, with weight [E, I, 3, 3], and x its images, of any
    strides: ``mbconv(stem(x, ...), None, ...)`` in fewer launches and passes.
    """
    dtype = compute_dtype(x)
    (weight1, norm1), (weight2, norm2), (weight3, norm3) = expand or (None, None), depthwise, project
    norms = [norm for norm in (norm1, norm2, norm3) if norm is not None]
    k, O = weight2.shape[-1], weight3.shape[0]
    N, _, *size = x.shape  # of what the depthwise convolution takes
    if stem_stride:
        if not expand or residual:
            raise ValueError(
                f"stem_stride needs expand, which is the stem, and no residual, got {expand=} and {residual=}"
            )
        _check_stem_weight(x, weight1, stem_stride, padding)
        size = conv_out_sizes(*size, 3, stem_stride, padding)
    _check(x, weight2, *norms, stride=stride, padding=padding, acts=(act,))
    check_memory(memory)
    if residual and (stride != 1 or O != x.shape[1]):
        raise ValueError(f"residual needs stride 1 and as many outputs as inputs, got {stride=}, {x.shape[1]} -> {O}")
    if norm1 is not None:
        check_batch(norm1, (N, norm1.weight.numel(), *size))
    for norm in (norm2, norm3):
        check_batch(norm, (N, norm.weight.numel(), *size), k, stride, padding)
    _check_block(
        x=x,
        expand_weight=weight1,
        norm1=norm1,
        depthwise_weight=weight2,
        norm2=norm2,
        squeeze_excite=squeeze_excite,
        project_weight=weight3,
        norm3=norm3,
        expand_size=3 if stem_stride else 1,
    )
    for name, t in (("branch_scale", branch_scale), ("draws", draws)):
        if t is not None and (not residual or t.shape != x.shape[:1] or t.dtype != torch.float32 or t.requires_grad):
            raise ValueError(
                f"{name} must be fp32 [{x.shape[0]}], of a block with residual, and need no gradient, got {t.dtype} "
                f"{[*t.shape]}"
            )
    if x.shape[0] == 0:
        size = conv_out_sizes(*size, k, stride, padding)
        return x.new_empty(0, O, *size, dtype=torch.promote_types(dtype, x.dtype) if residual else dtype)
    branch_draws, keep = branch_scale, -1.0
    if branch_scale is None and residual and training and drop_path > 0:
        branch_draws, keep = drop_path_draws(x.shape[0], x.device) if draws is None else draws, 1.0 - drop_path
    parameters = [weight1, weight2, weight3, *_parameters(*norms), *_tensors(squeeze_excite)]
    inference = (
        branch_draws is None and not any(norm.training for norm in norms) and not _differentiable([x, *parameters])
    )
    if inference and stem_stride:
        x = stem(x, *expand, stride=stem_stride, padding=padding, act=act)
        return mbconv(
            x=x,
            expand=None,
            depthwise=depthwise,
            squeeze_excite=squeeze_excite,
            project=project,
            stride=stride,
            padding=padding,
            act=act,
        )
    if inference and on_onednn(x):
        return cpu.mbconv(
            x=x,
            expand=expand,
            depthwise=depthwise,
            squeeze_excite=squeeze_excite,
            project=project,
            stride=stride,
            padding=padding,
            act=act,
            residual=residual,
        )
    shortcut = x if stem_stride else _nhwc(x)
    weight1 = weight1 if weight1 is None or stem_stride else weight1.contiguous()
    weight2, weight3 = weight2.contiguous(), weight3.contiguous()
    se = squeeze_excite
    if se is not None:
        se = SqueezeExciteParams(*(t.contiguous() for t in _tensors(se)), act=se.act, gate=se.gate)
    settings = BlockSettings(
        dtype=dtype,
        stride=stride,
        padding=padding,
        act=act,
        residual=residual,
        keep=keep,
        stem_stride=stem_stride,
        recompute=memory == "recompute",
    )
    block = {
        "x": shortcut,
        "expand_weight": weight1,
        "norm1": norm1,
        "depthwise_weight": weight2,
        "norm2": norm2,
        "se": se,
        "project_weight": weight3,
        "norm3": norm3,
        "settings": settings,
    }
    if inference:
        return _nchw(ops.mbconv_inference(**block))
    _advance(*norms)
    return _nchw(ops.mbconv(**block, branch_draws=branch_draws))


def head(x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, act: str = "silu") -> torch.Tensor:
    """``mean over H, W of act(BN(conv1x1(x)))``, [N, K, H, W] -> [N, O]; weight [O, K, 1, 1].

    With running statistics and no gradient wanted it is one launch, and the feature map is never stored.
    """
    if weight.dim() != 4 or weight.shape[2:] != (1, 1):
        raise ValueError(f"weight must be [O, K, 1, 1], got shape {tuple(weight.shape)}")
    check_activation(x, weight, weight.shape[1])
    _check_norms(norm, acts=(act,))
    check_batch(norm, x.shape)
    dtype = compute_dtype(x)
    if x.shape[0] == 0:
        return x.new_empty(0, weight.shape[0], dtype=dtype)
    inference = not norm.training and not _differentiable([x, weight, *_parameters(norm)])
    if inference and on_onednn(x):
        return cpu.head(x, weight, norm, act=act)
    args = (_nhwc(x), weight.contiguous(), norm, HeadSettings(dtype, act))
    if inference:
        return ops.head_inference(*args)
    _advance(norm)
    return ops.head(*args)


def stem(
    x: torch.Tensor,
    weight: torch.Tensor,
    norm: BatchNormParams,
    *,
    stride: int = 2,
    padding: str = "symmetric",
    act: str = "silu",
) -> torch.Tensor:
    """``act(BN(conv3x3(x)))``, a dense convolution of images of few channels: x [N, I, H, W], weight [S, I, 3, 3] ->
    [N, S, H', W'].

    x is read where it lies, whatever its strides and dtype: no copy, no cast.
    """
    _check_stem_weight(x, weight, stride, padding)
    _check_norms(norm, acts=(act,))
    n, _, *size = x.shape
    check_batch(norm, (n, weight.shape[0], *size), 3, stride, padding)
    if n == 0:
        return x.new_empty(
            0, weight.shape[0], *(conv_out_size(s, 3, stride, padding) for s in size), dtype=compute_dtype(x)
        )
    inference = not norm.training and not _differentiable([x, weight, *_parameters(norm)])
    if inference and on_onednn(x):
        return cpu.stem(x, weight, norm, stride=stride, padding=padding, act=act)
    args = (x, weight, norm, StemSettings(compute_dtype(x), stride, padding, act))
    if inference:
        return _nchw(ops.stem_inference(*args))
    _advance(norm)
    return _nchw(ops.stem(*args))
