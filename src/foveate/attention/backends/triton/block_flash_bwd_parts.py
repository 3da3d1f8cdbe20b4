"""What the gradient kernels of block-sparse attention do with one tile of queries and one of keys.

The formulas stand in block_flash_bwd.py. Keys' gradients are made from transposed scores: no product is transposed.
"""

from __future__ import annotations

import triton
import triton.language as tl

from foveate.attention.backends.triton.block_flash import products, sigmoid


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr, UPCAST: tl.constexpr):
    """acc + a b, a in float32 rounded to b's dtype."""
    if UPCAST:
        return acc + tl.dot(a, b.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a.to(b.dtype), b, acc, input_precision=PRECISION)


@triton.jit
def _weights(scores, lse, scale, bias, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr):
    """exp(s - lse) or sigmoid(s + bias), from scores as `products` gives them; lse broadcasts over keys."""
    if SIGMOID:
        return sigmoid(scores, scale, bias, SOFTCAP)
    elif SOFTCAP:
        return tl.exp2(scores - lse)
    else:
        return tl.exp2(scores * scale - lse)


@triton.jit
def _score_gradient(p, dp, delta, scores, softcap, SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr):
    if SIGMOID:
        ds = p * (1.0 - p) * dp
    else:
        ds = p * (dp - delta)
    if SOFTCAP:
        t = scores / softcap
        ds = ds * (1.0 - t * t)
    return ds


@triton.jit
def query_tile(
    k, v, see, acc, q, do, lse, delta, scale, softcap, bias,
    SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """acc plus the gradient of queries q [M, D] from keys and values [N, .]; see: pairs that count, None for all."""
    scores = products(q, k, scale, softcap, SOFTCAP, PRECISION, UPCAST)
    p = _weights(scores, lse[:, None], scale, bias, SOFTCAP, SIGMOID)
    if see is not None:
        p = tl.where(see, p, 0.0)
    dp = products(do, v, 0.0, 0.0, False, PRECISION, UPCAST)
    ds = _score_gradient(p, dp, delta[:, None], scores, softcap, SOFTCAP, SIGMOID)
    return _dot(ds, k, acc, PRECISION, UPCAST)


@triton.jit
def key_tile(
    start, see, k, v, dk, dv_acc, slot, q_at, do_at, lse_at, delta_at, stride_qm, m, n, scale, softcap, bias,
    MASKED: tl.constexpr, EVEN: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_M: tl.constexpr,
    SOFTCAP: tl.constexpr, SIGMOID: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Gradients of a tile of keys and values from BLOCK_M queries; EVEN: no tile ends past the last query.

    see: keys that these queries read, None for all. MASKED: none after the query.
    """
    r = start + tl.arange(0, BLOCK_M)
    d = tl.arange(0, BLOCK_D)
    dv = tl.arange(0, BLOCK_DV)
    q_row = q_at + r.to(tl.int64)[:, None] * stride_qm + d[None, :]
    do_row = do_at + r.to(tl.int64)[:, None] * DV + dv[None, :]
    lse = tl.zeros([BLOCK_M], tl.float32)
    delta = tl.zeros([BLOCK_M], tl.float32)
    if EVEN:
        q = tl.load(q_row) if D == BLOCK_D else tl.load(q_row, mask=(d < D)[None, :], other=0.0)
        do = tl.load(do_row) if DV == BLOCK_DV else tl.load(do_row, mask=(dv < DV)[None, :], other=0.0)
        if not SIGMOID:
            lse = tl.load(lse_at + r)
            delta = tl.load(delta_at + r)
    else:
        # A query past the last one has dO = 0, so its weights add nothing whatever they are.
        live = r < m
        q = tl.load(q_row, mask=live[:, None] & (d < D)[None, :], other=0.0)
        do = tl.load(do_row, mask=live[:, None] & (dv < DV)[None, :], other=0.0)
        if not SIGMOID:
            lse = tl.load(lse_at + r, mask=live, other=float("inf"))
            delta = tl.load(delta_at + r, mask=live, other=0.0)
    scores = products(k, q, scale, softcap, SOFTCAP, PRECISION, UPCAST)
    p = _weights(scores, lse[None, :], scale, bias, SOFTCAP, SIGMOID)
    if MASKED:
        p = tl.where(slot[:, None] <= (n - m + r)[None, :], p, 0.0)
    if see is not None:
        p = tl.where(see[:, None], p, 0.0)
    dv_acc = _dot(p, do, dv_acc, PRECISION, UPCAST)
    dp = products(v, do, 0.0, 0.0, False, PRECISION, UPCAST)
    ds = _score_gradient(p, dp, delta[None, :], scores, softcap, SOFTCAP, SIGMOID)
    return _dot(ds, q, dk, PRECISION, UPCAST), dv_acc
