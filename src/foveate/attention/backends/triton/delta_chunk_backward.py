"""The gradient of the delta rule's errors, in chunks, backwards in time.

With R_t the gradient of S_t (what o_t reads of it included), E_t = dv_t = beta_t r_t and r_t = k_t R_t, the recurrence
runs like the forward one, R_{t-1} = exp(g_t) (R_t - k_t^T E_t) + scale q_{t-1}^T do_{t-1}. In a chunk, with
A' = strict upper triangle of (k_i . k_j) exp(c_j - c_i), P' = upper triangle of scale (k_i . q_j) exp(c_j - c_i), and
R the gradient of the state after the chunk,

    T' = (I + A' b)^-1      U' = T' P' dO      W' = T' (exp(c_L - c) K)         `prepare_back_kernel`
    r = U' + W' R           E = b r
    R <- exp(c_L) R + scale (exp(c) Q)^T dO - (exp(c) K)^T E                    `delta_back_kernel`

Given M (see `delta_chunk`) and E, every other gradient is a walk of `scan_chunk`: see `delta_launch`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.delta_chunk import solve_precision, triangle_inverse
from foveate.attention.backends.triton.scan_configs import DeltaConfig, columns
from foveate.attention.backends.triton.scan_launch import Cut, steps
from foveate.attention.backends.triton.scan_parts import bounds, chunk_decay, decay_row, product, scores_between, tile


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "scale", "HEADS"])
def prepare_back_kernel(
    Q, K, DO, BETA, G, TABLE, W, U,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh, stride_bt, stride_bh,
    total, tokens, length, per_sequence, scale, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    PRECISION: tl.constexpr, SOLVE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W' [HEADS, total, DK] and U' [HEADS, total, DV]. Grid (chunks, heads, pieces)."""
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
    q = tile(Q + start * stride_qt + (h // K_GROUP) * stride_qh, stride_qt, i, d, there, d < DK, True, FULL_K)
    k = tile(K + start * stride_kt + (h // K_GROUP) * stride_kh, stride_kt, i, d, there, d < DK, True, FULL_K)
    beta = tl.load(BETA + start * stride_bt + h * stride_bh + i * stride_bt, mask=there, other=0.0).to(tl.float32)
    c, c_last = i, 0.0
    if DECAY != 0:
        c, c_last = chunk_decay(decay_row(G, h, start, total, C, DECAY), 0, i, count, DECAY, True)
    A = scores_between(product(k, tl.trans(k), PRECISION, UPCAST), c, i, True, True, DECAY)
    T = triangle_inverse(A * beta[None, :], i, C, SOLVE)
    P = scores_between(product(k, tl.trans(q), PRECISION, UPCAST), c, i, True, False, DECAY) * scale
    TP = product(T.to(k.dtype), P.to(k.dtype), PRECISION, UPCAST).to(k.dtype)
    if DECAY != 0:
        T = T * tl.exp2(tl.minimum(c_last - c, 0.0))[None, :]
    w = product(T.to(k.dtype), k, PRECISION, UPCAST).to(k.dtype)
    at = h * total + start
    tl.store(W + at * DK + (i[:, None] * DK + d[None, :]), w, mask=there[:, None] & (d < DK)[None, :])
    for block in tl.static_range((DV + BLOCK_V - 1) // BLOCK_V):
        e = block * BLOCK_V + tl.arange(0, BLOCK_V)
        do = tile(DO + start * stride_ot + h * stride_oh, stride_ot, i, e, there, e < DV, True, FULL_V)
        u = product(TP, do, PRECISION, UPCAST).to(do.dtype)
        tl.store(U + at * DV + (i[:, None] * DV + e[None, :]), u, mask=there[:, None] & (e < DV)[None, :])


@triton.jit
def _chunk(
    R, Q, K, DO, W, U, BETA, G, ERRORS, OUT, ROWS, stride_qt, stride_kt, stride_ot, stride_bt,
    t, count, i, d, e, scale, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, LOCAL: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes E and the rows of M r (unless LOCAL), returns R before it."""
    there = i < count
    d_in, e_in = d < DK, e < DV
    FULL_K: tl.constexpr = DK == BLOCK_K
    FULL_V: tl.constexpr = DV % BLOCK_V == 0
    w = tile(W + t * DK, DK, i, d, there, d_in, MASKED, FULL_K)
    u = tile(U + t * DV, DV, i, e, there, e_in, MASKED, FULL_V)
    q = tile(Q + t * stride_qt, stride_qt, i, d, there, d_in, MASKED, FULL_K)
    k = tile(K + t * stride_kt, stride_kt, i, d, there, d_in, MASKED, FULL_K)
    do = tile(DO + t * stride_ot, stride_ot, i, e, there, e_in, MASKED, FULL_V)
    if MASKED:
        beta = tl.load(BETA + t * stride_bt + i * stride_bt, mask=there, other=0.0).to(tl.float32)
    else:
        beta = tl.load(BETA + t * stride_bt + i * stride_bt).to(tl.float32)
    r = u + product(w, R.to(w.dtype), PRECISION, UPCAST)
    weight = tl.full([C], 1.0, tl.float32)
    if DECAY != 0:
        c, c_last = chunk_decay(G, t, i, count, DECAY, MASKED)
        weight = tl.exp2(c)
        R = R * tl.exp2(c_last)
    R += product(tl.trans(q), (do * (weight * scale)[:, None]).to(q.dtype), PRECISION, UPCAST)
    R += product(tl.trans(k), (r * (weight * -beta)[:, None]).to(k.dtype), PRECISION, UPCAST)
    if not LOCAL:
        at = t * (HEADS * DV) + (i[:, None] * (HEADS * DV) + e[None, :])
        inside = there[:, None] & e_in[None, :]
        m = tl.load(ERRORS + at, mask=inside, other=0.0)
        tl.store(ROWS + (t + i) * HEADS, tl.sum(r * m, 1), mask=there)
        tl.store(OUT + at, (r * beta[:, None]).to(OUT.dtype.element_ty), mask=inside)
    return R


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "scale", "HEADS"])
def delta_back_kernel(
    Q, K, DO, W, U, BETA, G, ERRORS, STATES, TABLE, OUT, ROWS, FIRST,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_ot, stride_oh, stride_bt, stride_bh,
    total, tokens, length, per_sequence, scale, HEADS,
    K_GROUP: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr, DECAY: tl.constexpr,
    LOCAL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, heads, pieces). STATES: R after each piece or sequence; LOCAL writes a piece's own sum there.

    OUT: E. ROWS [value blocks, total, HEADS]: products of r with the errors M. FIRST: R before each sequence.
    """
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    n, begin, end, first, _ = bounds(TABLE, piece, tokens, length, per_sequence)
    if LOCAL and first:
        return
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    place = d[:, None] * DV + e[None, :]
    inside = (d < DK)[:, None] & (e < DV)[None, :]
    R = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if not LOCAL:
        if STATES is not None:
            at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
            R += tl.load(STATES + at * (DK * DV) + place, mask=inside, other=0.0)
        OUT += (begin * HEADS + h) * DV
        ERRORS += (begin * HEADS + h) * DV
        ROWS += (block.to(tl.int64) * total + begin) * HEADS + h
    Q += begin * stride_qt + (h // K_GROUP) * stride_qh
    K += begin * stride_kt + (h // K_GROUP) * stride_kh
    DO += begin * stride_ot + h * stride_oh
    W += (h * total + begin) * DK
    U += (h * total + begin) * DV
    BETA += begin * stride_bt + h * stride_bh
    if DECAY != 0:
        G = decay_row(G, h, begin, total, C, DECAY)
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    if rest > 0:
        R = _chunk(
            R, Q, K, DO, W, U, BETA, G, ERRORS, OUT, ROWS, stride_qt, stride_kt, stride_ot, stride_bt,
            zero + whole * C, rest, i, d, e, scale,
            HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, True, PRECISION, UPCAST,
        )  # fmt: skip
    for step in range(0, whole):
        R = _chunk(
            R, Q, K, DO, W, U, BETA, G, ERRORS, OUT, ROWS, stride_qt, stride_kt, stride_ot, stride_bt,
            (zero + whole - 1 - step) * C, C, i, d, e, scale,
            HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, LOCAL, False, PRECISION, UPCAST,
        )  # fmt: skip
    if LOCAL:
        tl.store(STATES + (piece.to(tl.int64) * HEADS + h) * (DK * DV) + place, R, mask=inside)
    else:
        tl.store(FIRST + (n.to(tl.int64) * HEADS + h) * (DK * DV) + place, R, mask=inside & first)


def prepare_back(
    q: Tensor, k: Tensor, do: Tensor, beta: Tensor, sums: Tensor | None, decay: int, scale: float, cut: Cut,
    config: DeltaConfig,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """W' [HV, total, K] and U' [HV, total, V] of all chunks."""
    HV, DK, DV, size = do.shape[2], k.shape[3], do.shape[3], k.element_size()
    w = torch.empty(HV, cut.total, DK, dtype=k.dtype, device=k.device)
    u = torch.empty(HV, cut.total, DV, dtype=k.dtype, device=k.device)
    prepare_back_kernel[(runtime.cdiv(cut.length, config.chunk), HV, cut.pieces)](
        q, k, do, beta, sums, cut.table, w, u, *steps(q), *steps(k), *steps(do), beta.stride(1), beta.stride(2),
        cut.total, *cut.sizes, scale, HV, K_GROUP=HV // k.shape[2], DK=DK, DV=DV,
        BLOCK_K=columns(DK, 256, config.chunk, size), BLOCK_V=columns(DV, 64, config.chunk, size), C=config.chunk,
        DECAY=decay, PRECISION=runtime.dot_precision(k.dtype), SOLVE=solve_precision(config),
        UPCAST=runtime.upcast(k.dtype), num_warps=config.prepare_warps, num_stages=1,
    )  # fmt: skip
    return w, u
