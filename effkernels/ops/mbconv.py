"""The operator of a whole MBConv block: [1x1 expand, BN1, act] -> depthwise, BN2, act -> [squeeze-excite] -> 1x1 project, BN3 [+ x].

One autograd node. It keeps x, the outputs y1, y2, y3 of the three convolutions before their BatchNorms, and fp32 vectors; with
``recompute`` not even y1. Launches, each reading what it says from memory once (e1: expanded tensor at input size, e2: after the
depthwise convolution):

    forward   expand (x -> y1), BN1's merge | depthwise (y1 -> y2), BN2's merge | pool (y2), squeeze-excite | project (y2 -> y3), BN3's
              merge | apply (y3, x -> out)                                                                         2 e1 + 3 e2
    backward  BN3's sums (dout, y3) | project (dout, y3, y2 -> dq) | squeeze-excite, BN2's sums | depthwise (dq, y2, y1 -> dz1), BN1's
              sums | expand (dz1, x -> dx) | all weight gradients                                                  3 e1 + 4 e2
    As the first of a network, a block that does not expand takes the stem along: a 3x3 convolution of images in place of the expand one.

    inference expand | depthwise | squeeze-excite | project: activations in the producer's epilogue                2 e1 + 2 e2
              or, where the model of costs says so, expand inside the depthwise kernel                                    0 e1 + 2 e2
"""

import torch

from effkernels.geometry import conv_out_size
from effkernels.ops import sync_batchnorm
from effkernels.ops.autograd import LIB, absent, contiguous_like, differentiable, fp32, normalised, on_its_device, pads_of, register
from effkernels.ops.counters import zeroed_counters

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def _norm(i, q=""):
    return (
        f"Tensor{q} weight{i}, Tensor{q} bias{i}, Tensor(a{i}!)? running_mean{i}, Tensor(b{i}!)? running_var{i}, "
        f"Tensor(c{i}!)? num_batches{i}"
    )


_SE = "Tensor? se_reduce_weight, Tensor? se_reduce_bias, Tensor? se_expand_weight, Tensor? se_expand_bias"
_SHAPE = "str dtype, int stride, str padding, str act, str se_act, str gate, bool residual"
LIB.define(
    f"mbconv(Tensor x, Tensor? expand_weight, {_norm(1, '?')}, Tensor depthwise_weight, {_norm(2)}, {_SE}, Tensor project_weight, "
    f"{_norm(3)}, Tensor? mask, {_SHAPE}, float keep, int stem, bool batch1, float? momentum1, float eps1, "
    "bool batch2, float? momentum2, float eps2, bool batch3, float? momentum3, float eps3, bool recompute, str[] groups) "
    "-> (Tensor out, Tensor y1, Tensor y2, Tensor y3, Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2, Tensor mean3, Tensor rstd3, "
    "Tensor gates, Tensor pooled, Tensor u)"
)
LIB.define(
    "mbconv_backward(Tensor dout, Tensor x, Tensor? expand_weight, Tensor? weight1, Tensor? bias1, Tensor depthwise_weight, "
    f"Tensor weight2, Tensor bias2, {_SE}, Tensor project_weight, Tensor weight3, Tensor bias3, Tensor? mask, "
    "Tensor y1, Tensor y2, Tensor y3, Tensor mean1, Tensor rstd1, Tensor mean2, Tensor rstd2, Tensor mean3, Tensor rstd3, "
    f"Tensor gates, Tensor pooled, Tensor u, {_SHAPE}, float keep, int stem, bool batch1, bool batch2, bool batch3, "
    "str[] groups, bool[] needs) "
    "-> (Tensor x, Tensor expand_weight, Tensor weight1, Tensor bias1, Tensor depthwise_weight, Tensor weight2, "
    "Tensor bias2, Tensor, Tensor, Tensor, Tensor, Tensor project_weight, Tensor weight3, Tensor bias3)"
)
_FROZEN = "Tensor{q} weight{i}, Tensor{q} bias{i}, Tensor{q} running_mean{i}, Tensor{q} running_var{i}"
LIB.define(
    f"mbconv_inference(Tensor x, Tensor? expand_weight, {_FROZEN.format(i=1, q='?')}, Tensor depthwise_weight, "
    f"{_FROZEN.format(i=2, q='')}, {_SE}, Tensor project_weight, {_FROZEN.format(i=3, q='')}, {_SHAPE}, float eps1, float eps2, "
    "float eps3) -> Tensor"
)


