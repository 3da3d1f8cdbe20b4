"""The delta rule in chunks, plain and with scalar decay, by the WY representation (arXiv 2406.06484, 2412.06464).

With A = strict lower triangle of (k_i . k_j) exp(c_i - c_j) and b = diag(beta), the errors M of a chunk's predictions,

    m_t = v_t - k_t (exp(g_t) S_{t-1}),        S_t = exp(g_t) S_{t-1} + k_t^T beta_t m_t

solve (I + A b) M = V - exp(c) K S. So

    T = (I + A b)^-1     U = T V     W = T (exp(c) K)
    P = scale (lower triangle of (q_i . k_j) exp(c_i - c_j)) b           `prepare_kernel`, all chunks at once
    M = U - W S          O = scale exp(c) Q S + P M
    S <- exp(c_L) S + K^T (exp(c_L - c) b) M                             `delta_kernel`, chunk after chunk

What does not read the state is prepared, since chunks wait for each other, and blocks of values would repeat it. The
walk holds S, M and O transposed: rows of S and of M are then left operands of their products straight from registers,
and a step passes nothing through shared memory but what it reads.

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
from foveate.attention.backends.triton.scan_configs import DeltaConfig, columns
from foveate.attention.backends.triton.scan_launch import Cut, steps
from foveate.attention.backends.triton.scan_parts import between, bounds, chunk_decay, decay_row, product, tile


@triton.jit
def slot_of(begin, piece, C: tl.constexpr):
    """Place of a piece's first chunk among whole chunks: each piece before it has at most one that is not whole."""
    return begin // C + piece


@triton.jit
def triangle_inverse(A, i, C: tl.constexpr, PRECISION: tl.constexpr):
    """(I + A)^-1 in float32 for a strictly triangular A [C, C], lower or upper; C is 16, 32, 64 or 128.

    PRECISION: of the products' operands: "bf16", or one that `tl.dot` knows.
    """
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6 if C == 64 else 7
    row, column = i[:, None], i[None, :]
    X = tl.where(row == column, 1.0, tl.where(row >> 1 == column >> 1, -A, 0.0))
    for level in tl.static_range(1, LEVELS):
        across = (row >> (level + 1) == column >> (level + 1)) & (row >> level != column >> level)
        B = tl.where(across, A, 0.0)
        if PRECISION == "bf16":
            half = X.to(tl.bfloat16)
            X -= tl.dot(tl.dot(half, B.to(tl.bfloat16)).to(tl.bfloat16), half)
        else:
            X -= tl.dot(tl.dot(X, B, input_precision=PRECISION), X, input_precision=PRECISION)
    return X


