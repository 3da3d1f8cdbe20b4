"""Linear attention with one decay per key channel (GLA, HGRN2), in chunks.

    A_ij = sum_d q_id k_jd exp(c_id - c_jd), i >= j          `vector_scores_kernel`, all chunks at once
    O = scale ((exp(c) Q) S + A V)        S <- exp(c_L) S + (exp(c_L - c) K)^T V        `vector_kernel`

A is no product of two matrices with bounded entries, so a chunk is halved again and again: for i in the upper and j in
the lower half of a block whose border row is b,

    exp(c_i - c_j) = exp(c_i - c_b) exp(c_b - c_j),        both exponents <= 0,

and one product per level covers all blocks of a size; the diagonal has no decay. Backwards in time `vector_kernel`
gives dv from A transposed, as `scan_chunk` does.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime, scan_configs
from foveate.attention.backends.triton.scan_chunk_backward import LONGEST, start_of
from foveate.attention.backends.triton.scan_launch import Cut, decay_sums, rows_of, steps
from foveate.attention.backends.triton.scan_parts import VECTOR, bounds, product, tile
from foveate.attention.backends.triton.scan_split import join


@triton.jit
def half_decay(G, c, i, d, d_in, row_stride, count, LEVEL: tl.constexpr):
    """exp2 of c between each row and the border of its block of 2^(LEVEL + 1) rows [C, D]; who is in the upper half.

    G: at the chunk's first row. Rows past the end have a border past the end, and no effect.
    """
    border = ((i >> (LEVEL + 1)) << (LEVEL + 1)) + (1 << LEVEL) - 1
    at = G + (border[:, None] * row_stride + d[None, :])
    edge = tl.load(at, mask=(border < count)[:, None] & d_in[None, :], other=0.0)
    upper = (((i >> LEVEL) & 1) == 1)[:, None]
    return tl.exp2(tl.minimum(tl.where(upper, c - edge, edge - c), 0.0)), upper


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "HEADS"])
def vector_scores_kernel(
    Q, K, G, TABLE, A, stride_qt, stride_qh, stride_kt, stride_kh, total, tokens, length, per_sequence, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """A [HEADS, total, C]: the weighed scores of each token with those of its chunk. Grid (chunks, heads, pieces)."""
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6 if C == 64 else 7
    h = tl.program_id(1).to(tl.int64)
    _, begin, end, _, _ = bounds(TABLE, tl.program_id(2), tokens, length, per_sequence)
    start = begin + tl.program_id(0).to(tl.int64) * C
    if start >= end:
        return
    count = tl.minimum(end - start, C).to(tl.int32)
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    there, d_in = i < count, d < DK
    FULL_K: tl.constexpr = DK == BLOCK_K
    q = tile(Q + start * stride_qt + (h // K_GROUP) * stride_qh, stride_qt, i, d, there, d_in, True, FULL_K)
    k = tile(K + start * stride_kt + (h // K_GROUP) * stride_kh, stride_kt, i, d, there, d_in, True, FULL_K)
    G += (start * HEADS + h) * DK
    c = tile(G, HEADS * DK, i, d, there, d_in, True, FULL_K)
    row, column = i[:, None], i[None, :]
    own = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)
    a = tl.where(row == column, own[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        factor, upper = half_decay(G, c, i, d, d_in, HEADS * DK, count, level)
        rows = tl.where(upper, q * factor, 0.0).to(q.dtype)
        columns = tl.where(upper, 0.0, k * factor).to(k.dtype)
        scores = product(rows, tl.trans(columns), PRECISION, UPCAST)
        a += tl.where(row >> (level + 1) == column >> (level + 1), scores, 0.0)
    at = (h * total + start) * C + (i[:, None] * C + i[None, :])
    tl.store(A + at, a.to(A.dtype.element_ty), mask=there[:, None])


@triton.jit
def _chunk(
    S, Q, K, V, A, G, OUT, stride_qt, stride_kt, stride_vt, t, count, i, d, e, scale, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LOCAL: tl.constexpr, REVERSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes the output (unless LOCAL), returns the next S and c_L [K]."""
    there = i < count
    d_in, e_in = d < DK, e < DV
    FULL_K: tl.constexpr = DK == BLOCK_K
    FULL_V: tl.constexpr = DV % BLOCK_V == 0
    k = tile(K + t * stride_kt, stride_kt, i, d, there, d_in, MASKED, FULL_K)
    v = tile(V + t * stride_vt, stride_vt, i, e, there, e_in, MASKED, FULL_V)
    G += t * (HEADS * DK)
    c = tile(G, HEADS * DK, i, d, there, d_in, MASKED, FULL_K)
    c_last = tl.load(G + (count - 1) * (HEADS * DK) + d, mask=d_in, other=0.0)
    from_start = tl.exp2(c)
    to_end = tl.exp2(tl.minimum(c_last[None, :] - c, 0.0))
    if not LOCAL:
        q = tile(Q + t * stride_qt, stride_qt, i, d, there, d_in, MASKED, FULL_K)
        q = (q * (to_end if REVERSE else from_start)).to(q.dtype)
        o = product(q, S.to(q.dtype), PRECISION, UPCAST)
        if REVERSE:
            a_at = A + t * C + (i[None, :] * C + i[:, None])
            a = tl.load(a_at, mask=(i < count)[None, :], other=0.0) if MASKED else tl.load(a_at)
        else:
            a_at = A + t * C + (i[:, None] * C + i[None, :])
            a = tl.load(a_at, mask=there[:, None], other=0.0) if MASKED else tl.load(a_at)
        o += product(a, v, PRECISION, UPCAST)
        at = t * (HEADS * DV) + (i[:, None] * (HEADS * DV) + e[None, :])
        tl.store(OUT + at, (o * scale).to(OUT.dtype.element_ty), mask=there[:, None] & e_in[None, :])
    k = (k * (from_start if REVERSE else to_end)).to(k.dtype)
    S = S * tl.exp2(c_last)[:, None] + product(tl.trans(k), v, PRECISION, UPCAST)
    return S, c_last


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "scale", "HEADS"])
def vector_kernel(
    Q, K, V, A, G, STATES, DECAYS, TABLE, OUT, FINAL,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, total, tokens, length, per_sequence, scale, HEADS,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    LOCAL: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, heads, pieces). STATES: before each piece (SPLIT) or sequence, read; LOCAL writes a piece's
    own sum there, and its decays to DECAYS [pieces, HEADS, DK]. FINAL: the state after each sequence."""
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    n, begin, end, first, last_piece = bounds(TABLE, piece, tokens, length, per_sequence)
    ends = first if REVERSE else last_piece
    if LOCAL and ends:
        return
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    place = d[:, None] * DV + e[None, :]
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if not LOCAL:
        if STATES is not None:
            at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
            S += tl.load(STATES + at * (DK * DV) + place, mask=inside, other=0.0)
        Q += begin * stride_qt + (h // Q_GROUP) * stride_qh
        A += (h * total + begin) * C
        OUT += (begin * HEADS + h) * DV
    K += begin * stride_kt + (h // K_GROUP) * stride_kh
    V += begin * stride_vt + h * stride_vh
    G += (begin * HEADS + h) * DK
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    decayed = tl.zeros([BLOCK_K], tl.float32)
    if REVERSE and rest > 0:
        S, c_last = _chunk(
            S, Q, K, V, A, G, OUT, stride_qt, stride_kt, stride_vt, zero + whole * C, rest, i, d, e, scale, HEADS,
            DK, DV, BLOCK_K, BLOCK_V, C, LOCAL, REVERSE, True, PRECISION, UPCAST,
        )  # fmt: skip
        decayed += c_last
    for step in range(0, whole):
        S, c_last = _chunk(
            S, Q, K, V, A, G, OUT, stride_qt, stride_kt, stride_vt,
            (zero + (whole - 1 - step if REVERSE else step)) * C, C, i, d, e, scale, HEADS,
            DK, DV, BLOCK_K, BLOCK_V, C, LOCAL, REVERSE, False, PRECISION, UPCAST,
        )  # fmt: skip
        decayed += c_last
    if not REVERSE and rest > 0:
        S, c_last = _chunk(
            S, Q, K, V, A, G, OUT, stride_qt, stride_kt, stride_vt, zero + whole * C, rest, i, d, e, scale, HEADS,
            DK, DV, BLOCK_K, BLOCK_V, C, LOCAL, REVERSE, True, PRECISION, UPCAST,
        )  # fmt: skip
        decayed += c_last
    if LOCAL:
        at = piece.to(tl.int64) * HEADS + h
        tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
        if block == 0:
            tl.store(DECAYS + at * DK + d, decayed, mask=d < DK)
    else:
        if FINAL is not None:
            at = n.to(tl.int64) * HEADS + h
            tl.store(FINAL + at * (DK * DV) + place, S, mask=inside & ends)


def scores(
    q: Tensor, k: Tensor, sums: Tensor, heads: int, cut: Cut, config: scan_configs.VectorConfig
) -> Tensor:  # fmt: skip
    """A [heads, total, C] in q's dtype."""
    DK, C = q.shape[3], config.chunk
    a = torch.empty(heads, cut.total, C, dtype=q.dtype, device=q.device)
    vector_scores_kernel[(runtime.cdiv(cut.length, C), heads, cut.pieces)](
        q, k, sums, cut.table, a, *steps(q), *steps(k), cut.total, *cut.sizes, heads,
        K_GROUP=heads // q.shape[2], DK=DK, BLOCK_K=runtime.power_of_two(DK, 16), C=C,
        PRECISION=runtime.dot_precision(q.dtype), UPCAST=runtime.upcast(q.dtype),
        num_warps=config.scores_warps, num_stages=1,
    )  # fmt: skip
    return a


