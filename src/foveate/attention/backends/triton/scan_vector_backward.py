"""Gradients of linear attention with one decay per key channel.

dv is `vector_kernel` backwards in time. dq and dk have the decay on their own channels: with P_ij = do_i . v_j,

    dq_i = scale (sum_{j <= i} P_ij exp(c_i - c_j) k_j + exp(c_i) (do_i S^T))
    dk_j = scale (sum_{i >= j} P_ij exp(c_i - c_j) q_i + exp(c_L - c_j) (v_j R^T))

over the same halvings as the scores: one product per level, whose result gets the rows' factor. As in
`scan_chunk_backward`, dg_t = <S_T, R_T> + sum_{i >= t} (q_i dq_i - k_i dk_i), here per channel.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from foveate.attention.backends.triton import runtime, scan_configs
from foveate.attention.backends.triton.scan_chunk_backward import LONGEST, fold, gate_gradient, start_of
from foveate.attention.backends.triton.scan_launch import Cut, decay_sums, rows_of, steps
from foveate.attention.backends.triton.scan_parts import bounds, product, tile
from foveate.attention.backends.triton.scan_vector import half_decay, scores, vector_walk


@triton.jit
def _chunk(
    S, X, Y, Z, G, OTHER, OUT, ROWS, stride_xt, stride_yt, stride_zt, stride_rt, t, count, i, d, e, scale, HEADS,
    DV: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr,
    REVERSE: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """The chunk of `count` tokens from t on: writes rows of the gradient and returns the next S."""
    LEVELS: tl.constexpr = 4 if C == 16 else 5 if C == 32 else 6 if C == 64 else 7
    there = i < count
    d_in, e_in = d < DV, e < DK
    FULL_V: tl.constexpr = DV == BLOCK_V
    FULL_K: tl.constexpr = DK % BLOCK_K == 0
    x = tile(X + t * stride_xt, stride_xt, i, d, there, d_in, MASKED, FULL_V)
    y = tile(Y + t * stride_yt, stride_yt, i, d, there, d_in, MASKED, FULL_V)
    z = tile(Z + t * stride_zt, stride_zt, i, e, there, e_in, MASKED, FULL_K)
    G += t * (HEADS * DK)
    c = tile(G, HEADS * DK, i, e, there, e_in, MASKED, FULL_K)
    c_last = tl.load(G + (count - 1) * (HEADS * DK) + e, mask=e_in, other=0.0)
    from_start = tl.exp2(c)
    to_end = tl.exp2(tl.minimum(c_last[None, :] - c, 0.0))
    row, column = i[:, None], i[None, :]
    P = product(x, tl.trans(y), PRECISION, UPCAST)
    o = product(x, S.to(x.dtype), PRECISION, UPCAST) * (to_end if REVERSE else from_start)
    for level in tl.static_range(LEVELS):
        factor, upper = half_decay(G, c, i, e, e_in, HEADS * DK, count, level)
        weighed = z * factor
        if REVERSE:
            weighed = tl.where(upper, weighed, 0.0)
        else:
            weighed = tl.where(upper, 0.0, weighed)
        same = tl.where(row >> (level + 1) == column >> (level + 1), P, 0.0)
        part = product(same.to(z.dtype), weighed.to(z.dtype), PRECISION, UPCAST) * factor
        if REVERSE:
            o += tl.where(upper, 0.0, part)
        else:
            o += tl.where(upper, part, 0.0)
    at = t * (HEADS * DK) + (i[:, None] * (HEADS * DK) + e[None, :])
    inside = there[:, None] & e_in[None, :]
    if ROWS is not None:
        other = tile(OTHER + t * stride_rt, stride_rt, i, e, there, e_in, MASKED, FULL_K)
        tl.store(ROWS + at, o * scale * other, mask=inside)
    o += tl.sum(tl.where(row == column, P, 0.0), 1)[:, None] * z
    tl.store(OUT + at, (o * scale).to(OUT.dtype.element_ty), mask=inside)
    z = (z * (from_start if REVERSE else to_end)).to(z.dtype)
    return S * tl.exp2(c_last)[None, :] + product(tl.trans(y), z, PRECISION, UPCAST)


@triton.jit(do_not_specialize=["tokens", "length", "per_sequence", "scale", "HEADS"])
def vector_back_kernel(
    X, Y, Z, G, OTHER, STATES, TABLE, OUT, ROWS,
    stride_xt, stride_xh, stride_yt, stride_yh, stride_zt, stride_zh, stride_rt, stride_rh,
    tokens, length, per_sequence, scale, HEADS,
    Z_GROUP: tl.constexpr, DV: tl.constexpr, DK: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_K: tl.constexpr,
    C: tl.constexpr, REVERSE: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """OUT [total, HEADS, DK]: dq from X = do, Y = v, Z = k; REVERSE: dk from X = v, Y = do, Z = q.

    ROWS [total, HEADS, DK] float32: OUT without each token's own pair, times OTHER (q or k), for the gates' gradient.
    STATES [.., DK, DV]: S before, or R after, each piece (SPLIT) or sequence. Grid (key blocks, heads, pieces).
    """
    h = tl.program_id(1).to(tl.int64)
    piece = tl.program_id(2)
    n, begin, end, _, _ = bounds(TABLE, piece, tokens, length, per_sequence)
    i = tl.arange(0, C)
    d = tl.arange(0, BLOCK_V)
    e = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    S = tl.zeros([BLOCK_V, BLOCK_K], tl.float32)
    if STATES is not None:
        at = (piece if SPLIT else n).to(tl.int64) * HEADS + h
        inside = (d < DV)[:, None] & (e < DK)[None, :]
        S += tl.load(STATES + at * (DK * DV) + (e[None, :] * DV + d[:, None]), mask=inside, other=0.0)
    X += begin * stride_xt + h * stride_xh
    Y += begin * stride_yt + h * stride_yh
    Z += begin * stride_zt + (h // Z_GROUP) * stride_zh
    if ROWS is not None:
        OTHER += begin * stride_rt + (h // Z_GROUP) * stride_rh
        ROWS += (begin * HEADS + h) * DK
    G += (begin * HEADS + h) * DK
    OUT += (begin * HEADS + h) * DK
    size = (end - begin).to(tl.int32)
    whole = size // C
    rest = size % C
    zero = tl.full([], 0, tl.int64)
    if REVERSE and rest > 0:
        S = _chunk(
            S, X, Y, Z, G, OTHER, OUT, ROWS, stride_xt, stride_yt, stride_zt, stride_rt,
            zero + whole * C, rest, i, d, e, scale, HEADS,
            DV, DK, BLOCK_V, BLOCK_K, C, REVERSE, True, PRECISION, UPCAST,
        )  # fmt: skip
    for step in range(0, whole):
        S = _chunk(
            S, X, Y, Z, G, OTHER, OUT, ROWS, stride_xt, stride_yt, stride_zt, stride_rt,
            (zero + (whole - 1 - step if REVERSE else step)) * C, C, i, d, e, scale, HEADS,
            DV, DK, BLOCK_V, BLOCK_K, C, REVERSE, False, PRECISION, UPCAST,
        )  # fmt: skip
    if not REVERSE and rest > 0:
        S = _chunk(
            S, X, Y, Z, G, OTHER, OUT, ROWS, stride_xt, stride_yt, stride_zt, stride_rt,
            zero + whole * C, rest, i, d, e, scale, HEADS,
            DV, DK, BLOCK_V, BLOCK_K, C, REVERSE, True, PRECISION, UPCAST,
        )  # fmt: skip


def _back_walk(
    x: Tensor, y: Tensor, z: Tensor, other: Tensor | None, sums: Tensor, states: Tensor | None, scale: float,
    reverse: bool, cut: Cut, config: scan_configs.VectorConfig,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    B, T, HV, DV = x.shape
    DK = z.shape[3]
    block_k = scan_configs.columns(DK, config.block_v, config.chunk, x.element_size())
    out = torch.empty(B, T, HV, DK, dtype=torch.float32 if z.shape[2] < HV else z.dtype, device=x.device)
    rows = None if other is None else torch.empty(B, T, HV, DK, dtype=torch.float32, device=x.device)
    vector_back_kernel[(runtime.cdiv(DK, block_k), HV, cut.pieces)](
        x, y, z, sums, other, states, cut.table, out, rows,
        *steps(x), *steps(y), *steps(z), *steps(other), *cut.sizes, scale, HV,
        Z_GROUP=HV // z.shape[2], DV=DV, DK=DK, BLOCK_V=runtime.power_of_two(DV, 16), BLOCK_K=block_k,
        C=config.chunk, REVERSE=reverse, SPLIT=cut.split,
        PRECISION=runtime.dot_precision(x.dtype), UPCAST=runtime.upcast(x.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out, rows


def vector_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float,
    offsets: Sequence[int] | None, gate: bool, final: Tensor, states: Tensor | None,
    do: Tensor, dfinal: Tensor | None, config: scan_configs.VectorConfig | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
    """Gradients of q, k, v, g (None unless `gate`) and of the initial state."""
    q, k, v, do = rows_of(q), rows_of(k), rows_of(v), rows_of(do.to(q.dtype))
    HV, DK, DV = v.shape[2], q.shape[3], v.shape[3]
    config = config or scan_configs.vector(DK, DV, q.element_size())
    cut = Cut.fill(q, v, offsets, config, longest=LONGEST if gate else None)
    sums = decay_sums(g, cut, config.chunk)
    assert sums is not None
    end = None if dfinal is None else dfinal.contiguous() / scale
    dstart = start_of(end, (cut.sequences, HV, DK, DV), q.device)
    a = scores(q, k, sums, HV, cut, config)
    dv, R = vector_walk(k, q, do, a, sums, end, scale, True, cut, config, dstart)
    before = states if cut.split else initial
    dq, q_rows = _back_walk(do, v, k, q if gate else None, sums, before, scale, False, cut, config)
    dk, k_rows = _back_walk(v, do, q, k if gate else None, sums, R, scale, True, cut, config)
    dg = None
    if gate:
        assert q_rows is not None
        assert k_rows is not None
        dg = gate_gradient(q_rows - k_rows, before, final, R, scale, cut, g)
    return fold(dq, q), fold(dk, k), dv, dg, dstart * scale
