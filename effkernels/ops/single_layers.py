"""Operators of single layers: [BN, act] -> depthwise -> BN, act -> [squeeze-excite]; BN, act, drop-path, residual; squeeze-excite."""

import torch
from torch.autograd.function import once_differentiable

from effkernels.geometry import conv_out_size
from effkernels.ops.autograd import (
    LIB,
    absent,
    batch_or_running,
    call,
    contiguous_like,
    differentiable,
    fp32,
    on_its_device,
    pads_of,
    register,
)

# ---- depthwise_block: [BN1 + act1] -> depthwise -> BN2 + act2 -> [squeeze-excite gate] -------------------------------------------

_NORM = (
    "Tensor{q} weight{i}, Tensor{q} bias{i}, Tensor(a{i}!)? running_mean{i}, Tensor(b{i}!)? running_var{i}, Tensor(c{i}!)? num_batches{i}"
)
_SE = "Tensor? reduce_weight, Tensor? reduce_bias, Tensor? expand_weight, Tensor? expand_bias"
_BLOCK_SETTINGS = (
    "int stride, str padding, str act1, str act2, str se_act, str gate, "
    "bool batch1, float? momentum1, float eps1, bool batch2, float? momentum2, float eps2"
)
LIB.define(
    f"depthwise_block(Tensor x, Tensor weight, {_NORM.format(i=1, q='?')}, {_NORM.format(i=2, q='')}, {_SE}, {_BLOCK_SETTINGS}) "
    "-> (Tensor out, Tensor y, Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2, Tensor gates, Tensor pooled, Tensor u)"
)
LIB.define(
    "depthwise_block_backward(Tensor dout, Tensor x, Tensor weight, Tensor? weight1, Tensor? bias1, Tensor weight2, Tensor bias2, "
    f"{_SE}, Tensor y, Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2, Tensor gates, Tensor pooled, Tensor u, "
    "int stride, str padding, str act1, str act2, str se_act, str gate, bool batch1, bool batch2, bool[] needs) "
    "-> (Tensor dx, Tensor dw, Tensor dweight1, Tensor dbias1, Tensor dweight2, Tensor dbias2, Tensor, Tensor, Tensor, Tensor)"
)


@on_its_device
def depthwise_block(
    x, weight, weight1, bias1, running_mean1, running_var1, num_batches1, weight2, bias2, running_mean2, running_var2, num_batches2,
    reduce_weight, reduce_bias, expand_weight, expand_bias, stride, padding, act1, act2, se_act, gate,
    batch1, momentum1, eps1, batch2, momentum2, eps2,
):  # fmt: skip
    from effkernels.kernels import batchnorm, depthwise, squeeze_excite
    from effkernels.kernels.norm import BatchNorm

    prologue = mean1 = rstd1 = None
    if weight1 is not None:
        mean1, rstd1 = batch_or_running(batch1, lambda: batchnorm.statistics(x), running_mean1, running_var1, num_batches1, momentum1, eps1)
        prologue = BatchNorm(weight1, bias1, mean1, rstd1)
    pads = pads_of(x, weight, stride, padding)
    y, tiles, _ = depthwise.depthwise_forward(x, weight, stride, pads, prologue=prologue, act1=act1, partial_statistics=batch2)
    mean2, rstd2 = batch_or_running(batch2, lambda: tiles, running_mean2, running_var2, num_batches2, momentum2, eps2)
    norm2 = BatchNorm(weight2, bias2, mean2, rstd2)
    gates = pooled = u = None
    if reduce_weight is not None:
        sums = squeeze_excite.pool(y, norm2, act=act2)
        gates, pooled, u = squeeze_excite.squeeze_excite_forward(
            sums, y.shape[1] * y.shape[2], reduce_weight, reduce_bias, expand_weight, expand_bias, act=se_act, gate=gate
        )
    out = batchnorm.apply(y, norm2, act=act2, gates=gates)
    return tuple(absent(x) if t is None else t for t in (out, y, mean1, rstd1, mean2, rstd2, gates, pooled, u))


def depthwise_block_fake(
    x, weight, weight1, bias1, running_mean1, running_var1, num_batches1, weight2, bias2, running_mean2, running_var2, num_batches2,
    reduce_weight, reduce_bias, expand_weight, expand_bias, stride, padding, *settings,
):  # fmt: skip
    N, H, W, C = x.shape
    k = weight.shape[-1]
    y = x.new_empty(N, conv_out_size(H, k, stride, padding), conv_out_size(W, k, stride, padding), C)
    norm1 = (absent(x), absent(x)) if weight1 is None else (fp32(x, C), fp32(x, C))
    se = (absent(x), absent(x), absent(x))
    if reduce_weight is not None:
        se = (fp32(x, N, C), fp32(x, N, C), fp32(x, N, reduce_weight.shape[0]))
    return (torch.empty_like(y), y, *norm1, fp32(x, C), fp32(x, C), *se)


