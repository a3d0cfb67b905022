"""Fused operators on NCHW tensors (any memory format; channels_last costs no copy), twins of ``effkernels.reference``.

They run the Triton kernels unconditionally: ``effkernels.dispatch.why_not_fused`` tells whether they can, the modules ask it.
Results are channels_last. Autocast decides the compute dtype as for a convolution; sums, statistics and gates are fp32.
"""

import torch

from effkernels import ops
from effkernels.dispatch import compute_dtype
from effkernels.geometry import check_activation, check_conv_args, conv_out_size
from effkernels.ops.mbconv import NAMES as DTYPE_NAMES
from effkernels.parameters import BatchNormParams, SqueezeExciteParams
from effkernels.reference import ACTIVATIONS, check_batch, check_memory, drop_path_draws


def _nhwc(x, dtype=None):
    return x.permute(0, 2, 3, 1).to(dtype or x.dtype).contiguous()


def _nchw(x):
    return x.permute(0, 3, 1, 2)


def _advance(*norms):
    """num_batches_tracked + 1 where the average is cumulative, before the kernels that read it (they count the others themselves)."""
    counters = [
        n.num_batches_tracked for n in norms if n is not None and n.updates and n.num_batches_tracked is not None and n.momentum is None
    ]
    if counters:
        torch._foreach_add_(counters, 1)


def _running(norm: BatchNormParams):
    return (norm.running_mean, norm.running_var, norm.num_batches_tracked) if norm.updates or not norm.training else (None,) * 3


def _differentiable(tensors) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def _depthwise_block(x, weight, norm, *, stride, padding, act, pre_norm, pre_act, squeeze_excite):
    """NHWC core of ``depthwise_conv_bn_act``."""
    se = squeeze_excite[:4] if squeeze_excite else (None,) * 4
    se_act, gate = (squeeze_excite.act, squeeze_excite.gate) if squeeze_excite else ("identity", "sigmoid")
    pre = pre_norm or BatchNormParams(None, None, training=False)
    batch = norm.training or pre.training
    if not batch and not _differentiable([x, weight, *pre[:2], *norm[:2], *se]):
        args = (x, weight, *pre[:4], *norm[:4], *se, stride, padding, pre_act, act, se_act, gate, pre.eps, norm.eps)
        return ops.run("depthwise_block_inference", None, ops.depthwise_block_inference, args)
    args = (
        x, weight, pre.weight, pre.bias, *_running(pre), norm.weight, norm.bias, *_running(norm), *se, stride, padding, pre_act, act,
        se_act, gate, pre.training, pre.momentum, pre.eps, norm.training, norm.momentum, norm.eps,
    )  # fmt: skip
    return ops.run("depthwise_block", ops.DepthwiseBlock, ops.depthwise_block, args)[0]


def _bn_act_add(x, norm, *, act="identity", mask=None, residual=None):
    """NHWC core of ``bn_act_add``."""
    if not norm.training and mask is None and not _differentiable([x, *norm[:2], residual]):
        args = (x, *norm[:4], residual, act, norm.eps)
        return ops.run("bn_act_add_inference", None, ops.bn_act_add_inference, args)
    args = (x, *norm[:2], *_running(norm), mask, residual, act, norm.training, norm.momentum, norm.eps)
    return ops.run("bn_act_add", ops.BatchNormActAdd, ops.bn_act_add, args)[0]


