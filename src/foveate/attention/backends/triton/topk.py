"""The k largest scores of each row, as ascending positions; equal scores go to the lowest position. Exact.

Scores become unsigned integers of the same order. Digit by digit (8 bits, the high one first) a histogram finds the
digit of the k-th largest; after the last one the threshold itself is known, and a last pass writes the positions of
all larger scores and of the first equal ones. A row is cut into chunks, one thread block each, which meet only
between launches: no atomics and no waiting, so the result is the same in every run. 16-bit scores need 2 digits and
3 launches, float32 4 and 5. Short rows are done by one thread block each in one launch.

Safe in a CUDA graph. NaN counts as the lowest score, and -0 equals +0.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import configs, runtime
from foveate.errors import ShapeError


@triton.jit
def _keys(x, BITS: tl.constexpr):
    """Scores as int32 whose bits, read as an unsigned number of BITS bits, order like the scores; NaN is 0."""
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
    return tl.where(nan, 0, key)


@triton.jit
def _digit(key, SHIFT: tl.constexpr):
    return (key >> SHIFT) & 255


@triton.jit
def _above(key, SHIFT: tl.constexpr, BITS: tl.constexpr):
    """The digits of a key above the one at SHIFT."""
    if SHIFT + 8 >= BITS:
        return key & 0
    else:
        return (key >> (SHIFT + 8)) & ((1 << (BITS - SHIFT - 8)) - 1)


@triton.jit
def _choose(counts, need):
    """The digit of the `need`-th largest, from counts [256] per digit, and how many lie in larger digits."""
    digit = tl.arange(0, 256)
    above = tl.sum(counts, 0) - tl.cumsum(counts, 0)
    chosen = tl.max(tl.where(above + counts >= need, digit, 0), 0)
    return chosen, tl.sum(tl.where(digit > chosen, counts, 0), 0)


@triton.jit
def _row_counts(HISTOGRAM, row, chunks, CHUNKS: tl.constexpr):
    c = tl.arange(0, CHUNKS)
    digit = tl.arange(0, 256)
    at = HISTOGRAM + (row.to(tl.int64) * chunks + c[:, None]) * 256 + digit[None, :]
    return tl.load(at, mask=(c < chunks)[:, None], other=0)


@triton.jit
def _wait(PDL: tl.constexpr):
    """Wait for the launch before this one, and let the next one be set up meanwhile."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit(do_not_specialize=["n", "k", "chunks", "chunk"])