def _needs(needs):
    """(dx, dw): the gradients of BN1 come with dx."""
    return needs[0] or needs[2] or needs[3], needs[1]


@on_its_device
def depthwise_block_backward(
    dout, x, weight, weight1, bias1, weight2, bias2, reduce_weight, reduce_bias, expand_weight, expand_bias,
    y, mean1, rstd1, mean2, rstd2, gates, pooled, u, stride, padding, act1, act2, se_act, gate, batch1, batch2, needs,
):  # fmt: skip
    from effkernels.kernels import batchnorm, depthwise, squeeze_excite
    from effkernels.kernels.norm import BatchNorm

    norm1 = BatchNorm(weight1, bias1, mean1, rstd1) if weight1 is not None else None
    norm2 = BatchNorm(weight2, bias2, mean2, rstd2)
    need_dx, need_dw = _needs(needs)
    C = x.shape[-1]
    taps = weight.shape[-1] ** 2
    pixels = y.shape[1] * y.shape[2]
    has_se = reduce_weight is not None
    sums = batchnorm.gradient_sums(dout, y, norm2, act=act2, for_gate=has_se)
    dpool, se_grads = None, [absent(x) for _ in range(4)]
    if has_se:
        weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
        dpool, se_grads, (dweight2, dbias2, k0, k1) = squeeze_excite.squeeze_excite_backward(
            sums, pixels, gates, pooled, u, weights, norm=norm2, act=se_act, gate=gate
        )
    else:
        gates = None
        dweight2, dbias2, k0, k1 = batchnorm.gradient_merge(sums.view(-1, 2, C), norm2, y.numel() // C)
    terms2 = (k0, k1) if batch2 else None
    dx, partials, _ = depthwise.depthwise_backward(
        dout, x, weight, stride, pads_of(x, weight, stride, padding),
        norm2=norm2, y2=y, terms2=terms2, act2=act2, gates=gates, dpool=dpool, norm1=norm1, act1=act1, need_dx=need_dx, need_dw=need_dw,
    )  # fmt: skip
    dw = batchnorm.sum_partials(partials, taps, weight) if need_dw else absent(x)
    dweight1, dbias1 = absent(x), absent(x)  # outputs of an operator must not alias
    if norm1 is not None and need_dx:
        dweight1, dbias1, k0, k1 = batchnorm.gradient_merge(partials[:, taps:], norm1, x.numel() // C)
        dx = batchnorm.apply_backward(dx, x, norm1, terms=(k0, k1) if batch1 else None)
        dweight1, dbias1 = dweight1.to(weight1.dtype), dbias1.to(bias1.dtype)
    dweight2, dbias2 = dweight2.to(weight2.dtype), dbias2.to(bias2.dtype)
    return (absent(x) if dx is None else dx, dw, dweight1, dbias1, dweight2, dbias2, *se_grads)


def depthwise_block_backward_fake(
    dout, x, weight, weight1, bias1, weight2, bias2, reduce_weight, reduce_bias, expand_weight, expand_bias, y, *rest,
):  # fmt: skip
    need_dx, need_dw = _needs(rest[-1])
    norm1 = [torch.empty_like(t) if weight1 is not None and need_dx else absent(x) for t in (weight1, bias1)]
    se = [absent(x) if t is None else contiguous_like(t) for t in (reduce_weight, reduce_bias, expand_weight, expand_bias)]
    dx = torch.empty_like(x) if need_dx else absent(x)
    return dx, contiguous_like(weight) if need_dw else absent(x), *norm1, torch.empty_like(weight2), torch.empty_like(bias2), *se


# ---- bn_act_add: act(BN(x)) * mask + residual ------------------------------------------------------------------------------------

LIB.define(
    f"bn_act_add(Tensor x, {_NORM.format(i='', q='')}, Tensor? mask, Tensor? residual, str act, bool batch, float? momentum, "
    "float eps) -> (Tensor out, Tensor mean, Tensor rstd)"
)
LIB.define(
    "bn_act_add_backward(Tensor dout, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, Tensor? mask, str act, "
    "bool batch, bool need_dx) -> (Tensor dx, Tensor dweight, Tensor dbias)"
)


@on_its_device
def bn_act_add(
    x, weight, bias, running_mean, running_var, num_batches, mask, residual, act, batch, momentum, eps,
):  # fmt: skip
    from effkernels.kernels import batchnorm
    from effkernels.kernels.norm import BatchNorm

    mean, rstd = batch_or_running(batch, lambda: batchnorm.statistics(x), running_mean, running_var, num_batches, momentum, eps)
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    out = batchnorm.apply(x, BatchNorm(weight, bias, mean, rstd), act=act, branch_draws=mask, residual=residual, out_dtype=out_dtype)
    return out, mean, rstd


def bn_act_add_fake(x, weight, bias, running_mean, running_var, num_batches, mask, residual, *settings):
    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    return torch.empty_like(x, dtype=out_dtype), fp32(x, x.shape[-1]), fp32(x, x.shape[-1])


@on_its_device
def bn_act_add_backward(dout, x, weight, bias, mean, rstd, mask, act, batch, need_dx):
    from effkernels.kernels import batchnorm
    from effkernels.kernels.norm import BatchNorm

    C = x.shape[-1]
    norm = BatchNorm(weight, bias, mean, rstd)
    sums = batchnorm.gradient_sums(dout, x, norm, act=act, branch_scale=mask)
    dweight, dbias, k0, k1 = batchnorm.gradient_merge(sums.view(-1, 2, C), norm, x.numel() // C)
    dx = absent(x)
    if need_dx:
        dx = batchnorm.apply_backward(dout, x, norm, terms=(k0, k1) if batch else None, act=act, branch_scale=mask, out_dtype=x.dtype)
    return dx, dweight.to(weight.dtype), dbias.to(bias.dtype)


def bn_act_add_backward_fake(dout, x, weight, bias, mean, rstd, mask, act, batch, need_dx):
    return torch.empty_like(x) if need_dx else absent(x), torch.empty_like(weight), torch.empty_like(bias)


class BatchNormActAdd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dispatched, *args):
        results = call("bn_act_add", bn_act_add, dispatched, args)
        out, mean, rstd = results
        x, weight, bias = args[:3]
        mask, residual, act, batch = args[6:10]
        ctx.save_for_backward(x, weight, bias, mean, rstd, mask)
        ctx.settings = (act, batch)
        ctx.residual_dtype = None if residual is None else residual.dtype
        ctx.dispatched = dispatched
        ctx.mark_non_differentiable(mean, rstd)
        ctx.set_materialize_grads(False)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, *unused):
        if dout is None:
            return (None,) * 13
        needs = ctx.needs_input_grad[1:]
        dx = dweight = dbias = None
        if any(needs[:3]):
            args = (dout.contiguous(), *ctx.saved_tensors, *ctx.settings, needs[0])
            dx, dweight, dbias = call("bn_act_add_backward", bn_act_add_backward, ctx.dispatched, args)
        grads = (dx, dweight, dbias, None, None, None, None, dout.to(ctx.residual_dtype) if needs[7] else None)
        return None, *(g if need else None for g, need in zip(grads, needs, strict=False)), *(None,) * 4


# ---- squeeze_excite: x * gate(x) -------------------------------------------------------------------------------------------------

LIB.define(
    "squeeze_excite(Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, Tensor expand_bias, str act, str gate) "
    "-> (Tensor out, Tensor gates, Tensor pooled, Tensor u)"
)
LIB.define(
    "squeeze_excite_backward(Tensor dout, Tensor x, Tensor reduce_weight, Tensor reduce_bias, Tensor expand_weight, "
    "Tensor expand_bias, Tensor gates, Tensor pooled, Tensor u, str act, str gate, bool[] needs) "
    "-> (Tensor dx, Tensor, Tensor, Tensor, Tensor)"
)


@on_its_device
def squeeze_excite(x, reduce_weight, reduce_bias, expand_weight, expand_bias, act, gate):
    from effkernels.kernels import batchnorm
    from effkernels.kernels import squeeze_excite as kernels

    gates, pooled, u = kernels.squeeze_excite_forward(
        kernels.pool(x), x.shape[1] * x.shape[2], reduce_weight, reduce_bias, expand_weight, expand_bias, act=act, gate=gate
    )
    return batchnorm.apply(x, None, gates=gates), gates, pooled, u


def squeeze_excite_fake(x, reduce_weight, *rest):
    N, C = x.shape[0], x.shape[-1]
    return torch.empty_like(x), fp32(x, N, C), fp32(x, N, C), fp32(x, N, reduce_weight.shape[0])


@on_its_device
def squeeze_excite_backward(
    dout, x, reduce_weight, reduce_bias, expand_weight, expand_bias, gates, pooled, u, act, gate, needs,
):  # fmt: skip
    from effkernels.kernels import batchnorm
    from effkernels.kernels import squeeze_excite as kernels

    sums = batchnorm.gradient_sums(dout, x, None, for_gate=True)
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    dpool, grads, _ = kernels.squeeze_excite_backward(sums, x.shape[1] * x.shape[2], gates, pooled, u, weights, act=act, gate=gate)
    dx = batchnorm.apply_backward(dout, None, None, gates=gates, dpool=dpool) if needs[0] else absent(x)
    return (dx, *grads)


def squeeze_excite_backward_fake(
    dout, x, reduce_weight, reduce_bias, expand_weight, expand_bias, gates, pooled, u, act, gate, needs,
):  # fmt: skip
    weights = (reduce_weight, reduce_bias, expand_weight, expand_bias)
    return torch.empty_like(x) if needs[0] else absent(x), *(contiguous_like(t) for t in weights)


# ---- depthwise_block_inference: running statistics, no gradient ------------------------------------------------------------------

_FROZEN = "Tensor{q} weight{i}, Tensor{q} bias{i}, Tensor{q} running_mean{i}, Tensor{q} running_var{i}"
LIB.define(
    f"depthwise_block_inference(Tensor x, Tensor weight, {_FROZEN.format(i=1, q='?')}, {_FROZEN.format(i=2, q='')}, {_SE}, int stride, "
    "str padding, str act1, str act2, str se_act, str gate, float eps1, float eps2) -> Tensor"
)


@on_its_device
def depthwise_block_inference(
    x, weight, weight1, bias1, running_mean1, running_var1, weight2, bias2, running_mean2, running_var2,
    reduce_weight, reduce_bias, expand_weight, expand_bias, stride, padding, act1, act2, se_act, gate, eps1, eps2,
):  # fmt: skip
    """BN2, the activation and the pooling in the depthwise kernel's epilogue; scale and shift from the live buffers."""
    from effkernels.kernels import batchnorm, depthwise
    from effkernels.kernels import squeeze_excite as kernels
    from effkernels.kernels.norm import BatchNorm

    has_se = reduce_weight is not None
    out, _, sums = depthwise.depthwise_forward(
        x, weight, stride, pads_of(x, weight, stride, padding),
        prologue=None if weight1 is None else BatchNorm(weight1, bias1, running_mean1, var=running_var1, eps=eps1), act1=act1,
        epilogue=BatchNorm(weight2, bias2, running_mean2, var=running_var2, eps=eps2), act2=act2, pool=has_se,
    )  # fmt: skip
    if not has_se:
        return out
    gates, _, _ = kernels.squeeze_excite_forward(
        sums, out.shape[1] * out.shape[2], reduce_weight, reduce_bias, expand_weight, expand_bias, act=se_act, gate=gate
    )
    return batchnorm.apply(out, None, gates=gates)


def depthwise_block_inference_fake(x, weight, *rest):
    stride, padding = rest[12:14]
    k = weight.shape[-1]
    OH, OW = (conv_out_size(n, k, stride, padding) for n in x.shape[1:3])
    return x.new_empty(x.shape[0], OH, OW, x.shape[3])


LIB.define(f"bn_act_add_inference(Tensor x, {_FROZEN.format(i='', q='')}, Tensor? residual, str act, float eps) -> Tensor")


@on_its_device
def bn_act_add_inference(x, weight, bias, running_mean, running_var, residual, act, eps):
    from effkernels.kernels import batchnorm
    from effkernels.kernels.norm import BatchNorm

    out_dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    norm = BatchNorm(weight, bias, running_mean, var=running_var, eps=eps)
    return batchnorm.apply(x, norm, act=act, residual=residual, out_dtype=out_dtype)


def bn_act_add_inference_fake(x, weight, bias, running_mean, running_var, residual, act, eps):
    return torch.empty_like(x, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))


