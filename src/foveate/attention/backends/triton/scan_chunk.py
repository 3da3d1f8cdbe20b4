"""Linear attention in chunks, one thread block per piece of a sequence, head and block of value channels.

    o_i = scale (exp(c_i) q_i S + sum_{j <= i} exp(c_i - c_j) (q_i . k_j) v_j)
    S  <- exp(c_L) S + sum_j exp(c_L - c_j) k_j^T v_j

S stays in registers, in float32; each chunk's queries, keys and values are read once per block of value channels. The
same walk backwards in time (REVERSE) gives

    o_j = scale (exp(c_L - c_j) q_j R + sum_{i >= j} exp(c_i - c_j) (q_j . k_i) v_i)
    R  <- exp(c_L) R + sum_i exp(c_i) k_i^T v_i

With roles exchanged these two are all three gradients of the first, so it has no other backward kernel:

    dq: walk(do, v, k), S transposed     dv: reverse walk(k, q, do), R     dk: reverse walk(v, do, q), R transposed

Cost per head: 2 T (C K + C V + 2 K V) FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime, scan_configs
from foveate.attention.backends.triton.scan_launch import Cut, steps
from foveate.attention.backends.triton.scan_parts import bounds, chunk_decay, decay_row, product, scores_between, tile


@triton.jit
def _chunk(
    S, Q, K, V, K2, V2, G, OUT, ADD, OTHER, ROWS,
    stride_qt, stride_kt, stride_vt, stride_k2t, stride_v2t, stride_xt,
    t, count, i, d, e, scale, HEADS,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
    C: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, MASKED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes the output and returns the next S."""
    there = i < count
    d_in, e_in = d < DK, e < DV
    FULL_K: tl.constexpr = DK == BLOCK_K
    FULL_V: tl.constexpr = DV % BLOCK_V == 0
    q = tile(Q + t * stride_qt, stride_qt, i, d, there, d_in, MASKED, FULL_K)
    k = tile(K + t * stride_kt, stride_kt, i, d, there, d_in, MASKED, FULL_K)
    v = tile(V + t * stride_vt, stride_vt, i, e, there, e_in, MASKED, FULL_V)
    c, c_last = i, 0.0
    if DECAY != 0:
        c, c_last = chunk_decay(G, t, i, count, DECAY, MASKED)
    scores = product(q, tl.trans(k), PRECISION, UPCAST)
    scores = scores_between(scores, c, i, REVERSE, STRICT, DECAY)
    o = product(q, S.to(q.dtype), PRECISION, UPCAST)
    if DECAY != 0:
        since = tl.minimum(c_last - c, 0.0) if REVERSE else c
        o = o * tl.exp2(since)[:, None]
    if K2 is not None:
        scores = scores * scale
    if OTHER is not None:
        # A token's own pair is in the rows of dq and of dk alike, and would only cancel.
        own = tl.sum(tl.where(i[:, None] == i[None, :], scores, 0.0), 1)
        scores = tl.where(i[:, None] == i[None, :], 0.0, scores)
    o += product(scores.to(v.dtype), v, PRECISION, UPCAST)
    written = v
    if DECAY != 0:
        weight = tl.exp2(c if REVERSE else tl.minimum(c_last - c, 0.0))
        S = S * tl.exp2(c_last)
        if K2 is not None:
            written = (v * (weight * scale)[:, None]).to(v.dtype)
        else:
            written = (v * weight[:, None]).to(v.dtype)
    elif K2 is not None:
        written = (v * scale).to(v.dtype)
    S += product(tl.trans(k), written, PRECISION, UPCAST)
    if K2 is not None:
        k2 = tile(K2 + t * stride_k2t, stride_k2t, i, d, there, d_in, MASKED, FULL_K)
        v2 = tile(V2 + t * stride_v2t, stride_v2t, i, e, there, e_in, MASKED, FULL_V)
        scores = product(q, tl.trans(k2), PRECISION, UPCAST)
        scores = scores_between(scores, c, i, REVERSE, True, DECAY)
        o += product((-scores).to(v2.dtype), v2, PRECISION, UPCAST)
        if DECAY != 0:
            S += product(tl.trans(k2), (v2 * -weight[:, None]).to(v2.dtype), PRECISION, UPCAST)
        else:
            S += product(tl.trans(k2), -v2, PRECISION, UPCAST)
    else:
        o = o * scale
    if OTHER is not None:
        x = tile(OTHER + t * stride_xt, stride_xt, i, e, there, e_in, MASKED, FULL_V)
        tl.store(ROWS + (t + i) * HEADS, tl.sum(o * x, 1), mask=there)
        if K2 is not None:
            o += own[:, None] * v
        else:
            o += (own * scale)[:, None] * v
    at = t * (HEADS * DV) + (i[:, None] * (HEADS * DV) + e[None, :])
    inside = there[:, None] & e_in[None, :]
    if ADD is not None:
        o += tl.load(ADD + at, mask=inside, other=0.0)
    if MASKED or not FULL_V:
        tl.store(OUT + at, o.to(OUT.dtype.element_ty), mask=inside)
    else:
        tl.store(OUT + at, o.to(OUT.dtype.element_ty))
    return S


