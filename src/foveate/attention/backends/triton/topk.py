"""The k largest scores of each row, as ascending positions; equal scores go to the lowest position. Exact.

Scores become integers of the same order. A row is cut into chunks, one thread block each, which meet only between
three launches: no atomics and no waiting, so the result is the same in every run.

1. A sample of the row gives a lower bound of the k-th largest score, and 254 bins above it (`topk_bins`). Scores at or
   above the bound, some 9 % of a row where k is 2 % of it, are kept with their positions and counted by bin. Those
   below make two bins more, parted by the sample's lowest score, which may be what masks entries.
2. The counts tell the bin of the k-th largest score; those kept in it, some tens, are listed.
3. Every thread block finds the threshold from that list alone and writes the positions of what it kept above it, and
   of the first equal scores.

The sample decides the time, never the result: where fewer than k scores were kept, the second launch keeps all. Time
grows with the list, which every thread block of a row reads; scores that are all equal there do not cost more. Short
rows are done by one thread block each in one launch.

Safe in a CUDA graph. NaN counts as -inf, and -0 equals +0. Memory: 12 bytes per score.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.attention.backends.triton.topk_bins import LOWEST, bin_of, bounds, ordered, threshold_bin
from foveate.attention.backends.triton.topk_keys import choose, digit_of, digits_above, finite_alone, keys, least_key
from foveate.errors import ShapeError


@triton.jit
def _row_length(LENGTH, row, n):
    if LENGTH is not None:
        n = tl.maximum(tl.minimum(tl.load(LENGTH + row).to(tl.int32), n), 0)
    return n


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait until the launch before this one has ended, and only then let the next one be set up.

    So no thread block reads or writes anything before all that went before is done.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def _keep(kept, o, at, mask):
    """One number of 64 bits each: the score's order above, its position below."""
    tl.store(kept, (o.to(tl.int64) << 32) | at.to(tl.int64), mask=mask)


@triton.jit
def _load_kept(kept, mask):
    both = tl.load(kept, mask=mask, other=0)
    return (both >> 32).to(tl.int32), both.to(tl.int32)


@triton.jit
def _count_bins(kept, many, near, start, shift, WIDTH: tl.constexpr):
    counts = tl.zeros([256], tl.int32)
    for first in range(0, many, WIDTH):
        at = first + tl.arange(0, WIDTH)
        o, _at = _load_kept(kept + at, at < many)
        counts += tl.histogram(bin_of(o, near, start, shift), 256, mask=at < many)
    return counts


