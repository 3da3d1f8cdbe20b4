"""Top-k by digits of 8 bits, which `gpu_topk.py` times beside the package's top-k: 4 launches for float32, else 3.

Two histograms find the threshold's high 16 bits; float32 scores that share them are listed, and every thread block
finds the rest from that list; a last launch writes the positions. Exact; ties to the lowest position.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.topk_keys import choose, digit_of, digits_above, keys


@triton.jit
def _row_length(LENGTH, row, n):
    if LENGTH is not None:
        n = tl.maximum(tl.minimum(tl.load(LENGTH + row).to(tl.int32), n), 0)
    return n


@triton.jit
def _totals(TABLE, row, c, chunks, CHUNKS: tl.constexpr):
    """Counts per digit of a row's chunks, and of the chunks before c: both [256]."""
    digit = tl.arange(0, 256)
    table = TABLE + row.to(tl.int64) * chunks * 256
    total = tl.zeros([256], tl.int32)
    before = tl.zeros([256], tl.int32)
    # Unrolled, so that all loads are in flight together.
    for each in tl.static_range(CHUNKS):
        counts = tl.load(table + each * 256 + digit, mask=(digit >= 0) & (each < chunks), other=0)
        total += counts
        before += tl.where(each < c, counts, 0)
    return total, before


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the launch before this one, and let the next one be set up meanwhile.

    What was there before the first launch may be read without waiting.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _load_keys(scores, at, hi, BITS: tl.constexpr):
    return keys(tl.load(scores + at, mask=at < hi, other=0.0), BITS)


@triton.jit
def _count(key, inside, prefix, SHIFT: tl.constexpr, BITS: tl.constexpr):
    same = inside & (digits_above(key, SHIFT, BITS) == prefix)
    return tl.histogram(digit_of(key, SHIFT), 256, mask=same)


