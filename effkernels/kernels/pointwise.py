"""1x1 convolutions as products of NHWC rows: both backward passes of an MBConv block (``pointwise_forward`` has the forward).

    project backward  dq[m,e] = sum_o dy[m,o] w[o,e]         dy = scale * mask[n] * dout + k0 + k1 * y      (BatchNorm
    3's backward)
                      dw[o,e] = sum_m dy[m,o] q[m,e]         q = phi(BN2(y2)) * gate[n,e]
    expand backward   dx[m,i] = sum_e dz[m,e] A[e] w[e,i] + sum_j x[m,j] G[j,i] + c[i]  [+ dout[m,i]]
                      D[e,i]  = sum_m dz[m,e] x[m,i],   gram[j,i] = sum_m x[m,j] x[m,i],   xsum[i] = sum_m x[m,i]

The expand backward never reads y1: BatchNorm 1's backward is dy1 = A * dz + k0 + k1 * y1 with y1 = x w^T, so y1's term
folds into x: G = w^T diag(k1) w, c = k0 w, and dw = A D + k1 (w gram) + k0 xsum (``reduce_weight_gradients``). Nothing
activated or gated is stored.

Rows are counted per image where something depends on the image (a gate, sums per image), else over the whole batch, in
tiles of BM. Programs are persistent over tiles; a backward launch holds two roles, data gradient and weight gradient,
that move over the same rows at the same time, so that what both read comes from DRAM once. Weight gradients are fp32
partials, one per split of the rows.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import expand_backward_config, project_backward_config
from effkernels.kernels.activation import activate, activate_and_grad, branch_factor
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    check_counters,
    dot,
    fast_math,
    fp32,
    launcher,
    matmul_precision,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector, scale_and_shift

GRAM_BLOCK = 32  # rows and columns of a program's part of the Gram matrix


@triton.jit
def load_tile(x, i, c, C, ok, mc):
    """Rows i of x [BM, C] at channels c; 0 outside."""
    return tl.load(x + i[:, None] * C + c[None, :], mask=ok[:, None] & mc[None, :], other=0.0)


@triton.jit
def activated_operand(
    v, scale, shift, gate, dtype: tl.constexpr, BN: tl.constexpr, ACT: tl.constexpr, GATED: tl.constexpr, FAST: tl.constexpr
):
    """The forward's left operand a from a loaded tile v."""
    if BN or GATED:
        v = v.to(tl.float32)
        if BN:
            v = activate(v * scale + shift, ACT, FAST)
        if GATED:
            v = v * gate
        return cast(v, dtype)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@triton.jit