def histogram_kernel(
    SCORES, LENGTH, LAST, HISTOGRAM, STATE, LARGER,
    stride, n, k, chunks, chunk,
    SHIFT: tl.constexpr, BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Counts of the digit at SHIFT among scores that share the threshold's higher digits; grid (chunks, rows).

    LAST: counts of the digit before. STATE [rows, 4, 2]: the threshold's digits so far and how many more are
    needed, per digit. LARGER [rows, chunks]: how many of a chunk's scores are surely selected.
    """
    c, row = tl.program_id(0), tl.program_id(1)
    STEP: tl.constexpr = (BITS - 8 - SHIFT) // 8
    _wait(PDL)
    n = _row_length(LENGTH, row, n)
    prefix = tl.full([], 0, tl.int32)
    if STEP > 0:
        prefix, _need = _advance(LAST, STATE, LARGER, row, c, n, k, chunks, STEP, CHUNKS)
    counts = tl.zeros([256], tl.int32)
    lo = c * chunk
    base = SCORES + row.to(tl.int64) * stride
    for start in range(lo, tl.minimum(lo + chunk, n), BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < tl.minimum(lo + chunk, n)
        key = _keys(tl.load(base + at, mask=inside, other=0.0), BITS)
        same = inside & (_above(key, SHIFT, BITS) == prefix)
        counts += tl.histogram(_digit(key, SHIFT), 256, mask=same)
    tl.store(HISTOGRAM + (row.to(tl.int64) * chunks + c) * 256 + tl.arange(0, 256), counts)


@triton.jit
def _row_length(LENGTH, row, n):
    if LENGTH is not None:
        n = tl.maximum(tl.minimum(tl.load(LENGTH + row).to(tl.int32), n), 0)
    return n


@triton.jit
def _advance(LAST, STATE, LARGER, row, c, n, k, chunks, STEP: tl.constexpr, CHUNKS: tl.constexpr):
    """Fix digit STEP - 1 of the threshold from its counts: returns the digits so far and how many are still needed.

    Every chunk of a row does the same; chunk 0 keeps the result for the next launch. A chunk adds what of its own
    scores lies above.
    """
    prefix = tl.full([], 0, tl.int32)
    need = tl.minimum(k, n)
    larger = tl.full([], 0, tl.int32)
    if STEP > 1:
        state = STATE + (row * 4 + STEP - 2) * 2
        prefix = tl.load(state)
        need = tl.load(state + 1)
        larger = tl.load(LARGER + row * chunks + c)
    counts = _row_counts(LAST, row, chunks, CHUNKS)
    chosen, above = _choose(tl.sum(counts, 0), need)
    prefix = (prefix << 8) | chosen
    need -= above
    digit = tl.arange(0, 256)
    own = tl.load(LAST + (row.to(tl.int64) * chunks + c) * 256 + digit)
    tl.store(LARGER + row * chunks + c, larger + tl.sum(tl.where(digit > chosen, own, 0), 0))
    if c == 0:
        state = STATE + (row * 4 + STEP - 1) * 2
        tl.store(state, prefix)
        tl.store(state + 1, need)
    return prefix, need


@triton.jit(do_not_specialize=["n", "k", "chunks", "chunk"])
def compact_kernel(
    SCORES, LENGTH, LAST, STATE, LARGER, OUT,
    stride, n, k, chunks, chunk,
    BITS: tl.constexpr, CHUNKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Write a chunk's selected positions behind those of the chunks before it; grid (chunks, rows)."""
    c, row = tl.program_id(0), tl.program_id(1)
    STEPS: tl.constexpr = BITS // 8
    _wait(PDL)
    n = _row_length(LENGTH, row, n)
    state = STATE + (row * 4 + STEPS - 2) * 2
    prefix, need = tl.load(state), tl.load(state + 1)
    counts = _row_counts(LAST, row, chunks, CHUNKS)
    chosen, above = _choose(tl.sum(counts, 0), need)
    threshold = (prefix << 8) | chosen
    need -= above
    each = tl.arange(0, CHUNKS)
    digit = tl.arange(0, 256)[None, :]
    before = (each < c) & (each < chunks)
    larger = tl.load(LARGER + row * chunks + each, mask=before, other=0)
    larger += tl.where(before, tl.sum(tl.where(digit > chosen, counts, 0), 1), 0)
    equal = tl.where(before, tl.sum(tl.where(digit == chosen, counts, 0), 1), 0)
    larger_before, equal_before = tl.sum(larger, 0), tl.sum(equal, 0)
    lo = c * chunk
    _write(SCORES + row.to(tl.int64) * stride, OUT + row.to(tl.int64) * k, lo, tl.minimum(lo + chunk, n), threshold,
           need, larger_before, equal_before, BITS, BLOCK)  # fmt: skip
    if LENGTH is not None:
        # Rows with fewer than k scores end with -1.
        for start in range(c * BLOCK, k, chunks * BLOCK):
            at = start + tl.arange(0, BLOCK)
            tl.store(OUT + row.to(tl.int64) * k + at, -1, mask=(at >= n) & (at < k))


@triton.jit
def _write(scores, out, lo, hi, threshold, need, larger, equal, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Positions lo .. hi above the threshold, and at it while fewer than `need` were, behind the counts given."""
    for start in range(lo, hi, BLOCK):
        at = start + tl.arange(0, BLOCK)
        inside = at < hi
        key = _keys(tl.load(scores + at, mask=inside, other=0.0), BITS)
        if BITS == 32:
            # As unsigned numbers.
            over = inside & ((key ^ -2147483648) > (threshold ^ -2147483648))
        else:
            over = inside & (key > threshold)
        same = inside & (key == threshold)
        # One scan for both counts: BLOCK < 2^15.
        packed = over.to(tl.int32) | (same.to(tl.int32) << 16)
        ranks = tl.cumsum(packed, 0) - packed
        larger_rank = larger + (ranks & 0xFFFF)
        equal_rank = equal + (ranks >> 16)
        chosen = over | (same & (equal_rank < need))
        tl.store(out + larger_rank + tl.minimum(equal_rank, need), at, mask=chosen)
        total = tl.sum(packed, 0)
        larger += total & 0xFFFF
        equal += total >> 16


@triton.jit(do_not_specialize=["n", "k"])
def single_kernel(SCORES, LENGTH, OUT, stride, n, k, BITS: tl.constexpr, BLOCK: tl.constexpr):
    """The whole selection of one row that fits in registers; grid (rows,)."""
    row = tl.program_id(0)
    n = _row_length(LENGTH, row, n)
    at = tl.arange(0, BLOCK)
    inside = at < n
    scores = SCORES + row.to(tl.int64) * stride
    out = OUT + row.to(tl.int64) * k
    key = _keys(tl.load(scores + at, mask=inside, other=0.0), BITS)
    prefix = tl.full([], 0, tl.int32)
    need = tl.minimum(k, n)
    for step in tl.static_range(BITS // 8):
        same = inside & (_above(key, BITS - 8 - 8 * step, BITS) == prefix)
        chosen, above = _choose(tl.histogram(_digit(key, BITS - 8 - 8 * step), 256, mask=same), need)
        prefix = (prefix << 8) | chosen
        need -= above
    none = tl.full([], 0, tl.int32)
    _write(scores, out, 0, n, prefix, need, none, none, BITS, BLOCK)
    if LENGTH is not None:
        for start in range(0, k, BLOCK):
            place = start + tl.arange(0, BLOCK)
            tl.store(out + place, -1, mask=(place >= n) & (place < k))


def topk_select(
    scores: Tensor, k: int, *, length: Tensor | None = None, config: configs.TopkConfig | None = None
) -> Tensor:
    """Positions of the k largest scores of each row.

    scores: float32, bfloat16 or float16 [..., N], last stride 1.    k: 1 .. N.
    length: int32 or int64 [...], scores in use per row; a row with fewer than k ends with -1.
    Returns int32 [..., k], ascending; of equal scores the ones at the lowest positions.
    """
    N = scores.shape[-1]
    if not 1 <= k <= N:
        raise ShapeError(f"k={k}, allowed: 1 .. {N} (scores per row)")
    runtime.check_floats(scores=scores)
    runtime.check_unit_stride(scores=scores)
    shape = scores.shape[:-1]
    scores = scores.reshape(-1, N)
    R, device = scores.shape[0], scores.device
    out = torch.empty(R, k, dtype=torch.int32, device=device)
    if not R:
        return out.view(*shape, k)
    if length is not None:
        length = length.reshape(-1)
    bits = 8 * scores.element_size()
    if N <= configs.TOPK_SINGLE and config is None:
        block = runtime.power_of_two(N, 128)
        warps = 16 if block > 4096 else 8 if block > 1024 else 4
        single_kernel[(R,)](scores, length, out, scores.stride(0), N, k, BITS=bits, BLOCK=block, num_warps=warps)
        return out.view(*shape, k)
    config = config or configs.TOPK
    blocks = triton.cdiv(N, config.block)
    wanted = max(1, 2 * runtime.multiprocessors(device.index) // R)
    per_chunk = triton.cdiv(blocks, min(blocks, config.most_chunks, wanted))
    chunk = per_chunk * config.block
    chunks = triton.cdiv(N, chunk)
    steps = bits // 8
    counts = torch.empty(steps, R, chunks, 256, dtype=torch.int32, device=device)
    state = torch.empty(R, 4, 2, dtype=torch.int32, device=device)
    larger = torch.empty(R, chunks, dtype=torch.int32, device=device)
    pdl = runtime.has_dependent_launch(device.index)
    padded = runtime.power_of_two(chunks)
    sizes = (scores.stride(0), N, k, chunks, chunk)
    for step in range(steps):
        histogram_kernel[(chunks, R)](
            scores, length, counts[max(step - 1, 0)], counts[step], state, larger, *sizes,
            SHIFT=bits - 8 - 8 * step, BITS=bits, CHUNKS=padded, BLOCK=config.block, PDL=pdl,
            num_warps=config.num_warps, launch_pdl=pdl and step > 0,
        )  # fmt: skip
    compact_kernel[(chunks, R)](
        scores, length, counts[steps - 1], state, larger, out, *sizes,
        BITS=bits, CHUNKS=padded, BLOCK=config.block, PDL=pdl, num_warps=config.num_warps, launch_pdl=pdl,
    )  # fmt: skip
    return out.view(*shape, k)
