"""The delta rule in chunks, plain and with scalar decay, by the WY representation (arXiv 2406.06484, 2412.06464).

With A = strict lower triangle of (k_i . k_j) exp(c_i - c_j) and b = diag(beta), the errors M of a chunk's predictions,

    m_t = v_t - k_t (exp(g_t) S_{t-1}),        S_t = exp(g_t) S_{t-1} + k_t^T beta_t m_t

solve (I + A b) M = V - exp(c) K S. So

    T = (I + A b)^-1     U = T V     W = T (exp(c) K)                    `prepare_kernel`, all chunks at once
    M = U - W S          O = scale (exp(c) Q S + (scores of Q and K) b M)
    S <- exp(c_L) S + (exp(c_L - c) K)^T b M                              `delta_kernel`, chunk after chunk

The inverse doubles its blocks: where X inverts the diagonal blocks of one size, X - X B X inverts those of twice the
size, B being what lies between their halves. Every product is of numbers that belong to the inverse, so nothing large
cancels, unlike in the sum of powers of A b.
A piece of a sequence maps the state before it affinely; with S = 0 at its start, `delta_kernel` gives the shift, and
with S = I and U = 0 the matrix. `join_kernel` then carries states over the pieces.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.scan_configs import DeltaConfig
from foveate.attention.backends.triton.scan_launch import Cut, steps
from foveate.attention.backends.triton.scan_parts import (
    bounds,
    chunk_decay,
    product,
    scores_between,
    tile,
)


@triton.jit
def triangle_inverse(A, i, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 in float32 for a strictly triangular A [C, C], lower or upper; C is 16, 32, 64 or 128."""
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6 if C == 64 else 7
    row, column = i[:, None], i[None, :]
    X = tl.where(row == column, 1.0, tl.where(row >> 1 == column >> 1, -A, 0.0))
    for level in tl.static_range(1, LEVELS):
        across = (row >> (level + 1) == column >> (level + 1)) & (row >> level != column >> level)
        B = tl.where(across, A, 0.0)
        X -= tl.dot(tl.dot(X, B, input_precision=PRECISION), X, input_precision=PRECISION)
    return X


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "HEADS"])
def prepare_kernel(
    K, V, BETA, G, TABLE, W, U,
    stride_kt, stride_kh, stride_vt, stride_vh, stride_bt, stride_bh, total, tokens, length, per_sequence, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W [HEADS, total, DK] and U [HEADS, total, DV]. Grid (chunks, heads, pieces)."""
    h = tl.program_id(1).to(tl.int64)
    _, begin, end, _, _ = bounds(TABLE, tl.program_id(2), tokens, length, per_sequence)
    start = begin + tl.program_id(0).to(tl.int64) * C
    if start >= end:
        return
    count = tl.minimum(end - start, C).to(tl.int32)
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    there = i < count
    FULL_K: tl.constexpr = DK == BLOCK_K
    FULL_V: tl.constexpr = DV % BLOCK_V == 0
    k = tile(K + start * stride_kt + (h // K_GROUP) * stride_kh, stride_kt, i, d, there, d < DK, True, FULL_K)
    beta = tl.load(BETA + start * stride_bt + h * stride_bh + i * stride_bt, mask=there, other=0.0).to(tl.float32)
    gamma = 0.0
    if DECAY == 1:
        gamma = tl.load(G + h)
    c = i
    if DECAY != 0:
        c, _ = chunk_decay(G, h * total + start, i, count, gamma, C, DECAY, True)
    A = scores_between(product(k, tl.trans(k), PRECISION, UPCAST), c, i, False, True, DECAY)
    T = triangle_inverse(A * beta[None, :], i, C, SOLVE)
    TK = T
    if DECAY != 0:
        TK = T * tl.exp2(c)[None, :]
    w = product(TK.to(k.dtype), k, PRECISION, UPCAST).to(k.dtype)
    at = h * total + start
    tl.store(W + at * DK + (i[:, None] * DK + d[None, :]), w, mask=there[:, None] & (d < DK)[None, :])
    T = T.to(k.dtype)
    for block in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        e = block * BLOCK_V + tl.arange(0, BLOCK_V)
        v = tile(V + start * stride_vt + h * stride_vh, stride_vt, i, e, there, e < DV, True, FULL_V)
        u = product(T, v, PRECISION, UPCAST).to(v.dtype)
        tl.store(U + at * DV + (i[:, None] * DV + e[None, :]), u, mask=there[:, None] & (e < DV)[None, :])


@triton.jit
def _chunk(
    S, Q, K, W, U, BETA, G, OUT, ERRORS, stride_qt, stride_kt, stride_bt, t, count, i, d, e, gamma, scale, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, LOCAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes the output (unless LOCAL) and returns the next S."""
    there = i < count
    d_in, e_in = d < DK, e < DV
    FULL_K: tl.constexpr = DK == BLOCK_K
    # Columns of a map are beyond DV and read no U.
    FULL_V: tl.constexpr = DV % BLOCK_V == 0 and not LOCAL
    w = tile(W + t * DK, DK, i, d, there, d_in, MASKED, FULL_K)
    u = tile(U + t * DV, DV, i, e, there, e_in, MASKED, FULL_V)
    k = tile(K + t * stride_kt, stride_kt, i, d, there, d_in, MASKED, FULL_K)
    if MASKED:
        beta = tl.load(BETA + t * stride_bt + i * stride_bt, mask=there, other=0.0).to(tl.float32)
    else:
        beta = tl.load(BETA + t * stride_bt + i * stride_bt).to(tl.float32)
    c, c_last = i, 0.0
    if DECAY != 0:
        c, c_last = chunk_decay(G, t, i, count, gamma, C, DECAY, MASKED)
    before = S.to(w.dtype)
    m = u - product(w, before, PRECISION, UPCAST)
    weight = beta
    if DECAY != 0:
        weight = beta * tl.exp2(tl.minimum(c_last - c, 0.0))
        S = S * tl.exp2(c_last)
    if not LOCAL:
        q = tile(Q + t * stride_qt, stride_qt, i, d, there, d_in, MASKED, FULL_K)
        scores = scores_between(product(q, tl.trans(k), PRECISION, UPCAST), c, i, False, False, DECAY)
        o = product(q, before, PRECISION, UPCAST)
        if DECAY != 0:
            o = o * tl.exp2(c)[:, None]
        o += product(scores.to(k.dtype), (m * beta[:, None]).to(k.dtype), PRECISION, UPCAST)
        inside = there[:, None] & e_in[None, :]
        at = t * (HEADS * DV) + (i[:, None] * (HEADS * DV) + e[None, :])
        tl.store(OUT + at, (o * scale).to(OUT.dtype.element_ty), mask=inside)
        if ERRORS is not None:
            tl.store(ERRORS + at, m.to(ERRORS.dtype.element_ty), mask=inside)
    S += product(tl.trans(k), (m * weight[:, None]).to(k.dtype), PRECISION, UPCAST)
    return S


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "scale", "HEADS"])
def delta_kernel(
    Q, K, W, U, BETA, G, STATES, MAPS, TABLE, OUT, ERRORS, FINAL,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_bt, stride_bh, total, tokens, length, per_sequence, scale, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    LOCAL: tl.constexpr, EVERY: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, heads, pieces), LOCAL: (value blocks + key blocks, heads, pieces).

    STATES: before each piece (SPLIT) or sequence, read; LOCAL writes a piece's own sum there, and its matrix to MAPS;
    EVERY: of the last piece too, whose matrix only a backward pass needs.
    ERRORS [total, HEADS, DV]: M. FINAL: the state after each sequence.
    """
    BLOCKS_V: tl.constexpr = (DV + BLOCK_V - 1) // BLOCK_V
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    n, begin, end, _, last_piece = bounds(TABLE, piece, tokens, length, per_sequence)
    if LOCAL and not EVERY and last_piece:
        return
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    place = d[:, None] * DV + e[None, :]
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    column = e - BLOCKS_V * BLOCK_V
    if LOCAL:
        S += tl.where(d[:, None] == column[None, :], 1.0, 0.0)
    else:
        if STATES is not None:
            at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
            S += tl.load(STATES + at * (DK * DV) + place, mask=inside, other=0.0)
    if not LOCAL:
        Q += begin * stride_qt + (h // K_GROUP) * stride_qh
        OUT += (begin * HEADS + h) * DV
        if ERRORS is not None:
            ERRORS += (begin * HEADS + h) * DV
    K += begin * stride_kt + (h // K_GROUP) * stride_kh
    W += (h * total + begin) * DK
    U += (h * total + begin) * DV
    BETA += begin * stride_bt + h * stride_bh
    gamma = 0.0
    if DECAY == 1:
        gamma = tl.load(G + h)
    elif DECAY == 2:
        G += h * total + begin
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    for step in range(0, whole):
        S = _chunk(
            S, Q, K, W, U, BETA, G, OUT, ERRORS, stride_qt, stride_kt, stride_bt, (zero + step) * C, C, i, d, e,
            gamma, scale, HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, False, PRECISION, UPCAST,
        )  # fmt: skip
    if rest > 0:
        S = _chunk(
            S, Q, K, W, U, BETA, G, OUT, ERRORS, stride_qt, stride_kt, stride_bt, zero + whole * C, rest, i, d, e,
            gamma, scale, HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, True, PRECISION, UPCAST,
        )  # fmt: skip
    at = piece.to(tl.int64) * HEADS + h
    if LOCAL:
        tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
        in_map = (d < DK)[:, None] & ((column >= 0) & (column < DK))[None, :]
        tl.store(MAPS + at * (DK * DK) + d[:, None] * DK + column[None, :], S, mask=in_map)
    else:
        if FINAL is not None:
            at = n.to(tl.int64) * HEADS + h
            tl.store(FINAL + at * (DK * DV) + place, S, mask=inside & last_piece)


@triton.jit(do_not_specialize=["per_sequence", "HEADS"])
def join_kernel(
    STATES, MAPS, START, FIRST, per_sequence, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    REVERSE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Pieces' sums into states before them, in place: S <- map S + sum. REVERSE: after them, by the maps' transposes.

    Grid (value blocks, heads, sequences).
    """
    h = tl.program_id(1)
    n = tl.program_id(2)
    d = tl.arange(0, BLOCK_K)
    e = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    place = d[:, None] * DV + e[None, :]
    if REVERSE:
        map_place = d[None, :] * DK + d[:, None]
    else:
        map_place = d[:, None] * DK + d[None, :]
    map_in = (d < DK)[:, None] & (d < DK)[None, :]
    if FIRST is not None:
        first = tl.load(FIRST + n).to(tl.int32)
        pieces = tl.load(FIRST + n + 1).to(tl.int32) - first
    else:
        first, pieces = n * per_sequence, per_sequence
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if START is not None:
        S += tl.load(START + (n.to(tl.int64) * HEADS + h) * (DK * DV) + place, mask=inside, other=0.0)
    zero = tl.full([], 0, tl.int64)
    for step in range(0, pieces):
        piece = first + (pieces - 1 - step if REVERSE else step)
        at = (zero + piece) * HEADS + h
        more = step < pieces - 1
        own = tl.load(STATES + at * (DK * DV) + place, mask=inside & more, other=0.0)
        matrix = tl.load(MAPS + at * (DK * DK) + map_place, mask=map_in & more, other=0.0)
        tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
        S = own + tl.dot(matrix, S, input_precision=PRECISION)