def fold_rows(v):
    """Sum of rows r and r + 8 of every 16 of v [BM, BN]: a thread holds both in the layout of the tensor cores'
    results."""
    return tl.sum(tl.reshape(v, [v.shape[0] // 16, 2, 8, v.shape[1]]), 1)


@triton.jit
def sum_rows(folded):
    return tl.sum(tl.sum(folded, 0), 0)


@triton.jit
def bn_backward_operand(dout, y, base, i, c, C, ok, mc, scale, offset, slope, factor, dtype: tl.constexpr, BATCH: tl.constexpr):
    """dy = scale * factor * dout + offset + slope * y, 0 in rows outside; rounded to the compute dtype."""
    v = load_tile(dout + base * C, i, c, C, ok, mc).to(tl.float32) * (scale * factor)
    if BATCH:
        v += offset + slope * load_tile(y + base * C, i, c, C, ok, mc).to(tl.float32)
        v = tl.where(ok[:, None], v, 0.0)
    return cast(v, dtype)


@triton.jit
def backward_rows(norm, terms, c, mc):
    """(scale, offset, slope) of a BatchNorm's backward as [1, BC] rows."""
    scale = load_vector(norm.weight, c, mc) * load_rstd(norm, c, mc)
    offset = tl.zeros_like(scale)
    slope = tl.zeros_like(scale)
    if terms is not None:
        offset = load_vector(terms[0], c, mc)
        slope = load_vector(terms[1], c, mc)
    return scale[None, :], offset[None, :], slope[None, :]


@triton.jit
def store_partial(partials, acc, row, col, ROWS, COLS, split):
    """acc [BL, BR] into partials [split, ROWS, COLS]."""
    offset = split.to(tl.int64) * ROWS * COLS + row[:, None] * COLS + col[None, :]
    tl.store(partials + offset, acc, mask=(row < ROWS)[:, None] & (col < COLS)[None, :])


@triton.jit
def project_weight_gradient(
    pid,
    dout,
    y3,
    y2,
    partials,
    norm3,
    terms3,
    mask,
    keep,
    norm2,
    gate,
    images,
    rows,
    O,
    E,
    tiles,
    splits,
    BM: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dw of BO x BW over every ``splits``-th row tile."""
    dtype: tl.constexpr = y2.dtype.element_ty
    blocks_e = tl.cdiv(E, BW)
    blocks_o = tl.cdiv(O, BO)
    c = pid % blocks_e * BW + tl.arange(0, BW)
    mc = c < E
    o = pid // blocks_e % blocks_o * BO + tl.arange(0, BO)
    mo = o < O
    split = pid // blocks_e // blocks_o
    i = tl.arange(0, BM)
    scale3, offset3, slope3 = backward_rows(norm3, terms3, o, mo)
    scale2, shift2 = scale_and_shift(norm2, c, mc)
    dw = tl.zeros([BO, BW], tl.float32)
    for t in tl.range(split, images * tiles, splits, num_stages=STAGES):
        image = (t // tiles).to(tl.int64)
        row0 = t % tiles * BM
        ok = row0 + i < rows
        base = image * rows + row0
        factor = branch_factor(tl.load(mask + image), keep) if mask is not None else 1.0
        dy = bn_backward_operand(dout, y3, base, i, o, O, ok, mo, scale3, offset3, slope3, factor, dtype, terms3 is not None)
        gates = load_vector(gate + image * E, c, mc)[None, :] if gate is not None else 0.0
        q = activated_operand(load_tile(y2 + base * E, i, c, E, ok, mc), scale2, shift2, gates, dtype, True, ACT, gate is not None, FAST)
        dw = dot(tl.trans(dy), q, dw, PRECISION)
    store_partial(partials, dw, o, c, O, E, split)


@triton.jit
def project_data_gradient(
    pid,
    dout,
    y3,
    y2,
    w,
    dq,
    sums,
    partials,
    norm3,
    terms3,
    mask,
    keep,
    norm2,
    gate,
    images,
    rows,
    O,
    E,
    tiles,
    parts,
    tiles_per_part,
    programs,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    SHARED: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dq of BE channels and their sums, for every ``programs``-th part of an image; SHARED: dw of all O (BK covers it)
    too."""
    dtype: tl.constexpr = y2.dtype.element_ty
    blocks_e = tl.cdiv(E, BE)
    c = pid % blocks_e * BE + tl.arange(0, BE)
    mc = c < E
    p = pid // blocks_e
    i = tl.arange(0, BM)
    k = tl.arange(0, BK)
    scale2, shift2 = scale_and_shift(norm2, c, mc)
    mu2 = load_vector(norm2.mean, c, mc)[None, :]
    if SHARED:
        mk = k < O
        scale3, offset3, slope3 = backward_rows(norm3, terms3, k, mk)
        weight = cast(tl.load(w + k[:, None] * E + c[None, :], mask=mk[:, None] & mc[None, :], other=0.0).to(tl.float32), dtype)
        dw = tl.zeros([BK, BE], tl.float32)
    for g in range(p, images * parts, programs):
        image = (g // parts).to(tl.int64)
        factor = branch_factor(tl.load(mask + image), keep) if mask is not None else 1.0
        gates = load_vector(gate + image * E, c, mc)[None, :] if gate is not None else 0.0
        s1 = tl.zeros([BM // 16, 8, BE], tl.float32)
        s3 = tl.zeros([BM // 16, 8, BE], tl.float32)
        if gate is not None:
            s_gate = tl.zeros([BM // 16, 8, BE], tl.float32)
            s2 = tl.zeros([BM // 16, 8, BE], tl.float32)
            s4 = tl.zeros([BM // 16, 8, BE], tl.float32)
        first = g % parts * tiles_per_part
        for t in tl.range(first, tl.minimum(first + tiles_per_part, tiles), num_stages=STAGES if SHARED else 1):
            row0 = t * BM
            ok = row0 + i < rows
            base = image * rows + row0
            acc = tl.zeros([BM, BE], tl.float32)
            if SHARED:
                dy = bn_backward_operand(dout, y3, base, i, k, O, ok, mk, scale3, offset3, slope3, factor, dtype, terms3 is not None)
                acc = dot(dy, weight, acc, PRECISION)
            else:
                for start in tl.range(0, O, BK, num_stages=STAGES):
                    kk = start + k
                    mkk = kk < O
                    scale, offset, slope = backward_rows(norm3, terms3, kk, mkk)
                    w_mask = mkk[:, None] & mc[None, :]
                    right = cast(tl.load(w + kk[:, None] * E + c[None, :], mask=w_mask, other=0.0).to(tl.float32), dtype)
                    left = bn_backward_operand(dout, y3, base, i, kk, O, ok, mkk, scale, offset, slope, factor, dtype, terms3 is not None)
                    acc = dot(left, right, acc, PRECISION)
            v = load_tile(y2 + base * E, i, c, E, ok, mc).to(tl.float32)
            phi, dphi = activate_and_grad(v * scale2 + shift2, ACT, FAST)
            slope_sum = acc * dphi  # rows outside: dy, and so acc, is 0
            s1 += fold_rows(slope_sum)
            s3 += fold_rows(slope_sum * (v - mu2))
            if gate is not None:
                s_gate += fold_rows(acc * phi)
                dphi = tl.where(ok[:, None], dphi, 0.0)
                s2 += fold_rows(dphi)
                s4 += fold_rows(dphi * (v - mu2))
            if dq is not None:
                tl.store(dq + base * E + i[:, None] * E + c[None, :], cast(acc, dtype), mask=ok[:, None] & mc[None, :])
            if SHARED:
                if gate is not None:
                    phi = phi * gates
                dw = dot(tl.trans(dy), cast(phi, dtype), dw, PRECISION)
        NUM: tl.constexpr = 5 if gate is not None else 2
        out = sums + (image * parts + g % parts) * NUM * E + c
        r_std = load_rstd(norm2, c, mc)
        tl.store(out, sum_rows(s1), mask=mc)
        tl.store(out + E, sum_rows(s3) * r_std, mask=mc)
        if gate is not None:
            tl.store(out + 2 * E, sum_rows(s_gate), mask=mc)
            tl.store(out + 3 * E, sum_rows(s2), mask=mc)
            tl.store(out + 4 * E, sum_rows(s4) * r_std, mask=mc)
    if SHARED:
        store_partial(partials, dw, k, c, O, E, p)


@sized_jit
def project_backward_kernel(
    dout,
    y3,
    y2,
    w,
    dq,
    sums,
    partials,
    norm3,
    terms3,
    mask,
    norm2,
    gate,
    keep,
    images,
    rows,
    KV,
    NV,
    tiles,
    parts,
    tiles_per_part,
    programs,
    splits,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BK: tl.constexpr,
    BO: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    ACT: tl.constexpr,
    WGRAD: tl.constexpr,
    FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """WGRAD "shared": the data-gradient programs keep dw too; "role": programs of its own, first in the grid; "":
    none."""
    O = KV * KVEC
    E = NV * NVEC
    pid = tl.program_id(0)
    if WGRAD == "role":
        wgrad_programs = splits * tl.cdiv(O, BO) * tl.cdiv(E, BW)
        if pid < wgrad_programs:
            project_weight_gradient(
                pid,
                dout,
                y3,
                y2,
                partials,
                norm3,
                terms3,
                mask,
                keep,
                norm2,
                gate,
                images,
                rows,
                O,
                E,
                tiles,
                splits,
                BM,
                BO,
                BW,
                STAGES,
                ACT,
                FAST,
                PRECISION,
            )
        else:
            project_data_gradient(
                pid - wgrad_programs,
                dout,
                y3,
                y2,
                w,
                dq,
                sums,
                partials,
                norm3,
                terms3,
                mask,
                keep,
                norm2,
                gate,
                images,
                rows,
                O,
                E,
                tiles,
                parts,
                tiles_per_part,
                programs,
                BM,
                BE,
                BK,
                STAGES,
                ACT,
                False,
                FAST,
                PRECISION,
            )
    else:
        project_data_gradient(
            pid,
            dout,
            y3,
            y2,
            w,
            dq,
            sums,
            partials,
            norm3,
            terms3,
            mask,
            keep,
            norm2,
            gate,
            images,
            rows,
            O,
            E,
            tiles,
            parts,
            tiles_per_part,
            programs,
            BM,
            BE,
            BK,
            STAGES,
            ACT,
            WGRAD == "shared",
            FAST,
            PRECISION,
        )


@triton.jit
def gram_matrix(pid, w, terms1, matrix, E, I, BG: tl.constexpr, dtype: tl.constexpr):
    """BG x BG of matrix fp32 [I + 1, I]: G[j,i] = sum_e w[e,j] k1[e] w[e,i] and, in row I, c[i] = sum_e k0[e] w[e,i]; w
    as the forward rounded it."""
    blocks = tl.cdiv(I, BG)
    i = pid % blocks * BG + tl.arange(0, BG)
    j = pid // blocks * BG + tl.arange(0, BG)
    mi, mj = i < I, j < I
    acc = tl.zeros([BG, BG], tl.float32)
    row = tl.zeros([BG], tl.float32)
    for start in range(0, E, BG):
        e = start + tl.arange(0, BG)
        me = e < E
        right = tl.load(w + e[:, None] * I + i[None, :], mask=me[:, None] & mi[None, :], other=0.0).to(tl.float32)
        left = tl.load(w + e[:, None] * I + j[None, :], mask=me[:, None] & mj[None, :], other=0.0).to(tl.float32)
        right, left = cast(right, dtype).to(tl.float32), cast(left, dtype).to(tl.float32)
        acc = tl.dot(tl.trans(left * load_vector(terms1[1], e, me)[:, None]), right, acc, input_precision="ieee")
        row += tl.sum(right * load_vector(terms1[0], e, me)[:, None], 0)
    tl.store(matrix + j[:, None] * I + i[None, :], acc, mask=mj[:, None] & mi[None, :])
    tl.store(matrix + I * I + i, row, mask=mi & (pid < blocks))


@triton.jit
def raw_operand(x, i, c, C, ok, mc, dtype: tl.constexpr):
    """Rows i of x at channels c, rounded to the compute dtype."""
    v = load_tile(x, i, c, C, ok, mc)
    return v if v.dtype == dtype else cast(v.to(tl.float32), dtype)


@triton.jit
def expand_weight_gradient(
    pid,
    dz,
    x,
    partials,
    grams,
    rows,
    E,
    I,
    tiles,
    splits,
    BM: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
    STAGES: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """D of BE x BW, or beyond the last block of E a block of gram (and once xsum), over every ``splits``-th row
    tile."""
    dtype: tl.constexpr = dz.dtype.element_ty
    blocks_i = tl.cdiv(I, BW)
    blocks_e = tl.cdiv(E, BE)
    blocks_l = blocks_e + tl.cdiv(I, BE) if BATCH else blocks_e
    c = pid % blocks_i * BW + tl.arange(0, BW)
    mc = c < I
    block = pid // blocks_i % blocks_l
    split = pid // blocks_i // blocks_l
    m = tl.arange(0, BM)
    wide = tl.full([], BM, tl.int64)
    acc = tl.zeros([BE, BW], tl.float32)
    if block < blocks_e:
        e = block * BE + tl.arange(0, BE)
        me = e < E
        for t in tl.range(split, tiles, splits, num_stages=STAGES):
            base = t * wide
            ok = base + m < rows
            left = load_tile(dz + base * E, m, e, E, ok, me)
            acc = dot(tl.trans(left), raw_operand(x + base * I, m, c, I, ok, mc, dtype), acc, PRECISION)
        store_partial(partials, acc, e, c, E, I, split)
    else:
        if grams is not None:
            j = (block - blocks_e) * BE + tl.arange(0, BE)
            mj = j < I
            xsum = tl.zeros([BW], tl.float32)
            for t in tl.range(split, tiles, splits, num_stages=STAGES):
                base = t * wide
                ok = base + m < rows
                right = raw_operand(x + base * I, m, c, I, ok, mc, dtype)
                acc = dot(tl.trans(raw_operand(x + base * I, m, j, I, ok, mj, dtype)), right, acc, PRECISION)
                xsum += tl.sum(right.to(tl.float32), 0)
            out = grams + split.to(tl.int64) * (I + 1) * I
            tl.store(out + j[:, None] * I + c[None, :], acc, mask=mj[:, None] & mc[None, :])
            tl.store(out + I * I + c, xsum, mask=mc & (block == blocks_e))


@triton.jit
def expand_data_gradient(
    pid,
    dz,
    x,
    w,
    dx,
    norm1,
    matrix,
    dout,
    ready,
    rows,
    E,
    I,
    tiles,
    programs,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """BI channels of dx in every ``programs``-th row tile. ready: how many blocks of the matrix are there, and next to
    it its readers."""
    dtype: tl.constexpr = dz.dtype.element_ty
    blocks_i = tl.cdiv(I, BI)
    c = pid % blocks_i * BI + tl.arange(0, BI)
    mc = c < I
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    wide = tl.full([], BM, tl.int64)
    for t in range(pid // blocks_i, tiles, programs):
        base = t * wide
        ok = base + m < rows
        acc = tl.zeros([BM, BI], tl.float32)
        for start in tl.range(0, E, BK, num_stages=STAGES):
            e = start + k
            me = e < E
            scale = load_vector(norm1.weight, e, me) * load_rstd(norm1, e, me)
            weight = tl.load(w + e[:, None] * I + c[None, :], mask=me[:, None] & mc[None, :], other=0.0).to(tl.float32)
            weight = cast(cast(weight, dtype).to(tl.float32) * scale[:, None], dtype)
            acc = dot(load_tile(dz + base * E, m, e, E, ok, me), weight, acc, PRECISION)
        if matrix is not None:
            if t == pid // blocks_i:  # the first tile, whose product above took the time that the matrix takes
                wait_for(ready, tl.cdiv(I, BG) * tl.cdiv(I, BG), programs * blocks_i)
            for start in tl.range(0, I, BK, num_stages=STAGES):
                j = start + k
                mj = j < I
                at = matrix + j[:, None] * I + c[None, :]
                right = cast(tl.load(at, mask=mj[:, None] & mc[None, :], other=0.0, cache_modifier=".cg"), dtype)
                acc = dot(raw_operand(x + base * I, m, j, I, ok, mj, dtype), right, acc, PRECISION)
            acc += tl.load(matrix + I * I + c, mask=mc, other=0.0, cache_modifier=".cg")[None, :]
        offset = m[:, None] * I + c[None, :]
        out_mask = ok[:, None] & mc[None, :]
        if dout is not None:
            acc += tl.load(dout + base * I + offset, mask=out_mask, other=0.0).to(tl.float32)
        tl.store(dx + base * I + offset, cast(acc, dx.dtype.element_ty), mask=out_mask)


@triton.jit
def wait_for(ready, arrivals, readers):
    """Until ``arrivals`` programs have added 1 to ``ready``; the last of ``readers`` that waited leaves it and the
    count after it at 0."""
    while tl.atomic_add(ready, 0, sem="acquire", scope="gpu") < arrivals:
        pass
    tl.debug_barrier()
    if tl.atomic_add(ready + 1, 1) == readers - 1:
        tl.store(ready, 0)
        tl.store(ready + 1, 0)


@sized_jit
def expand_backward_kernel(
    dz,
    x,
    w,
    dx,
    partials,
    grams,
    norm1,
    terms1,
    matrix,
    dout,
    counters,
    rows,
    KV,
    NV,
    tiles,
    programs,
    splits,
    total,
    KVEC: tl.constexpr,
    NVEC: tl.constexpr,
    BM: tl.constexpr,
    BI: tl.constexpr,
    BK: tl.constexpr,
    BE: tl.constexpr,
    BW: tl.constexpr,
    BG: tl.constexpr,
    STAGES: tl.constexpr,
    NEED_DX: tl.constexpr,
    NEED_DW: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First, with batch statistics, the Gram matrix of the weights, then the weight-gradient programs, then those of
    dx.

    Those of dx wait for the matrix. Programs take their work by ticket in the order in which they start, so when one
    waits, those that it waits for are running, and wait for nothing: it ends. Counters, all left at 0: tickets, blocks
    of the matrix, its readers.
    """
    E = KV * KVEC
    I = NV * NVEC
    pid = tl.program_id(0)
    grams_first = 0
    if matrix is not None:
        pid = tl.atomic_add(counters, 1)
        if pid == total - 1:
            tl.store(counters, 0)
        grams_first = tl.cdiv(I, BG) * tl.cdiv(I, BG)
        if pid < grams_first:
            gram_matrix(pid, w, terms1, matrix, E, I, BG, dz.dtype.element_ty)
            tl.debug_barrier()
            tl.atomic_add(counters + 1, 1, sem="release", scope="gpu")
    pid -= grams_first
    if NEED_DW:
        blocks_l = tl.cdiv(E, BE) + tl.cdiv(I, BE) if terms1 is not None else tl.cdiv(E, BE)
        wgrad_programs = splits * blocks_l * tl.cdiv(I, BW)
        if (pid >= 0) & (pid < wgrad_programs):
            expand_weight_gradient(
                pid, dz, x, partials, grams, rows, E, I, tiles, splits, BM, BE, BW, STAGES, terms1 is not None, PRECISION
            )
        pid -= wgrad_programs
    if NEED_DX:
        if pid >= 0:
            expand_data_gradient(
                pid,
                dz,
                x,
                w,
                dx,
                norm1,
                matrix,
                dout,
                None if matrix is None else counters + 1,
                rows,
                E,
                I,
                tiles,
                programs,
                BM,
                BI,
                BK,
                BG,
                STAGES,
                PRECISION,
            )


@launcher
def project_backward(
    dout,
    y3,
    y2,
    weight,
    *,
    norm3: BatchNorm,
    terms3=None,
    norm2: BatchNorm,
    act,
    gates=None,
    branch_draws=None,
    keep=-1.0,
    need_data=True,
    need_dq=True,
    need_dw=True,
):
    """Data and weight gradient of the project convolution in one launch.

    Args:
        dout: gradient of the block's output [N, h, w, O]; y3 [N, h, w, O] and y2 [N, h, w, E] before their BatchNorms.
        weight: [O, E, 1, 1]. norm3: with rstd; terms3: (k0, k1) fp32 [O] of its backward, or None when its statistics
            are frozen.
        norm2: with rstd. gates: fp32 [N, E] or None. branch_draws, keep: drop-path's, as in ``batchnorm.apply``.
        need_data: whether sums are wanted; need_dq: dq too.

    Returns: (dq [N, h, w, E] or None, sums fp32 [N, parts, 5 (2 without gate), E]: dq*phi', dq*phi'*yhat2, dq*phi,
        phi', phi'*yhat2, or None; partials fp32 [S, O, E] of the weight gradient or None).
    """
    N, H, W, E = y2.shape
    O = weight.shape[0]
    rows = H * W
    cfg = project_backward_config(E, O, rows, y2.dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    blocks_e = triton.cdiv(E, cfg.BN)
    wgrad = "" if not need_dw else "shared" if cfg.shared and need_data else "role"
    parts, tiles_per_part, programs, splits = cfg.plan(N, tiles, E, O, wgrad, need_data, y2.device)
    dq = torch.empty_like(y2) if need_dq else None
    sums = fp32(y2.device, N, parts, 2 if gates is None else 5, E) if need_data else None
    copies = programs if wgrad == "shared" else splits
    partials = fp32(y2.device, copies, O, E) if need_dw else None
    grid = programs * blocks_e + (splits * triton.cdiv(O, cfg.BL) * triton.cdiv(E, cfg.BR) if wgrad == "role" else 0)
    project_backward_kernel[(grid,)](
        dout=dout,
        y3=y3,
        y2=y2,
        w=weight,
        dq=dq,
        sums=sums,
        partials=partials,
        norm3=norm3,
        terms3=None if terms3 is None else tuple(terms3),
        mask=branch_draws,
        norm2=norm2,
        gate=gates,
        keep=keep,
        images=N,
        rows=rows,
        KV=O // channel_vector_width(O),
        NV=E // channel_vector_width(E),
        tiles=tiles,
        parts=parts,
        tiles_per_part=tiles_per_part,
        programs=programs,
        splits=splits,
        KVEC=channel_vector_width(O),
        NVEC=channel_vector_width(E),
        BM=cfg.BM,
        BE=cfg.BN,
        BK=cfg.BK,
        BO=cfg.BL,
        BW=cfg.BR,
        STAGES=cfg.stages,
        ACT=act,
        WGRAD=wgrad,
        FAST=fast_math(y2.dtype),
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dq, sums, partials


@launcher
def expand_backward(
    dz, x, weight, *, norm1: BatchNorm, terms1=None, counters=None, residual=None, need_dx=True, need_dw=True, out_dtype=None
):
    """Data and weight gradient of the expand convolution in one launch, without its output.

    Args:
        dz: gradient of BatchNorm 1's output [N, H, W, E]; x: the block's input [N, H, W, I], of any dtype.
        weight: [E, I, 1, 1]. norm1: with rstd; terms1: (k0, k1) fp32 [E] of its backward, or None when its statistics
            are frozen.
        counters: int32, 0, at least 3; needed for dx with terms1. residual: added to dx, [N, H, W, I].

    Returns: (dx or None, D fp32 [S, E, I] or None, gram fp32 [S, I + 1, I] with xsum in the last row, or None).
    """
    N, H, W, E = dz.shape
    I = x.shape[-1]
    rows = N * H * W
    cfg = expand_backward_config(E, I, rows, dz.dtype)
    tiles = triton.cdiv(rows, cfg.BM)
    matrix = None
    if terms1 is not None and need_dx:
        check_counters(counters, 3)
        matrix = fp32(dz.device, I + 1, I)
    blocks_i = triton.cdiv(I, cfg.BN)
    blocks_l = triton.cdiv(E, cfg.BL) + (triton.cdiv(I, cfg.BL) if terms1 is not None else 0)
    programs, splits = cfg.roles(tiles, blocks_i, blocks_l * triton.cdiv(I, cfg.BR), need_dx, need_dw, dz.device)
    dx = torch.empty_like(x, dtype=out_dtype or x.dtype) if need_dx else None
    partials = fp32(dz.device, splits, E, I) if need_dw else None
    grams = fp32(dz.device, splits, I + 1, I) if need_dw and terms1 is not None else None
    grid = (programs * blocks_i if need_dx else 0) + (splits * blocks_l * triton.cdiv(I, cfg.BR) if need_dw else 0)
    grid += 0 if matrix is None else triton.cdiv(I, GRAM_BLOCK) ** 2
    expand_backward_kernel[(grid,)](
        dz=dz,
        x=x,
        w=weight,
        dx=dx,
        partials=partials,
        grams=grams,
        norm1=norm1,
        terms1=None if terms1 is None else tuple(terms1),
        matrix=matrix,
        dout=residual,
        counters=None if matrix is None else counters,
        rows=rows,
        KV=E // channel_vector_width(E),
        NV=I // channel_vector_width(I),
        tiles=tiles,
        programs=programs,
        splits=splits,
        total=grid,
        KVEC=channel_vector_width(E),
        NVEC=channel_vector_width(I),
        BM=cfg.BM,
        BI=cfg.BN,
        BK=cfg.BK,
        BE=cfg.BL,
        BW=cfg.BR,
        BG=GRAM_BLOCK,
        STAGES=cfg.stages,
        NEED_DX=need_dx,
        NEED_DW=need_dw,
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dx, partials, grams
