"""Squeeze-excite: global pooling with BatchNorm and activation on load, and both fully connected layers in one launch.

    pooled[n,c] = mean_hw a[n,h,w,c],  u = pooled W_r^T + b_r,  v = phi(u),  gate = sigma(v W_e^T + b_e)
    backward, from dgate = sum_hw dq * a:
    dt = dgate * sigma'(t),  dW_e = dt^T v,  db_e = sum dt,  du = (dt W_e) * phi'(u),  dW_r = du^T pooled,  db_r = sum du,
    dpool = du W_r / HW    (added to every pixel's gradient)

The backward also finishes BatchNorm 2: since da = dq * gate + dpool is linear in gate and dpool, its two sums follow from the five
per-(n, c) sums of ``gradient_sums`` with no further pass: dbeta = sum_n gate*S1 + dpool*S2, dgamma = sum_n gate*S3 + dpool*S4.
"""

import torch
import triton
import triton.language as tl

from effkernels.kernels.batchnorm import bn_terms
from effkernels.kernels.common import (
    activate,
    activate_and_grad,
    bn_row,
    cast,
    channel_vector_width,
    fast_math,
    gate_derivative,
    gate_function,
    load_vector,
    sized_jit,
)
from effkernels.launch import reduction_config


@sized_jit
def pool_kernel(
    y, sums, gamma, beta, mean, var, eps, rows, CV, rows_per_program, parts,
    CVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, VAR_IS_RSTD: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """sums[n, part, c] = sum over the part's pixels of phi(BN(y)), or of y."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BC) * BC + tl.arange(0, BC)
    mc = c < C
    group = tl.program_id(0) // tl.cdiv(C, BC)
    n = (group // parts).to(tl.int64)
    first = group % parts * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BR)
    if BN:
        scale, shift = bn_row(gamma, beta, mean, var, eps, c, mc, VAR_IS_RSTD)
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(first, last, BR):
        ok = (start + r < last)[:, None] & mc[None, :]
        v = tl.load(y + n * rows * C + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if BN:
            v = tl.where(ok, activate(v * scale + shift, ACT, FAST), 0.0)
        acc += v
    tl.store(sums + group.to(tl.int64) * C + c, tl.sum(acc, 0), mask=mc)


@sized_jit
def squeeze_excite_kernel(
    sums, w_reduce, b_reduce, w_expand, b_expand, pooled, u_out, gate, parts, C, R, inverse_count,
    RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One image a program: finish the pooling, both layers, the gate."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    mr = r < R
    u = load_vector(b_reduce, r, mr)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        mc = c < C
        p = tl.zeros([CB], tl.float32)
        for t in range(0, parts):
            p += tl.load(sums + (n * parts + t) * C + c, mask=mc, other=0.0)
        p = p * inverse_count
        tl.store(pooled + n * C + c, p, mask=mc)
        w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
        u += tl.sum(w * p[None, :], 1)
    tl.store(u_out + n * R + r, u, mask=mr)
    v = tl.where(mr, activate(u, ACT, False), 0.0)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        mc = c < C
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr[None, :], other=0.0).to(tl.float32)
        t = tl.sum(w * v[None, :], 1) + load_vector(b_expand, c, mc)
        tl.store(gate + n * C + c, gate_function(t, GATE), mask=mc)


@sized_jit
def squeeze_excite_dgrad_kernel(
    sums, gate, u_in, w_reduce, w_expand, dt_out, du_out, dpool, parts, C, R, inverse_count,
    RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One image a program: from sum dq*phi (row 2 of ``sums`` [N, parts, 5, C]) back to dpool."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, RB)
    mr = r < R
    dv = tl.zeros([RB], tl.float32)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        mc = c < C
        dgate = tl.zeros([CB], tl.float32)
        for t in range(0, parts):
            dgate += tl.load(sums + ((n * parts + t) * 5 + 2) * C + c, mask=mc, other=0.0)
        dt = dgate * gate_derivative(load_vector(gate + n * C, c, mc), GATE)
        tl.store(dt_out + n * C + c, dt, mask=mc)
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr[None, :], other=0.0).to(tl.float32)
        dv += tl.sum(w * dt[:, None], 0)
    phi, dphi = activate_and_grad(load_vector(u_in + n * R, r, mr), ACT, False)
    du = tl.where(mr, dv * dphi, 0.0)
    tl.store(du_out + n * R + r, du, mask=mr)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        mc = c < C
        w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
        tl.store(dpool + n * C + c, tl.sum(w * du[:, None], 0) * inverse_count, mask=mc)


@sized_jit
def squeeze_excite_wgrad_kernel(
    sums, gate, dpool, dt, du, u_in, pooled, gamma, mean, rstd, dw_reduce, db_reduce, dw_expand, db_expand,
    dgamma, dbeta, k0, k1, N, parts, C, R, count,
    NB: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """CB channels times RB of the bottleneck a program, all images in order: weight gradients; BN2's sums and batch terms once."""
    c = tl.program_id(0) * CB + tl.arange(0, CB)
    mc = c < C
    r = tl.program_id(1) * RB + tl.arange(0, RB)
    mr = r < R
    first = tl.program_id(1) == 0
    i = tl.arange(0, NB)
    dwe = tl.zeros([CB, RB], tl.float32)
    dwr = tl.zeros([CB, RB], tl.float32)
    dbe = tl.zeros([CB], tl.float32)
    dbr = tl.zeros([RB], tl.float32)
    s1 = tl.zeros([CB], tl.float32)
    s3 = tl.zeros([CB], tl.float32)
    for start in range(0, N, NB):
        n = (start + i).to(tl.int64)
        mn = n < N
        mask_c = mn[:, None] & mc[None, :]
        mask_r = mn[:, None] & mr[None, :]
        at_c = n[:, None] * C + c[None, :]
        at_r = n[:, None] * R + r[None, :]
        dt_n = tl.load(dt + at_c, mask=mask_c, other=0.0)
        du_n = tl.load(du + at_r, mask=mask_r, other=0.0)
        v = tl.where(mask_r, activate(tl.load(u_in + at_r, mask=mask_r, other=0.0), ACT, False), 0.0)
        dwe = tl.dot(tl.trans(dt_n), v, dwe, input_precision="ieee")
        dwr = tl.dot(tl.trans(tl.load(pooled + at_c, mask=mask_c, other=0.0)), du_n, dwr, input_precision="ieee")
        dbe += tl.sum(dt_n, 0)
        dbr += tl.sum(du_n, 0)
        if BN:
            g = tl.load(gate + at_c, mask=mask_c, other=0.0)
            dp = tl.load(dpool + at_c, mask=mask_c, other=0.0)
            for t in range(0, parts):
                row = sums + ((n * parts + t) * 5)[:, None] * C + c[None, :]
                s1 += tl.sum(g * tl.load(row, mask=mask_c, other=0.0) + dp * tl.load(row + 3 * C, mask=mask_c, other=0.0), 0)
                s3 += tl.sum(g * tl.load(row + C, mask=mask_c, other=0.0) + dp * tl.load(row + 4 * C, mask=mask_c, other=0.0), 0)
    mask = mc[:, None] & mr[None, :]
    tl.store(dw_expand + c[:, None] * R + r[None, :], cast(dwe, dw_expand.dtype.element_ty), mask=mask)
    tl.store(dw_reduce + r[None, :] * C + c[:, None], cast(dwr, dw_reduce.dtype.element_ty), mask=mask)
    tl.store(db_expand + c, cast(dbe, db_expand.dtype.element_ty), mask=mc & first)
    tl.store(db_reduce + r, cast(dbr, db_reduce.dtype.element_ty), mask=mr & (tl.program_id(0) == 0))
    if BN:
        tl.store(dbeta + c, s1, mask=mc & first)
        tl.store(dgamma + c, s3, mask=mc & first)
        b0, b1 = bn_terms(gamma, mean, rstd, s1, s3, count, c, mc)
        tl.store(k0 + c, b0, mask=mc & first)
        tl.store(k1 + c, b1, mask=mc & first)


def _fp32(device, *shape):
    return torch.empty(shape, device=device, dtype=torch.float32)


def pool(y, bn=None, *, act="identity"):
    """fp32 sums [N, parts, C] over pixels of phi(BN(y)), y [N, H, W, C]; bn (gamma, beta, mean, var or rstd, eps, is_rstd)."""
    N, H, W, C = y.shape
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, parts = cfg.split(H * W, blocks_c * N, y.device)
    sums = _fp32(y.device, N, parts, C)
    g, b, m, v, eps, is_rstd = bn or (y,) * 4 + (0.0, True)
    pool_kernel[(blocks_c * N * parts,)](
        y, sums, g, b, m, v, eps, H * W, C // channel_vector_width(C), rows_per_program, parts,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, VAR_IS_RSTD=is_rstd, BN=bn is not None, ACT=act,
        FAST=fast_math(y.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return sums


def _blocks(R):
    """RB covers the bottleneck; CB keeps a weight block near 4096 elements."""
    RB = max(16, triton.next_power_of_2(R))
    return {"RB": RB, "CB": max(16, min(128, 4096 // RB)), "num_warps": 4 if RB <= 256 else 8}


def squeeze_excite_forward(sums, pixels, w_reduce, b_reduce, w_expand, b_expand, *, act="silu", gate="sigmoid"):
    """(gate [N, C], pooled [N, C], u [N, R]), fp32, from pool sums [N, parts, C] over ``pixels`` pixels."""
    N, parts, C = sums.shape
    R = w_reduce.shape[0]
    outs = _fp32(sums.device, N, C), _fp32(sums.device, N, R), _fp32(sums.device, N, C)
    squeeze_excite_kernel[(N,)](
        sums, w_reduce, b_reduce, w_expand, b_expand, *outs, parts, C, R, 1.0 / pixels,
        **_blocks(R), ACT=act, GATE=gate,
    )  # fmt: skip
    pooled, u, gates = outs
    return gates, pooled, u


def squeeze_excite_backward(sums, pixels, gates, pooled, u, weights, *, bn=None, act="silu", gate="sigmoid"):
    """Gradients from ``gradient_sums(..., gate=True)`` [N, parts, 5, C].

    Args:
        weights: (w_reduce, b_reduce, w_expand, b_expand); bn: (gamma, mean, rstd) of the BatchNorm before the gate, or None.

    Returns: (dpool fp32 [N, C], [dw_reduce, db_reduce, dw_expand, db_expand], [dgamma, dbeta, k0, k1] or None).
    """
    w_reduce, b_reduce, w_expand, b_expand = weights
    N, parts, _, C = sums.shape
    R = u.shape[1]
    dt, du, dpool = _fp32(u.device, N, C), _fp32(u.device, N, R), _fp32(u.device, N, C)
    squeeze_excite_dgrad_kernel[(N,)](
        sums, gates, u, w_reduce, w_expand, dt, du, dpool, parts, C, R, 1.0 / pixels,
        **_blocks(R), ACT=act, GATE=gate,
    )  # fmt: skip
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights]
    norms = [_fp32(u.device, C) for _ in range(4)] if bn else [u] * 4
    gamma, mean, rstd = bn or (u,) * 3
    RB = min(64, _blocks(R)["RB"])
    squeeze_excite_wgrad_kernel[(triton.cdiv(C, 16), triton.cdiv(R, RB))](
        sums, gates, dpool, dt, du, u, pooled, gamma, mean, rstd, *grads, *norms, N, parts, C, R, float(N * pixels),
        NB=32, RB=RB, CB=16, ACT=act, BN=bn is not None, num_warps=4,
    )  # fmt: skip
    return dpool, grads, norms if bn else None
