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

from effkernels.configs.rules import gate_backward_config, reduction_config, squeeze_excite_config
from effkernels.kernels.batchnorm import bn_terms, finish_gradients, unpacked
from effkernels.kernels.common import (
    activate,
    activate_and_grad,
    bn_row,
    cast,
    channel_vector_width,
    check_counters,
    fast_math,
    fp32,
    gate_derivative,
    gate_function,
    last_to_arrive,
    launcher,
    load_vector,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm


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


@triton.jit
def squeeze_excite_layers(
    pooled, w_reduce, b_reduce, w_expand, b_expand, u_out, gate, n, C, R,
    RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """u and the gate of image n (int64), whose ``pooled`` this program has stored. Three blocks of weights are in flight beside the one
    in use: a single program reads them all."""
    i = tl.arange(0, RB)
    j = tl.arange(0, CB)
    tl.debug_barrier()  # what other threads of this program stored
    for r0 in range(0, R, RB):
        r = r0 + i
        mr = r < R
        acc = tl.zeros([RB, CB], tl.float32)
        for start in tl.range(0, C, CB, num_stages=4):
            c = start + j
            mc = c < C
            w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
            acc += w * load_vector(pooled + n * C, c, mc)[None, :]
        tl.store(u_out + n * R + r, tl.sum(acc, 1) + load_vector(b_reduce, r, mr), mask=mr)
    tl.debug_barrier()
    blocks_r = tl.cdiv(R, RB)
    acc = tl.zeros([CB, RB], tl.float32)
    for step in tl.range(0, tl.cdiv(C, CB) * blocks_r, num_stages=4):
        c = step // blocks_r * CB + j
        mc = c < C
        r = step % blocks_r * RB + i
        mr = r < R
        v = tl.where(mr, activate(load_vector(u_out + n * R, r, mr), ACT, False), 0.0)
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr[None, :], other=0.0).to(tl.float32)
        acc = tl.where(step % blocks_r == 0, 0.0, acc) + w * v[None, :]
        last = step % blocks_r == blocks_r - 1
        tl.store(gate + n * C + c, gate_function(tl.sum(acc, 1) + load_vector(b_expand, c, mc), GATE), mask=mc & last)


@sized_jit
def squeeze_excite_kernel(
    sums, w_reduce, b_reduce, w_expand, b_expand, pooled, u_out, gate, parts, CV, RV, inverse_count,
    CVEC: tl.constexpr, RVEC: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """One image a program: finish the pooling, both layers, the gate."""
    C = CV * CVEC
    R = RV * RVEC
    n = tl.program_id(0).to(tl.int64)
    for start in range(0, C, CB):
        c = start + tl.arange(0, CB)
        mc = c < C
        p = tl.zeros([CB], tl.float32)
        for t in range(0, parts):
            p += tl.load(sums + (n * parts + t) * C + c, mask=mc, other=0.0)
        tl.store(pooled + n * C + c, p * inverse_count, mask=mc)
    squeeze_excite_layers(pooled, w_reduce, b_reduce, w_expand, b_expand, u_out, gate, n, C, R, RB, CB, ACT, GATE)


@triton.jit
def sum_parts(sums, n, parts, c, mc, C, PB: tl.constexpr):
    """Partials [N, parts, C] of image n, other programs' work, summed over the parts: [CB]."""
    t = tl.arange(0, PB)
    acc = tl.zeros([PB, c.shape[0]], tl.float32)
    for start in range(0, parts, PB):
        ok = (start + t < parts)[:, None] & mc[None, :]
        at = sums + (n * parts + start) * C + t[:, None] * C + c[None, :]
        acc += tl.load(at, mask=ok, other=0.0, cache_modifier=".cg")
    return tl.sum(acc, 0)


@sized_jit
def pool_and_gate_kernel(
    y, sums, gamma, beta, mean, rstd, w_reduce, b_reduce, w_expand, b_expand, counters, pooled, u_out, gate,
    rows, CV, RV, rows_per_program, parts,
    CVEC: tl.constexpr, RVEC: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, RB: tl.constexpr, CB: tl.constexpr, PB: tl.constexpr,
    ACT: tl.constexpr, SE_ACT: tl.constexpr, GATE: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """sums [N, parts, C] of phi(z); the last program of an image goes on to its gate."""
    C = CV * CVEC
    R = RV * RVEC
    blocks_c = tl.cdiv(C, BC)
    c = tl.program_id(0) % blocks_c * BC + tl.arange(0, BC)
    mc = c < C
    group = tl.program_id(0) // blocks_c
    n = (group // parts).to(tl.int64)
    first = group % parts * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BR)
    scale, shift = bn_row(gamma, beta, mean, rstd, 0.0, c, mc, True)
    acc = tl.zeros([BR, BC], tl.float32)
    for start in range(first, last, BR):
        ok = (start + r < last)[:, None] & mc[None, :]
        v = tl.load(y + n * rows * C + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        acc += tl.where(ok, activate(v * scale + shift, ACT, FAST), 0.0)
    tl.store(sums + group.to(tl.int64) * C + c, tl.sum(acc, 0), mask=mc)
    if last_to_arrive(counters + n, parts * blocks_c):
        for start in range(0, C, CB):
            cc = start + tl.arange(0, CB)
            mcc = cc < C
            tl.store(pooled + n * C + cc, sum_parts(sums, n, parts, cc, mcc, C, PB) / rows, mask=mcc)
        squeeze_excite_layers(pooled, w_reduce, b_reduce, w_expand, b_expand, u_out, gate, n, C, R, RB, CB, SE_ACT, GATE)


@triton.jit
def sum_tile(sums, n, parts, row, c, mask, C):
    """Row ``row`` of sums [N, parts, 5, C] at images n and channels c, over the parts: [NB, CB]."""
    acc = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    at = sums + (n * parts * 5 + row)[:, None] * C + c[None, :]
    for t in tl.range(0, parts, num_stages=4):
        acc += tl.load(at + t * 5 * C, mask=mask, other=0.0)
    return acc


@triton.jit
def gate_backward_to_units(
    b, j, sums, gates, w_expand, dt_out, dv_out, N, parts, C, R,
    NB: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr, RB: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """dt of NB images times CB channels, and what these channels give to dv: dv_out [channel blocks, N, R]."""
    n = (b * NB + tl.arange(0, NB)).to(tl.int64)
    mn = (n < N)[:, None]
    c = j * CB + tl.arange(0, CB)
    mask = mn & (c < C)[None, :]
    at = n[:, None] * C + c[None, :]
    dt = sum_tile(sums, n, parts, 2, c, mask, C) * gate_derivative(tl.load(gates + at, mask=mask, other=0.0), GATE)
    tl.store(dt_out + at, dt, mask=mask)
    tl.debug_barrier()
    for r0 in range(0, R, RB):
        r = r0 + tl.arange(0, RB)
        mr = (r < R)[None, :]
        acc = tl.zeros([NB, RB], tl.float32)
        for start in tl.range(0, CB, KB, num_stages=3):
            k = j * CB + start + tl.arange(0, KB)
            mk = k < C
            left = tl.load(dt_out + n[:, None] * C + k[None, :], mask=mn & mk[None, :], other=0.0)
            w = tl.load(w_expand + k[:, None] * R + r[None, :], mask=mk[:, None] & mr, other=0.0).to(tl.float32)
            acc = tl.dot(left, w, acc, input_precision="ieee")
        tl.store(dv_out + (j * N + n)[:, None] * R + r[None, :], acc, mask=mn & mr)


@triton.jit
def gate_backward_units(
    b, blocks_c, dv, u_in, du_out, N, R, NB: tl.constexpr, RB: tl.constexpr, JB: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """du of NB images."""
    n = (b * NB + tl.arange(0, NB)).to(tl.int64)
    jj = tl.arange(0, JB)
    for r0 in range(0, R, RB):
        r = r0 + tl.arange(0, RB)
        mask = (n < N)[:, None] & (r < R)[None, :]
        at = n[:, None] * R + r[None, :]
        acc = tl.zeros([JB, NB, RB], tl.float32)
        for start in range(0, blocks_c, JB):
            j = start + jj
            block = (j * N).to(tl.int64)[:, None, None] * R + at[None, :, :]
            acc += tl.load(dv + block, mask=(j < blocks_c)[:, None, None] & mask[None, :, :], other=0.0, cache_modifier=".cg")
        phi, dphi = activate_and_grad(tl.load(u_in + at, mask=mask, other=0.0), ACT, False)
        tl.store(du_out + at, tl.sum(acc, 0) * dphi, mask=mask)


@triton.jit
def gate_backward_to_pool(
    b, j, sums, gates, w_reduce, du, dpool, partials, N, parts, C, R, inverse_pixels,
    NB: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr,
):  # fmt: skip
    """dpool of NB images times CB channels, and BatchNorm 2's two sums over them: partials [image blocks, 2, C]."""
    n = (b * NB + tl.arange(0, NB)).to(tl.int64)
    mn = (n < N)[:, None]
    c = j * CB + tl.arange(0, CB)
    mc = c < C
    mask = mn & mc[None, :]
    acc = tl.zeros([NB, CB], tl.float32)
    for start in tl.range(0, R, KB, num_stages=3):
        k = start + tl.arange(0, KB)
        mk = k < R
        left = tl.load(du + n[:, None] * R + k[None, :], mask=mn & mk[None, :], other=0.0, cache_modifier=".cg")
        w = tl.load(w_reduce + k[:, None] * C + c[None, :], mask=mk[:, None] & mc[None, :], other=0.0).to(tl.float32)
        acc = tl.dot(left, w, acc, input_precision="ieee")
    acc *= inverse_pixels
    at = n[:, None] * C + c[None, :]
    tl.store(dpool + at, acc, mask=mask)
    g = tl.load(gates + at, mask=mask, other=0.0)
    out = partials + (b * 2).to(tl.int64) * C + c
    db = g * sum_tile(sums, n, parts, 0, c, mask, C) + acc * sum_tile(sums, n, parts, 3, c, mask, C)
    tl.store(out, tl.sum(db, 0), mask=mc)
    dg = g * sum_tile(sums, n, parts, 1, c, mask, C) + acc * sum_tile(sums, n, parts, 4, c, mask, C)
    tl.store(out + C, tl.sum(dg, 0), mask=mc)


@sized_jit
def gate_backward_kernel(
    sums, gates, u, w_reduce, w_expand, gamma, mean, rstd, counters, dt, dv, du, dpool, partials, dgamma, dbeta, k0, k1,
    N, parts, CV, RV, inverse_pixels, count,
    CVEC: tl.constexpr, RVEC: tl.constexpr, NB: tl.constexpr, CB: tl.constexpr, KB: tl.constexpr, RB: tl.constexpr, JB: tl.constexpr,
    BP: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
):  # fmt: skip
    """From sums [N, parts, 5, C] to dpool, BatchNorm 2's gradients and batch terms; a program is NB images times CB channels.

    Two stages of programs: the first ends with du, the second begins with it. Programs take their work by ticket in the order in
    which they start, so when one of the second stage waits, all of the first are running, and wait for nothing: it ends. Counters:
    tickets, arrivals and readers of each block of images, arrivals of each block of channels; all are left at 0.
    """
    C = CV * CVEC
    R = RV * RVEC
    blocks_n = tl.cdiv(N, NB)
    blocks_c = tl.cdiv(C, CB)
    stage = blocks_n * blocks_c
    ticket = tl.atomic_add(counters, 1)
    if ticket == 2 * stage - 1:
        tl.store(counters, 0)
    b = ticket % stage // blocks_c
    j = ticket % stage % blocks_c
    readers = counters + 1 + blocks_n + b
    if ticket < stage:
        gate_backward_to_units(b, j, sums, gates, w_expand, dt, dv, N, parts, C, R, NB, CB, KB, RB, GATE)
        if last_to_arrive(counters + 1 + b, blocks_c):
            gate_backward_units(b, blocks_c, dv, u, du, N, R, NB, RB, JB, ACT)
            tl.debug_barrier()
            tl.atomic_add(readers, 1, sem="release", scope="gpu")
    else:
        while tl.atomic_add(readers, 0, sem="acquire", scope="gpu") == 0:
            pass
        tl.debug_barrier()
        gate_backward_to_pool(b, j, sums, gates, w_reduce, du, dpool, partials, N, parts, C, R, inverse_pixels, NB, CB, KB)
        if tl.atomic_add(readers, 1) == blocks_c:
            tl.store(readers, 0)
        if last_to_arrive(counters + 1 + 2 * blocks_n + j, blocks_n):
            finish_gradients(partials, gamma, mean, rstd, dgamma, dbeta, k0, k1, blocks_n, 2 * C, C, count, j, BP, CB)


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


@launcher
def pool(y, norm: BatchNorm | None = None, *, act="identity"):
    """fp32 sums [N, parts, C] over pixels of phi(BN(y)), or of y without ``norm``, for y [N, H, W, C]."""
    N, H, W, C = y.shape
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, parts = cfg.split(H * W, blocks_c * N, y.device)
    sums = fp32(y.device, N, parts, C)
    g, b, m, v, eps, is_rstd = unpacked(norm, y)
    pool_kernel[(blocks_c * N * parts,)](
        y, sums, g, b, m, v, eps, H * W, C // channel_vector_width(C), rows_per_program, parts,
        CVEC=channel_vector_width(C), BR=cfg.BR, BC=cfg.BC, VAR_IS_RSTD=is_rstd, BN=norm is not None, ACT=act,
        FAST=fast_math(y.dtype), num_warps=cfg.num_warps,
    )  # fmt: skip
    return sums


@launcher
def pool_and_gate(y, norm2: BatchNorm, w_reduce, b_reduce, w_expand, b_expand, *, act, se_act, gate, counters):
    """Pooling of phi(BN2(y)) and squeeze-excite in one launch, for training.

    Args:
        y: [N, h, w, C]. norm2: with rstd. w_reduce: [R, C, 1, 1]; w_expand: [C, R, 1, 1].
        counters: int32, 0, at least N.

    Returns: fp32 (gates [N, C], pooled [N, C], u [N, R]).
    """
    N, H, W, C = y.shape
    check_counters(counters, N)
    R = w_reduce.shape[0]
    cfg = reduction_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BC)
    rows_per_program, parts = cfg.split(H * W, blocks_c * N, y.device)
    sums = fp32(y.device, N, parts, C)
    gates, pooled, u = (fp32(y.device, N, size) for size in (C, C, R))
    pool_and_gate_kernel[(blocks_c * N * parts,)](
        y, sums, *norm2[:4], w_reduce, b_reduce, w_expand, b_expand, counters, pooled, u, gates,
        H * W, C // channel_vector_width(C), R // channel_vector_width(R), rows_per_program, parts,
        BR=cfg.BR, BC=cfg.BC, **_layers(C, R), PB=squeeze_excite_config(R).PB, ACT=act, SE_ACT=se_act, GATE=gate,
        FAST=fast_math(y.dtype), **squeeze_excite_config(R).options,
    )  # fmt: skip
    return gates, pooled, u


def _layers(C, R):
    """Compile-time arguments of ``squeeze_excite_layers``."""
    cfg = squeeze_excite_config(R)
    return {"RB": cfg.RB, "CB": cfg.CB, "CVEC": channel_vector_width(C), "RVEC": channel_vector_width(R)}


def _blocks(R):
    """RB covers the bottleneck; CB keeps a weight block near 4096 elements."""
    RB = max(16, triton.next_power_of_2(R))
    return {"RB": RB, "CB": max(16, min(128, 4096 // RB)), "num_warps": 4 if RB <= 256 else 8}


@launcher
def squeeze_excite_forward(sums, pixels, w_reduce, b_reduce, w_expand, b_expand, *, act="silu", gate="sigmoid"):
    """(gate [N, C], pooled [N, C], u [N, R]), fp32, from pool sums [N, parts, C] over ``pixels`` pixels."""
    N, parts, C = sums.shape
    R = w_reduce.shape[0]
    outs = fp32(sums.device, N, C), fp32(sums.device, N, R), fp32(sums.device, N, C)
    squeeze_excite_kernel[(N,)](
        sums, w_reduce, b_reduce, w_expand, b_expand, *outs,
        parts, C // channel_vector_width(C), R // channel_vector_width(R), 1.0 / pixels,
        **_layers(C, R), ACT=act, GATE=gate, **squeeze_excite_config(R).options,
    )  # fmt: skip
    pooled, u, gates = outs
    return gates, pooled, u


@launcher
def gate_backward(sums, gates, u, weights, norm2: BatchNorm, pixels, *, act, gate, counters):
    """Backward of ``pool_and_gate`` in one launch, but for the weights' gradients; with BatchNorm 2's.

    Args:
        sums: fp32 [N, parts, 5, C], over pixels, of dq phi', dq phi' yhat, dq phi, phi' and phi' yhat, at z. gates, u: its results.
        weights: (w_reduce, b_reduce, w_expand, b_expand). norm2: with rstd. pixels: h * w.
        act: of the bottleneck. counters: int32, 0, at least ``gate_backward_config().counters(N, C)``.

    Returns: fp32 dt [N, C], du [N, R] (gradients before the gate function and before ``act``), dpool [N, C], which is added to every
        pixel's gradient, and (dgamma, dbeta in the parameters' dtypes, k0, k1 fp32 [C]) of BatchNorm 2.
    """
    w_reduce, _, w_expand, _ = weights
    gamma, beta, mean, rstd, *_ = norm2
    N, parts, _, C = sums.shape
    R = u.shape[1]
    cfg = gate_backward_config()
    blocks_n, blocks_c = triton.cdiv(N, cfg.NB), triton.cdiv(C, cfg.CB)
    check_counters(counters, cfg.counters(N, C))
    dt, dv, du, dpool = (fp32(u.device, *shape) for shape in ((N, C), (blocks_c, N, R), (N, R), (N, C)))
    partials = fp32(u.device, blocks_n, 2, C)
    norm = torch.empty_like(gamma), torch.empty_like(beta), fp32(u.device, C), fp32(u.device, C)
    gate_backward_kernel[(2 * blocks_n * blocks_c,)](
        sums, gates, u, w_reduce, w_expand, gamma, mean, rstd, counters, dt, dv, du, dpool, partials, *norm,
        N, parts, C // channel_vector_width(C), R // channel_vector_width(R), 1.0 / pixels, float(N * pixels),
        CVEC=channel_vector_width(C), RVEC=channel_vector_width(R), NB=cfg.NB, CB=cfg.CB, KB=cfg.KB, RB=cfg.RB, JB=cfg.JB, BP=cfg.BP,
        ACT=act, GATE=gate, num_warps=cfg.num_warps,
    )  # fmt: skip
    return dt, du, dpool, norm


def squeeze_excite_backward(sums, pixels, gates, pooled, u, weights, *, norm: BatchNorm | None = None, act="silu", gate="sigmoid"):
    """Gradients from ``gradient_sums(..., for_gate=True)`` [N, parts, 5, C].

    Args:
        weights: (w_reduce, b_reduce, w_expand, b_expand); norm: the BatchNorm before the gate, with rstd, or None.

    Returns: (dpool fp32 [N, C], [dw_reduce, db_reduce, dw_expand, db_expand], [dgamma, dbeta, k0, k1] or None).
    """
    w_reduce, b_reduce, w_expand, b_expand = weights
    N, parts, _, C = sums.shape
    R = u.shape[1]
    dt, du, dpool = fp32(u.device, N, C), fp32(u.device, N, R), fp32(u.device, N, C)
    squeeze_excite_dgrad_kernel[(N,)](
        sums, gates, u, w_reduce, w_expand, dt, du, dpool, parts, C, R, 1.0 / pixels,
        **_blocks(R), ACT=act, GATE=gate,
    )  # fmt: skip
    grads = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights]
    norms = [fp32(u.device, C) for _ in range(4)] if norm else [u] * 4
    gamma, _, mean, rstd, *_ = norm or (u,) * 4
    RB = min(64, _blocks(R)["RB"])
    squeeze_excite_wgrad_kernel[(triton.cdiv(C, 16), triton.cdiv(R, RB))](
        sums, gates, dpool, dt, du, u, pooled, gamma, mean, rstd, *grads, *norms, N, parts, C, R, float(N * pixels),
        NB=32, RB=RB, CB=16, ACT=act, BN=norm is not None, num_warps=4,
    )  # fmt: skip
    return dpool, grads, norms if norm else None
