"""SnapKV: the last queries of a prompt vote for the keys that stay.  (arXiv 2404.14469)

Which prompt positions a head uses while it generates is already visible in the attention of the last prompt tokens.
Their attention is summed per key, smoothed so that neighbours of a hot token survive, and the best keys stay with
the window itself. Prefill is dense; only the stored cache shrinks, once.

    votes[j] = pool_j( mean over the G heads of a group of sum over the last `window` queries i of p[i, j] )
    keep the `budget - window` keys with most votes, and the last `window` keys; all, when N < budget

p is the float32 softmax over all N keys. Cost: window x N scores per query head, once, in pieces.
Differs from the authors' code: one choice per KV head, the mean over its query heads (theirs is per query head and
gives up the saving of GQA: `per_query_head=True` selects so, but stores the union of a group's choices).
A prompt shorter than the window keeps everything. Query-aware when the question ends the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.scoring import top_mask
from foveate.methods.cache import Change, KeepRagged
from foveate.methods.prompt import WindowVotes, pool_votes, window_weights
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "snapkv",
    kind="keep",
    paper="SnapKV: LLM Knows What You are Looking for Before Generation",
    arxiv="2404.14469",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24, "window": 8},
    claim=(
        "Bundled model, half of the cache, question known, 20 seeds, 2k and 4k tokens: "
        "passkey 0.00 and 0.00, single needle 0.55 and 0.65; "
        "dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class SnapKV(WindowVotes):
    """Keeps the prompt keys that the last prompt queries attend to, after pooling, and the window itself."""

    per_query_head: bool = option(False, "each query head chooses its own keys (the original); the union is stored")

    def check(self) -> None:
        super().check()
        if self.ratio is None and self.budget <= self.window:
            raise self.refuse("budget", f"> window={self.window}, which is part of it")

    @property
    def ragged(self) -> bool:  # type: ignore[override]
        """The union of what a group's query heads keep differs from group to group."""
        return self.per_query_head

    def head_votes(self, step: Step) -> Tensor:
        """Votes per query head, window columns last and highest: [B, Hq, N]."""
        weights = window_weights(step, self.window).sum(2)
        votes = pool_votes(weights[..., : step.cache.stored - self.window], self.kernel, self.pool)
        return torch.nn.functional.pad(votes, (0, self.window), value=float(votes.max()) + 1.0)

    def choose_per_query_head(self, step: Step) -> Tensor:
        """Bool [B, Hq, N]: what each query head would keep."""
        count = self.count(step.real_tokens())
        if step.cache.stored <= self.window or self._keeps_all(count, step.real_tokens()):
            return torch.ones(*step.q.shape[:2], step.cache.stored, dtype=torch.bool, device=step.q.device)
        scores = self.head_votes(step)
        held = step.cache.positions
        if held is not None and step.cache.holes:
            scores = scores.masked_fill(held[:, :1] < 0, -torch.inf)
        return top_mask(scores, count[:, None] if isinstance(count, Tensor) else count)

    def choose(self, step: Step) -> Change | None:
        if not self.per_query_head:
            return super().choose(step)
        mask = self.choose_per_query_head(step)
        return None if bool(mask.all()) else KeepRagged(mask.unflatten(1, (step.kv_heads, -1)).any(2))
