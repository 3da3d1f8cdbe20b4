"""Budgets: how many keys a head may keep. Counts are tokens per KV head."""

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
