"""Squeeze-excite: global pooling with BatchNorm and activation on load, both fully connected layers, their backward.

    pooled[n,c] = mean_hw a[n,h,w,c],  u = pooled W_r^T + b_r,  v = phi(u),  gate = sigma(v W_e^T + b_e)
    dt = dgate * sigma'(t),  dW_e = dt^T v,  db_e = sum_n dt                           dgate = sum_hw dq * a
    du = (dt W_e) * phi'(u),  dW_r = du^T pooled,  db_r = sum_n du,  dpool = du W_r / HW

t is the gate before its sigma, and dpool is added to the gradient of every pixel of a.

The backward also finishes BatchNorm 2. Since da = dq * gate + dpool is linear in gate and dpool, its two sums follow
from the five sums per image and channel of ``gradient_sums``, with no further pass: dbeta = sum_n gate*S1 + dpool*S2,
dgamma = sum_n gate*S3 + dpool*S4.

The forward is two launches after the pooling: every channel's gate needs all units, and each unit all channels. A
program of either has a block of the layer's weights, so that even one image takes as many programs as there are blocks.

    squeeze   pooled[n,c],  partials[j,n,r] = sum over block j of channels of pooled[n,c] W_r[r,c]
    excite    u[n,r] = sum_j partials[j,n,r] + b_r,  v,  gate[n,c]
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import gate_backward_config, pool_config, squeeze_excite_config
from effkernels.kernels.activation import activate, activate_and_grad, gate_derivative, gate_function
from effkernels.kernels.batchnorm import batch_terms, finish_gradients
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    exact_dot,
    fast_math,
    fp32,
    given,
    last_to_arrive,
    launcher,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, load_vector, scale_and_shift


@sized_jit
def pool_kernel(
    y,
    sums,
    norm,
    rows,
    CV,
    rows_per_program,
    parts,
    CVEC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
):
    """sums[n, part, c] = sum over the part's pixels of phi(BN(y)), or of y."""
    C = CV * CVEC
    c = tl.program_id(0) % tl.cdiv(C, BLOCK_C) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    group = tl.program_id(0) // tl.cdiv(C, BLOCK_C)
    n = (group // parts).to(tl.int64)
    first = group % parts * rows_per_program
    last = tl.minimum(first + rows_per_program, rows)
    r = tl.arange(0, BLOCK_ROWS)
    if given(norm):
        scale, shift = scale_and_shift(norm, c, mc)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_C], tl.float32)
    for start in range(first, last, BLOCK_ROWS):
        ok = (start + r < last)[:, None] & mc[None, :]
        v = tl.load(y + n * rows * C + (start + r)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        if given(norm):
            v = tl.where(ok, activate(v * scale + shift, ACT, FAST), 0.0)
        acc += v
    tl.store(sums + group.to(tl.int64) * C + c, tl.sum(acc, 0), mask=mc)


@triton.jit
def sum_parts(partials, n, parts, n_stride, part_stride, k, mask, BLOCK_P: tl.constexpr):
    """Columns k of partials of images n, added over the parts: [BLOCK_N, BLOCK_K]. Of one image BLOCK_P parts at a
    time."""
    at = partials + (n * n_stride)[:, None] + k[None, :]
    if n.shape[0] == 1:
        t = tl.arange(0, BLOCK_P)[:, None]
        some = tl.zeros([BLOCK_P, k.shape[0]], tl.float32)
        for start in range(0, parts, BLOCK_P):
            some += tl.load(at + (start + t) * part_stride, mask=mask & (start + t < parts), other=0.0)
        return tl.sum(some, 0)[None, :]
    else:
        acc = tl.zeros([n.shape[0], k.shape[0]], tl.float32)
        for part in range(0, parts):
            acc += tl.load(at + part * part_stride, mask=mask, other=0.0)
        return acc


@triton.jit
def linear(x, w, acc):
    """acc + x w^T, of x [BLOCK_N, K] and w [M, K]. A product of tensor cores has 16 rows at least, so that of one image
    is a sum."""
    if x.shape[0] == 1:
        return acc + tl.sum(w * x, 1)[None, :]
    else:
        return exact_dot(x, tl.trans(w), acc)


@sized_jit
def squeeze_kernel(
    sums,
    w_reduce,
    pooled,
    partials,
    N,
    parts,
    CV,
    RV,
    inverse_pixels,
    CVEC: tl.constexpr,
    RVEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Finish the pooling of BLOCK_N images times BLOCK_C channels, and store what these channels give to BLOCK_R units
    of the bottleneck: partials [channel blocks, N, R]."""
    C = CV * CVEC
    R = RV * RVEC
    blocks_c = tl.cdiv(C, BLOCK_C)
    blocks_r = tl.cdiv(R, BLOCK_R)
    j = tl.program_id(0) % blocks_c
    block_r = tl.program_id(0) // blocks_c % blocks_r
    n = (tl.program_id(0) // (blocks_c * blocks_r) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mn = (n < N)[:, None]
    r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    mr = r < R
    c = j * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    mask = mn & mc[None, :]
    w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
    p = (
        sum_parts(partials=sums, n=n, parts=parts, n_stride=parts * C, part_stride=C, k=c, mask=mask, BLOCK_P=BLOCK_P)
        * inverse_pixels
    )
    tl.store(pooled + n[:, None] * C + c[None, :], p, mask=mask & (block_r == 0))
    u = linear(p, w, tl.zeros([BLOCK_N, BLOCK_R], tl.float32))
    tl.store(partials + (j * N + n)[:, None] * R + r[None, :], u, mask=mn & mr[None, :])


@sized_jit
def excite_kernel(
    partials,
    b_reduce,
    w_expand,
    b_expand,
    u_out,
    gate,
    N,
    splits,
    CV,
    RV,
    CVEC: tl.constexpr,
    RVEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
):
    """The gates of BLOCK_N images times BLOCK_C channels, from partials [splits, N, R] of u without its bias."""
    C = CV * CVEC
    R = RV * RVEC
    blocks_c = tl.cdiv(C, BLOCK_C)
    j = tl.program_id(0) % blocks_c
    n = (tl.program_id(0) // blocks_c * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mn = (n < N)[:, None]
    c = j * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    t = tl.zeros([BLOCK_N, BLOCK_C], tl.float32) + load_vector(b_expand, c, mc)[None, :]
    for start in range(0, R, BLOCK_R):
        r = start + tl.arange(0, BLOCK_R)
        mr = r < R
        mask = mn & mr[None, :]
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr[None, :], other=0.0).to(tl.float32)
        u = (
            sum_parts(
                partials=partials, n=n, parts=splits, n_stride=R, part_stride=N * R, k=r, mask=mask, BLOCK_P=BLOCK_P
            )
            + load_vector(b_reduce, r, mr)[None, :]
        )
        tl.store(u_out + n[:, None] * R + r[None, :], u, mask=mask & (j == 0))
        t = linear(tl.where(mask, activate(u, ACT, False), 0.0), w, t)
    tl.store(gate + n[:, None] * C + c[None, :], gate_function(t, GATE), mask=mn & mc[None, :])


@triton.jit
def sum_tile(sums, n, parts, row, c, mask, C):
    """Row ``row`` of sums [N, parts, 5, C] at images n and channels c, added over the parts: [BLOCK_N, BLOCK_C]."""
    acc = tl.zeros([n.shape[0], c.shape[0]], tl.float32)
    at = sums + (n * parts * 5 + row)[:, None] * C + c[None, :]
    for t in range(0, parts):
        acc += tl.load(at + t * 5 * C, mask=mask, other=0.0)
    return acc


@triton.jit
def gate_backward_to_units(
    b,
    j,
    sums,
    gates,
    w_expand,
    dt_out,
    dv_out,
    N,
    parts,
    C,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    GATE: tl.constexpr,
):
    """dt of BLOCK_N images times BLOCK_C channels, and what these channels give to dv: dv_out [channel blocks, N,
    R]."""
    n = (b * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mn = (n < N)[:, None]
    c = j * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    mask = mn & mc[None, :]
    at = n[:, None] * C + c[None, :]
    dt = sum_tile(sums=sums, n=n, parts=parts, row=2, c=c, mask=mask, C=C) * gate_derivative(
        tl.load(gates + at, mask=mask, other=0.0), GATE
    )
    tl.store(dt_out + at, dt, mask=mask)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mr = (r < R)[None, :]
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr, other=0.0).to(tl.float32)
        dv = exact_dot(dt, w, tl.zeros([BLOCK_N, BLOCK_R], tl.float32))
        tl.store(dv_out + (j * N + n)[:, None] * R + r[None, :], dv, mask=mn & mr)


@triton.jit
def gate_backward_units(
    b,
    blocks_c,
    dv,
    u_in,
    du_out,
    N,
    R,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    ACT: tl.constexpr,
):
    """du of BLOCK_N images."""
    n = (b * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mask = (n < N)[:, None] & (r < R)[None, :]
        at = n[:, None] * R + r[None, :]
        acc = tl.zeros([BLOCK_N, BLOCK_R], tl.float32)
        for j in range(0, blocks_c):
            acc += tl.load(dv + j * N * R.to(tl.int64) + at, mask=mask, other=0.0, cache_modifier=".cg")
        phi, dphi = activate_and_grad(tl.load(u_in + at, mask=mask, other=0.0), ACT, False)
        tl.store(du_out + at, acc * dphi, mask=mask)


@triton.jit
def gate_backward_to_pool(
    b,
    j,
    ready,
    sums,
    gates,
    w_reduce,
    du,
    dpool,
    partials,
    N,
    parts,
    C,
    R,
    inverse_pixels,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """dpool of BLOCK_N images times BLOCK_C channels, and BatchNorm 2's two sums over them: partials [image blocks, 2,
    C]. ``ready`` is not 0 once the images' du can be read; what does not need it is loaded before."""
    n = (b * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mn = (n < N)[:, None]
    c = j * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    mask = mn & mc[None, :]
    at = n[:, None] * C + c[None, :]
    g = tl.load(gates + at, mask=mask, other=0.0)
    db = g * sum_tile(sums=sums, n=n, parts=parts, row=0, c=c, mask=mask, C=C)
    dg = g * sum_tile(sums=sums, n=n, parts=parts, row=1, c=c, mask=mask, C=C)
    db_pool = sum_tile(sums=sums, n=n, parts=parts, row=3, c=c, mask=mask, C=C)
    dg_pool = sum_tile(sums=sums, n=n, parts=parts, row=4, c=c, mask=mask, C=C)
    while tl.atomic_add(ready, 0, sem="acquire", scope="gpu") == 0:
        pass
    tl.debug_barrier()
    acc = tl.zeros([BLOCK_N, BLOCK_C], tl.float32)
    for r0 in range(0, R, BLOCK_R):
        r = r0 + tl.arange(0, BLOCK_R)
        mr = r < R
        left = tl.load(du + n[:, None] * R + r[None, :], mask=mn & mr[None, :], other=0.0, cache_modifier=".cg")
        w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
        acc = exact_dot(left, w, acc)
    acc *= inverse_pixels
    tl.store(dpool + at, acc, mask=mask)
    out = partials + (b * 2).to(tl.int64) * C + c
    tl.store(out, tl.sum(db + acc * db_pool, 0), mask=mc)
    tl.store(out + C, tl.sum(dg + acc * dg_pool, 0), mask=mc)


@sized_jit
def gate_backward_kernel(
    sums,
    gates,
    u,
    w_reduce,
    w_expand,
    norm2,
    counters,
    dt,
    dv,
    du,
    dpool,
    partials,
    dgamma,
    dbeta,
    k0,
    k1,
    N,
    parts,
    CV,
    RV,
    inverse_pixels,
    count,
    CVEC: tl.constexpr,
    RVEC: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_P: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
):
    """From sums [N, parts, 5, C] to dpool, BatchNorm 2's gradients and batch terms; a program is BLOCK_N images times
    BLOCK_C channels.

    Two stages of programs: the first ends with du, the second begins with it. Programs take their work by ticket in the
    order in which they start, so when one of the second stage waits, all of the first are running, and wait for
    nothing: it ends. Counters: tickets, arrivals and readers of each block of images, arrivals of each block of
    channels; all are left at 0.
    """
    C = CV * CVEC
    R = RV * RVEC
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_c = tl.cdiv(C, BLOCK_C)
    stage = blocks_n * blocks_c
    ticket = tl.atomic_add(counters, 1)
    if ticket == 2 * stage - 1:
        tl.store(counters, 0)
    b = ticket % stage // blocks_c
    j = ticket % stage % blocks_c
    readers = counters + 1 + blocks_n + b
    if ticket < stage:
        gate_backward_to_units(
            b=b,
            j=j,
            sums=sums,
            gates=gates,
            w_expand=w_expand,
            dt_out=dt,
            dv_out=dv,
            N=N,
            parts=parts,
            C=C,
            R=R,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_R=BLOCK_R,
            GATE=GATE,
        )
        if last_to_arrive(counters + 1 + b, blocks_c):
            gate_backward_units(
                b=b, blocks_c=blocks_c, dv=dv, u_in=u, du_out=du, N=N, R=R, BLOCK_N=BLOCK_N, BLOCK_R=BLOCK_R, ACT=ACT
            )
            tl.debug_barrier()
            tl.atomic_add(readers, 1, sem="release", scope="gpu")
    else:
        gate_backward_to_pool(
            b=b,
            j=j,
            ready=readers,
            sums=sums,
            gates=gates,
            w_reduce=w_reduce,
            du=du,
            dpool=dpool,
            partials=partials,
            N=N,
            parts=parts,
            C=C,
            R=R,
            inverse_pixels=inverse_pixels,
            BLOCK_N=BLOCK_N,
            BLOCK_C=BLOCK_C,
            BLOCK_R=BLOCK_R,
        )
        if tl.atomic_add(readers, 1) == blocks_c:
            tl.store(readers, 0)
        if last_to_arrive(counters + 1 + 2 * blocks_n + j, blocks_n):
            finish_gradients(
                sums=partials,
                norm=norm2,
                dgamma=dgamma,
                dbeta=dbeta,
                k0=k0,
                k1=k1,
                parts=blocks_n,
                row_stride=2 * C,
                C=C,
                count=count,
                block_c=j,
                BLOCK_P=BLOCK_P,
                BLOCK_C=BLOCK_C,
            )


@sized_jit
def squeeze_excite_dgrad_kernel(
    sums,
    gate,
    u_in,
    w_reduce,
    w_expand,
    dt_out,
    du_out,
    dpool,
    parts,
    C,
    R,
    inverse_count,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
    GATE: tl.constexpr,
):
    """One image a program: from sum dq*phi (row 2 of ``sums`` [N, parts, 5, C]) back to dpool."""
    n = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    mr = r < R
    dv = tl.zeros([BLOCK_R], tl.float32)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mc = c < C
        dgate = tl.zeros([BLOCK_C], tl.float32)
        for t in range(0, parts):
            dgate += tl.load(sums + ((n * parts + t) * 5 + 2) * C + c, mask=mc, other=0.0)
        dt = dgate * gate_derivative(load_vector(gate + n * C, c, mc), GATE)
        tl.store(dt_out + n * C + c, dt, mask=mc)
        w = tl.load(w_expand + c[:, None] * R + r[None, :], mask=mc[:, None] & mr[None, :], other=0.0).to(tl.float32)
        dv += tl.sum(w * dt[:, None], 0)
    phi, dphi = activate_and_grad(load_vector(u_in + n * R, r, mr), ACT, False)
    du = tl.where(mr, dv * dphi, 0.0)
    tl.store(du_out + n * R + r, du, mask=mr)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        mc = c < C
        w = tl.load(w_reduce + r[:, None] * C + c[None, :], mask=mr[:, None] & mc[None, :], other=0.0).to(tl.float32)
        tl.store(dpool + n * C + c, tl.sum(w * du[:, None], 0) * inverse_count, mask=mc)


@sized_jit
def squeeze_excite_wgrad_kernel(
    sums,
    gate,
    dpool,
    dt,
    du,
    u_in,
    pooled,
    norm,
    dw_reduce,
    db_reduce,
    dw_expand,
    db_expand,
    dgamma,
    dbeta,
    k0,
    k1,
    N,
    parts,
    C,
    R,
    count,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ACT: tl.constexpr,
):
    """BLOCK_C channels times BLOCK_R of the bottleneck a program, all images in order: weight gradients; BN2's sums and
    batch terms once."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mc = c < C
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    mr = r < R
    first = tl.program_id(1) == 0
    i = tl.arange(0, BLOCK_N)
    dwe = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    dwr = tl.zeros([BLOCK_C, BLOCK_R], tl.float32)
    dbe = tl.zeros([BLOCK_C], tl.float32)
    dbr = tl.zeros([BLOCK_R], tl.float32)
    s1 = tl.zeros([BLOCK_C], tl.float32)
    s3 = tl.zeros([BLOCK_C], tl.float32)
    for start in range(0, N, BLOCK_N):
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
        if given(norm):
            g = tl.load(gate + at_c, mask=mask_c, other=0.0)
            dp = tl.load(dpool + at_c, mask=mask_c, other=0.0)
            for t in range(0, parts):
                row = sums + ((n * parts + t) * 5)[:, None] * C + c[None, :]
                s1 += tl.sum(
                    g * tl.load(row, mask=mask_c, other=0.0) + dp * tl.load(row + 3 * C, mask=mask_c, other=0.0), 0
                )
                s3 += tl.sum(
                    g * tl.load(row + C, mask=mask_c, other=0.0) + dp * tl.load(row + 4 * C, mask=mask_c, other=0.0), 0
                )
    mask = mc[:, None] & mr[None, :]
    tl.store(dw_expand + c[:, None] * R + r[None, :], cast(dwe, dw_expand.dtype.element_ty), mask=mask)
    tl.store(dw_reduce + r[None, :] * C + c[:, None], cast(dwr, dw_reduce.dtype.element_ty), mask=mask)
    tl.store(db_expand + c, cast(dbe, db_expand.dtype.element_ty), mask=mc & first)
    tl.store(db_reduce + r, cast(dbr, db_reduce.dtype.element_ty), mask=mr & (tl.program_id(0) == 0))
    if given(norm):
        tl.store(dbeta + c, s1, mask=mc & first)
        tl.store(dgamma + c, s3, mask=mc & first)
        b0, b1 = batch_terms(norm, s1, s3, count, c, mc)
        tl.store(k0 + c, b0, mask=mc & first)
        tl.store(k1 + c, b1, mask=mc & first)


@launcher
def pool(y: torch.Tensor, norm: BatchNorm | None = None, *, act: str = "identity") -> torch.Tensor:
    """Return fp32 sums [N, parts, C] over pixels of phi(BN(y)), or of y itself without ``norm``, for y [N, H, W, C]."""
    N, H, W, C = y.shape
    cfg = pool_config(C, y.dtype)
    blocks_c = triton.cdiv(C, cfg.BLOCK_C)
    rows_per_program, parts = cfg.long(H * W, blocks_c * N, y.device)
    sums = fp32(y.device, N, parts, C)
    pool_kernel[(blocks_c * N * parts,)](
        y=y,
        sums=sums,
        norm=norm,
        rows=H * W,
        CV=C // channel_vector_width(C),
        rows_per_program=rows_per_program,
        parts=parts,
        CVEC=channel_vector_width(C),
        BLOCK_ROWS=cfg.BLOCK_ROWS,
        BLOCK_C=cfg.BLOCK_C,
        ACT=act,
        FAST=fast_math(y.dtype),
        num_warps=cfg.num_warps,
    )
    return sums


def _blocks(R):
    """Return the blocks of a launch that holds the whole bottleneck at once: BLOCK_R covers it, and a block of weights
    has about 4096 elements."""
    BLOCK_R = max(16, triton.next_power_of_2(R))
    return {"BLOCK_R": BLOCK_R, "BLOCK_C": max(16, min(128, 4096 // BLOCK_R)), "num_warps": 4 if BLOCK_R <= 256 else 8}


@launcher
def squeeze(sums: torch.Tensor, pixels: int, w_reduce: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 pooled [N, C] and, to be summed over the first dimension, u without its bias [splits, N, R]."""
    N, parts, C = sums.shape
    R = w_reduce.shape[0]
    cfg = squeeze_excite_config(N, R)
    blocks = triton.cdiv(C, cfg.BLOCK_C) * triton.cdiv(R, cfg.BLOCK_R)
    programs = triton.cdiv(N, cfg.BLOCK_N)
    pooled, partials = fp32(sums.device, N, C), fp32(sums.device, triton.cdiv(C, cfg.BLOCK_C), N, R)
    squeeze_kernel[(blocks * programs,)](
        sums=sums,
        w_reduce=w_reduce,
        pooled=pooled,
        partials=partials,
        N=N,
        parts=parts,
        CV=C // channel_vector_width(C),
        RV=R // channel_vector_width(R),
        inverse_pixels=1.0 / pixels,
        CVEC=channel_vector_width(C),
        RVEC=channel_vector_width(R),
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_R=cfg.BLOCK_R,
        BLOCK_C=cfg.BLOCK_C,
        BLOCK_P=cfg.BLOCK_P,
        **cfg.options,
    )
    return pooled, partials


@launcher
def excite(
    partials: torch.Tensor,
    b_reduce: torch.Tensor,
    w_expand: torch.Tensor,
    b_expand: torch.Tensor,
    act: str,
    gate: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return fp32 (gates [N, C], u [N, R]) from what ``squeeze`` left."""
    splits, N, R = partials.shape
    C = len(b_expand)
    cfg = squeeze_excite_config(N, R)
    blocks = triton.cdiv(C, cfg.BLOCK_C)
    programs = triton.cdiv(N, cfg.BLOCK_N)
    gates, u = fp32(partials.device, N, C), fp32(partials.device, N, R)
    excite_kernel[(blocks * programs,)](
        partials=partials,
        b_reduce=b_reduce,
        w_expand=w_expand,
        b_expand=b_expand,
        u_out=u,
        gate=gates,
        N=N,
        splits=splits,
        CV=C // channel_vector_width(C),
        RV=R // channel_vector_width(R),
        CVEC=channel_vector_width(C),
        RVEC=channel_vector_width(R),
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_C=cfg.BLOCK_C,
        BLOCK_R=cfg.BLOCK_R,
        BLOCK_P=cfg.BLOCK_P,
        ACT=act,
        GATE=gate,
        **cfg.options,
    )
    return gates, u


def squeeze_excite_forward(
    sums: torch.Tensor,
    pixels: int,
    w_reduce: torch.Tensor,
    b_reduce: torch.Tensor,
    w_expand: torch.Tensor,
    b_expand: torch.Tensor,
    *,
    act: str = "silu",
    gate: str = "sigmoid",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return fp32 (gates [N, C], pooled [N, C], u [N, R]) from the sums fp32 [N, parts, C] of ``pool`` over ``pixels``
    pixels, in two launches: every channel needs all units, and each unit all channels."""
    pooled, partials = squeeze(sums, pixels, w_reduce)
    gates, u = excite(partials=partials, b_reduce=b_reduce, w_expand=w_expand, b_expand=b_expand, act=act, gate=gate)
    return gates, pooled, u


@launcher
def gate_backward(
    sums: torch.Tensor,
    gates: torch.Tensor,
    u: torch.Tensor,
    weights: tuple,
    norm2: BatchNorm,
    pixels: int,
    *,
    act: str,
    gate: str,
    counters: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, tuple]:
    """Run the backward of ``pool_and_gate`` in one launch, with BatchNorm 2's gradients and without those of the
    weights.

    Args:
        sums: fp32 [N, parts, 5, C], over the pixels of each image, of dq phi', dq phi' yhat, dq phi, phi' and phi' yhat
            at z.
        gates, u: results of ``pool_and_gate``. weights: (w_reduce, b_reduce, w_expand, b_expand). norm2: with rstd.
            pixels: h * w.
        act: of the bottleneck. gate: the gate function.
        counters: int32, all 0, at least ``gate_backward_config(R).counters(N, C)``; they are 0 again afterwards.

    Returns: fp32 dt [N, C] and du [N, R], the gradients before the gate function and before ``act``; dpool fp32 [N, C],
        which is added to the gradient of every pixel; and BatchNorm 2's dgamma and dbeta, in their parameters' dtypes,
        k0 and k1, fp32 [C].
    """
    w_reduce, _, w_expand, _ = weights
    N, parts, _, C = sums.shape
    R = u.shape[1]
    cfg = gate_backward_config(R)
    blocks_n, blocks_c = triton.cdiv(N, cfg.BLOCK_N), triton.cdiv(C, cfg.BLOCK_C)
    check_counters(counters, cfg.counters(N, C))
    dt, dv, du, dpool = (fp32(u.device, *shape) for shape in ((N, C), (blocks_c, N, R), (N, R), (N, C)))
    partials = fp32(u.device, blocks_n, 2, C)
    dgamma, dbeta = torch.empty_like(norm2.weight), torch.empty_like(norm2.bias)
    k0, k1 = fp32(u.device, C), fp32(u.device, C)
    gate_backward_kernel[(2 * blocks_n * blocks_c,)](
        sums=sums,
        gates=gates,
        u=u,
        w_reduce=w_reduce,
        w_expand=w_expand,
        norm2=norm2,
        counters=counters,
        dt=dt,
        dv=dv,
        du=du,
        dpool=dpool,
        partials=partials,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        N=N,
        parts=parts,
        CV=C // channel_vector_width(C),
        RV=R // channel_vector_width(R),
        inverse_pixels=1.0 / pixels,
        count=float(N * pixels),
        CVEC=channel_vector_width(C),
        RVEC=channel_vector_width(R),
        BLOCK_N=cfg.BLOCK_N,
        BLOCK_C=cfg.BLOCK_C,
        BLOCK_R=cfg.BLOCK_R,
        BLOCK_P=cfg.BLOCK_P,
        ACT=act,
        GATE=gate,
        **cfg.options,
    )
    return dt, du, dpool, (dgamma, dbeta, k0, k1)


def squeeze_excite_backward(
    sums: torch.Tensor,
    pixels: int,
    gates: torch.Tensor,
    pooled: torch.Tensor,
    u: torch.Tensor,
    weights: tuple,
    *,
    norm: BatchNorm | None = None,
    act: str = "silu",
    gate: str = "sigmoid",
) -> tuple[torch.Tensor, list, list | None]:
    """Return the gradients of squeeze-excite, and of a BatchNorm before it, from the sums of a pass over its pixels.

    Args:
        sums: fp32 [N, parts, 5, C] of ``gradient_sums(..., for_gate=True)``. pixels: H * W.
        gates, pooled, u: results of ``squeeze_excite_forward``. weights: (w_reduce, b_reduce, w_expand, b_expand).
        norm: the BatchNorm before the gate, with rstd, or None.

    Returns: dpool fp32 [N, C], which is added to the gradient of every pixel; [dw_reduce, db_reduce, dw_expand,
        db_expand]; and [dgamma, dbeta, k0, k1] fp32 [C], or None without ``norm``.
    """
    w_reduce, b_reduce, w_expand, b_expand = weights
    N, parts, _, C = sums.shape
    R = u.shape[1]
    dt, du, dpool = fp32(u.device, N, C), fp32(u.device, N, R), fp32(u.device, N, C)
    squeeze_excite_dgrad_kernel[(N,)](
        sums=sums,
        gate=gates,
        u_in=u,
        w_reduce=w_reduce,
        w_expand=w_expand,
        dt_out=dt,
        du_out=du,
        dpool=dpool,
        parts=parts,
        C=C,
        R=R,
        inverse_count=1.0 / pixels,
        **_blocks(R),
        ACT=act,
        GATE=gate,
    )
    dw_reduce, db_reduce, dw_expand, db_expand = (
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in weights
    )
    finished = [fp32(u.device, C) for _ in range(4)] if norm is not None else None
    dgamma, dbeta, k0, k1 = finished or [None] * 4
    block_r = min(64, _blocks(R)["BLOCK_R"])
    squeeze_excite_wgrad_kernel[(triton.cdiv(C, 16), triton.cdiv(R, block_r))](
        sums=sums,
        gate=gates,
        dpool=dpool,
        dt=dt,
        du=du,
        u_in=u,
        pooled=pooled,
        norm=norm,
        dw_reduce=dw_reduce,
        db_reduce=db_reduce,
        dw_expand=dw_expand,
        db_expand=db_expand,
        dgamma=dgamma,
        dbeta=dbeta,
        k0=k0,
        k1=k1,
        N=N,
        parts=parts,
        C=C,
        R=R,
        count=float(N * pixels),
        BLOCK_N=32,
        BLOCK_R=block_r,
        BLOCK_C=16,
        ACT=act,
        num_warps=4,
    )
    return dpool, [dw_reduce, db_reduce, dw_expand, db_expand], finished
