"""Backward of an MBConv block's expand (1x1) convolution, which never reads the convolution's output y1.

    dx[m,i]   = sum_e dz[m,e] A[e] w[e,i] + sum_j x[m,j] G[j,i] + c[i]  [+ dout[m,i]]        A = gamma rstd
    D[e,i]    = sum_m dz[m,e] x[m,i]
    gram[j,i] = sum_m x[m,j] x[m,i],      xsum[i] = sum_m x[m,i]

BatchNorm 1's backward is dy1 = A dz + k0 + k1 y1 with y1 = x w^T, so y1's term folds into x: G = w^T diag(k1) w and c
= k0 w in the data gradient, and dw = A D + k1 (w gram) + k0 xsum (``reduce_weight_gradients``). w is the weight as
the forward rounded it. With running statistics k0 = k1 = 0, and there are no G, c, gram and xsum.

A small launch first makes the right operand, ``matrix`` = [A w ; G ; 1] (1: the identity, through which dout is
added), and c. Then comes one of three forms, by shape and dtype (``expand_backward_form`` in
effkernels/configs/rules.py):

"pass", few channels. One pass over the rows; a tile of dz and x in shared memory serves all products, and a program
keeps D and gram in registers to the end. Up to 32 inputs, channels of dz are the rows of D, in pieces of 64. Beyond,
x's channels are the rows of all of it: dx^T, D^T and gram have I <= 64 rows, as many as one instruction, and E is cut
into powers of two that add up to it, so that nothing is wasted on E. As the height of a tile is then free for dx^T, a
tile is 32 rows, and shared memory holds three for each of two programs:

            dz tile, 240 channels   x tile                         x^T      [ dz | x ]
          +-------+----+--+-+      +-----+                       +-----+   +-----------+
    rows m|  128  | 64 |32|16|     |  40 |     [ D^T | gram ] += | i,m |   |    m,k    |
          +-------+----+--+-+      +-----+                       +-----+   +-----------+

                                                             [A w ; G]^T   [ dz | x ]^T
                                                                 +-----+   +-----------+
                                               dx^T            = | i,k |   |    k,m    |
                                                                 +-----+   +-----------+

"split", many channels: two launches, since the registers of an SM do not hold D. The data gradient is one product
over k, dx = [dz | x | dout] [A w ; G ; 1], whose loop only moves a pointer from one tensor to the next. A program of
the weight gradient holds 128 rows of D, or of gram, and all of their columns, and walks over every ``splits``-th
tile.

"library", fp32: PyTorch's own products, whose tiles keep the plain multiply-adds (or TF32) busier than Triton's;
those of x alone come on top. The weight gradient is PyTorch's in half precision too, as soon as a program does not
hold all of its columns (``expand_weight_is_apart``); the data gradient is not, since x G and c, which may cancel, would
be rounded apart.

Channels are compile-time constants of what passes over the rows: strides fold, and pieces that fit need no mask.
Weight gradients are fp32 partials, one for a program or a split of the rows; nothing is added atomically.
"""

import torch
import triton
import triton.language as tl

from effkernels.configs.rules import (
    expand_backward_form,
    expand_data_config,
    expand_matrix_config,
    expand_pass_config,
    expand_weight_config,
    expand_weight_is_apart,
)
from effkernels.kernels.common import (
    cast,
    channel_vector_width,
    dot,
    fp32,
    launcher,
    matmul_precision,
    product,
    sized_jit,
)
from effkernels.kernels.norm import BatchNorm, load_rstd, load_vector


@triton.jit
def zeros(ROWS: tl.constexpr, COLS: tl.constexpr):
    """An fp32 accumulator [ROWS, COLS], all 0."""
    return tl.zeros([ROWS, COLS], tl.float32)


@triton.jit
def load_rows(x, m, c, C, ok, mc):
    """Rows m of x [.., C] at channels c; 0 outside."""
    return tl.load(x + (m[:, None] * C + c[None, :]), mask=ok[:, None] & mc[None, :], other=0.0)


@triton.jit
def load_columns(x, m, c, C, ok, mc):
    """The transpose of ``load_rows``."""
    return tl.load(x + (m[None, :] * C + c[:, None]), mask=ok[None, :] & mc[:, None], other=0.0)


