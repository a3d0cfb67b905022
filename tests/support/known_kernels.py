"""Kernels whose speed on an H100 is widely reported or follows from its schedule, to hold the simulator against."""

import torch
import triton
import triton.language as tl

from effkernels.tools.launches import record_launches


@triton.jit
def product(a, b, c, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr):
    """c [M, N] = a [M, K] b [K, N]; blocks in groups of GROUP rows, so that b stays in L2."""
    pid = tl.program_id(0)
    blocks_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP * blocks_n)
    height = tl.minimum(tl.cdiv(M, BLOCK_M) - group * GROUP, GROUP)
    block_m = group * GROUP + pid % (GROUP * blocks_n) % height
    block_n = pid % (GROUP * blocks_n) // height
    m, n, k = (
        block_m * BLOCK_M + tl.arange(0, BLOCK_M),
        block_n * BLOCK_N + tl.arange(0, BLOCK_N),
        tl.arange(0, BLOCK_K),
    )
    left, right = a + (m % M)[:, None] * K + k[None, :], b + k[:, None] * N + (n % N)[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        acc = tl.dot(
            tl.load(left, mask=k[None, :] < K - start, other=0.0),
            tl.load(right, mask=k[:, None] < K - start, other=0.0),
            acc,
        )
        left += BLOCK_K
        right += BLOCK_K * N
    tl.store(c + m[:, None] * N + n[None, :], acc.to(tl.bfloat16), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def attention(q, k, v, out, scale, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, D: tl.constexpr):
    """out = softmax(q k^T) v of one head a program row, online softmax in base 2."""
    head = tl.program_id(1).to(tl.int64) * N * D
    m, d, n = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, BLOCK_N)
    query = tl.load(q + head + m[:, None] * D + d[None, :])
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.full([BLOCK_M], 1.0, tl.float32)
    acc = tl.zeros([BLOCK_M, D], tl.float32)
    keys, values = k + head + d[:, None] + n[None, :] * D, v + head + n[:, None] * D + d[None, :]
    for _ in range(0, N, BLOCK_N):
        scores = tl.dot(query, tl.load(keys))
        now = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - now[:, None])
        fade = tl.exp2(top - now)
        acc = tl.dot(weights.to(tl.bfloat16), tl.load(values), acc * fade[:, None])
        total, top = total * fade + tl.sum(weights, 1), now
        keys += BLOCK_N * D
        values += BLOCK_N * D
    tl.store(out + head + m[:, None] * D + d[None, :], (acc / total[:, None]).to(tl.bfloat16))


@triton.jit
def copy(x, out, N, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < N), mask=i < N)


@triton.jit
def chain(x, out, steps, BLOCK: tl.constexpr, BARRIER: tl.constexpr):
    """A chain of ``steps`` times 64 dependent multiply-adds, with or without a barrier after each 64."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)
    for _ in range(steps):
        for _ in tl.static_range(64):
            value = value * 1.0001 + value
        if BARRIER:
            tl.debug_barrier()
    tl.store(out + i, value)


@triton.jit
def wrong(x, BLOCK: tl.constexpr):
    """Adds blocks whose sizes do not agree."""
    tl.store(x + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)) + tl.load(x + tl.arange(0, 2 * BLOCK)))


def recorded(fn, grid, *arguments, **constants):
    """The launch, as the project records its own."""
    with record_launches() as launches:
        fn[grid](*arguments, **constants)
    return launches[0]


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def product_launch(size=8192, BLOCK_M=128, BLOCK_N=256, BLOCK_K=64, num_warps=8, num_stages=3):
    """(launch, operations)."""
    a, b, c = meta(size, size), meta(size, size), meta(size, size)
    grid = (triton.cdiv(size, BLOCK_M) * triton.cdiv(size, BLOCK_N),)
    how = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, GROUP=8, num_warps=num_warps, num_stages=num_stages)
    return recorded(product, grid, a, b, c, size, size, size, **how), 2 * size**3


def attention_launch(D, BLOCK_N, num_warps, heads=128, N=4096, BLOCK_M=128):
    """(launch, operations)."""
    q, k, v, out = (meta(heads, N, D) for _ in range(4))
    how = dict(BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, D=D, num_warps=num_warps, num_stages=3)
    return recorded(attention, (N // BLOCK_M, heads), q, k, v, out, 1.0, N, **how), 4 * heads * N * N * D


def copy_launch(elements=1 << 28, BLOCK=2048):
    """(launch, bytes)."""
    x = meta(elements)
    return recorded(copy, (elements // BLOCK,), x, meta(elements), elements, BLOCK=BLOCK, num_warps=4), 4 * elements


def chain_launch(warps, steps=512, barrier=False, programs=132):
    """One program on each of 132 SMs, one element a thread."""
    x = meta(programs * 32 * warps, dtype=torch.float32)
    return recorded(
        chain,
        (programs,),
        x,
        meta(len(x), dtype=torch.float32),
        steps,
        BLOCK=32 * warps,
        BARRIER=barrier,
        num_warps=warps,
    )


def wrong_launch():
    return recorded(wrong, (1,), meta(64), BLOCK=16)
