"""Methods that decide once, at the end of the prompt, what stays.

`score` gives every stored key a number; the best stay. In a chunked prompt the last queries are carried along, and
the decision waits for the end.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.scoring import top_slots
from foveate.attention.statistics import attention_rows, by_group
from foveate.methods.budgets import Budgeted
from foveate.methods.cache import Change, Keep
from foveate.methods.step import Step
from foveate.options import option


@dataclass
class Tail:
    """The last queries of an unfinished prompt: q [B, Hq, w, D], their positions [B, w]."""

    q: Tensor
    positions: Tensor


@dataclass(frozen=True, kw_only=True)
class PromptKeep(Budgeted):
    """Keeps the best-scored keys of the prompt; what comes later is kept whole."""

    evicts: ClassVar[bool] = True
    steady: ClassVar[bool] = True

    @property
    def observed(self) -> int:
        """How many of the last queries `score` needs."""
        return 0

    def score(self, step: Step) -> Tensor:
        """Importance of every slot, [B, Hkv, N] float32; forced slots get more than any other."""
        raise TypeError(f"{type(self).__name__} has no score")

    def choose(self, step: Step) -> Change | None:
        """What stays, given a step that holds the whole prompt."""
        tokens = step.real_tokens()
        count = self.count(tokens)
        if self._keeps_all(count, tokens):
            return None
        scores = hide_padding(self.score(step), step)
        if isinstance(count, Tensor):
            count = count[:, None]
        return Keep(top_slots(scores, count, tight=True))

    @staticmethod
    def _keeps_all(count: int | Tensor, tokens: int | Tensor) -> bool:
        return bool(torch.as_tensor(count >= tokens).all())

    def note(self, step: Step) -> None:
        """Carry what the end of a chunked prompt will need; the default carries the last queries."""
        if not self.observed:
            return
        q, at = step.q[:, :, -self.observed :], step.query_positions()[:, -self.observed :]
        held = step.state
        if isinstance(held, Tail) and q.shape[2] < self.observed:
            q = torch.cat((held.q, q), dim=2)[:, :, -self.observed :]
            at = torch.cat((held.positions, at), dim=1)[:, -self.observed :]
        step.state = Tail(q.clone(), at.clone())

    def keep(self, step: Step) -> Change | None:
        if step.run.chunked:
            if step.phase != "decode":
                self.note(step)
            return None
        return self.choose(step) if step.phase == "prefill" else None

    def prompt_ends(self, step: Step) -> Change | None:
        held = step.state
        if isinstance(held, Tail):
            step = dataclasses.replace(step, q=held.q, q_positions=held.positions)
        change = self.choose(step)
        step.cache.states.pop(step.member, None)
        return change


@dataclass(frozen=True, kw_only=True)
class WindowVotes(PromptKeep):
    """Scores by the attention that an observation window, the last queries of the prompt, pays to every key."""

    window: int = option(64, "last queries of the prompt that vote; their own keys always stay", at_least=1)
    kernel: int = option(5, "width over which neighbouring votes are pooled, odd", at_least=1)
    pool: str = option("avg", "how neighbouring votes are pooled", one_of=("avg", "max"))
    reduce: str = option(
        "mean", "how the query heads of a group are reduced, before pooling", one_of=("mean", "max", "sum")
    )

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise self.refuse("kernel", "an odd number")

    @property
    def observed(self) -> int:
        return self.window

    def votes(self, step: Step) -> Tensor:
        """Pooled votes for the keys before the window: [B, Hkv, N - window] float32."""
        weights = window_weights(step, self.window)
        mass = by_group(weights.mean(2), step.kv_heads, self.reduce)
        return pool_votes(mass[..., : step.cache.stored - self.window], self.kernel, self.pool)

    def score(self, step: Step) -> Tensor:
        if step.cache.stored <= self.window:
            return torch.ones(*step.cache.shape, step.cache.stored, device=step.q.device)
        votes = self.votes(step)
        # The window itself always stays: it gets more than any vote.
        return F.pad(votes, (0, self.window), value=float(votes.max()) + 1.0)


def window_weights(step: Step, window: int) -> Tensor:
    """Softmax weights [B, Hq, w, N] of the last `window` queries."""
    positions = step.positions
    if positions.q is not None:
        positions = dataclasses.replace(positions, q=positions.q[:, -window:])
    return attention_rows(step.q[:, :, -window:], step.k, scale=step.scale, positions=positions, window=step.window)


def pool_votes(votes: Tensor, kernel: int, pool: str) -> Tensor:
    """Smooth votes [B, H, N] over neighbouring keys; average pooling counts the padding."""
    if kernel == 1 or votes.shape[-1] == 0:
        return votes
    pooled = F.avg_pool1d if pool == "avg" else F.max_pool1d
    return pooled(votes, kernel, stride=1, padding=kernel // 2)


def hide_padding(scores: Tensor, step: Step) -> Tensor:
    """-inf where a slot holds padding."""
    held = step.cache.positions
    if held is None or not step.cache.holes:
        return scores
    return scores.masked_fill(held < 0, -torch.inf)