@triton.jit
def load_piece(x, m, ok, START: tl.constexpr, SIZE: tl.constexpr, C: tl.constexpr):
    """Rows m of x [.., C] at SIZE channels from START on; 0 outside."""
    c = START + tl.arange(0, SIZE)
    if START + SIZE <= C:
        return tl.load(x + (m[:, None] * C + c[None, :]), mask=ok[:, None], other=0.0)
    else:
        return load_rows(x, m, c, C, ok, c < C)


@triton.jit
def add_rows(total, x):
    """total [R, C] += rows r, r + R, .. of x [BLOCK_M, C]: those of one thread, if all threads hold R rows at once."""
    R: tl.constexpr = total.shape[0]
    if x.shape[0] > R:
        return total + tl.sum(tl.reshape(x.to(tl.float32), [x.shape[0] // R, R, x.shape[1]]), 0)
    else:
        return total + x.to(tl.float32)


@sized_jit
def expand_matrix_kernel(
    w,
    norm,
    k0,
    k1,
    matrix,
    c,
    EV,
    IV,
    E_rows,
    I_rows,
    EVEC: tl.constexpr,
    IVEC: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
    IDENTITY: tl.constexpr,
):
    """matrix [E_rows + I_rows (+ I_rows with IDENTITY), I] = [A w ; G ; 1], each padded with rows of zeros; c fp32 [I].

    A program makes BLOCK_R x BLOCK_I of A w; those after them BLOCK_I x BLOCK_I of G and 1, and BLOCK_I of c. In half
    precision G is a product of tensor cores, for which k1 is divided by its largest value (of BLOCK_P) first: in fp16
    it would vanish.
    """
    E = EV * EVEC
    I = IV * IVEC
    dtype: tl.constexpr = matrix.dtype.element_ty
    blocks_i = tl.cdiv(I, BLOCK_I)
    i = tl.program_id(0) % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    block = tl.program_id(0) // blocks_i
    mi = i < I
    if block < tl.cdiv(E_rows, BLOCK_R):
        e = block * BLOCK_R + tl.arange(0, BLOCK_R)
        me = e < E
        scale = load_vector(norm.weight, e, me) * load_rstd(norm, e, me)
        value = load_rows(w, e, i, I, me, mi).to(tl.float32) * scale[:, None]
        tl.store(matrix + e[:, None] * I + i[None, :], cast(value, dtype), mask=(e < E_rows)[:, None] & mi[None, :])
    else:
        block -= tl.cdiv(E_rows, BLOCK_R)
        j = block * BLOCK_I + tl.arange(0, BLOCK_I)
        mj = j < I
        out = matrix + (E_rows + j)[:, None] * I + i[None, :]
        mask = (j < I_rows)[:, None] & mi[None, :]
        if k0 is not None:
            every = tl.arange(0, BLOCK_P)
            peak = 1.0
            if dtype != tl.float32:
                peak = tl.max(tl.abs(load_vector(k1, every, every < E)), 0)
                peak = tl.where(peak > 0.0, peak, 1.0)
            acc = tl.zeros([BLOCK_I, BLOCK_I], tl.float32)
            row = tl.zeros([BLOCK_I], tl.float32)
            for start in tl.range(0, E, BLOCK_K, num_stages=3):
                e = start + tl.arange(0, BLOCK_K)
                me = e < E
                right = load_rows(w, e, i, I, me, mi)
                left = load_rows(w, e, j, I, me, mj).to(tl.float32) * (load_vector(k1, e, me) / peak)[:, None]
                acc = dot(tl.trans(cast(left, dtype)), right, acc, "ieee")
                row += tl.sum(right.to(tl.float32) * load_vector(k0, e, me)[:, None], 0)
            tl.store(out, cast(acc * peak, dtype), mask=mask)
            tl.store(c + i, row, mask=mi & (block == 0))
            out += I_rows * I
        if IDENTITY:
            tl.store(out, cast(tl.where(i[None, :] == j[:, None], 1.0, 0.0), dtype), mask=mask)


@sized_jit
def expand_pass_kernel(
    dz,
    x,
    dout,
    matrix,
    c,
    dx,
    partials,
    grams,
    rows,
    tiles,
    programs,
    E: tl.constexpr,
    I: tl.constexpr,
    SIZES: tl.constexpr,
    STARTS: tl.constexpr,
    PIECES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of every ``programs``-th tile of BLOCK_M rows, and what these tiles add to D and gram.

    E lies in PIECES, with SIZES from STARTS on. TRANSPOSED: x's channels are the rows of every product.
    """
    p = tl.program_id(0).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    wide = tl.full([], BLOCK_M, tl.int64)
    i = tl.arange(0, BLOCK_I)
    mi = i < I
    weight = ()
    D = ()
    for k in tl.static_range(PIECES):
        e = STARTS[k] + tl.arange(0, SIZES[k])
        if TRANSPOSED:
            weight = weight + (load_columns(matrix, e, i, I, e < E, mi),)
            D = D + (zeros(BLOCK_I, SIZES[k]),)
        else:
            weight = weight + (load_rows(matrix, e, i, I, e < E, mi),)
            D = D + (zeros(SIZES[k], BLOCK_I),)
    if grams is not None:
        G = load_rows(matrix + E * I, i, i, I, mi, mi)  # symmetric
        constant = load_vector(c, i, mi)
        gram = zeros(BLOCK_I, BLOCK_I)
        xsum = zeros(BLOCK_R, BLOCK_I)
    for t in tl.range(tl.program_id(0), tiles, programs, num_stages=STAGES):
        row0 = t * wide
        ok = row0 + m < rows
        x_tile = load_rows(x + row0 * I, m, i, I, ok, mi)
        acc = zeros(BLOCK_I, BLOCK_M) if TRANSPOSED else zeros(BLOCK_M, BLOCK_I)
        dz_tile = ()
        for k in tl.static_range(PIECES):
            dz_tile = dz_tile + (load_piece(dz + row0 * E, m, ok, STARTS[k], SIZES[k], E),)
            if TRANSPOSED:
                acc = dot(weight[k], tl.trans(dz_tile[k]), acc, PRECISION)
            else:
                acc = dot(dz_tile[k], weight[k], acc, PRECISION)
        if grams is not None:
            if TRANSPOSED:
                acc = dot(G, tl.trans(x_tile), acc, PRECISION)
            else:
                acc = dot(x_tile, G, acc, PRECISION)
        sums = ()
        for k in tl.static_range(PIECES):
            if TRANSPOSED:
                sums = sums + (dot(tl.trans(x_tile), dz_tile[k], D[k], PRECISION),)
            else:
                sums = sums + (dot(tl.trans(dz_tile[k]), x_tile, D[k], PRECISION),)
        D = sums
        if grams is not None:
            gram = dot(tl.trans(x_tile), x_tile, gram, PRECISION)
            xsum = add_rows(xsum, x_tile)
            acc += constant[:, None] if TRANSPOSED else constant[None, :]
        if TRANSPOSED:
            acc = tl.trans(acc)
        if dout is not None:
            acc += load_rows(dout + row0 * I, m, i, I, ok, mi).to(tl.float32)
        out = dx + row0 * I + (m[:, None] * I + i[None, :])
        tl.store(out, cast(acc, dx.dtype.element_ty), mask=ok[:, None] & mi[None, :])
    for k in tl.static_range(PIECES):
        e = STARTS[k] + tl.arange(0, SIZES[k])
        total = tl.trans(D[k]) if TRANSPOSED else D[k]
        tl.store(partials + p * (E * I) + e[:, None] * I + i[None, :], total, mask=(e < E)[:, None] & mi[None, :])
    if grams is not None:
        out = grams + p * ((I + 1) * I)
        tl.store(out + i[:, None] * I + i[None, :], gram, mask=mi[:, None] & mi[None, :])
        tl.store(out + I * I + i, tl.sum(xsum, 0), mask=mi)


@sized_jit
def expand_data_kernel(
    dz,
    x,
    dout,
    matrix,
    c,
    dx,
    rows,
    tiles,
    programs,
    E: tl.constexpr,
    I: tl.constexpr,
    E_ROWS: tl.constexpr,
    I_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dx of BLOCK_I channels in every ``programs``-th tile, in one loop over the columns of [dz | x | dout]. Each of
    the three is padded to whole steps of BLOCK_K.
    """
    blocks_i = tl.cdiv(I, BLOCK_I)
    i = tl.program_id(0) % blocks_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mi = i < I
    m = tl.arange(0, BLOCK_M)
    wide = tl.full([], BLOCK_M, tl.int64)
    k = tl.arange(0, BLOCK_K)
    right_offset = k[:, None] * I + i[None, :]
    X_END: tl.constexpr = E_ROWS if c is None else E_ROWS + I_ROWS
    END: tl.constexpr = X_END if dout is None else X_END + I_ROWS
    for t in tl.range(tl.program_id(0) // blocks_i, tiles, programs):
        row0 = t * wide
        ok = row0 + m < rows
        acc = zeros(BLOCK_M, BLOCK_I)
        if c is not None:
            acc += load_vector(c, i, mi)[None, :]
        for start in tl.range(0, END, BLOCK_K, num_stages=STAGES):
            left, width, inside = dz + row0 * E + start, E, E - start
            if c is not None or dout is not None:
                width = tl.where(start < E_ROWS, E, I)
            if c is not None:
                of_dz = start < E_ROWS
                left = tl.where(of_dz, left, x + row0 * I + (start - E_ROWS))
                inside = tl.where(of_dz, inside, E_ROWS + I - start)
            if dout is not None:
                before = start < X_END
                left = tl.where(before, left, dout + row0 * I + (start - X_END))
                inside = tl.where(before, inside, X_END + I - start)
            a = load_rows(left, m, k, width, ok, k < inside)
            b = tl.load(matrix + start * I + right_offset, mask=mi[None, :], other=0.0)
            acc = dot(a, b, acc, PRECISION)
        out = dx + row0 * I + (m[:, None] * I + i[None, :])
        tl.store(out, cast(acc, dx.dtype.element_ty), mask=ok[:, None] & mi[None, :])


@sized_jit
def expand_weight_kernel(
    dz,
    x,
    partials,
    grams,
    rows,
    tiles,
    splits,
    gram_splits,
    E: tl.constexpr,
    I: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """First come programs for gram and xsum over every ``gram_splits``-th tile, then those for D, BLOCK_E x BLOCK_I,
    over every ``splits``-th. BLOCK_I covers I."""
    blocks_e = tl.cdiv(E, BLOCK_E)
    pid = tl.program_id(0)
    i = tl.arange(0, BLOCK_I)
    mi = i < I
    m = tl.arange(0, BLOCK_M)
    wide = tl.full([], BLOCK_M, tl.int64)
    if pid < gram_splits:
        gram = zeros(BLOCK_I, BLOCK_I)
        xsum = zeros(BLOCK_R, BLOCK_I)
        for t in tl.range(pid, tiles, gram_splits, num_stages=STAGES):
            row0 = t * wide
            ok = row0 + m < rows
            x_tile = load_rows(x + row0 * I, m, i, I, ok, mi)
            gram = dot(tl.trans(x_tile), x_tile, gram, PRECISION)
            xsum = add_rows(xsum, x_tile)
        out = grams + pid.to(tl.int64) * ((I + 1) * I)
        tl.store(out + i[:, None] * I + i[None, :], gram, mask=mi[:, None] & mi[None, :])
        tl.store(out + I * I + i, tl.sum(xsum, 0), mask=mi)
    else:
        pid -= gram_splits
        e = pid % blocks_e * BLOCK_E + tl.arange(0, BLOCK_E)
        me = e < E
        acc = zeros(BLOCK_E, BLOCK_I)
        for t in tl.range(pid // blocks_e, tiles, splits, num_stages=STAGES):
            row0 = t * wide
            ok = row0 + m < rows
            left = load_rows(dz + row0 * E, m, e, E, ok, me)
            acc = dot(tl.trans(left), load_rows(x + row0 * I, m, i, I, ok, mi), acc, PRECISION)
        out = partials + (pid // blocks_e).to(tl.int64) * (E * I)
        tl.store(out + e[:, None] * I + i[None, :], acc, mask=me[:, None] & mi[None, :])


def pieces(channels: int, most: int, least: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(sizes, starts): powers of two from ``most`` down to ``least`` that cover the channels, the largest first."""
    sizes, size = [], most
    while sum(sizes) < channels:
        if size == least or sum(sizes) + size <= channels:
            sizes.append(size)
        else:
            size //= 2
    return tuple(sizes), tuple(sum(sizes[:k]) for k in range(len(sizes)))


@launcher
def right_operand(
    weight: torch.Tensor,
    norm: BatchNorm,
    terms: tuple[torch.Tensor, torch.Tensor] | None,
    *,
    E_rows: int,
    I_rows: int,
    identity: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(matrix [E_rows (+ I_rows with terms) (+ I_rows with ``identity``), I] in weight's dtype, c fp32 [I] or None)."""
    E, I = weight.shape
    cfg = expand_matrix_config(E, I, weight.dtype)
    k0, k1 = terms or (None, None)
    matrix = weight.new_empty(E_rows + I_rows * ((terms is not None) + identity), I)
    c = None if terms is None else fp32(weight.device, I)
    blocks = triton.cdiv(E_rows, cfg.BLOCK_M) + (
        triton.cdiv(I_rows, cfg.BLOCK_I) if terms is not None or identity else 0
    )
    expand_matrix_kernel[(blocks * triton.cdiv(I, cfg.BLOCK_I),)](
        w=weight,
        norm=norm,
        k0=k0,
        k1=k1,
        matrix=matrix,
        c=c,
        EV=E // channel_vector_width(E),
        IV=I // channel_vector_width(I),
        E_rows=E_rows,
        I_rows=I_rows,
        EVEC=channel_vector_width(E),
        IVEC=channel_vector_width(I),
        BLOCK_R=cfg.BLOCK_M,
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_K=cfg.BLOCK_K,
        BLOCK_P=triton.next_power_of_2(E),
        IDENTITY=identity,
        **cfg.options,
    )
    return matrix, c


@launcher
def both_gradients(
    dz: torch.Tensor,
    x: torch.Tensor,
    dout: torch.Tensor | None,
    matrix: torch.Tensor,
    c: torch.Tensor | None,
    out_dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """(dx, D, gram or None) in one pass."""
    E, I = dz.shape[-1], x.shape[-1]
    rows = dz.numel() // E
    cfg = expand_pass_config(E, I, rows, dz.dtype)
    transposed = cfg.BLOCK_I > 32
    sizes, starts = pieces(E, cfg.BLOCK_E, 16 if transposed else cfg.BLOCK_E)
    tiles = triton.cdiv(rows, cfg.BLOCK_M)
    programs = cfg.programs(tiles, 1, dz.device)
    dx = torch.empty_like(x, dtype=out_dtype)
    partials = fp32(dz.device, programs, E, I)
    grams = None if c is None else fp32(dz.device, programs, I + 1, I)
    expand_pass_kernel[(programs,)](
        dz=dz,
        x=x,
        dout=dout,
        matrix=matrix,
        c=c,
        dx=dx,
        partials=partials,
        grams=grams,
        rows=rows,
        tiles=tiles,
        programs=programs,
        E=E,
        I=I,
        SIZES=sizes,
        STARTS=starts,
        PIECES=len(sizes),
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_R=cfg.BLOCK_R,
        STAGES=cfg.stages,
        TRANSPOSED=transposed,
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dx, partials, grams


@launcher
def data_gradient(
    dz: torch.Tensor,
    x: torch.Tensor,
    dout: torch.Tensor | None,
    weight: torch.Tensor,
    norm: BatchNorm,
    terms: tuple[torch.Tensor, torch.Tensor] | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """dx; dout is of dz's dtype, or None."""
    E, I = dz.shape[-1], x.shape[-1]
    rows = dz.numel() // E
    cfg = expand_data_config(E, I, rows, dz.dtype)
    E_rows, I_rows = triton.cdiv(E, cfg.BLOCK_K) * cfg.BLOCK_K, triton.cdiv(I, cfg.BLOCK_K) * cfg.BLOCK_K
    matrix, c = right_operand(weight, norm, terms, E_rows=E_rows, I_rows=I_rows, identity=dout is not None)
    tiles, blocks_i = triton.cdiv(rows, cfg.BLOCK_M), triton.cdiv(I, cfg.BLOCK_I)
    programs = cfg.programs(tiles, blocks_i, dz.device)
    dx = torch.empty_like(x, dtype=out_dtype)
    expand_data_kernel[(programs * blocks_i,)](
        dz=dz,
        x=x,
        dout=dout,
        matrix=matrix,
        c=c,
        dx=dx,
        rows=rows,
        tiles=tiles,
        programs=programs,
        E=E,
        I=I,
        E_ROWS=E_rows,
        I_ROWS=I_rows,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_K=cfg.BLOCK_K,
        STAGES=cfg.stages,
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return dx


@launcher
def weight_gradient(dz: torch.Tensor, x: torch.Tensor, with_gram: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(D, gram or None)."""
    E, I = dz.shape[-1], x.shape[-1]
    rows = dz.numel() // E
    cfg = expand_weight_config(E, I, rows, dz.dtype)
    tiles, blocks_e = triton.cdiv(rows, cfg.BLOCK_M), triton.cdiv(E, cfg.BLOCK_E)
    splits, gram_splits = cfg.splits(tiles, blocks_e, with_gram, dz.device)
    partials = fp32(dz.device, splits, E, I)
    grams = fp32(dz.device, gram_splits, I + 1, I) if with_gram else None
    expand_weight_kernel[(splits * blocks_e + gram_splits,)](
        dz=dz,
        x=x,
        partials=partials,
        grams=grams,
        rows=rows,
        tiles=tiles,
        splits=splits,
        gram_splits=gram_splits,
        E=E,
        I=I,
        BLOCK_M=cfg.BLOCK_M,
        BLOCK_E=cfg.BLOCK_E,
        BLOCK_I=cfg.BLOCK_I,
        BLOCK_R=cfg.BLOCK_R,
        STAGES=cfg.stages,
        PRECISION=matmul_precision(),
        **cfg.options,
    )
    return partials, grams


def library_data_gradient(
    dz: torch.Tensor,
    x: torch.Tensor,
    dout: torch.Tensor | None,
    weight: torch.Tensor,
    norm: BatchNorm,
    terms: tuple[torch.Tensor, torch.Tensor] | None,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """dx by PyTorch's products. With ``out`` given, since autocast leaves those as they are."""
    E, I = dz.shape[-1], x.shape[-1]
    rows = x.view(-1, I)
    matrix, c = right_operand(weight, norm, terms, E_rows=E, I_rows=I)
    dx = torch.empty_like(rows)
    if terms is None:
        torch.mm(dz.view(-1, E), matrix, out=dx)
    else:
        torch.addmm(c.to(dx.dtype), rows, matrix[E:], out=dx)
        torch.addmm(dx, dz.view(-1, E), matrix[:E], out=dx)
    if dout is not None:
        dx += dout.view(-1, I)
    return dx.to(out_dtype).view(x.shape)


def library_weight_gradient(
    dz: torch.Tensor, x: torch.Tensor, with_gram: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(D, gram or None) by PyTorch's products."""
    E, I = dz.shape[-1], x.shape[-1]
    rows = x.view(-1, I)
    partials, grams = fp32(dz.device, 1, E, I), None
    product(dz.view(-1, E).t(), rows, out=partials[0])
    if with_gram:
        grams = fp32(dz.device, 1, I + 1, I)
        product(rows.t(), rows, out=grams[0, :I])
        torch.sum(rows, 0, dtype=torch.float32, out=grams[0, I])
    return partials, grams


def expand_backward(
    dz: torch.Tensor,
    x: torch.Tensor,
    weight: torch.Tensor,
    *,
    norm1: BatchNorm,
    terms1: tuple[torch.Tensor, torch.Tensor] | None,
    residual: torch.Tensor | None = None,
    need_dx: bool = True,
    need_dw: bool = True,
    out_dtype: torch.dtype | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Data and weight gradient of the expand convolution, without its output.

    Args:
        dz: gradient of BatchNorm 1's output [N, H, W, E]; x: the block's input [N, H, W, I], of any
            dtype, rounded to dz's.
        weight: [E, I] in dz's dtype. norm1: BatchNorm 1, of which weight and rstd are read.
        terms1: (k0, k1) fp32 [E] of its backward, or None with running statistics. residual: added to dx, [N, H, W, I].
        out_dtype: of dx, default x's.

    Returns: (dx or None, D fp32 [S, E, I] or None, gram fp32 [T, I + 1, I] with xsum in the last row, or None).
    """
    E, I = weight.shape
    out_dtype = out_dtype or x.dtype
    x = x.to(dz.dtype)
    form = expand_backward_form(E, I, dz.dtype, dz.device)
    if form == "pass" and need_dx and need_dw:
        matrix, c = right_operand(weight, norm1, terms1, E_rows=E, I_rows=I)
        return both_gradients(dz=dz, x=x, dout=residual, matrix=matrix, c=c, out_dtype=out_dtype)
    dx = partials = grams = None
    if need_dx and form == "library":
        dx = library_data_gradient(
            dz=dz, x=x, dout=residual, weight=weight, norm=norm1, terms=terms1, out_dtype=out_dtype
        )
    elif need_dx:
        # As an operand of the product, a residual of another dtype would be rounded.
        late = residual is not None and residual.dtype != dz.dtype
        dx = data_gradient(
            dz=dz, x=x, dout=None if late else residual, weight=weight, norm=norm1, terms=terms1, out_dtype=out_dtype
        )
        if late:
            dx += residual
    if need_dw:
        makes = library_weight_gradient if expand_weight_is_apart(I, dz.dtype) else weight_gradient
        partials, grams = makes(dz, x, terms1 is not None)
    return dx, partials, grams