# Keeps x and y (before their BatchNorms), per-channel and per-(n, c) fp32 vectors; nothing activated.
DepthwiseBlock = differentiable(
    "depthwise_block",
    depthwise_block,
    depthwise_block_backward,
    inputs=(0, 1, 2, 3, 7, 8, 12, 13, 14, 15),
    settings=(*range(16, 22), 22, 25),  # stride to gate, batch1 and batch2
)
SqueezeExcite = differentiable("squeeze_excite", squeeze_excite, squeeze_excite_backward, inputs=range(5), settings=(5, 6))
register("depthwise_block", depthwise_block, depthwise_block_fake, DepthwiseBlock)
register("depthwise_block_backward", depthwise_block_backward, depthwise_block_backward_fake)
register("bn_act_add", bn_act_add, bn_act_add_fake, BatchNormActAdd)
register("bn_act_add_backward", bn_act_add_backward, bn_act_add_backward_fake)
register("squeeze_excite", squeeze_excite, squeeze_excite_fake, SqueezeExcite)
register("squeeze_excite_backward", squeeze_excite_backward, squeeze_excite_backward_fake)
register("depthwise_block_inference", depthwise_block_inference, depthwise_block_inference_fake)
register("bn_act_add_inference", bn_act_add_inference, bn_act_add_inference_fake)
