"""Evicting after every forward: what H2O, TOVA and the norm- and similarity-based methods share.

A decode step reads the old cache and its own key, so one key more than the budget; then the worst key goes. Its slot
is filled with the last one, in place (`Drop`); where more than one key must go, the best are gathered (`Keep`). Ties
go to the lower position, however the slots are ordered by then.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.scoring import slots_of, top_mask
from foveate.methods.cache import Change, Drop, Keep
from foveate.methods.prompt import PromptKeep, hide_padding
from foveate.methods.step import Step
from foveate.options import option


@dataclass
class PromptLength:
    """tokens: real tokens of the prompt, an int, or int64 [B] where padding makes rows differ."""

    tokens: int | Tensor


@dataclass(frozen=True, kw_only=True)
class Evictor(PromptKeep):
    """Holds at most `budget` keys per KV head after every forward, or evicts once, at the end of the prompt.

    With `ratio` the budget is counted from the prompt (its first forward, or all its pieces) and then stays.
    """

    when: str = option(
        "always",
        "evict after every forward, or once, at the end of the prompt (what follows is then kept whole)",
        one_of=("always", "prompt"),
    )

    @property
    def steady(self) -> bool:  # type: ignore[override]
        return self.when == "prompt"

    def keep(self, step: Step) -> Change | None:
        if self.when == "prompt":
            return super().keep(step)
        count = self.allowed(step)
        return evict(step, self.score(step), count) if too_many(step, count) else None

    def prompt_ends(self, step: Step) -> Change | None:
        return super().prompt_ends(step) if self.when == "prompt" else None

    def allowed(self, step: Step) -> int | Tensor:
        """Keys that may stay now: an int, or [B]."""
        if self.when == "prompt":
            return self.count(step.real_tokens())
        if self.ratio is None:
            return self.budget
        in_prompt = step.phase == "prefill" or (step.run.chunked and step.phase == "extend")
        if in_prompt or not isinstance(step.state, PromptLength):
            step.state = PromptLength(newest(step) + 1 if step.cache.holes else step.cache.seen)
        return self.count(step.state.tokens)


def newest(step: Step) -> Tensor:
    """Position of each sequence's last token: int64 [B]."""
    return step.query_positions().amax(1)


def slot_positions(step: Step) -> Tensor:
    """Position of every slot, -1 where it is empty: int [B or 1, 1 or Hkv, N]."""
    return step.positions.keys(step.cache.stored, step.q.device)


def too_many(step: Step, count: int | Tensor) -> bool:
    """Whether some head holds more than `count` keys, or slots enough for that."""
    if isinstance(count, int):
        return step.cache.stored > count
    real = torch.as_tensor(step.real_tokens(), device=count.device)
    return step.cache.stored > int(count.max()) or bool((real > count).any())


def evict(step: Step, scores: Tensor, count: int | Tensor) -> Change:
    """Leave the `count` best-scored keys of each head, scores [B, Hkv, N]; empty slots go before any key."""
    at = slot_positions(step)
    scores = hide_padding(scores, step)
    if isinstance(count, int) and not step.cache.holes:
        if step.cache.stored == count + 1:
            return Drop(worst(scores, at))
        return Keep(slots_of(best(scores, at, count, step.cache.ordered)))
    limit = torch.as_tensor(count, device=at.device).reshape(-1, 1)
    over = (at >= 0).sum(-1) - limit
    if step.cache.stored == int(limit.max()) + 1 and int(over.max()) <= 1:
        # A sequence that is not over its limit gives an empty slot instead.
        spared = (over <= 0)[..., None]
        return Drop(worst(torch.where((at < 0) & ~spared, torch.inf, scores), at))
    return Keep(slots_of(best(scores, at, limit, step.cache.ordered)))


def worst(scores: Tensor, at: Tensor) -> Tensor:
    """Slot of the lowest score, of equals the latest position: scores [B, H, N] -> int64 [B, H, 1]."""
    lowest = scores == scores.amin(-1, keepdim=True)
    return torch.where(lowest, at, -2).argmax(-1, keepdim=True)


def best(scores: Tensor, at: Tensor, count: int | Tensor, ordered: bool) -> Tensor:
    """Bool like scores [B, H, N]: the `count` highest, of equals the earliest positions."""
    if ordered:
        return top_mask(scores, count)
    order = at.expand_as(scores).argsort(dim=-1, stable=True)
    chosen = top_mask(scores.gather(-1, order), count)
    return torch.zeros_like(chosen).scatter(-1, order, chosen)


def force(scores: Tensor, forced: Tensor) -> Tensor:
    """Give the slots where `forced` (bool, broadcastable) more than any other score has."""
    return torch.where(forced, float(scores.max()) + 1.0, scores)
