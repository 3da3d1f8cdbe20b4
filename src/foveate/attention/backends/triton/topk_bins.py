"""Bins of a row's scores between two bounds taken from a sample. Any bounds are correct; good ones make bins small.

The sample is 16 groups of up to 32 scores at hashed positions, the same for all chunks of a row. Each group holds one
of the k largest scores with a chance of at most 1 - exp(-1/2), so that the smallest of the 16 groups' maxima lies at or
below the k-th largest score but for a chance of (1 - exp(-1/2))^16 = 3e-7; about 5.5 k scores are expected above it.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.attention.backends.triton.topk_keys import keys

LOWEST: tl.constexpr = tl.constexpr(-2147483648)


@triton.jit
def ordered(x):
    """Scores as int32 that order, signed, like them; NaN is -inf."""
    return keys(x.to(tl.float32), 32) ^ LOWEST


@triton.jit
def _size(o):
    """The absolute value of an ordered score."""
    return (o ^ (o >> 31)).to(tl.float32, bitcast=True)


@triton.jit
def _spread(o, near):
    """A score on a scale that is linear up to `near` in size and logarithmic beyond: never decreasing with it."""
    far = (_size(o) + near).to(tl.int32, bitcast=True) - near.to(tl.int32, bitcast=True)
    return tl.where(o < 0, -far, far)


@triton.jit
def bin_of(o, near, start, shift):
    """0 .. 253, largest scores first; all scores above the bins are in 0, and all below in 253."""
    at = _spread(o, near)
    place = (at - start).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
    return tl.where(at < start, 253, 253 - tl.minimum(place, 253).to(tl.int32))


@triton.jit
def bounds(scores, n, k):
    """Of a row of n scores: the bound, with most likely k scores at or above it; the sample's lowest score; and near,
    start, shift of `bin_of`.

    Where k exceeds an eighth of the row the bound is below all scores.
    """
    group = tl.arange(0, 16)[:, None]
    each = tl.arange(0, 32)[None, :]
    mixed = (group * 32 + each + 1).to(tl.uint32) * 0x9E3779B1
    mixed = (mixed ^ (mixed >> 15)) * 0x85EBCA6B
    mixed = (mixed ^ (mixed >> 13)) * 0xC2B2AE35
    at = tl.umulhi(mixed ^ (mixed >> 16), tl.zeros([16, 32], tl.uint32) + n.to(tl.uint32)).to(tl.int32)
    o = ordered(tl.load(scores + at, mask=at < n, other=0.0))
    size = tl.maximum(tl.minimum(n // (2 * k), 32), 1)
    maxima = tl.max(tl.where(each < size, o, LOWEST), 1)
    largest = tl.max(o, 1)
    highest = tl.max(largest, 0)
    lowest = tl.min(tl.min(o, 1), 0)
    # A group that holds nothing but the row's lowest score, of masked entries say, does not count.
    low = tl.min(tl.where(maxima > lowest, maxima, highest), 0)
    near = _size(low)
    everything = n < 8 * k
    if everything:
        low = lowest
        # Long tails on either side of zero: what is common is nearer to it than the lowest of all.
        near = tl.minimum(_size(low), _size(tl.min(largest, 0)))
    near = tl.where(near > 0.0, near, _size(highest) * 5.9604645e-08)
    # Infinities and NaN give no scale.
    near = tl.where(near < 1e37, tl.maximum(near, 1e-30), 1.0)
    start = _spread(low, near)
    span = (_spread(highest, near) - start).to(tl.uint32, bitcast=True)
    shift = tl.full([], 0, tl.int32)
    for bit in tl.static_range(8, 32):
        shift += ((span >> bit) > 0).to(tl.int32)
    return tl.where(everything, LOWEST, low), lowest, near, start, shift


@triton.jit
def threshold_bin(TABLE, row, c, chunks, need, GROUP: tl.constexpr):
    """The bin of the need-th largest; how many lie in larger scores' bins and how many in it; and the same two of the
    chunks before c."""
    table = TABLE + row.to(tl.int64) * chunks * 256 + tl.arange(0, 256)
    total = tl.zeros([256], tl.int32)
    before = tl.zeros([256], tl.int32)
    for first in range(0, chunks, GROUP):
        # Unrolled, so that all loads are in flight together.
        for each in tl.static_range(GROUP):
            inside = (tl.arange(0, 256) >= 0) & (first + each < chunks)
            counts = tl.load(table + (first + each) * 256, mask=inside, other=0).to(tl.int32)
            total += counts
            before += tl.where(first + each < c, counts, 0)
    upto = tl.cumsum(total, 0)
    larger = upto < need
    here = (upto >= need) & (upto - total < need)
    # Two counts in one sum.
    both = (total.to(tl.int64) << 32) | before.to(tl.int64)
    above = tl.sum(tl.where(larger, both, 0), 0)
    within = tl.sum(tl.where(here, both, 0), 0)
    chosen = tl.sum(larger.to(tl.int32), 0)
    return chosen, (above >> 32).to(tl.int32), (within >> 32).to(tl.int32), above.to(tl.int32), within.to(tl.int32)
