"""H2O: keep the heavy hitters, the keys that took most attention so far, and the recent ones.  (arXiv 2306.14048)

A few keys collect nearly all of the attention, and they go on doing so. Every key's attention weight is summed over
all queries since it entered; when a head holds more than its budget, the `recent` last keys stay and the heaviest of
the others fill the rest. A key that was evicted is gone, with its sum.

    sigma[j] += sum over new queries i, and over the G heads of a group, of p[i, j]        float32 [B, Hkv, N]
    if n > budget: keep the budget - recent heaviest of the older keys, and the last `recent` keys

p is the softmax over the keys held at that step, the new ones included: a decode step reads budget + 1 keys. Keys
keep their rotation and true positions. `normalize` divides sigma by how many weights were summed (G times the queries
since the key entered), which takes away the advantage of early keys.

Cost: scores are computed a second time, in pieces, O(M N D) per query head and forward; 4 bytes per held key and KV
head for sigma. Bad options raise OptionError; a packed cache cannot be scored (UnsupportedCacheError).
Differs from the authors' code: sums per sequence (theirs, over the batch), and a group's query heads are summed
(theirs has no GQA). The mask version of their evaluation, in which evicted keys may return, is not offered. Learned
sinks, softcaps and weights of merged keys are left out of p.

`observed-attention` is the prompt-only, normalised variant of kvpress: no recent keys are forced, and decoding evicts
nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from foveate.attention.statistics import by_group, column_mass
from foveate.methods.cache import Change
from foveate.methods.keep.eviction import Evictor, force, newest, slot_positions
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register

MASS = "h2o.mass"


@register(
    "h2o",
    kind="keep",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    year=2023,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24, "recent": 12},
    claim=(
        "Bundled model, 192 of 1024 keys of text: perplexity 15.2, recent keys alone 54.7, heavy hitters "
        "alone 800 (dense 11.0) (benchmarks/results/claims/h2o.json). Half of the cache, question known, 20 "
        "seeds, 2k and 4k tokens: passkey 0.25 and 0.25, single needle 0.25 and 0.25; dense passkey 0.70 and "
        "0.60, single needle 0.95 and 1.00 (benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class H2O(Evictor):
    """Keeps the keys that received most attention so far and the most recent ones, after every forward."""

    budget: int = option(2048, "keys kept per KV head, heavy and recent together", at_least=1)
    recent: int | None = option(None, "last keys that always stay, part of the budget; none: half of it", at_least=0)
    normalize: bool = option(False, "rank by the mean weight since a key entered instead of the sum")

    def check(self) -> None:
        if self.recent is not None and self.ratio is None and self.recent > self.budget:
            raise self.refuse("recent", f"<= budget={self.budget}, of which it is part")

    def keep(self, step: Step) -> Change | None:
        if self.when == "always":
            self.note(step)
        return super().keep(step)

    def note(self, step: Step) -> None:
        """Add what this forward's queries gave to every key."""
        given = mass(step)
        if step.cache.has_extra(MASS):
            step.cache.extra(MASS).add_(given)
        else:
            step.cache.set_extra(MASS, given)

    def score(self, step: Step) -> Tensor:
        """Accumulated weight of every slot, [B, Hkv, N] float32; the recent keys get the highest plus one."""
        sums = step.cache.extra(MASS) if step.cache.has_extra(MASS) else mass(step)
        at, last = slot_positions(step), newest(step)[:, None, None]
        if self.normalize:
            sums = sums / (step.group * (last - at + 1))
        recent = self.recent_of(self.allowed(step))
        if isinstance(recent, Tensor):
            recent = recent.to(at.device)[:, None, None]
        return force(sums, at > last - recent)

    def recent_of(self, count: int | Tensor) -> int | Tensor:
        """How many of `count` keys are the last ones: an int, or [B]."""
        if self.recent is None:
            return count // 2
        return count.clamp(max=self.recent) if isinstance(count, Tensor) else min(self.recent, count)


@register(
    "observed-attention",
    kind="keep",
    paper="H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models",
    arxiv="2306.14048",
    year=2023,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24},
    claim=(
        "Bundled model, 1024 tokens, a fifth of the keys, 2 seeds: perplexity of the next 64 tokens 13.93, H2O 15.16 "
        "and without its recent keys 800, four sinks and a window 26.5, all keys 11.02: the mean weight per key needs "
        "no recent half (benchmarks/results/claims/h2o.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ObservedAttention(H2O):
    """Keeps the prompt keys with the highest mean attention weight over all prompt queries that saw them."""

    budget: int = option(1024, "keys kept per KV head", at_least=1)
    recent: int | None = option(0, "last keys that always stay, part of the budget; none: half of it", at_least=0)
    normalize: bool = option(True, "rank by the mean weight since a key entered instead of the sum")
    when: str = option("prompt", "once, at the end of the prompt, or after every forward", one_of=("always", "prompt"))


def mass(step: Step) -> Tensor:
    """Weight each slot receives from this step's queries, summed over them and the query group: [B, Hkv, N]."""
    total = column_mass(step.q, step.k, scale=step.scale, positions=step.positions, window=step.window)
    return by_group(total, step.kv_heads, "sum")
