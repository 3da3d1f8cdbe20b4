"""Statistics of attention weights, computed in pieces: never M x N in memory.

Every function recomputes scores for the query rows it needs; none asks a kernel for its weights. GQA query heads
stay apart ([B, Hq, ...]); reduce them with `by_group`.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType

import torch
from torch import Tensor

from foveate.attention.backends.triton import availability
from foveate.attention.positions import Positions
from foveate.attention.shapes import match

PIECE_ENTRIES = 1 << 23


def _pieces(
    q: Tensor, k: Tensor, scale: float, positions: Positions, window: int | None, rows: int | None
) -> Iterator[tuple[slice, Tensor]]:
    """Masked scores [B, Hq, m, N] float32 (float64 for float64), row piece by row piece."""
    B, Hq, M, D = q.shape
    Hkv, N = k.shape[1], k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    step = rows or max(1, PIECE_ENTRIES // max(1, B * Hq * N))
    for start in range(0, M, step):
        part = slice(start, min(start + step, M))
        m = part.stop - part.start
        folded = q[:, :, part].reshape(B, Hkv, (Hq // Hkv) * m, D)
        scores = (folded @ k.transpose(-1, -2)).to(exact).mul_(scale).view(B, Hkv, Hq // Hkv, m, N)
        visible = positions.visible(M, N, q.device, window=window, rows=part)
        yield part, scores.masked_fill_(~visible[:, :, None], -torch.inf).view(B, Hq, m, N)


def _kernels(q: Tensor, k: Tensor, positions: Positions | None) -> tuple[ModuleType, Tensor | None] | None:
    """The Triton reductions and the positions of the queries, where they serve the call."""
    positions = positions or Positions()
    if positions.k is not None or q.shape[-1] > 256 or not availability.serves(q, k):
        return None
    return importlib.import_module("foveate.attention.backends.triton.score_reduce"), positions.q


def _softmax(scores: Tensor) -> Tensor:
    top = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - top.masked_fill(top == -torch.inf, 0.0))
    return weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(weights.dtype).tiny)


def attention_rows(
    q: Tensor, k: Tensor, *, scale: float, positions: Positions | None = None, window: int | None = None
) -> Tensor:
    """Softmax weights [B, Hq, M, N] float32 of a few queries q [B, Hq, M, D] over k [B, Hkv, N, D].

    For the last query or an observation window; its result is M x N, so M must be small.
    """
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    pieces = [_softmax(scores) for _, scores in _pieces(q, k, scale, positions or Positions(), window, None)]
    return torch.cat(pieces, dim=2)


def column_mass(
    q: Tensor, k: Tensor, *, scale: float, positions: Positions | None = None, window: int | None = None
) -> Tensor:
    """Weight each key receives, summed over the queries: [B, Hq, N] float32. O(M N D) time, O(N) memory."""
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    fast = _kernels(q, k, positions)
    if fast is not None:
        return fast[0].column_mass(q, k, scale=scale, window=window, q_positions=fast[1])
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    total = torch.zeros(*q.shape[:2], k.shape[2], dtype=exact, device=q.device)
    for _, scores in _pieces(q, k, scale, positions or Positions(), window, None):
        total += _softmax(scores).sum(2)
    return total


def entropy(
    q: Tensor, k: Tensor, *, scale: float, positions: Positions | None = None, window: int | None = None
) -> Tensor:
    """Entropy of each query's weights in nats: [B, Hq, M] float32; 0 for a query that sees nothing."""
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    rows = []
    for _, scores in _pieces(q, k, scale, positions or Positions(), window, None):
        weights = _softmax(scores)
        rows.append(-torch.xlogy(weights, weights).sum(-1))
    return torch.cat(rows, dim=2)


def log_sum_exp(
    q: Tensor, k: Tensor, *, scale: float, positions: Positions | None = None, window: int | None = None
) -> Tensor:
    """Natural log of each query's softmax denominator: [B, Hq, M] float32, -inf when it sees nothing."""
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    fast = _kernels(q, k, positions)
    if fast is not None:
        return fast[0].log_sum_exp(q, k, scale=scale, window=window, q_positions=fast[1])
    pieces = _pieces(q, k, scale, positions or Positions(), window, None)
    return torch.cat([torch.logsumexp(scores, -1) for _, scores in pieces], dim=2)


def top_keys(
    q: Tensor,
    k: Tensor,
    count: int,
    *,
    scale: float,
    positions: Positions | None = None,
    window: int | None = None,
) -> tuple[Tensor, Tensor]:
    """The `count` keys with most weight for each query: weights and slots, both [B, Hq, M, count]."""
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    weights, slots = [], []
    for _, scores in _pieces(q, k, scale, positions or Positions(), window, None):
        top = _softmax(scores).topk(min(count, k.shape[2]), dim=-1)
        weights.append(top.values)
        slots.append(top.indices)
    return torch.cat(weights, 2), torch.cat(slots, 2)


def block_mass(
    q: Tensor,
    k: Tensor,
    *,
    block_m: int,
    block_n: int,
    scale: float,
    positions: Positions | None = None,
    window: int | None = None,
) -> Tensor:
    """Mean weight that a query block puts on a key block: [B, Hq, ceil(M / block_m), ceil(N / block_n)]."""
    match(q=(q, "B Hq M D"), k=(k, "B Hkv N D"))
    fast = _kernels(q, k, positions) if block_m <= 128 and block_n % 16 == 0 else None
    if fast is not None:
        sizes = {"block_m": block_m, "block_n": block_n}
        return fast[0].block_mass(q, k, **sizes, scale=scale, window=window, q_positions=fast[1])
    cols = -(-k.shape[2] // block_n)
    rows = []
    for _, scores in _pieces(q, k, scale, positions or Positions(), window, block_m):
        weights = torch.nn.functional.pad(_softmax(scores), (0, cols * block_n - k.shape[2]))
        rows.append(weights.unflatten(-1, (cols, block_n)).sum(-1).mean(2))
    return torch.stack(rows, dim=2)


def by_group(x: Tensor, kv_heads: int, reduce: str = "mean") -> Tensor:
    """Reduce [B, Hq, ...] over the query heads of each KV group: "mean", "max" or "sum" -> [B, Hkv, ...]."""
    grouped = x.unflatten(1, (kv_heads, -1))
    if reduce == "mean":
        return grouped.mean(2)
    if reduce == "sum":
        return grouped.sum(2)
    if reduce == "max":
        return grouped.amax(2)
    raise ValueError(f"reduce={reduce!r}, allowed: 'mean', 'max', 'sum'")