@triton.jit(do_not_specialize=["n", "k", "chunks", "chunk"])
def sift_kernel(
    SCORES, LENGTH, KEPT, COUNT, TABLE, STATE,
    stride, n, k, chunks, chunk,
    BLOCK: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """KEPT [rows, chunks, chunk]: a chunk's scores at or above the row's bound, in order of position; COUNT of them.

    Grid (chunks, rows). TABLE [rows, chunks, 256] counts them by bin. STATE [rows, 0:5]: what `bounds` returns.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    _wait(PDL)
    n = _row_length(LENGTH, row, n)
    lo = c * chunk
    hi = tl.minimum(lo + chunk, n)
    scores = SCORES + row.to(tl.int64) * stride
    at = lo + tl.arange(0, BLOCK)
    # In flight while the bounds are found.
    x = tl.load(scores + at, mask=at < hi, other=0.0)
    bound, lowest, near, start, shift = bounds(scores, n, k)
    place = row.to(tl.int64) * chunks + c
    kept = KEPT + place * chunk
    many = tl.full([], 0, tl.int32)
    between = tl.full([], 0, tl.int32)
    for first in range(lo, hi, BLOCK):
        at = first + tl.arange(0, BLOCK)
        following = tl.load(scores + at + BLOCK, mask=at + BLOCK < hi, other=0.0)
        o = ordered(x)
        inside = (at < hi) & (o >= bound)
        # Two counts in one sum: a block is shorter than 2^15.
        below = (at < hi) & (o < bound) & (o > lowest)
        both = tl.sum(inside.to(tl.int32) | (below.to(tl.int32) << 16), 0)
        ranks = tl.cumsum(inside.to(tl.int32), 0)
        _keep(kept + many + ranks - 1, o, at, inside)
        many += both & 0xFFFF
        between += both >> 16
        x = following
    tl.debug_barrier()
    counts = _count_bins(kept, many, near, start, shift, WIDTH)
    digit = tl.arange(0, 256)
    rest = tl.maximum(hi - lo, 0) - many - between
    counts = tl.where(digit == 254, between, tl.where(digit == 255, rest, counts))
    tl.store(TABLE + place * 256 + digit, counts)
    tl.store(COUNT + place, many)
    if c == 0:
        tl.store(STATE + row * 8, bound)
        tl.store(STATE + row * 8 + 1, lowest)
        tl.store(STATE + row * 8 + 2, near.to(tl.int32, bitcast=True))
        tl.store(STATE + row * 8 + 3, start)
        tl.store(STATE + row * 8 + 4, shift)


@triton.jit(do_not_specialize=["room", "n", "k", "chunks", "chunk"])
def candidates_kernel(
    SCORES, LENGTH, KEPT, COUNT, TABLE, STATE, OFFERS, LIST,
    stride, room, n, k, chunks, chunk,
    GROUP: tl.constexpr, WIDTH: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """LIST [rows, n]: the scores kept in the threshold's bin, as ordered integers, in order of position.

    Grid (chunks, rows). OFFERS [5, rows, chunks]: of each chunk, scores above and listed in the chunks before it, the
    smallest and the largest of what it listed, how many it kept. STATE [rows, 5:7]: how many are needed of those
    listed, how many are listed.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    _wait(PDL)
    n = _row_length(LENGTH, row, n)
    place = row.to(tl.int64) * chunks + c
    many = tl.load(COUNT + place)
    bound = tl.load(STATE + row * 8)
    lowest = tl.load(STATE + row * 8 + 1)
    near = tl.load(STATE + row * 8 + 2).to(tl.float32, bitcast=True)
    start = tl.load(STATE + row * 8 + 3)
    shift = tl.load(STATE + row * 8 + 4)
    need = tl.minimum(k, n)
    chosen, above, count, larger, listed = threshold_bin(TABLE, row, c, chunks, need, GROUP)
    kept = KEPT + place * chunk
    if chosen > 253:
        # The bound was too high: keep all.
        lo = tl.minimum(c * chunk, n)
        many = tl.minimum(chunk, n - lo)
        scores = SCORES + row.to(tl.int64) * stride
        for first in range(0, many, WIDTH):
            at = first + tl.arange(0, WIDTH)
            o = ordered(tl.load(scores + lo + at, mask=at < many, other=0.0))
            _keep(kept + at, o, lo + at, at < many)
        tl.debug_barrier()
    size = tl.num_programs(1) * chunks
    offer = OFFERS + place
    tl.store(offer, larger)
    tl.store(offer + size, listed)
    LIST += row.to(tl.int64) * room
    least = tl.full([], 2147483647, tl.int32)
    most = tl.full([], LOWEST, tl.int32)
    for first in range(0, many, WIDTH):
        at = first + tl.arange(0, WIDTH)
        o, _at = _load_kept(kept + at, at < many)
        of_bin = tl.where(o < bound, tl.where(o > lowest, 254, 255), bin_of(o, near, start, shift))
        same = (at < many) & (of_bin == chosen)
        ranks = tl.cumsum(same.to(tl.int32), 0)
        tl.store(LIST + listed + ranks - 1, o, mask=same)
        least = tl.minimum(least, tl.min(tl.where(same, o, 2147483647), 0))
        most = tl.maximum(most, tl.max(tl.where(same, o, LOWEST), 0))
        if first + WIDTH < many:
            listed += tl.sum(same.to(tl.int32), 0)
    tl.store(offer + 2 * size, least)
    tl.store(offer + 3 * size, most)
    tl.store(offer + 4 * size, many)
    if c == 0:
        # What the launch before wrote stays: other chunks may still read it.
        tl.store(STATE + row * 8 + 5, need - above)
        tl.store(STATE + row * 8 + 6, count)


@triton.jit
def _list_threshold(LIST, count, need, least, most, BLOCK: tl.constexpr):
    """The need-th largest of `count` listed numbers from least to most, and how many equal to it are needed."""
    span = (most - least).to(tl.uint32, bitcast=True)
    steps = (span > 0).to(tl.int32) + (span > 0xFF).to(tl.int32)
    steps += (span > 0xFFFF).to(tl.int32) + (span > 0xFFFFFF).to(tl.int32)
    threshold = least
    for step in range(0, steps):
        shift = 8 * (steps - 1 - step)
        counts = tl.zeros([256], tl.int32)
        for first in range(0, count, BLOCK):
            at = first + tl.arange(0, BLOCK)
            o = tl.load(LIST + at, mask=at < count, other=0)
            # Where o lies below the threshold so far, this wraps to more than 255.
            digit = (o - threshold).to(tl.uint32, bitcast=True) >> shift.to(tl.uint32)
            counts += tl.histogram((digit & 255).to(tl.int32), 256, mask=(at < count) & (digit < 256))
        chosen, above = choose(counts, need)
        threshold += chosen << shift
        need -= above
    return threshold, need


@triton.jit
def _list_counts(LIST, count, threshold, BLOCK: tl.constexpr):
    """How many of the first `count` listed numbers lie over the threshold, and at it."""
    over = tl.full([], 0, tl.int32)
    same = tl.full([], 0, tl.int32)
    for first in range(0, count, BLOCK):
        at = first + tl.arange(0, BLOCK)
        o = tl.load(LIST + at, mask=at < count, other=0)
        over += tl.sum(((at < count) & (o > threshold)).to(tl.int32), 0)
        same += tl.sum(((at < count) & (o == threshold)).to(tl.int32), 0)
    return over, same


@triton.jit(do_not_specialize=["room", "n", "k", "chunks", "chunk"])
def compact_kernel(
    LENGTH, KEPT, STATE, OFFERS, LIST, OUT,
    room, n, k, chunks, chunk,
    CHUNKS: tl.constexpr, WIDTH: tl.constexpr, LISTED: tl.constexpr, FINITE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write a chunk's selected positions behind those of the chunks before it; grid (chunks, rows)."""
    c, row = tl.program_id(0), tl.program_id(1)
    _wait(PDL)
    n = _row_length(LENGTH, row, n)
    size = tl.num_programs(1) * chunks
    offer = OFFERS + row * chunks
    larger = tl.load(offer + c)
    equal = tl.load(offer + size + c)
    many = tl.load(offer + 4 * size + c)
    each = tl.arange(0, CHUNKS)
    least = tl.min(tl.load(offer + 2 * size + each, mask=each < chunks, other=2147483647), 0)
    most = tl.max(tl.load(offer + 3 * size + each, mask=each < chunks, other=LOWEST), 0)
    need = tl.load(STATE + row * 8 + 5)
    threshold = least
    if least < most:
        LIST += row.to(tl.int64) * room
        threshold, need = _list_threshold(LIST, tl.load(STATE + row * 8 + 6), need, least, most, LISTED)
        over, equal = _list_counts(LIST, equal, threshold, LISTED)
        larger += over
    filled = tl.minimum(k, n)
    if FINITE:
        need, filled = finite_alone(threshold, LOWEST ^ least_key(tl.float32), need, filled)
    out = OUT + row.to(tl.int64) * k
    kept = KEPT + (row.to(tl.int64) * chunks + c) * chunk
    for first in range(0, many, WIDTH):
        at = first + tl.arange(0, WIDTH)
        o, position = _load_kept(kept + at, at < many)
        larger, equal = _write(
            out, position, (at < many) & (o > threshold), (at < many) & (o == threshold), need, larger, equal
        )  # fmt: skip
    if FINITE or LENGTH is not None:
        # Rows with fewer than k scores end with -1.
        for first in range(c * WIDTH, k, chunks * WIDTH):
            at = first + tl.arange(0, WIDTH)
            tl.store(out + at, -1, mask=(at >= filled) & (at < k))


@triton.jit
def _write(out, position, over, same, need, larger, equal):
    """Positions of the scores over the threshold, and of those at it while fewer than `need` were, behind the counts
    given. Returns the counts after it."""
    # One scan for both counts: a block is shorter than 2^15.
    packed = over.to(tl.int32) | (same.to(tl.int32) << 16)
    ranks = tl.cumsum(packed, 0) - packed
    equal_rank = equal + (ranks >> 16)
    chosen = over | (same & (equal_rank < need))
    tl.store(out + larger + (ranks & 0xFFFF) + tl.minimum(equal_rank, need), position, mask=chosen)
    total = tl.sum(packed, 0)
    return larger + (total & 0xFFFF), equal + (total >> 16)


@triton.jit(do_not_specialize=["n", "k"])
def single_kernel(
    SCORES, LENGTH, OUT, stride, n, k, BITS: tl.constexpr, FINITE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The whole selection of one row that fits in registers; grid (rows,)."""
    row = tl.program_id(0)
    n = _row_length(LENGTH, row, n)
    at = tl.arange(0, BLOCK)
    inside = at < n
    scores = SCORES + row.to(tl.int64) * stride
    out = OUT + row.to(tl.int64) * k
    key = keys(tl.load(scores + at, mask=inside, other=0.0), BITS)
    prefix = tl.full([], 0, tl.int32)
    need = tl.minimum(k, n)
    for step in tl.static_range(BITS // 8):
        same = inside & (digits_above(key, BITS - 8 - 8 * step, BITS) == prefix)
        chosen, above = choose(tl.histogram(digit_of(key, BITS - 8 - 8 * step), 256, mask=same), need)
        prefix = (prefix << 8) | chosen
        need -= above
    filled = tl.minimum(k, n)
    if FINITE:
        need, filled = finite_alone(prefix, least_key(SCORES.dtype.element_ty), need, filled)
    none = tl.full([], 0, tl.int32)
    if BITS == 32:
        # As unsigned numbers.
        over = (key ^ LOWEST) > (prefix ^ LOWEST)
    else:
        over = key > prefix
    _write(out, at, inside & over, inside & (key == prefix), need, none, none)
    if FINITE or LENGTH is not None:
        for start in range(0, k, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(out + place, -1, mask=(place >= filled) & (place < k))


def topk_select(
    scores: Tensor,
    k: int,
    *,
    length: Tensor | None = None,
    finite: bool = False,
    config: configs.TopkConfig | None = None,
) -> Tensor:
    """Positions of the k largest scores of each row.

    scores: float32, bfloat16 or float16 [..., N], last stride 1.    k: 1 .. N.
    length: int32 or int64 [...], scores in use per row; a row with fewer than k ends with -1.
    finite: -inf and NaN are never taken either.
    Returns int32 [..., k], ascending; of equal scores the ones at the lowest positions.
    """
    N = scores.shape[-1]
    if not 1 <= k <= N:
        raise ShapeError(f"k={k}, allowed: 1 .. {N} (scores per row)")
    runtime.check_floats(scores=scores)
    runtime.check_unit_stride(scores=scores)
    shape = scores.shape[:-1]
    scores = scores.reshape(-1, N)
    R, bits = scores.shape[0], 8 * scores.element_size()
    out = torch.empty(R, k, dtype=torch.int32, device=scores.device)
    if not R:
        return out.view(*shape, k)
    length = None if length is None else length.reshape(-1)
    if N <= configs.TOPK_SINGLE and config is None:
        block = runtime.power_of_two(N, 128)
        warps = 16 if block > 4096 else 8 if block > 1024 else 4
        single_kernel[(R,)](
            scores, length, out, scores.stride(0), N, k, BITS=bits, FINITE=finite, BLOCK=block, num_warps=warps
        )
        return out.view(*shape, k)
    # A row takes one place of the grid's second axis.
    config = config or (configs.TOPK if N <= configs.TOPK_LONG else configs.TOPK_OF_LONG)
    for part in runtime.batches(R, 1):
        own = None if length is None else runtime.part_of(length, part)
        _by_chunks(runtime.part_of(scores, part), own, k, finite, config, runtime.part_of(out, part))
    return out.view(*shape, k)


def _by_chunks(
    scores: Tensor, length: Tensor | None, k: int, finite: bool, config: configs.TopkConfig, out: Tensor
) -> None:
    """The three launches for scores [R, N], into out [R, k]."""
    (R, N), device = scores.shape, scores.device
    chunks = max(1, min(config.most_chunks, config.per_sm * runtime.multiprocessors(device.index) // R))
    block = min(config.block, runtime.power_of_two(runtime.cdiv(N, chunks), config.least_block))
    chunk = runtime.cdiv(runtime.cdiv(N, chunks), block) * block
    chunks = runtime.cdiv(N, chunk)
    # What a chunk is expected to keep, or a block of it.
    width = min(block, runtime.power_of_two(block * max(7 * k, N // 9) // N, config.width))
    kept = torch.empty(R, chunks, chunk, dtype=torch.int64, device=device)
    count = torch.empty(R, chunks, dtype=torch.int32, device=device)
    counts = torch.int16 if chunk < 2**15 else torch.int32
    table = torch.empty(R, chunks, 256, dtype=counts, device=device)
    state = torch.empty(R, 8, dtype=torch.int32, device=device)
    offers = torch.empty(5, R, chunks, dtype=torch.int32, device=device)
    listed = torch.empty(R, N, dtype=torch.int32, device=device)
    pdl = runtime.has_dependent_launch(device.index)
    options = {"WIDTH": width, "PDL": pdl, "launch_pdl": pdl}
    stride = scores.stride(0) if R > 1 else N
    grid = (chunks, R)
    warps = max(1, min(config.num_warps, block // 128))
    sift_kernel[grid](
        scores, length, kept, count, table, state, stride, N, k, chunks, chunk,
        # Registers that let `per_sm` thread blocks share a multiprocessor.
        BLOCK=block, num_warps=warps, maxnreg=min(255, 65536 // (32 * warps * config.per_sm)), **options,
    )  # fmt: skip
    options["num_warps"] = max(1, min(config.num_warps, max(config.late_warps, width // 256), width // 128))
    candidates_kernel[grid](
        scores, length, kept, count, table, state, offers, listed, stride, N, N, k, chunks, chunk,
        GROUP=min(32, runtime.power_of_two(chunks)), **options,
    )  # fmt: skip
    compact_kernel[grid](
        length, kept, state, offers, listed, out, N, N, k, chunks, chunk,
        CHUNKS=runtime.power_of_two(chunks), LISTED=512, FINITE=finite, **options,
    )  # fmt: skip
