"""Rows of column strips in registers: what the depthwise kernels, forward and backward, share.

A program has S strips of neighbouring columns times BLOCK_C channels. It holds a row of them as a tuple of blocks
[S, BLOCK_C], one for each column, so that a tap of the convolution picks another entry of the tuple: no lane ever asks
another for a value. A row that was loaded as one block [columns, S, BLOCK_C] is split into that tuple, and joined again
to be stored.
"""

import triton
import triton.language as tl

from effkernels.kernels.common import cast


@triton.jit
def split_columns(block, NUM: tl.constexpr):
    """Take a block [NUM, S, BLOCK_C] apart into a tuple of NUM blocks [S, BLOCK_C]; NUM is a power of two."""
    if NUM == 1:
        return (tl.reshape(block, [block.shape[1], block.shape[2]]),)
    else:
        halves = tl.reshape(block, [2, NUM // 2, block.shape[1], block.shape[2]])
        low, high = tl.split(tl.permute(halves, (1, 2, 3, 0)))
        return split_columns(low, NUM // 2) + split_columns(high, NUM // 2)


@triton.jit
def join_columns(columns, FIRST: tl.constexpr, NUM: tl.constexpr):
    """Put the NUM blocks [S, BLOCK_C] from columns[FIRST] on together as [NUM, S, BLOCK_C]; NUM is a power of two."""
    if NUM == 1:
        return columns[FIRST][None, :, :]
    else:
        low = join_columns(columns, FIRST, NUM // 2)
        high = join_columns(columns, FIRST + NUM // 2, NUM // 2)
        both = tl.permute(tl.join(low, high), (3, 0, 1, 2))
        return tl.reshape(both, [NUM, both.shape[2], both.shape[3]])


@triton.jit
def zero_blocks(NUM: tl.constexpr, S: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tuple of NUM fp32 blocks [S, BLOCK_C], all 0."""
    blocks = ()
    for i in tl.static_range(NUM):  # noqa: B007 (Triton has no anonymous loop variable)
        blocks = blocks + (tl.zeros([S, BLOCK_C], tl.float32),)
    return blocks


@triton.jit
def any_row(row_ok):
    """Whether a condition [S] holds for any of the strips: one branch for the whole program."""
    return tl.max(row_ok.to(tl.int32), 0) > 0


@triton.jit
def load_weights(w, c, mask, dtype: tl.constexpr, TAPS: tl.constexpr):
    """The weights of channels c as a tuple of TAPS fp32 vectors [1, BLOCK_C], from w [C, TAPS].

    They are rounded to the compute dtype first, as the cast of the weight rounds them in the plain layer.
    """
    taps = ()
    for t in tl.static_range(TAPS):
        taps = taps + (
            cast(tl.load(w + c * TAPS + t, mask=mask, other=0.0).to(tl.float32), dtype).to(tl.float32)[None, :],
        )
    return taps