def _counters(x, E, O):
    """One for each image, and enough for the channel blocks and groups of programs of every kernel."""
    return zeroed_counters(x, x.shape[0] + 512 + max(E, O) // 8)


def first_convolution(x, weight, stem, padding, dtype, **how):
    """The expand convolution of x [N, H, W, I]; with ``stem``, a stride, the network's 3x3 one of images x [N, I, H, W]."""
    if stem:
        from effkernels.kernels.stem import stem_forward
        from effkernels.ops.stem import image_pads

        return stem_forward(x, weight, stem, image_pads(x, stem, padding), dtype=dtype, **how)
    from effkernels.kernels.pointwise import pointwise_forward

    return pointwise_forward(x, weight, dtype=dtype, **how)


@on_its_device
def mbconv(
    x, expand_weight, weight1, bias1, running_mean1, running_var1, num_batches1,
    depthwise_weight, weight2, bias2, running_mean2, running_var2, num_batches2,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, weight3, bias3, running_mean3, running_var3, num_batches3, mask,
    dtype, stride, padding, act, se_act, gate, residual, keep, stem,
    batch1, momentum1, eps1, batch2, momentum2, eps2, batch3, momentum3, eps3, recompute, groups,
):  # fmt: skip
    from effkernels.kernels import batchnorm, depthwise, pointwise, squeeze_excite
    from effkernels.kernels.norm import BatchNorm

    compute = DTYPES[dtype]
    counters = _counters(x, depthwise_weight.shape[0], project_weight.shape[0])
    y1 = mean1 = rstd1 = prologue = None
    a = None
    if expand_weight is None:
        a = x.to(compute)
    else:

        def expand(**how):
            return first_convolution(x, expand_weight, stem, padding, compute, counters=counters, **how)

        y1, mean1, rstd1 = normalised(expand, weight1, batch1, running_mean1, running_var1, num_batches1, momentum1, eps1, groups[0])
        prologue, a = BatchNorm(weight1, bias1, mean1, rstd1), y1

    def depthwise_forward(**how):
        pads = pads_of(a, depthwise_weight, stride, padding)
        act1 = act if prologue else "identity"
        return depthwise.depthwise_forward(a, depthwise_weight, stride, pads, prologue=prologue, act1=act1, counters=counters, **how)[:2]

    y2, mean2, rstd2 = normalised(depthwise_forward, weight2, batch2, running_mean2, running_var2, num_batches2, momentum2, eps2, groups[1])
    norm2 = BatchNorm(weight2, bias2, mean2, rstd2)
    gates = pooled = u = None
    if se_reduce_weight is not None:
        gates, pooled, u = squeeze_excite.pool_and_gate(
            y2, norm2, se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, act=act, se_act=se_act, gate=gate,
            counters=counters,
        )  # fmt: skip

    def project(**how):
        return pointwise.pointwise_forward(y2, project_weight, prologue=norm2, act1=act, gates=gates, counters=counters, **how)

    y3, mean3, rstd3 = normalised(project, weight3, batch3, running_mean3, running_var3, num_batches3, momentum3, eps3, groups[2])
    out = batchnorm.apply(
        y3, BatchNorm(weight3, bias3, mean3, rstd3), branch_draws=mask, keep=keep, residual=x if residual else None,
        out_dtype=torch.promote_types(compute, x.dtype) if residual else compute,
    )  # fmt: skip
    results = (out, None if recompute else y1, y2, y3, mean1, rstd1, mean2, rstd2, mean3, rstd3, gates, pooled, u)
    return tuple(absent(x) if t is None else t for t in results)


def mbconv_fake(
    x, expand_weight, weight1, bias1, running_mean1, running_var1, num_batches1,
    depthwise_weight, weight2, bias2, running_mean2, running_var2, num_batches2,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, weight3, bias3, running_mean3, running_var3, num_batches3, mask,
    dtype, stride, padding, act, se_act, gate, residual, keep, stem,
    batch1, momentum1, eps1, batch2, momentum2, eps2, batch3, momentum3, eps3, recompute, groups,
):  # fmt: skip
    compute = DTYPES[dtype]
    N, H, W, _ = x.shape
    if stem:
        H, W = (conv_out_size(size, 3, stem, padding) for size in x.shape[2:])
    E, O, k = depthwise_weight.shape[0], project_weight.shape[0], depthwise_weight.shape[-1]
    y2 = x.new_empty(N, conv_out_size(H, k, stride, padding), conv_out_size(W, k, stride, padding), E, dtype=compute)
    y3 = y2.new_empty(*y2.shape[:3], O)
    out = y3.new_empty(y3.shape, dtype=torch.promote_types(compute, x.dtype) if residual else compute)
    y1, norm1 = absent(x), (absent(x), absent(x))
    if expand_weight is not None:
        norm1 = (fp32(x, E), fp32(x, E))
        y1 = y1 if recompute else x.new_empty(N, H, W, E, dtype=compute)
    se = [absent(x) for _ in range(3)]
    if se_reduce_weight is not None:
        se = [fp32(x, N, C) for C in (E, E, se_reduce_weight.shape[0])]
    return (out, y1, y2, y3, *norm1, fp32(x, E), fp32(x, E), fp32(x, O), fp32(x, O), *se)


def stem_gradients(dz, y, x, weight, stride, padding, norm, terms, need_dx, need_dw):
    """(dx or None, partials of dw or None) of a first 3x3 convolution, from the gradient dz of its BatchNorm's output."""
    from effkernels.kernels import batchnorm
    from effkernels.kernels.stem import stem_backward
    from effkernels.ops.stem import image_gradient, image_pads

    pads, dx, partials = image_pads(x, stride, padding), None, None
    if need_dw:
        partials = stem_backward(dz, y, x, weight, stride, pads, norm, terms=terms)
    if need_dx:
        dx = image_gradient(batchnorm.apply_backward(dz, y, norm, terms=terms), x, weight, stride, pads)
    return dx, partials


@on_its_device
def mbconv_backward(
    dout, x, expand_weight, weight1, bias1, depthwise_weight, weight2, bias2,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, project_weight, weight3, bias3, mask,
    y1, y2, y3, mean1, rstd1, mean2, rstd2, mean3, rstd3, gates, pooled, u,
    dtype, stride, padding, act, se_act, gate, residual, keep, stem, batch1, batch2, batch3, groups, needs,
):  # fmt: skip
    """Gradients of (x and the parameters in order of the arguments); ``needs`` says which. What nobody needs is not computed."""
    from effkernels.kernels import batchnorm, depthwise, pointwise, squeeze_excite, weight_gradients
    from effkernels.kernels.norm import BatchNorm

    need_x, need_expand, *need_norm1, need_depthwise = needs[:5]
    need_norm2, need_se, need_project = needs[5:7], needs[7:11], needs[11]
    expands, has_se = expand_weight is not None, se_reduce_weight is not None
    need_da = need_x or need_expand or any(need_norm1)
    need_dq = need_da or need_depthwise
    need_data = need_dq or any(need_norm2) or any(need_se)
    grads = dict.fromkeys("x expand norm1 bias1 depthwise norm2 bias2 reduce_w reduce_b expand_w expand_b project norm3 bias3".split())

    counters = _counters(x, depthwise_weight.shape[0], project_weight.shape[0])
    norms = {"norm1": weight1, "bias1": bias1, "norm2": weight2, "bias2": bias2, "norm3": weight3, "bias3": bias3}
    dtypes = {name: None if t is None else t.dtype for name, t in norms.items()}
    # The kernels round a BatchNorm's sums to its parameters' dtype, which the processes' sums must not be.
    weight1, bias1 = (t.float() if groups[0] and t is not None else t for t in (weight1, bias1))
    weight2, bias2 = (t.float() if groups[1] else t for t in (weight2, bias2))
    weight3, bias3 = (t.float() if groups[2] else t for t in (weight3, bias3))
    norm2 = BatchNorm(weight2, bias2, mean2, rstd2)
    norm1 = BatchNorm(weight1, bias1, mean1, rstd1) if expands else None
    norm3 = BatchNorm(weight3, bias3, mean3, rstd3)
    rows2 = y2.numel() // y2.shape[-1]
    k0 = k1 = None
    if batch3 or any(needs[12:14]):
        grads["norm3"], grads["bias3"], k0, k1 = batchnorm.gradient_reduce(dout, y3, norm3, branch_draws=mask, keep=keep, counters=counters)
        if batch3 and groups[2]:
            k0, k1 = sync_batchnorm.batch_terms(grads["norm3"], grads["bias3"], (weight3, mean3, rstd3), rows2, groups[2])
    partials = {}
    if need_data or need_project:
        dq, sums, partials["project"] = pointwise.project_backward(
            dout, y3, y2, project_weight, norm3=norm3, terms3=(k0, k1) if batch3 else None, norm2=norm2,
            act=act, gates=gates if has_se else None, branch_draws=mask, keep=keep,
            need_data=need_data, need_dq=need_dq, need_dw=need_project,
        )  # fmt: skip
    if need_data:
        pixels = y2.shape[1] * y2.shape[2]
        dpool, finished2 = None, (None,) * 4
        if has_se:
            weights = (se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias)
            dt, du, dpool, finished2 = squeeze_excite.gate_backward(
                sums, gates, u, weights, norm2, pixels, act=se_act, gate=gate, counters=counters
            )
            partials["se"] = weight_gradients.SqueezeExcitePartials(dt, du, u, pooled, weights, se_act) if any(need_se) else None
        elif batch2 or any(need_norm2):
            finished2 = batchnorm.gradient_merge(sums.view(-1, 2, sums.shape[-1]), norm2, y2.shape[0] * pixels)
        grads["norm2"], grads["bias2"], k0, k1 = finished2
        if batch2 and groups[1]:
            k0, k1 = sync_batchnorm.batch_terms(*finished2[:2], (weight2, mean2, rstd2), rows2, groups[1])
    if need_dq:
        a = y1 if expands else x.to(DTYPES[dtype])
        if expands and y1.numel() == 0:  # recompute
            a, _ = first_convolution(x, expand_weight, stem, padding, DTYPES[dtype])
        da, partials["depthwise"], finished1 = depthwise.depthwise_backward(
            dq, a, depthwise_weight, stride, pads_of(a, depthwise_weight, stride, padding),
            norm2=norm2, y2=y2, terms2=(k0, k1) if batch2 else None, act2=act, gates=gates if has_se else None, dpool=dpool,
            norm1=norm1, act1=act if expands else "identity",
            need_dx=need_da, need_dw=need_depthwise, counters=counters if expands and need_da else None,
        )  # fmt: skip
    grams = terms = None
    if need_da and expands:
        grads["norm1"], grads["bias1"], *terms = finished1
        terms = terms if batch1 else None
        if batch1 and groups[0]:
            terms = sync_batchnorm.batch_terms(*finished1[:2], (weight1, mean1, rstd1), a.numel() // a.shape[-1], groups[0])
        if stem:
            grads["x"], partials["stem"] = stem_gradients(da, a, x, expand_weight, stem, padding, norm1, terms, need_x, need_expand)
        elif need_x or need_expand:
            grads["x"], partials["expand"], grams = pointwise.expand_backward(
                da, x, expand_weight, norm1=norm1, terms1=terms, counters=counters, residual=dout if residual else None,
                need_dx=need_x, need_dw=need_expand, out_dtype=x.dtype,
            )  # fmt: skip
    elif need_da:
        grads["x"] = (da + dout if residual else da).to(x.dtype)

    def layer(name, weight):
        return None if partials.get(name) is None else weight_gradients.LayerPartials(partials[name], weight)

    expand = None
    if partials.get("expand") is not None:
        expand = weight_gradients.ExpandPartials(partials["expand"], grams, expand_weight, norm1, terms, DTYPES[dtype])
    grads["depthwise"], grads["project"], grads["expand"], se = weight_gradients.reduce_weight_gradients(
        depthwise=layer("depthwise", depthwise_weight) if need_depthwise else None,
        project=layer("project", project_weight),
        expand=expand,
        squeeze_excite=partials.get("se"),
        stem=layer("stem", expand_weight),
    )
    if se is not None:
        grads.update(zip(("reduce_w", "reduce_b", "expand_w", "expand_b"), se, strict=True))
    for name, dtype in dtypes.items():
        if grads[name] is not None:
            grads[name] = grads[name].to(dtype)
    return tuple(absent(x) if grad is None or not need else grad for grad, need in zip(grads.values(), needs, strict=True))


def mbconv_backward_fake(
    dout, x, expand_weight, weight1, bias1, depthwise_weight, weight2, bias2,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, project_weight, weight3, bias3, *rest,
):  # fmt: skip
    likes = (
        x, expand_weight, weight1, bias1, depthwise_weight, weight2, bias2,
        se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, project_weight, weight3, bias3,
    )  # fmt: skip
    results = [contiguous_like(like) if need else absent(x) for like, need in zip(likes, rest[-1], strict=True)]
    if rest[-6]:  # stem: gradients lie as images and weight do
        results[:2] = [torch.empty_like(like) if need else absent(x) for like, need in zip(likes[:2], rest[-1], strict=False)]
    return tuple(results)


@on_its_device
def mbconv_inference(
    x, expand_weight, weight1, bias1, running_mean1, running_var1,
    depthwise_weight, weight2, bias2, running_mean2, running_var2,
    se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias,
    project_weight, weight3, bias3, running_mean3, running_var3,
    dtype, stride, padding, act, se_act, gate, residual, eps1, eps2, eps3,
):  # fmt: skip
    """Running statistics, no gradient; scale and shift come from the live buffers, so nothing goes stale."""
    from effkernels.configs.rules import expand_inside
    from effkernels.kernels import depthwise, expand_depthwise, pointwise, squeeze_excite
    from effkernels.kernels.norm import BatchNorm

    compute = DTYPES[dtype]
    has_se = se_reduce_weight is not None
    pads = pads_of(x, depthwise_weight, stride, padding)
    norm1 = BatchNorm(weight1, bias1, running_mean1, var=running_var1, eps=eps1) if expand_weight is not None else None
    norm2 = BatchNorm(weight2, bias2, running_mean2, var=running_var2, eps=eps2)
    norm3 = BatchNorm(weight3, bias3, running_mean3, var=running_var3, eps=eps3)
    E, k = depthwise_weight.shape[0], depthwise_weight.shape[-1]
    if expand_weight is not None and expand_inside(k, stride, x.shape[-1], E, compute, act):
        a, sums = expand_depthwise.expand_depthwise(
            x.to(compute), expand_weight, norm1, depthwise_weight, norm2, stride, pads, act=act, pool=has_se,
            precision=pointwise.matmul_precision(),
        )  # fmt: skip
    else:
        a = x.to(compute) if expand_weight is None else None
        if a is None:
            a, _ = pointwise.pointwise_forward(x, expand_weight, dtype=compute, epilogue=norm1, act2=act)
        a, _, sums = depthwise.depthwise_forward(a, depthwise_weight, stride, pads, epilogue=norm2, act2=act, pool=has_se)
    gates = None
    if has_se:
        gates, _, _ = squeeze_excite.squeeze_excite_forward(
            sums, a.shape[1] * a.shape[2], se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias, act=se_act, gate=gate
        )
    out, _ = pointwise.pointwise_forward(
        a, project_weight, gates=gates, epilogue=norm3, residual=x if residual else None,
        out_dtype=torch.promote_types(compute, x.dtype) if residual else compute,
    )  # fmt: skip
    return out


def mbconv_inference_fake(x, *rest):
    depthwise_weight, project_weight = rest[5], rest[14]
    dtype, stride, padding = rest[19:22]
    residual = rest[25]
    k = depthwise_weight.shape[-1]
    H, W = (conv_out_size(n, k, stride, padding) for n in x.shape[1:3])
    out_dtype = torch.promote_types(DTYPES[dtype], x.dtype) if residual else DTYPES[dtype]
    return x.new_empty(x.shape[0], H, W, project_weight.shape[0], dtype=out_dtype)


MBConvFunction = differentiable(
    "mbconv",
    mbconv,
    mbconv_backward,
    inputs=(0, 1, 2, 3, 7, 8, 9, 13, 14, 15, 16, 17, 18, 19),
    also=(23,),  # mask
    settings=(*range(24, 33), 33, 36, 39, 43),  # dtype to stem, batch1 to batch3, groups
)
register("mbconv", mbconv, mbconv_fake, MBConvFunction)
register("mbconv_backward", mbconv_backward, mbconv_backward_fake)
register("mbconv_inference", mbconv_inference, mbconv_inference_fake)
