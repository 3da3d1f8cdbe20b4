"""What the kernels of the linear family share: pieces of sequences, decays inside a chunk, products.

A sequence is cut into pieces of whole chunks, and a piece is walked by one thread block. Decays are base 2 inside the
kernels. With c_i the decays' sum from the chunk's first token to i (inclusive) and L its last token, all exponents are
differences <= 0; they are bounded before the exponential and masked after it, so a masked entry can never be inf * 0.
"""

from __future__ import annotations

import triton
import triton.language as tl

# How a call decays: not at all, [HV], [B, T, HV] or [B, T, HV, K].
NONE, FIXED, SCALAR, VECTOR = 0, 1, 2, 3
# Natural log. exp of it is 0 beside anything that float32 holds, and sums of it keep the weak decays of their chunk.
LOWEST = -80.0


@triton.jit
def bounds(TABLE, piece, tokens, length, per_sequence):
    """Sequence, first token, end, whether the piece is the sequence's first and its last.

    TABLE: [pieces, 4] int64 (sequence, begin, end, first + 2 last) for packed sequences; None for equal ones.
    """
    if TABLE is not None:
        n = tl.load(TABLE + piece * 4)
        begin = tl.load(TABLE + piece * 4 + 1)
        end = tl.load(TABLE + piece * 4 + 2)
        flags = tl.load(TABLE + piece * 4 + 3)
        first, last = (flags & 1) != 0, flags >= 2
    else:
        n = (piece // per_sequence).to(tl.int64)
        part = piece % per_sequence
        begin = n * tokens + part.to(tl.int64) * length
        end = tl.minimum(begin + length, (n + 1) * tokens)
        first, last = part == 0, part == per_sequence - 1
    return n, begin, end, first, last


@triton.jit
def tile(X, row_stride, i, d, there, inside, MASKED: tl.constexpr, FULL: tl.constexpr):
    """Rows i and channels d of X; rows past the end and channels past the width are 0."""
    at = X + (i[:, None] * row_stride + d[None, :])
    if MASKED and FULL:
        return tl.load(at, mask=there[:, None], other=0.0)
    elif MASKED:
        return tl.load(at, mask=there[:, None] & inside[None, :], other=0.0)
    elif FULL:
        return tl.load(at)
    else:
        return tl.load(at, mask=inside[None, :], other=0.0)


@triton.jit
def product(a, b, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, b, input_precision=PRECISION)


@triton.jit
def decay_row(G, h, begin, total, C: tl.constexpr, DECAY: tl.constexpr):
    """Where the sums of head h begin, as `scan_launch.decay_sums` lays them out; `begin` counts tokens."""
    if DECAY == 1:
        G += h * C
    elif DECAY == 2:
        G += h * total + begin
    return G


@triton.jit
def chunk_decay(G, t, i, count, DECAY: tl.constexpr, MASKED: tl.constexpr):
    """c [C] and c_L of the chunk of `count` tokens from t on. G: from `decay_row`.

    FIXED sums are the same in every chunk, yet read there: held over the loop, what is made of them fills registers.
    """
    if DECAY == 1:
        c = tl.load(G + i)
        last = tl.load(G + count - 1)
    else:
        if MASKED:
            c = tl.load(G + t + i, mask=i < count, other=0.0)
        else:
            c = tl.load(G + t + i)
        last = tl.load(G + t + count - 1)
    return c, last


@triton.jit
def between(c, i, REVERSE: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr):
    """Weights [C, C] of column j in row i: exp2(c_i - c_j) for j <= i, else 0; with REVERSE exp2(c_j - c_i), j >= i."""
    row, column = i[:, None], i[None, :]
    if REVERSE:
        seen = column > row if STRICT else column >= row
    else:
        seen = column < row if STRICT else column <= row
    if DECAY == 0:
        return tl.where(seen, 1.0, 0.0)
    else:
        difference = c[None, :] - c[:, None] if REVERSE else c[:, None] - c[None, :]
        return tl.where(seen, tl.exp2(tl.minimum(difference, 0.0)), 0.0)


@triton.jit
def scores_between(scores, c, i, REVERSE: tl.constexpr, STRICT: tl.constexpr, DECAY: tl.constexpr):
    """Scores [C, C] times `between`."""
    if DECAY == 0:
        row, column = i[:, None], i[None, :]
        if REVERSE:
            seen = column > row if STRICT else column >= row
        else:
            seen = column < row if STRICT else column <= row
        return tl.where(seen, scores, 0.0)
    else:
        return scores * between(c, i, REVERSE, STRICT, DECAY)


@triton.jit(do_not_specialize=["tokens", "length", "per_sequence", "HEADS"])
def cumulative_kernel(
    G, TABLE, OUT, stride_t, stride_h, stride_ot, stride_oh, tokens, length, per_sequence, HEADS,
    BLOCK_H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """OUT: base-2 decays summed from the first token of each chunk. Grid (chunks, pieces, heads or channels)."""
    _, begin, end, _, _ = bounds(TABLE, tl.program_id(1), tokens, length, per_sequence)
    start = begin + tl.program_id(0).to(tl.int64) * C
    if start >= end:
        return
    i = tl.arange(0, C)
    h = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    there = (start + i < end)[:, None] & (h < HEADS)[None, :]
    g = tl.load(G + start * stride_t + i[:, None] * stride_t + h[None, :] * stride_h, mask=there, other=0.0)
    g = tl.maximum(g.to(tl.float32), -80.0) * 1.4426950408889634
    c = tl.cumsum(g, 0)
    at = OUT + start * stride_ot + h.to(tl.int64)[None, :] * stride_oh + i[:, None] * stride_ot
    tl.store(at, c, mask=there)


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "HEADS"])
def gate_gradient_kernel(
    ROWS, ANCHOR, TABLE, OUT, total, tokens, length, per_sequence, HEADS,
    BLOCK_H: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """OUT [total, HEADS]: ANCHOR [pieces, HEADS] plus the sum of ROWS [total, HEADS] from a token to its piece's end.

    Grid (heads, pieces).
    """
    piece = tl.program_id(1)
    _, begin, end, _, _ = bounds(TABLE, piece, tokens, length, per_sequence)
    i = tl.arange(0, C)
    h = tl.program_id(0) * BLOCK_H + tl.arange(0, BLOCK_H)
    inside = h < HEADS
    carry = tl.load(ANCHOR + piece.to(tl.int64) * HEADS + h, mask=inside, other=0.0)
    chunks = tl.cdiv(end - begin, C).to(tl.int32)
    zero = tl.full([], 0, tl.int64)
    for step in range(0, chunks):
        start = begin + (zero + chunks - 1 - step) * C
        there = (start + i < end)[:, None] & inside[None, :]
        at = start * HEADS + i[:, None] * HEADS + h[None, :]
        x = tl.load(ROWS + at, mask=there, other=0.0)
        tl.store(OUT + at, tl.cumsum(x, 0, reverse=True) + carry[None, :], mask=there)
        carry += tl.sum(x, 0)