def vector_walk(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, sums: Tensor, start: Tensor | None, scale: float, reverse: bool,
    cut: Cut, config: scan_configs.VectorConfig, final: Tensor, out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """The output [B, T, heads, V], and the states before pieces (`start` where none is split). Fills `final`."""
    B, T, HV, DV = v.shape
    DK = q.shape[3]
    block_v = scan_configs.columns(DV, config.block_v, config.chunk, q.element_size())
    grid = (runtime.cdiv(DV, block_v), HV, cut.pieces)
    sizes = {
        "Q_GROUP": HV // q.shape[2], "K_GROUP": HV // k.shape[2], "DK": DK, "DV": DV,
        "BLOCK_K": runtime.power_of_two(DK, 16), "BLOCK_V": block_v, "C": config.chunk, "REVERSE": reverse,
        "SPLIT": cut.split, "PRECISION": runtime.dot_precision(q.dtype), "UPCAST": runtime.upcast(q.dtype),
        "num_warps": config.num_warps, "num_stages": config.num_stages,
    }  # fmt: skip
    strides = (*steps(q), *steps(k), *steps(v), cut.total, *cut.sizes, scale, HV)
    states = start
    if cut.split:
        states = torch.empty(cut.pieces, HV, DK, DV, dtype=torch.float32, device=q.device)
        decays = torch.empty(cut.pieces, HV, DK, dtype=torch.float32, device=q.device)
        vector_kernel[grid](
            None, k, v, None, sums, states, decays, cut.table, None, None, *strides, LOCAL=True, **sizes
        )  # fmt: skip
        join(states, decays, start, cut, VECTOR, reverse)
    out = torch.empty(B, T, HV, DV, dtype=out_dtype or v.dtype, device=q.device)
    vector_kernel[grid](q, k, v, a, sums, states, None, cut.table, out, final, *strides, LOCAL=False, **sizes)
    return out, states


def vector_forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, config: scan_configs.VectorConfig | None = None,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """o [B, T, HV, V], final state [N, HV, K, V], states before pieces (None: nothing is split)."""
    q, k, v = rows_of(q), rows_of(k), rows_of(v)
    HV, DK, DV = v.shape[2], q.shape[3], v.shape[3]
    config = config or scan_configs.vector(DK, DV, q.element_size())
    cut = Cut.fill(q, v, offsets, config, longest=LONGEST if gate else None)
    sums = decay_sums(g, cut, config.chunk)
    assert sums is not None
    final = start_of(initial, (cut.sequences, HV, DK, DV), q.device)
    a = scores(q, k, sums, HV, cut, config)
    o, states = vector_walk(q, k, v, a, sums, initial, scale, False, cut, config, final, out_dtype)
    return o, final, states if cut.split else None