@triton.jit(do_not_specialize=["total", "tokens", "length", "per_sequence", "scale", "HEADS"])
def scan_kernel(
    Q, K, V, K2, V2, G, STATES, TABLE, OUT, ADD, FINAL, OTHER, ROWS,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_k2t, stride_k2h, stride_v2t, stride_v2h, stride_xt, stride_xh,
    total, tokens, length, per_sequence, scale, HEADS,
    Q_GROUP: tl.constexpr, K_GROUP: tl.constexpr, V_GROUP: tl.constexpr, X_GROUP: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, C: tl.constexpr,
    DECAY: tl.constexpr, REVERSE: tl.constexpr, STRICT: tl.constexpr, SPLIT: tl.constexpr, TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Grid (value blocks, heads, pieces). STATES: before each piece (SPLIT) or sequence; FINAL: after each sequence.

    With K2 and V2 the state is also written by -k2^T v2, read only by earlier tokens (later ones unless REVERSE), and
    `scale` multiplies only what k and v wrote. OTHER: ROWS gets its row products with the output, without each token's
    own write.
    """
    block = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    n, begin, end, first, last_piece = bounds(TABLE, piece, tokens, length, per_sequence)
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_K)
    e = block * BLOCK_V + tl.arange(0, BLOCK_V)
    if TRANSPOSED:
        place = e[None, :] * DK + d[:, None]
    else:
        place = d[:, None] * DV + e[None, :]
    state_in = (d < DK)[:, None] & (e < DV)[None, :]
    S = tl.zeros([BLOCK_K, BLOCK_V], tl.float32)
    if STATES is not None:
        at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
        S += tl.load(STATES + at * (DK * DV) + place, mask=state_in, other=0.0)

    Q += begin * stride_qt + (h // Q_GROUP) * stride_qh
    K += begin * stride_kt + (h // K_GROUP) * stride_kh
    V += begin * stride_vt + (h // V_GROUP) * stride_vh
    if K2 is not None:
        K2 += begin * stride_k2t + h * stride_k2h
        V2 += begin * stride_v2t + (h // V_GROUP) * stride_v2h
    OUT += (begin * HEADS + h) * DV
    if ADD is not None:
        ADD += (begin * HEADS + h) * DV
    if OTHER is not None:
        OTHER += begin * stride_xt + (h // X_GROUP) * stride_xh
        ROWS += (block.to(tl.int64) * total + begin) * HEADS + h
    if DECAY != 0:
        G = decay_row(G, h, begin, total, C, DECAY)
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    # The loop's chunks are whole and need no masks; a part of a chunk stands at the piece's end.
    if REVERSE and rest > 0:
        t = zero + whole * C
        S = _chunk(
            S, Q, K, V, K2, V2, G, OUT, ADD, OTHER, ROWS,
            stride_qt, stride_kt, stride_vt, stride_k2t, stride_v2t, stride_xt, t, rest, i, d, e, scale,
            HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, REVERSE, STRICT, True, PRECISION, UPCAST,
        )  # fmt: skip
    for step in range(0, whole):
        t = (zero + (whole - 1 - step if REVERSE else step)) * C
        S = _chunk(
            S, Q, K, V, K2, V2, G, OUT, ADD, OTHER, ROWS,
            stride_qt, stride_kt, stride_vt, stride_k2t, stride_v2t, stride_xt, t, C, i, d, e, scale,
            HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, REVERSE, STRICT, False, PRECISION, UPCAST,
        )  # fmt: skip
    if not REVERSE and rest > 0:
        t = zero + whole * C
        S = _chunk(
            S, Q, K, V, K2, V2, G, OUT, ADD, OTHER, ROWS,
            stride_qt, stride_kt, stride_vt, stride_k2t, stride_v2t, stride_xt, t, rest, i, d, e, scale,
            HEADS, DK, DV, BLOCK_K, BLOCK_V, C, DECAY, REVERSE, STRICT, True, PRECISION, UPCAST,
        )  # fmt: skip
    if FINAL is not None:
        ends = first if REVERSE else last_piece
        at = n.to(tl.int64) * HEADS + h
        tl.store(FINAL + at * (DK * DV) + place, S, mask=state_in & ends)


@dataclass(frozen=True)
class Walk:
    """One launch of `scan_kernel`; tensors [B, T, heads, channels], `heads` of the output a multiple of each one's.

    states: [pieces or N, heads, K, V] float32 ([.., V, K] with `transposed`); None: zeros. second: k2, v2.
    other: gets row products with the output, but for what each token wrote itself.
    add: [B, T, heads, V] added to the output.
    """

    heads: int
    decay: int
    sums: Tensor | None
    cut: Cut
    scale: float
    reverse: bool = False
    strict: bool = False
    transposed: bool = False

    def run(
        self, q: Tensor, k: Tensor, v: Tensor, states: Tensor | None, *,
        out_dtype: torch.dtype | None = None, final: Tensor | None = None, other: Tensor | None = None,
        second: tuple[Tensor, Tensor] | None = None, add: Tensor | None = None,
        config: scan_configs.ScanConfig | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The output [B, T, heads, V], and the row products [B, T, heads] float32 where `other` is given."""
        B, T, _, DK = q.shape
        DV, cut = v.shape[-1], self.cut
        config = config or scan_configs.scan(DK, DV, q.element_size())
        block_k = runtime.power_of_two(DK, 16)
        block_v = scan_configs.columns(DV, config.block_v, config.chunk, q.element_size())
        blocks = runtime.cdiv(DV, block_v)
        out = torch.empty(B, T, self.heads, DV, dtype=out_dtype or q.dtype, device=q.device)
        rows = None
        if other is not None:
            rows = torch.empty(blocks, B, T, self.heads, dtype=torch.float32, device=q.device)
        k2, v2 = second or (None, None)
        scan_kernel[(blocks, self.heads, cut.pieces)](
            q, k, v, k2, v2, self.sums, states, cut.table, out, add, final, other, rows,
            *steps(q), *steps(k), *steps(v), *steps(k2), *steps(v2), *steps(other),
            cut.total, *cut.sizes, self.scale, self.heads,
            Q_GROUP=self.heads // q.shape[2], K_GROUP=self.heads // k.shape[2],
            V_GROUP=self.heads // v.shape[2], X_GROUP=1 if other is None else self.heads // other.shape[2],
            DK=DK, DV=DV, BLOCK_K=block_k, BLOCK_V=block_v, C=config.chunk,
            DECAY=self.decay, REVERSE=self.reverse, STRICT=self.strict, SPLIT=cut.split, TRANSPOSED=self.transposed,
            PRECISION=runtime.dot_precision(q.dtype), UPCAST=runtime.upcast(q.dtype),
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
        return out, None if rows is None else rows.sum(0)
