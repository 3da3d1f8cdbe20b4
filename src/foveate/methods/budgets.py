"""Budgets: how many keys a head may keep, and which slots a score then keeps.

Counts are tokens per KV head. Ties go to the lower slot, so results are reproducible on every device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.base import Method
from foveate.options import option


@dataclass(frozen=True, kw_only=True)
class Budgeted(Method):
    """A method with a budget: a number of tokens, or a share of the prompt to drop."""

    budget: int = option(1024, "keys kept per KV head", at_least=1)
    ratio: float | None = option(
        None, "share of the prompt to drop, instead of budget: int(N (1 - ratio)) keys stay", at_least=0, below=1
    )

    def count(self, tokens: int | Tensor) -> int | Tensor:
        """Keys to keep of a prompt of `tokens` (an int, or [B] for rows of different length)."""
        if self.ratio is None:
            return tokens.clamp(max=self.budget) if isinstance(tokens, Tensor) else min(self.budget, tokens)
        if isinstance(tokens, Tensor):
            kept = (tokens.double() * (1.0 - self.ratio)).long()
            return torch.where(tokens > 0, kept.clamp_min(1), 0)
        return max(1, int(tokens * (1.0 - self.ratio)))


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
        threshold = scores.topk(count, dim=-1).values[..., -1:]
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


def pyramid_budget(layer: int, layers: int, capacity: int, window: int, beta: int, prompt: int) -> int:
    """PyramidKV: keys a layer keeps besides its window, falling linearly from the first layer to the last.

    capacity: mean keys per layer, the window included. Where prompt < 2 (capacity - window) every layer gets
    capacity - window.
    """
    room = capacity - window
    if prompt < 2 * room:
        return room
    least = room // beta
    most = 2 * room - least
    if most >= prompt - window:
        most = prompt - window
        least = 2 * room - most
    step = (most - least) // max(1, layers - 1)
    return most - layer * step
