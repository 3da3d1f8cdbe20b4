"""Ada-KV: the heads of a layer share their budget by how much they need.  (arXiv 2407.11550)

Some heads look at few tokens and some at many. With one budget for the layer, the best keys over all heads are
counted, and each head gets as many as it has among them, blended with a floor. Any score per key will do: SnapKV's
votes (Ada-SnapKV), with PyramidKV's layer budgets (Ada-Pyramid), or Expected Attention's.

    b = budget - window                       keys per head besides the window (b = PyramidKV's number in Ada-Pyramid)
    c[h] = how many of the layer's best b * Hkv scores belong to head h
    keep the best round(c[h] (1 - floor) + int(floor b)) keys of head h, half to even, and the window
    nothing goes when b > N - window; the first `skip_layers` layers keep b for every head

`normalize` first multiplies a head's scores by its best b scores' share of its total (for the counts only).
`variant="kvpress"`: n = min(N, budget) keys per head, or max(1, int(N (1 - ratio))); each head's best
max(1, int(floor n)) are safe (none for floor 0), and of all others the layer's lowest Hkv (N - n) go. The window takes
part with the highest score plus one.

Heads hold different numbers of keys, packed: cost in memory is what is kept, and decoding attends per head. Scores cost
what their method costs; sorting O(Hkv N log N). Bad options raise OptionError.
Differs from the authors' code: any batch size, each sequence by itself; `ratio=0` keeps everything; scores without a
window (Expected Attention) use the original arithmetic with window 0. Where `ratio` leaves no more than the window,
the window stays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.scoring import top_mask
from foveate.methods.budgets import ByScore, Uniform, falling_budget, prune_lowest
from foveate.methods.cache import Change, KeepRagged
from foveate.methods.keep.expected_attention import ExpectedAttention
from foveate.methods.keep.pyramidkv import PyramidKV
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.prompt import PromptKeep, WindowVotes
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register

BASES = ("snapkv", "pyramid", "expected-attention")


@register(
    "adakv",
    kind="keep",
    paper="Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation for Efficient LLM Inference",
    arxiv="2407.11550",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24, "window": 8},
    claim=(
        "Bundled model, 1k tokens, 32, 64 and 128 keys per head: the kept keys hold 0.606, 0.703 and 0.805 of "
        "the attention, equal budgets 0.603, 0.697 and 0.799 (benchmarks/results/claims/adakv.json). Half of "
        "the cache, question known, 20 seeds, 2k and 4k tokens: passkey 0.65 and 0.60, single needle 0.85 and "
        "0.75; dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class AdaKV(WindowVotes):
    """Keeps the prompt keys with the best scores of a whole layer, so that heads keep different numbers."""

    ragged: ClassVar[bool] = True

    budget: int = option(1024, "mean keys kept per KV head of a layer, the window included", at_least=1)
    window: int = option(32, "last queries of the prompt that vote; their own keys always stay", at_least=1)
    kernel: int = option(7, "width over which neighbouring votes are pooled, odd", at_least=1)
    pool: str = option("max", "how neighbouring votes are pooled", one_of=("avg", "max"))
    base: str | PromptKeep = option(  # noqa: RUF009 - the default is text
        "snapkv",
        "whose scores: 'snapkv', 'pyramid' or 'expected-attention' (with epsilon 0.01), or a scoring method object "
        "with options of its own; its scores are used, under this budget or ratio",
    )
    variant: str = option("original", "how the budget is shared", one_of=("original", "kvpress"))
    floor: float = option(0.2, "share of the budget that every head gets in any case", at_least=0, at_most=1)
    normalize: bool = option(False, "weigh a head's scores (>= 0) by how concentrated they are, when counting")
    skip_layers: int = option(0, "first layers whose heads all get the same budget", at_least=0)
    beta: int = option(20, "base 'pyramid': how steep the layer budgets fall", at_least=1)

    def check(self) -> None:
        super().check()
        if isinstance(self.base, str) and self.base not in BASES:
            raise self.refuse("base", f"{BASES} or a method object")
        if isinstance(self.base, AdaKV) or type(self.scorer).score is PromptKeep.score:
            raise self.refuse("base", "a method with scores of its own, e.g. SnapKV() or ExpectedAttention()")
        if isinstance(self.base, SnapKV) and self.base.per_query_head:
            raise self.refuse("base", "SnapKV with one score per KV head (per_query_head=False)")
        if self.ratio is None and self.budget <= self.tail:
            raise self.refuse("budget", f"> window={self.tail}, which is part of it")

    @cached_property
    def scorer(self) -> PromptKeep:
        """The method that scores; it has this method's budget and ratio."""
        if isinstance(self.base, PromptKeep):
            least = self.base.window + 1 if isinstance(self.base, WindowVotes) else 1
            return replace(self.base, budget=max(self.budget, least), ratio=self.ratio)
        if self.base == "expected-attention":
            return ExpectedAttention(epsilon=0.01, budget=self.budget, ratio=self.ratio)
        share: dict[str, Any] = {"budget": max(self.budget, self.window + 1), "ratio": self.ratio}
        share |= {"window": self.window, "kernel": self.kernel, "pool": self.pool, "reduce": self.reduce}
        if self.base == "pyramid":
            return PyramidKV(**share, beta=self.beta, variant=self.variant)
        return SnapKV(**share)

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return self.scorer.needs

    @property
    def observed(self) -> int:
        return self.scorer.observed

    @property
    def tail(self) -> int:
        """Last keys that stay beside the chosen ones: the window of a voting base, else 0."""
        return self.scorer.window if isinstance(self.scorer, WindowVotes) else 0

    def note(self, step: Step) -> None:
        self.scorer.note(step)

    def score(self, step: Step) -> Tensor:
        """The base's scores, [B, Hkv, N] float32; forced keys have more than any other."""
        return self.scorer.score(step)

    def choose(self, step: Step) -> Change | None:
        tokens = step.real_tokens()
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [tokens] * step.q.shape[0]
        if all(self.spares(n) for n in rows):
            return None
        scores, held = self.score(step), step.cache.positions
        mask = torch.zeros_like(scores, dtype=torch.bool)
        for row, own in enumerate(scores):
            # A prompt's padding is the same for all heads.
            real = slice(None) if held is None else held[row, 0] >= 0
            mask[row][:, real] = self.chosen(own[:, real], step.layer, step.layers)
        return KeepRagged(mask)

    def spares(self, tokens: int) -> bool:
        """Whether a prompt of `tokens` keeps everything in every layer."""
        if self.ratio is None and self.variant == "original":
            return self.budget > tokens
        return int(self.count(tokens)) >= tokens

    def chosen(self, scores: Tensor, layer: int, layers: int) -> Tensor:
        """Bool like scores [Hkv, N] of a sequence without padding: what the heads of `layer` keep."""
        N = scores.shape[-1]
        if self.spares(N):
            return torch.ones_like(scores, dtype=torch.bool)
        shared = layer >= self.skip_layers
        if self.variant == "kvpress":
            scorer = self.scorer
            count = scorer.layer_count(layer, layers, N) if isinstance(scorer, PyramidKV) else int(self.count(N))
            return prune_lowest(scores, count, self.floor) if shared else top_mask(scores, count)
        free = N - self.tail
        base = max(0, (self.budget if self.ratio is None else int(self.count(N))) - self.tail)
        if isinstance(self.scorer, PyramidKV):
            base = falling_budget(layer, layers, base, free, self.scorer.beta)
        if base > free:
            return torch.ones_like(scores, dtype=torch.bool)
        front = scores[:, :free]
        budgets = ByScore(Uniform(base), self.floor, self.normalize).counts(layer, front) if shared else base
        return F.pad(top_mask(front, budgets), (0, self.tail), value=True)