def join(states: Tensor, maps: Tensor, start: Tensor | None, cut: Cut, reverse: bool, precision: str) -> None:
    """Run `join_kernel` on states [pieces, heads, K, V] and maps [pieces, heads, K, K]."""
    _, heads, DK, DV = states.shape
    block_v = min(16, runtime.power_of_two(DV, 16))
    join_kernel[(triton.cdiv(DV, block_v), heads, cut.sequences)](
        states, maps, start, cut.first, cut.per_sequence, heads,
        DK=DK, DV=DV, BLOCK_K=runtime.power_of_two(DK, 16), BLOCK_V=block_v, REVERSE=reverse,
        PRECISION=precision, num_warps=8, num_stages=1,
    )  # fmt: skip


def prepare(
    k: Tensor, v: Tensor, beta: Tensor, sums: Tensor | None, decay: int, cut: Cut, config: DeltaConfig
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W [HV, total, K] and U [HV, total, V] of all chunks."""
    HV, DK, DV = v.shape[2], k.shape[3], v.shape[3]
    w = torch.empty(HV, cut.total, DK, dtype=k.dtype, device=k.device)
    u = torch.empty(HV, cut.total, DV, dtype=k.dtype, device=k.device)
    prepare_kernel[(triton.cdiv(cut.length, config.chunk), HV, cut.pieces)](
        k, v, beta, sums, cut.table, w, u, *steps(k), *steps(v), beta.stride(1), beta.stride(2),
        cut.total, *cut.sizes, HV, K_GROUP=HV // k.shape[2], DK=DK, DV=DV,
        BLOCK_K=runtime.power_of_two(DK, 16), BLOCK_V=min(64, runtime.power_of_two(DV, 16)), C=config.chunk,
        DECAY=decay, PRECISION=runtime.dot_precision(k.dtype), SOLVE=config.solve, UPCAST=runtime.upcast(k.dtype),
        num_warps=config.prepare_warps, num_stages=1,
    )  # fmt: skip
    return w, u