@triton.jit(do_not_specialize=["n", "k", "chunks", "chunk"])
def histogram_kernel(
    SCORES, LENGTH, LAST, TABLE, STATE, BEFORE,
    stride, n, k, chunks, chunk,
    STEP: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """TABLE [rows, chunks, 256]: counts of digit STEP among scores that share the threshold's digit before it.

    Grid (chunks, rows). Step 1 takes that digit from LAST, the table of step 0, and writes STATE [rows, 8] (digits so
    far, how many more are needed) and BEFORE [rows, chunks], how many scores of earlier chunks lie above.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    SHIFT: tl.constexpr = BITS - 8 - 8 * STEP
    n = _row_length(LENGTH, row, n)
    lo = c * chunk
    hi = tl.minimum(lo + chunk, n)
    scores = SCORES + row.to(tl.int64) * stride
    at = lo + tl.arange(0, BLOCK)
    if ONE:
        key = _load_keys(scores, at, hi, BITS)
    _wait(PDL)
    prefix = tl.full([], 0, tl.int32)
    if STEP > 0:
        total, before = _totals(LAST, row, c, chunks, CHUNKS)
        prefix, above = choose(total, tl.minimum(k, n))
        tl.store(BEFORE + row * chunks + c, tl.sum(tl.where(tl.arange(0, 256) > prefix, before, 0), 0))
        if c == 0:
            tl.store(STATE + row * 8, prefix)
            tl.store(STATE + row * 8 + 1, tl.minimum(k, n) - above)
    if ONE:
        counts = _count(key, at < hi, prefix, SHIFT, BITS)
    else:
        counts = tl.zeros([256], tl.int32)
        for start in range(lo, hi, BLOCK):
            at = start + tl.arange(0, BLOCK)
            counts += _count(_load_keys(scores, at, hi, BITS), at < hi, prefix, SHIFT, BITS)
    tl.store(TABLE + (row.to(tl.int64) * chunks + c) * 256 + tl.arange(0, 256), counts)


@triton.jit
def _second_digit(TABLE, STATE, BEFORE, row, c, chunks, CHUNKS: tl.constexpr):
    """The threshold's first 16 bits; how many scores that have them are needed; how many have them; and in the chunks
    before c, how many lie above and how many have them."""
    total, before = _totals(TABLE, row, c, chunks, CHUNKS)
    need = tl.load(STATE + row * 8 + 1)
    chosen, above = choose(total, need)
    digit = tl.arange(0, 256)
    larger = tl.load(BEFORE + row * chunks + c) + tl.sum(tl.where(digit > chosen, before, 0), 0)
    equal = tl.sum(tl.where(digit == chosen, before, 0), 0)
    count = tl.sum(tl.where(digit == chosen, total, 0), 0)
    return (tl.load(STATE + row * 8) << 8) | chosen, need - above, count, larger, equal


@triton.jit(do_not_specialize=["room", "n", "chunks", "chunk"])
def candidates_kernel(
    SCORES, LENGTH, TABLE, STATE, BEFORE, OFFERS, LIST,
    stride, room, n, chunks, chunk,
    CHUNKS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LIST [rows, n]: the low 16 bits of float32 scores that share the threshold's high ones, in order of position.

    Grid (chunks, rows). OFFERS [4, rows, chunks]: of each chunk, scores above and listed in the chunks before it, and
    the smallest and largest of what it listed. STATE [rows, 2:5]: the high bits, how many are needed of those listed,
    how many are listed.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    n = _row_length(LENGTH, row, n)
    lo = c * chunk
    hi = tl.minimum(lo + chunk, n)
    scores = SCORES + row.to(tl.int64) * stride
    at = lo + tl.arange(0, BLOCK)
    if ONE:
        key = _load_keys(scores, at, hi, 32)
    _wait(PDL)
    prefix, need, count, larger, equal = _second_digit(TABLE, STATE, BEFORE, row, c, chunks, CHUNKS)
    LIST += row.to(tl.int64) * room
    least = tl.full([], 65536, tl.int32)
    most = tl.full([], -1, tl.int32)
    listed = equal
    if ONE:
        listed, least, most = _list(LIST, key, at < hi, prefix, listed, least, most)
    else:
        for start in range(lo, hi, BLOCK):
            at = start + tl.arange(0, BLOCK)
            listed, least, most = _list(
                LIST, _load_keys(scores, at, hi, 32), at < hi, prefix, listed, least, most
            )  # fmt: skip
    size = tl.num_programs(1) * chunks
    offer = OFFERS + row * chunks + c
    tl.store(offer, larger)
    tl.store(offer + size, equal)
    tl.store(offer + 2 * size, least)
    tl.store(offer + 3 * size, most)
    if c == 0:
        # What the step before wrote stays: other chunks may still read it.
        tl.store(STATE + row * 8 + 2, prefix)
        tl.store(STATE + row * 8 + 3, need)
        tl.store(STATE + row * 8 + 4, count)


@triton.jit
def _list(LIST, key, inside, prefix, listed, least, most):
    same = inside & (((key >> 16) & 0xFFFF) == prefix)
    low = key & 0xFFFF
    ranks = tl.cumsum(same.to(tl.int32), 0)
    tl.store(LIST + listed + ranks - 1, low, mask=same)
    least = tl.minimum(least, tl.min(tl.where(same, low, 65536), 0))
    most = tl.maximum(most, tl.max(tl.where(same, low, -1), 0))
    return listed + tl.sum(same.to(tl.int32), 0), least, most


@triton.jit
def _list_threshold(LIST, count, need, BLOCK: tl.constexpr):
    """The need-th largest of `count` listed numbers of 16 bits, and how many equal to it are needed."""
    threshold = tl.full([], 0, tl.int32)
    for step in tl.static_range(2):
        counts = tl.zeros([256], tl.int32)
        for start in range(0, count, BLOCK):
            at = start + tl.arange(0, BLOCK)
            low = tl.load(LIST + at, mask=at < count, other=0)
            counts += _count(low, at < count, threshold, 8 - 8 * step, 16)
        chosen, above = choose(counts, need)
        threshold = (threshold << 8) | chosen
        need -= above
    return threshold, need


@triton.jit(do_not_specialize=["room", "n", "k", "chunks", "chunk"])
def compact_kernel(
    SCORES, LENGTH, TABLE, STATE, BEFORE, OFFERS, LIST, OUT,
    stride, room, n, k, chunks, chunk,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, ONE: tl.constexpr, LISTED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Write a chunk's selected positions behind those of the chunks before it; grid (chunks, rows)."""
    c, row = tl.program_id(0), tl.program_id(1)
    n = _row_length(LENGTH, row, n)
    lo = c * chunk
    hi = tl.minimum(lo + chunk, n)
    scores = SCORES + row.to(tl.int64) * stride
    out = OUT + row.to(tl.int64) * k
    at = lo + tl.arange(0, BLOCK)
    if ONE:
        key = _load_keys(scores, at, hi, BITS)
    _wait(PDL)
    if BITS == 16:
        threshold, need, _listed, larger, equal = _second_digit(TABLE, STATE, BEFORE, row, c, chunks, CHUNKS)
    else:
        size = tl.num_programs(1) * chunks
        offer = OFFERS + row * chunks
        larger = tl.load(offer + c)
        equal = tl.load(offer + size + c)
        each = tl.arange(0, CHUNKS)
        least = tl.min(tl.load(offer + 2 * size + each, mask=each < chunks, other=65536), 0)
        most = tl.max(tl.load(offer + 3 * size + each, mask=each < chunks, other=-1), 0)
        need = tl.load(STATE + row * 8 + 3)
        low = least
        LIST += row.to(tl.int64) * room
        if least < most:
            low, need = _list_threshold(LIST, tl.load(STATE + row * 8 + 4), need, LISTED)
            listed = equal
            equal = tl.full([], 0, tl.int32)
            for start in range(0, listed, LISTED):
                place = start + tl.arange(0, LISTED)
                other = tl.load(LIST + place, mask=place < listed, other=-1)
                larger += tl.sum((other > low).to(tl.int32), 0)
                equal += tl.sum((other == low).to(tl.int32), 0)
        # Where a row has no score at all, low is 65536 and nothing is written.
        threshold = (tl.load(STATE + row * 8 + 2) << 16) | low
    if ONE:
        _write_block(out, key, at, hi, threshold, need, larger, equal, BITS)
    else:
        _write(scores, out, lo, hi, threshold, need, larger, equal, BITS, BLOCK)
    if LENGTH is not None:
        # Rows with fewer than k scores end with -1.
        for start in range(c * BLOCK, k, chunks * BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(out + place, -1, mask=(place >= n) & (place < k))


@triton.jit
def _write_block(out, key, at, hi, threshold, need, larger, equal, BITS: tl.constexpr):
    """Positions `at` of keys above the threshold, and at it while fewer than `need` were, behind the counts given.

    Returns the counts after it.
    """
    inside = at < hi
    if BITS == 32:
        # As unsigned numbers.
        over = inside & ((key ^ -2147483648) > (threshold ^ -2147483648))
    else:
        over = inside & (key > threshold)
    same = inside & (key == threshold)
    # One scan for both counts: a block is shorter than 2^15.
    packed = over.to(tl.int32) | (same.to(tl.int32) << 16)
    ranks = tl.cumsum(packed, 0) - packed
    equal_rank = equal + (ranks >> 16)
    chosen = over | (same & (equal_rank < need))
    tl.store(out + larger + (ranks & 0xFFFF) + tl.minimum(equal_rank, need), at, mask=chosen)
    total = tl.sum(packed, 0)
    return larger + (total & 0xFFFF), equal + (total >> 16)


@triton.jit
def _write(scores, out, lo, hi, threshold, need, larger, equal, BITS: tl.constexpr, BLOCK: tl.constexpr):
    for start in range(lo, hi, BLOCK):
        at = start + tl.arange(0, BLOCK)
        larger, equal = _write_block(
            out, _load_keys(scores, at, hi, BITS), at, hi, threshold, need, larger, equal, BITS
        )  # fmt: skip


@dataclass(frozen=True)
class Config:
    block: int = 4096
    num_warps: int = 8
    most_chunks: int = 32
    least_block: int = 512
    per_sm: int = 2


def topk_by_digits(scores: Tensor, k: int, *, length: Tensor | None = None, config: Config = Config()) -> Tensor:
    """int32 [R, k], ascending positions of the k largest of scores [R, N]."""
    R, N = scores.shape
    device, bits = scores.device, 8 * scores.element_size()
    out = torch.empty(R, k, dtype=torch.int32, device=device)
    chunks = max(1, min(config.most_chunks, config.per_sm * runtime.multiprocessors(device.index) // R))
    block = min(config.block, runtime.power_of_two(triton.cdiv(N, chunks), config.least_block))
    chunk = triton.cdiv(triton.cdiv(N, chunks), block) * block
    chunks = triton.cdiv(N, chunk)
    table = torch.empty(2, R, chunks, 256, dtype=torch.int32, device=device)
    state = torch.empty(R, 8, dtype=torch.int32, device=device)
    before = torch.empty(R, chunks, dtype=torch.int32, device=device)
    pdl = runtime.has_dependent_launch(device.index)
    shape_options = {
        "CHUNKS": runtime.power_of_two(chunks), "BLOCK": block, "ONE": chunk == block, "PDL": pdl,
        "num_warps": max(1, min(config.num_warps, block // 128)),
    }  # fmt: skip
    stride = scores.stride(0) if R > 1 else N
    for step in (0, 1):
        histogram_kernel[(chunks, R)](
            scores, length, table[0], table[step], state, before, stride, N, k, chunks, chunk,
            STEP=step, BITS=bits, launch_pdl=pdl and step > 0, **shape_options,
        )  # fmt: skip
    offers = listed = None
    if bits == 32:
        offers = torch.empty(4, R, chunks, dtype=torch.int32, device=device)
        listed = torch.empty(R, N, dtype=torch.int32, device=device)
        candidates_kernel[(chunks, R)](
            scores, length, table[1], state, before, offers, listed, stride, N, N, chunks, chunk,
            launch_pdl=pdl, **shape_options,
        )  # fmt: skip
    compact_kernel[(chunks, R)](
        scores, length, table[1], state, before, offers, listed, out, stride, N, N, k, chunks, chunk,
        BITS=bits, LISTED=512, launch_pdl=pdl, **shape_options,
    )  # fmt: skip
    return out
