"""Values of registers while a program is emulated: an int where all threads agree, else an int64 array with a thread's
value in each place, both in [0, 2^32); a predicate is a bool or an array of bools. The operations are those of the
machine's integer instructions."""

import numpy as np

M = 0xFFFFFFFF  # of 32 bits


def signed(x: int | np.ndarray) -> int | np.ndarray:
    """The value of 32 bits as a signed integer, in [-2^31, 2^31)."""
    return (x ^ 0x80000000) - 0x80000000


def wrap64(x: int | np.ndarray) -> int | np.ndarray:
    """An int as int64 holds it; arrays wrap by themselves."""
    return ((x + (1 << 63)) & 0xFFFFFFFFFFFFFFFF) - (1 << 63) if type(x) is int else x


def pair(low: int | np.ndarray, high: int | np.ndarray) -> int | np.ndarray:
    """The signed 64-bit value of two registers: ``high`` * 2^32 + ``low``."""
    return low | (signed(high) << 32)


def select(p: bool | np.ndarray, a: int | np.ndarray, b: int | np.ndarray) -> int | np.ndarray:
    """``a`` for the threads whose predicate ``p`` holds, ``b`` for the others."""
    if p is True:
        return a
    if p is False:
        return b
    return np.where(p, a, b)


def truth(p: bool | np.ndarray) -> bool | np.ndarray:
    """A Python bool where all threads agree."""
    if type(p) is bool:
        return p
    if p.all():
        return True
    return p if p.any() else False


def _elementwise(function):
    """``function`` of ints, for arrays as well."""
    vector = np.frompyfunc(function, function.__code__.co_argcount, 1)

    def call(*values):
        if all(type(v) is int for v in values):
            return function(*values)
        return vector(*values).astype(np.int64)

    return call


@_elementwise
def popcount(x: int) -> int:
    """How many of the 32 bits are set (POPC)."""
    return bin(x).count("1")


@_elementwise
def leading(x: int) -> int:
    """The place of the highest bit that is set; 2^32 - 1 where none is (FLO.U32)."""
    return x.bit_length() - 1 & M


@_elementwise
def leading_signed(x: int) -> int:
    """The place of the highest bit that differs from the sign; 2^32 - 1 where none does (FLO)."""
    return (x ^ M if x >> 31 else x).bit_length() - 1 & M


@_elementwise
def reversed_bits(x: int) -> int:
    """The 32 bits in the opposite order (BREV)."""
    return int(f"{x:032b}"[::-1], 2)


@_elementwise
def permuted(a: int, selector: int, b: int) -> int:
    """Four bytes of {b, a}, each picked by four bits of ``selector``, or its sign repeated where the fourth bit is set
    (PRMT)."""
    source = (b << 32 | a).to_bytes(8, "little")
    out = 0
    for k in range(4):
        nibble = selector >> 4 * k & 15
        byte = source[nibble & 7]
        out |= (0xFF if byte >> 7 else 0) << 8 * k if nibble & 8 else byte << 8 * k
    return out


@_elementwise
def float_up(x: int) -> int:
    """Bits of the fp32 value of an unsigned integer, rounded up."""
    value = np.float32(x)
    return int((value if int(value) >= x else np.nextafter(value, np.float32(np.inf))).view(np.uint32))


@_elementwise
def float_of(x: int) -> int:
    """Bits of the fp32 value nearest to an unsigned integer."""
    return int(np.float32(x).view(np.uint32))


@_elementwise
def reciprocal(x: int) -> int:
    """Bits of 1 / x in fp32, for the bits of x (MUFU.RCP, here rounded to nearest)."""
    with np.errstate(divide="ignore"):
        return int((np.float32(1) / np.uint32(x).view(np.float32)).view(np.uint32))


@_elementwise
def truncated(x: int) -> int:
    """The unsigned integer towards 0 of an fp32 value given by its bits: at least 0, at most 2^32 - 1 (F2I.TRUNC)."""
    value = float(np.uint32(x).view(np.float32))
    return 0 if not value > 0 else min(int(value), M) if value < float("inf") else M


def shifted_left(a: int | np.ndarray, s: int | np.ndarray) -> int | np.ndarray:
    """32 bits shifted left by ``s``; 0 from 32 on."""
    return a << np.minimum(s, 32) & M if isinstance(s, np.ndarray) or isinstance(a, np.ndarray) else a << min(s, 32) & M


def shifted_right(a: int | np.ndarray, s: int | np.ndarray) -> int | np.ndarray:
    """Shifted right by ``s``, 32 at most: with zeros where ``a`` is unsigned, with its sign where it is ``signed``."""
    return a >> (np.minimum(s, 32) if isinstance(s, np.ndarray) else min(s, 32))


def funnel_high_left(a: int | np.ndarray, s: int | np.ndarray, b: int | np.ndarray) -> int | np.ndarray:
    """Upper word of {b, a} << s, for s in [0, 63]."""
    low, high = (
        (np.minimum(s, 32), np.maximum(32 - s, 0)) if isinstance(s, np.ndarray) else (min(s, 32), max(32 - s, 0))
    )
    far = shifted_left(a, np.maximum(s - 32, 0) if isinstance(s, np.ndarray) else max(s - 32, 0))
    return select(s < 32, (b << low & M) | (a >> high), far)


def funnel_low_right(
    a: int | np.ndarray, s: int | np.ndarray, b: int | np.ndarray, arithmetic: bool = False
) -> int | np.ndarray:
    """Lower word of {b, a} >> s, for s in [0, 63]; ``arithmetic`` repeats the sign of ``b``."""
    near = np.minimum(s, 32) if isinstance(s, np.ndarray) else min(s, 32)
    far = np.maximum(s - 32, 0) if isinstance(s, np.ndarray) else max(s - 32, 0)
    top = signed(b) if arithmetic else b
    return select(s < 32, (a >> near) | (top << (32 - near) & M), top >> far & M)
