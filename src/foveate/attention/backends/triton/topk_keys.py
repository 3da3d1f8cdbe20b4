"""Scores as unsigned integers of the same order, their digits of 8 bits, and the digit that a rank falls into."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def least_key(dtype: tl.constexpr):
    """The key of -inf."""
    return 0x007FFFFF if dtype == tl.float32 else 0x03FF if dtype == tl.float16 else 0x007F


@triton.jit
def keys(x, BITS: tl.constexpr):
    """Scores as int32 whose bits, read as an unsigned number of BITS bits, order like the scores; NaN is -inf."""
    if BITS == 32:
        raw = x.to(tl.int32, bitcast=True)
        nan = (raw & 0x7FFFFFFF) > 0x7F800000
        raw = tl.where(raw == -2147483648, 0, raw)
        key = tl.where(raw < 0, ~raw, raw ^ -2147483648)
    else:
        raw = x.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        infinity: tl.constexpr = 0x7C00 if x.dtype == tl.float16 else 0x7F80
        nan = (raw & 0x7FFF) > infinity
        raw = tl.where(raw == 0x8000, 0, raw)
        key = tl.where(raw > 0x7FFF, 0xFFFF - raw, raw | 0x8000)
    return tl.where(nan, least_key(x.dtype), key)


@triton.jit
def digit_of(key, SHIFT: tl.constexpr):
    return (key >> SHIFT) & 255


@triton.jit
def digits_above(key, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The digits of a key above the one at SHIFT."""
    if SHIFT + 8 >= BITS:
        return key & 0
    else:
        return (key >> (SHIFT + 8)) & ((1 << (BITS - SHIFT - 8)) - 1)


@triton.jit
def choose(counts, need):
    """The digit of the `need`-th largest, from counts [256] per digit, and how many lie in larger digits."""
    digit = tl.arange(0, 256)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    chosen = tl.max(tl.where(above + counts >= need, digit, 0), 0)
    return chosen, tl.sum(tl.where(digit > chosen, counts, 0), 0)


@triton.jit
def finite_alone(threshold, lowest, need, filled):
    """`need` of the scores at the threshold and `filled` in all, but none that is `lowest`, the number of -inf."""
    absent = threshold == lowest
    return tl.where(absent, 0, need), tl.where(absent, filled - need, filled)