@triton.jit(do_not_specialize=["total", "slots", "tokens", "length", "per_sequence", "scale", "HEADS"])
def prepare_kernel(
    Q, K, V, BETA, G, TABLE, P, W, U, WEIGHTS,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_bt, stride_bh,
    total, slots, tokens, length, per_sequence, scale, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """P [HEADS, total, C], W [HEADS, total, DK] and WEIGHTS [HEADS, total], exp(c_L - c) b; U [HEADS, slots, DV, C],
    each chunk's transposed (see `slot_of`).

    Grid (chunks, heads, pieces).
    """
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    _, begin, end, _, _ = bounds(TABLE, piece, tokens, length, per_sequence)
    start = begin + tl.program_id(0).to(tl.int64) * C
    if start >= end:
        return
    count = tl.minimum(end - start, C).to(tl.int32)
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    there = i < count
    FULL_K: tl.constexpr = DK == BLOCK_K
    FULL_V: tl.constexpr = DV % BLOCK_V == 0
    BLOCK_D: tl.constexpr = BLOCK_K if BLOCK_K < 64 else 64
    Q += start * stride_qt + (h // K_GROUP) * stride_qh
    K += start * stride_kt + (h // K_GROUP) * stride_kh
    q = tile(Q, stride_qt, i, d, there, d < DK, True, FULL_K)
    k = tile(K, stride_kt, i, d, there, d < DK, True, FULL_K)
    beta = tl.load(BETA + start * stride_bt + h * stride_bh + i * stride_bt, mask=there, other=0.0).to(tl.float32)
    at = h * total + start
    c, weights = i, beta
    if DECAY != 0:
        c, c_last = chunk_decay(decay_row(G, h, start, total, C, DECAY), 0, i, count, DECAY, True)
        weights = beta * tl.exp2(tl.minimum(c_last - c, 0.0))
    tl.store(WEIGHTS + at + i, weights, mask=there)
    seen = between(c, i, False, False, DECAY) * beta[None, :]
    p = product(q, tl.trans(k), PRECISION, UPCAST) * seen * scale
    tl.store(P + at * C + (i[:, None] * C + i[None, :]), p.to(P.dtype.element_ty), mask=there[:, None])
    A = tl.where(i[:, None] > i[None, :], product(k, tl.trans(k), PRECISION, UPCAST) * seen, 0.0)
    T = triangle_inverse(A, i, C, SOLVE)
    TK = T
    if DECAY != 0:
        TK = T * tl.exp2(c)[None, :]
    TK = TK.to(k.dtype)
    # Keys are read again (near by in the cache): held through the inverse they would fill registers.
    for block in tl.static_range(BLOCK_K // BLOCK_D):
        part = block * BLOCK_D + tl.arange(0, BLOCK_D)
        k = tile(K, stride_kt, i, part, there, part < DK, True, FULL_K)
        w = product(TK, k, PRECISION, UPCAST).to(k.dtype)
        tl.store(W + at * DK + (i[:, None] * DK + part[None, :]), w, mask=there[:, None] & (part < DK)[None, :])
    T = T.to(k.dtype)
    U += (h * slots + slot_of(begin, piece, C) + tl.program_id(0)) * (DV * C)
    for block in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        e = block * BLOCK_V + tl.arange(0, BLOCK_V)
        v = tile(V + start * stride_vt + h * stride_vh, stride_vt, i, e, there, e < DV, True, FULL_V)
        # Transposed after the product: a transposed result as an operand is miscompiled for Hopper (Triton 3.6.0).
        u = tl.trans(product(T, v, PRECISION, UPCAST).to(v.dtype))
        tl.store(U + (e[:, None] * C + i[None, :]), u, mask=(e < DV)[:, None])


@triton.jit
def _keep(X, at, x, there, inside, MASKED: tl.constexpr, FULL: tl.constexpr):
    if MASKED or not FULL:
        tl.store(X + at, x.to(X.dtype.element_ty), mask=there[:, None] & inside[None, :])
    else:
        tl.store(X + at, x.to(X.dtype.element_ty))


@triton.jit
def _chunk(
    S, Q, K, P, W, U, WEIGHTS, G, OUT, ERRORS, stride_qt, stride_kt, t, count, i, d, e, scale, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, LOCAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes the output (unless LOCAL) and returns the next S [V, K]."""
    there = i < count
    d_in, e_in = d < DK, e < DV
    FULL_K: tl.constexpr = DK == BLOCK_K
    # Rows of a map are beyond DV and read no U.
    FULL_V: tl.constexpr = DV % BLOCK_V == 0 and not LOCAL
    w = tile(W + t * DK, DK, i, d, there, d_in, MASKED, FULL_K)
    # Columns past the end hold zeros.
    u = tile(U + t * DV, C, e, i, e_in, there, not FULL_V, True)
    k = tile(K + t * stride_kt, stride_kt, i, d, there, d_in, MASKED, FULL_K)
    if MASKED:
        weights = tl.load(WEIGHTS + t + i, mask=there, other=0.0)
    else:
        weights = tl.load(WEIGHTS + t + i)
    factor = scale
    if DECAY != 0:
        c, c_last = chunk_decay(G, t, i, count, DECAY, MASKED)
        factor = (scale * tl.exp2(c))[None, :]
    before = S.to(w.dtype)
    m = u - product(before, tl.trans(w), PRECISION, UPCAST)
    if DECAY != 0:
        S = S * tl.exp2(c_last)
    S += product((m * weights[None, :]).to(k.dtype), k, PRECISION, UPCAST)
    if not LOCAL:
        q = tile(Q + t * stride_qt, stride_qt, i, d, there, d_in, MASKED, FULL_K)
        p_at = P + t * C + (i[:, None] * C + i[None, :])
        if MASKED:
            p = tl.load(p_at, mask=there[:, None], other=0.0)
        else:
            p = tl.load(p_at)
        o = product(before, tl.trans(q), PRECISION, UPCAST) * factor
        o += product(m.to(p.dtype), tl.trans(p), PRECISION, UPCAST)
        at = t * (HEADS * DV) + (i[:, None] * (HEADS * DV) + e[None, :])
        _keep(OUT, at, tl.trans(o), there, e_in, MASKED, FULL_V)
        if ERRORS is not None:
            _keep(ERRORS, at, tl.trans(m), there, e_in, MASKED, FULL_V)
    return S


@triton.jit(do_not_specialize=["total", "slots", "tokens", "length", "per_sequence", "scale", "HEADS"])
def delta_kernel(
    Q, K, P, W, U, WEIGHTS, G, STATES, MAPS, TABLE, OUT, ERRORS, FINAL,
    stride_qt, stride_qh, stride_kt, stride_kh, total, slots, tokens, length, per_sequence, scale, HEADS,
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
    place = d[None, :] * DV + e[:, None]
    inside = (d < DK)[None, :] & (e < DV)[:, None]
    S = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    column = e - BLOCKS_V * BLOCK_V
    if LOCAL:
        S += tl.where(d[None, :] == column[:, None], 1.0, 0.0)
    else:
        if STATES is not None:
            at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
            S += tl.load(STATES + at * (DK * DV) + place, mask=inside, other=0.0)
    if not LOCAL:
        Q += begin * stride_qt + (h // K_GROUP) * stride_qh
        P += (h * total + begin) * C
        OUT += (begin * HEADS + h) * DV
        if ERRORS is not None:
            ERRORS += (begin * HEADS + h) * DV
    K += begin * stride_kt + (h // K_GROUP) * stride_kh
    W += (h * total + begin) * DK
    U += (h * slots + slot_of(begin, piece, C)) * (DV * C)
    WEIGHTS += h * total + begin
    if DECAY != 0:
        G = decay_row(G, h, begin, total, C, DECAY)
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    for step in range(0, whole):
        S = _chunk(
            S, Q, K, P, W, U, WEIGHTS, G, OUT, ERRORS, stride_qt, stride_kt, (zero + step) * C, C, i, d, e,
            scale, HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, False, PRECISION, UPCAST,
        )  # fmt: skip
    if rest > 0:
        S = _chunk(
            S, Q, K, P, W, U, WEIGHTS, G, OUT, ERRORS, stride_qt, stride_kt, zero + whole * C, rest, i, d, e,
            scale, HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, True, PRECISION, UPCAST,
        )  # fmt: skip
    at = piece.to(tl.int64) * HEADS + h
    if LOCAL:
        tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
        in_map = (d < DK)[None, :] & ((column >= 0) & (column < DK))[:, None]
        tl.store(MAPS + at * (DK * DK) + d[None, :] * DK + column[:, None], S, mask=in_map)
    else:
        if FINAL is not None:
            at = n.to(tl.int64) * HEADS + h
            tl.store(FINAL + at * (DK * DV) + place, S, mask=inside & last_piece)


@triton.jit
def _map_columns(MAP, d, x, more, DK: tl.constexpr, REVERSE: tl.constexpr):
    """Rows d and columns x of a map; of its transpose with REVERSE. Zeros unless `more`."""
    if REVERSE:
        at = MAP + (x[None, :] * DK + d[:, None])
    else:
        at = MAP + (d[:, None] * DK + x[None, :])
    return tl.load(at, mask=(d < DK)[:, None] & (x < DK)[None, :] & more, other=0.0)


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
    # A map of more than 128 x 128 does not fit in shared memory.
    STEP: tl.constexpr = 128 if BLOCK_K > 128 else BLOCK_K
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
        if STEP == BLOCK_K:
            matrix = _map_columns(MAPS + at * (DK * DK), d, d, more, DK, REVERSE)
            tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
            S = own + tl.dot(matrix, S, input_precision=PRECISION)
        else:
            # Rows of S are picked by reading back what was just written.
            tl.debug_barrier()
            tl.store(STATES + at * (DK * DV) + place, S, mask=inside)
            tl.debug_barrier()
            S = own
            for part in tl.static_range(BLOCK_K // STEP):
                x = part * STEP + tl.arange(0, STEP)
                matrix = _map_columns(MAPS + at * (DK * DK), d, x, more, DK, REVERSE)
                at_rows = STATES + at * (DK * DV) + (x[:, None] * DV + e[None, :])
                rows = tl.load(at_rows, mask=(x < DK)[:, None] & (e < DV)[None, :], other=0.0)
                S += tl.dot(matrix, rows, input_precision=PRECISION)


def join(states: Tensor, maps: Tensor, start: Tensor | None, cut: Cut, reverse: bool, precision: str) -> None:
    """Run `join_kernel` on states [pieces, heads, K, V] and maps [pieces, heads, K, K]."""
    _, heads, DK, DV = states.shape
    block_v = min(16, runtime.power_of_two(DV, 16))
    join_kernel[(runtime.cdiv(DV, block_v), heads, cut.sequences)](
        states, maps, start, cut.first, cut.per_sequence, heads,
        DK=DK, DV=DV, BLOCK_K=runtime.power_of_two(DK, 16), BLOCK_V=block_v, REVERSE=reverse,
        PRECISION=precision, num_warps=8, num_stages=2 if DK <= 128 and precision == "tf32" else 1,
    )  # fmt: skip


def solve_precision(config: DeltaConfig) -> str:
    """The interpreter's `tl.dot` cannot read bfloat16."""
    return "ieee" if runtime.INTERPRET and config.solve == "bf16" else config.solve


def prepare(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, sums: Tensor | None, decay: int, scale: float, cut: Cut,
    config: DeltaConfig,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """P [HV, total, chunk], W [HV, total, K], U [HV, slots, V, chunk], weights [HV, total] float32, of all chunks."""
    HV, DK, DV, size = v.shape[2], k.shape[3], v.shape[3], k.element_size()
    p = torch.empty(HV, cut.total, config.chunk, dtype=k.dtype, device=k.device)
    weights = torch.empty(HV, cut.total, dtype=torch.float32, device=k.device)
    w = torch.empty(HV, cut.total, DK, dtype=k.dtype, device=k.device)
    slots = cut.total // config.chunk + cut.pieces
    u = torch.empty(HV, slots, DV, config.chunk, dtype=k.dtype, device=k.device)
    prepare_kernel[(runtime.cdiv(cut.length, config.chunk), HV, cut.pieces)](
        q, k, v, beta, sums, cut.table, p, w, u, weights, *steps(q), *steps(k), *steps(v), beta.stride(1),
        beta.stride(2), cut.total, slots, *cut.sizes, scale, HV, K_GROUP=HV // k.shape[2], DK=DK, DV=DV,
        BLOCK_K=columns(DK, 256, config.chunk, size), BLOCK_V=columns(DV, 64, config.chunk, size), C=config.chunk,
        DECAY=decay, PRECISION=runtime.dot_precision(k.dtype), SOLVE=solve_precision(config),
        UPCAST=runtime.upcast(k.dtype), num_warps=config.prepare_warps, num_stages=1, maxnreg=config.prepare_registers,
    )  # fmt: skip
    return p, w, u, weights