def _check(x, weight, *norms, stride=1, padding="symmetric", acts=()):
    """ValueError/TypeError naming what is wrong with the arguments of a functional form."""
    if weight.dim() != 4 or weight.shape[1] != 1 or weight.shape[2] != weight.shape[3]:
        raise ValueError(f"weight must be [C, 1, k, k], got shape {tuple(weight.shape)}")
    check_conv_args(weight.shape[-1], stride, padding)
    check_activation(x, weight, x.shape[1] if x.dim() == 4 else 0, weight.shape[-1], stride, padding)
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
            raise ValueError(f"a BatchNorm that synchronises processes is for mbconv, stem and head, got group {norm.group!r}")


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
    """``act(BN(depthwise(pre_act(pre_BN(x)))))``, times squeeze-excite's gate; each part optional but the convolution and its BN.

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
    y = _depthwise_block(
        _nhwc(x, compute_dtype(x)), weight, norm,
        stride=stride, padding=padding, act=act, pre_norm=pre_norm, pre_act=pre_act, squeeze_excite=squeeze_excite,
    )  # fmt: skip
    return _nchw(y)


def bn_act_add(x, norm: BatchNormParams, *, act="identity", mask=None, residual=None) -> torch.Tensor:
    """``act(BN(x)) * mask[n] + residual``; x and residual [N, C, H, W], mask fp32 [N]."""
    _check_norms(norm, acts=(act,))
    _check_alone(norm)
    check_batch(norm, x.shape)
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must have x's shape {tuple(x.shape)}, got {tuple(residual.shape)}")
    if mask is not None and (mask.shape != x.shape[:1] or mask.requires_grad):
        raise ValueError(f"mask must be [{x.shape[0]}] and need no gradient, got shape {tuple(mask.shape)}")
    _advance(norm)
    residual = None if residual is None else _nhwc(residual)
    return _nchw(_bn_act_add(_nhwc(x), norm, act=act, mask=mask, residual=residual))


def squeeze_excite(x: torch.Tensor, params: SqueezeExciteParams) -> torch.Tensor:
    """``x * gate(W_e act(W_r mean_hw(x) + b_r) + b_e)``; x [N, C, H, W]."""
    if x.shape[0] == 0:
        return x.new_empty(x.shape)
    args = (_nhwc(x), *params)  # the product keeps its dtype, also under autocast
    return _nchw(ops.run("squeeze_excite", ops.SqueezeExcite, ops.squeeze_excite, args)[0])


def _check_stem_weight(x, weight, stride, padding):
    if weight.dim() != 4 or weight.shape[2:] != (3, 3):
        raise ValueError(f"weight must be [S, I, 3, 3], got shape {tuple(weight.shape)}")
    check_conv_args(3, stride, padding)
    check_activation(x, weight, weight.shape[1], 3, stride, padding)


def _check_block(x, expand, depthwise, squeeze_excite, project, expand_size):
    """ValueError unless the layers of a block fit x and each other."""
    E, O = depthwise[0].shape[0], project[0].shape[0]
    wanted = {"depthwise weight": (depthwise[0], (E, 1, *depthwise[0].shape[2:])), "project weight": (project[0], (O, E, 1, 1))}
    if expand:
        wanted["expand weight"] = expand[0], (E, x.shape[1], expand_size, expand_size)
    elif x.shape[1] != E:
        raise ValueError(f"depthwise weight must have x's {x.shape[1]} channels, got {E}")
    norms = {"depthwise": (depthwise[1], E), "project": (project[1], O), **({"expand": (expand[1], E)} if expand else {})}
    for layer, (norm, C) in norms.items():
        for name in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{layer} norm's {name}"] = getattr(norm, name), (C,)
    if squeeze_excite:
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
    mask: torch.Tensor | None = None,
    stem_stride: int = 0,
) -> torch.Tensor:
    """One MBConv block as one autograd node; each of expand, depthwise, project is (convolution weight, BatchNormParams).

    x [N, I, H, W] -> [N, O, H', W']. drop_path applies to the residual branch in training only. memory "keep" holds the three
    convolutions' outputs for the backward; "recompute" computes the first (the largest) again from x there.
    draws: fp32 [N] from [0, 1), of drop_path; else they are drawn here. A sample's branch is kept where its draw lies below 1 - drop_path.
    mask: fp32 [N], factors of the residual branch that the caller drew, in place of drop_path's.
    stem_stride, 1 or 2: ``expand`` is a network's stem, with weight [E, I, 3, 3], and x its images, of any strides:
    ``mbconv(stem(x, ...), None, ...)`` in fewer launches and passes.
    """
    dtype = compute_dtype(x)
    norms = ([expand[1]] if expand else []) + [depthwise[1], project[1]]
    k = depthwise[0].shape[-1]
    inside = x.shape
    if stem_stride:
        if not expand or residual:
            raise ValueError(f"stem_stride needs expand, which is the stem, and no residual, got {expand=} and {residual=}")
        _check_stem_weight(x, expand[0], stem_stride, padding)
        inside = (x.shape[0], len(expand[0]), *(conv_out_size(size, 3, stem_stride, padding) for size in x.shape[2:]))
    _check(x, depthwise[0], *norms, stride=stride, padding=padding, acts=(act,))
    check_memory(memory)
    if residual and (stride != 1 or project[0].shape[0] != x.shape[1]):
        raise ValueError(f"residual needs stride 1 and as many outputs as inputs, got {stride=}, {x.shape[1]} -> {project[0].shape[0]}")
    for norm in norms:
        check_batch(norm, inside, *((k, stride, padding) if norm is not norms[0] or not expand else ()))
    _check_block(x, expand, depthwise, squeeze_excite, project, 3 if stem_stride else 1)
    for name, t in (("mask", mask), ("draws", draws)):
        if t is not None and (not residual or t.shape != x.shape[:1] or t.dtype != torch.float32 or t.requires_grad):
            raise ValueError(
                f"{name} must be fp32 [{x.shape[0]}], of a block with residual, and need no gradient, got {t.dtype} {[*t.shape]}"
            )
    if x.shape[0] == 0:
        size = (conv_out_size(n, k, stride, padding) for n in inside[2:])
        return x.new_empty(0, project[0].shape[0], *size, dtype=torch.promote_types(dtype, x.dtype) if residual else dtype)
    keep = -1.0
    if mask is None and residual and training and drop_path > 0:
        mask, keep = drop_path_draws(x.shape[0], x.device) if draws is None else draws, 1.0 - drop_path
    shortcut = x if stem_stride else _nhwc(x)
    weight1, norm1 = expand or (None, BatchNormParams(None, None, training=False))
    (weight2, norm2), (weight3, norm3) = depthwise, project
    weight1 = weight1 if weight1 is None or stem_stride else weight1.contiguous()
    weight2, weight3 = weight2.contiguous(), weight3.contiguous()
    se = tuple(t.contiguous() for t in squeeze_excite[:4]) if squeeze_excite else (None,) * 4
    se_act, gate = (squeeze_excite.act, squeeze_excite.gate) if squeeze_excite else ("identity", "sigmoid")
    settings = (DTYPE_NAMES[dtype], stride, padding, act, se_act, gate, residual)
    parameters = (weight1, *norm1[:2], weight2, *norm2[:2], *se, weight3, *norm3[:2])
    if mask is None and not any(norm.training for norm in norms) and not _differentiable([x, *parameters]):
        if stem_stride:
            x = stem(x, *expand, stride=stem_stride, padding=padding, act=act)
            return mbconv(x, None, depthwise, squeeze_excite, project, stride=stride, padding=padding, act=act)
        args = (
            shortcut, weight1, *norm1[:4], weight2, *norm2[:4], *se, weight3, *norm3[:4], *settings, norm1.eps, norm2.eps, norm3.eps,
        )  # fmt: skip
        return _nchw(ops.run("mbconv_inference", None, ops.mbconv_inference, args))
    _advance(*norms)
    batch = [value for norm in (norm1, norm2, norm3) for value in (norm.training, norm.momentum, norm.eps)]
    args = (
        shortcut, weight1, *norm1[:2], *_running(norm1), weight2, *norm2[:2], *_running(norm2), *se, weight3, *norm3[:2], *_running(norm3),
        mask, *settings, keep, stem_stride, *batch, memory == "recompute", [norm.group for norm in (norm1, norm2, norm3)],
    )  # fmt: skip
    return _nchw(ops.run("mbconv", ops.MBConvFunction, ops.mbconv, args)[0])


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
    if not norm.training and not _differentiable([x, weight, *norm[:2]]):
        args = (_nhwc(x), weight.contiguous(), *norm[:4], DTYPE_NAMES[dtype], act, norm.eps)
        return ops.run("head_inference", None, ops.head_inference, args)
    _advance(norm)
    args = (_nhwc(x), weight.contiguous(), *norm[:2], *_running(norm), DTYPE_NAMES[dtype], act, norm.training, norm.momentum, norm.eps)
    args += (norm.group,)
    return ops.run("head", ops.Head, ops.head, args)[0]


def stem(
    x: torch.Tensor, weight: torch.Tensor, norm: BatchNormParams, *, stride: int = 2, padding: str = "symmetric", act: str = "silu"
) -> torch.Tensor:
    """``act(BN(conv3x3(x)))``, a dense convolution of images of few channels: x [N, I, H, W], weight [S, I, 3, 3] -> [N, S, H', W'].

    x is read where it lies, whatever its strides and dtype: no copy, no cast.
    """
    _check_stem_weight(x, weight, stride, padding)
    _check_norms(norm, acts=(act,))
    n, _, *size = x.shape
    check_batch(norm, (n, weight.shape[0], *size), 3, stride, padding)
    if n == 0:
        return x.new_empty(0, weight.shape[0], *(conv_out_size(s, 3, stride, padding) for s in size), dtype=compute_dtype(x))
    settings = (DTYPE_NAMES[compute_dtype(x)], stride, padding, act)
    if not norm.training and not _differentiable([x, weight, *norm[:2]]):
        args = (x, weight, *norm[:4], *settings, norm.eps)
        return _nchw(ops.run("stem_inference", None, ops.stem_inference, args))
    _advance(norm)
    args = (x, weight, *norm[:2], *_running(norm), *settings, norm.training, norm.momentum, norm.eps, norm.group)
    return _nchw(ops.run("stem", ops.Stem, ops.stem, args)[0])
