"""Scores of one query per head against many keys, and the best of many scores: what every selection starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.attention.backends import cpp_scoring
from foveate.attention.shapes import match
from foveate.errors import ShapeError


def query_scores(q: Tensor, k: Tensor) -> Tensor:
    """Unscaled q . k of q [B, Hq, D] with k [B, Hkv, N, D]: [B, Hq, N] float32 (float64 for float64).

    On CPU without the C++ kernel one product per KV head: batched products of so few rows are 10 times slower in
    bfloat16 (11.3 against 1.2 ms at Hq 9, Hkv 3, N 32k, D 64; one core of a shared Zen 4, torch 2.13).
    """
    match(q=(q, "B Hq D"), k=(k, "B Hkv N D"))
    B, Hq, D = q.shape
    H, N = k.shape[1], k.shape[2]
    exact = torch.float64 if q.dtype == torch.float64 else torch.float32
    rows = q.reshape(B, H, Hq // H, D)
    if q.device.type != "cpu":
        return (rows @ k.transpose(-1, -2)).to(exact).view(B, Hq, N)
    if cpp_scoring.why_not(rows, k) is None:
        return cpp_scoring.scores(rows, k)
    scores = torch.empty(B, H, Hq // H, N, dtype=exact)
    for b in range(B):
        for h in range(H):
            scores[b, h] = torch.nn.functional.linear(rows[b, h], k[b, h])
    return scores.view(B, Hq, N)


def top_mask(scores: Tensor, count: int | Tensor) -> Tensor:
    """Bool like scores [..., N]: the `count` highest of each row; ties go to the lower index.

    count: an int, or a tensor that broadcasts to scores[..., 0]. Entries of -inf are never taken. O(N log k).
    """
    N = scores.shape[-1]
    if isinstance(count, int):
        if count >= N:
            return scores > -torch.inf
        if count <= 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        # Unsorted: only the least of the best is needed.
        threshold = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
        wanted: int | Tensor = count
    else:
        wanted = count.to(scores.device).expand(scores.shape[:-1])[..., None]
        ordered = scores.sort(dim=-1, descending=True).values
        threshold = ordered.gather(-1, (wanted - 1).clamp(0, N - 1))
        threshold = torch.where(wanted > 0, threshold, torch.inf)
    above = scores > threshold
    level = scores == threshold
    room = wanted - above.sum(-1, keepdim=True)
    mask = above | (level & (level.cumsum(-1) <= room))
    return mask & (scores > -torch.inf)


def slots_of(mask: Tensor) -> Tensor:
    """Ascending slots of the True entries of mask [B, H, N]: int64 [B, H, n], -1 beyond a row's own count."""
    counts = mask.sum(-1)
    most = int(counts.max())
    if bool((counts == most).all()):
        return mask.nonzero()[:, -1].view(*mask.shape[:-1], most)
    index = torch.full((*mask.shape[:-1], most), -1, dtype=torch.int64, device=mask.device)
    filled = torch.arange(most, device=mask.device) < counts[..., None]
    index[filled] = mask.nonzero()[:, -1]
    return index


def top_slots(scores: Tensor, count: int | Tensor) -> Tensor:
    """The slots of the `count` highest scores [B, H, N] of each row, ascending; ties go to the lower slot.

    count: an int, or a tensor that broadcasts to scores[..., 0]. Entries of -inf are never taken.
    Returns int64 [B, H, n], -1 beyond a row's own count: `slots_of(top_mask(scores, count))`.
    """
    if scores.dim() != 3:
        raise ShapeError(f"top_slots: scores {list(scores.shape)}, allowed: [B, H, N]")
    if cpp_scoring.why_not_top(scores) is not None:
        return slots_of(top_mask(scores, count))
    return cpp_scoring.top(scores, count)
