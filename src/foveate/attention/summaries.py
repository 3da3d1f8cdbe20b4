"""Summaries of chunks of keys: one vector or two per chunk, so that a query can ask many keys at once.

    chunks, real = in_chunks(keys, 16)       [..., N, D] -> [..., C, w, D], and which rows are keys
    mean(chunks, real)                       [..., C, D]     their mean
    bounds(chunks, real)                     [..., C, 2 D]   greatest and least of every feature   (Quest)
    attended(q, k, v)                        [..., C, D]     what the chunk's own queries attend to (LongHeads)
    centroids(keys, labels, C)               [..., C, D]     means of clusters, that are no runs    (Squeezed)

Rows where `real` (bool [..., C, w], None: all) is False count for nothing.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.softmax import attend
from foveate.attention.statistics import by_group


def in_chunks(x: Tensor, size: int) -> tuple[Tensor, Tensor | None]:
    """x [..., N, D] as chunks [..., C, size, D] of consecutive rows, and bool [C, size], which rows there are.

    The last chunk is filled with zeros; None where it is full.
    """
    n = x.shape[-2]
    count = -(-n // size)
    missing = count * size - n
    if not missing:
        return x.unflatten(-2, (count, size)), None
    real = torch.arange(count * size, device=x.device) < n
    return F.pad(x, (0, 0, 0, missing)).unflatten(-2, (count, size)), real.view(count, size)


def total(chunks: Tensor, real: Tensor | None = None, *, dtype: torch.dtype | None = None) -> Tensor:
    """Sums of chunks [..., C, w, D] -> [..., C, D] in `dtype`, by default that of the chunks."""
    return _shown(chunks, real, 0.0).sum(-2, dtype=dtype or chunks.dtype)


def mean(chunks: Tensor, real: Tensor | None = None) -> Tensor:
    """Means of chunks [..., C, w, D] -> [..., C, D] in their dtype; 0 for a chunk without rows."""
    if real is None:
        return total(chunks) / chunks.shape[-2]
    return total(chunks, real) / real.sum(-1).clamp_min(1)[..., None].to(chunks.dtype)


def bounds(chunks: Tensor, real: Tensor | None = None) -> Tensor:
    """Greatest and least of every feature, chunks [..., C, w, D] -> [..., C, 2 D]; -inf and inf for one without rows.

    sum over d of max(q_d greatest_d, q_d least_d) is no less than any q . k of the chunk.
    """
    greatest, least = (_shown(chunks, real, empty) for empty in (-torch.inf, torch.inf))
    return torch.cat((greatest.amax(-2), least.amin(-2)), -1)


def attended(q: Tensor, k: Tensor, v: Tensor, *, scale: float, per_query_head: bool = False) -> Tensor:
    """Keys of full chunks by their own queries, in two steps without a causal mask: [B, Hkv, C, D].

        u = mean over the w rows, and over a group's query heads, of softmax(q k^T scale) v
        c = softmax(u k^T scale) k

    q: [B, Hq, C, w, D], k, v: [B, Hkv, C, w, D], v as wide as k. per_query_head: each has its own, [B, Hq, C, D].
    """
    B, H, C = k.shape[:3]
    asking, keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
    asked = attend(asking, keys, values, scale=scale, causal=False).mean(2, keepdim=True)
    if not per_query_head:
        asked = by_group(asked, H)
    made: Tensor = attend(asked, keys, keys, scale=scale, causal=False)
    return made[:, :, 0].unflatten(0, (B, C)).transpose(1, 2)


def centroids(x: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Means of the rows in each cluster: x [..., n, D], labels int64 [..., n] -> [..., clusters, D] in x's dtype; 0 for
    an empty cluster. Sums are float32."""
    shape = (*x.shape[:-2], clusters)
    sums = torch.zeros(*shape, x.shape[-1], device=x.device)
    sums.scatter_add_(-2, labels[..., None].expand(x.shape), x.float())
    sizes = torch.zeros(shape, device=x.device).scatter_add_(-1, labels, torch.ones(labels.shape, device=x.device))
    return (sums / sizes.clamp_min(1.0)[..., None]).to(x.dtype)


def _shown(chunks: Tensor, real: Tensor | None, empty: float) -> Tensor:
    return chunks if real is None else chunks.masked_fill(~real[..., None], empty)
