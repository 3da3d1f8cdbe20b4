"""StreamingLLM: keep the first tokens, the attention sinks, and a window of recent ones.  (arXiv 2309.17453)

Softmax has to put its weight somewhere, and trained models put what they do not need on the first tokens. A window
alone therefore fails as soon as the first tokens leave it; with a few of them kept, generation goes on without end.
Distances are counted in the cache, not in the text, so they never leave the range the model was trained on.

    held: positions [0, sinks) and the last `window`; a key's index is its rank among the held ones, 0..n-1
    o = softmax( R(q, index of q) . R(k_j, index of j) / sqrt(D) ) v          R: rotary embedding, before it q and k

Schedules. "before" (chat script): room is made ahead of the M new tokens, so a step reads at most sinks + window
keys; M > window leaves the sinks and the new tokens, which are then cut. "after" (perplexity script): a step reads
everything held, then the cache is cut, so a decode step reads sinks + window + 1 keys. "prompt" (kvpress): once, at
the end of the prompt; what follows stays; `ratio` of the prompt's N tokens goes, int(N (1 - ratio)) stay, never fewer
than sinks + 1. A prompt longer than sinks + window in one call is dense, then cut; feed pieces for strict streaming.

No second, unrotated key cache (the authors have one). A sink's index is its position, so its stored rotation is right
already; the recent keys and the query are contiguous, so index distances among them are true distances. Only the
sinks are seen from elsewhere: they are read with the query turned to its index, the recent keys with the query as it
is, and the two are merged by their log-sum-exps. One rotation of the step's queries, nothing accumulates. What is
lost: the model's own float32 angles at true positions grow coarse beyond about a million tokens.

`reindex=False` keeps true distances (a sink and window mask; as in kvpress and DuoAttention) and, unless the schedule
is "before", combines with other methods. Padding is skipped: sinks are the first real tokens.
Cost: a decode step O((sinks + window) D), one slot overwritten in place. UnsupportedModelError where the rotary
embedding is not known or changes with the length; OptionError for `ratio` outside the schedule "prompt".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import Positions, attend, merge
from foveate.attention.plan import Dense
from foveate.errors import UnsupportedModelError
from foveate.methods.base import Method
from foveate.methods.cache import Change, Drop, Keep
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register

FAR = 2**31 - 1


@register(
    "streaming-llm",
    kind="keep",
    paper="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    year=2024,
    applies_to="pretrained",
    exact={"window": 10**6},
    small={"sinks": 2, "window": 20},
    claim=(
        "Bundled model, 1k tokens of text, 256 keys: perplexity 38.2 without sinks, 24.4 with four (dense "
        "11.0) (benchmarks/results/claims/streaming_llm.json). Half of the cache, question known, 20 seeds, "
        "2k and 4k tokens: passkey 0.45 and 0.40, single needle 0.45 and 0.45; dense passkey 0.70 and 0.60, "
        "single needle 0.95 and 1.00 (benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class StreamingLLM(Method):
    """Keeps the first tokens (attention sinks) and a window of recent ones, at distances counted in the cache."""

    evicts: ClassVar[bool] = True

    sinks: int = option(4, "first tokens that always stay", at_least=0)
    window: int = option(2000, "recent tokens that stay", at_least=1)
    reindex: bool = option(True, "distances are counted in the cache (the paper), not in the text")
    schedule: str = option(
        "before",
        "when tokens go: before a step makes its room, after it, or once at the end of the prompt",
        one_of=("before", "after", "prompt"),
    )
    ratio: float | None = option(
        None, "share of the prompt to drop under schedule 'prompt', instead of window", at_least=0, below=1
    )

    def check(self) -> None:
        if self.ratio is not None and self.schedule != "prompt":
            raise self.refuse("ratio", f"None under schedule={self.schedule!r}; it needs schedule='prompt'")

    @property
    def alone(self) -> bool:  # type: ignore[override]
        return self.reindex or self.schedule == "before"

    @property
    def acts_in(self) -> frozenset[Phase]:  # type: ignore[override]
        return frozenset(("extend", "decode")) if self.alone else frozenset()

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"rope"}) if self.reindex else frozenset()

    def attend(self, step: Step) -> Tensor:
        if self.schedule == "before" and step.phase != "prefill":
            change = self._cut(step, ahead=True)
            if change is not None:
                step.cache.apply(change)
        # Alone on its cache, so its version counts this method's own changes: index and position agree until then.
        if self.reindex and self.sinks and step.cache.version:
            return self._attend_reindexed(step)
        return step.attend()

    def _attend_reindexed(self, step: Step) -> Tensor:
        if step.rope is None:
            raise UnsupportedModelError(
                "StreamingLLM turns queries to their index in the cache, and this model's rotary embedding is not "
                "known; use reindex=False"
            )
        step.record(Dense())
        at, held = step.query_positions(), step.cache.positions_or_fail()
        gone = at.amax(1, keepdim=True) + 1 - torch.as_tensor(step.real_tokens(), device=at.device).view(-1, 1)
        index = torch.where(at < 0, -1, at - gone)
        turned = step.rope.rotate(step.rope.unrotate(step.q, at.clamp_min(0)), index.clamp_min(0))
        parts = []
        for q, where, slots in ((turned, index, slice(self.sinks)), (step.q, at, slice(self.sinks, None))):
            parts.append(
                attend(
                    q,
                    step.k[:, :, slots],
                    step.v[:, :, slots],
                    scale=step.scale,
                    positions=Positions(where, held[..., slots], step.cache.holes, step.cache.ordered),
                    window=step.window,
                    sink=None if q is turned else step.sink,
                    softcap=step.softcap,
                    return_lse=True,
                )
            )
        o, _ = merge([o for o, _ in parts], [lse for _, lse in parts])
        return o

    def keep(self, step: Step) -> Change | None:
        if self.schedule != "prompt":
            return self._cut(step)
        return self._cut_prompt(step) if step.phase == "prefill" and not step.run.chunked else None

    def prompt_ends(self, step: Step) -> Change | None:
        return self._cut_prompt(step) if self.schedule == "prompt" else None

    def score(self, step: Step) -> Tensor:
        """[B, Hkv, N] float32: 1 for the prompt tokens that stay under schedule "prompt", 0 for the others."""
        return self._stays(step, self._first_recent_of_prompt(step)).expand(*step.cache.shape, -1).float()

    def _first_recent_of_prompt(self, step: Step) -> Tensor:
        tokens = torch.as_tensor(step.real_tokens(), device=step.q.device).view(-1)
        if self.ratio is None:
            return tokens - self.window
        kept = (tokens.double() * (1.0 - self.ratio)).long()
        return tokens - (kept - self.sinks).clamp_min(1)

    def _cut_prompt(self, step: Step) -> Change | None:
        return compact(step, self._stays(step, self._first_recent_of_prompt(step)))

    def _stays(self, step: Step, first_recent: Tensor) -> Tensor:
        """Bool [B, 1 or Hkv, N]: sinks, and what stands at first_recent [B] or later."""
        held = step.positions.keys(step.cache.stored, step.q.device)
        return (held >= 0) & ((held < self.sinks) | (held >= first_recent[:, None, None]))

    def _cut(self, step: Step, ahead: bool = False) -> Change | None:
        """What leaves sinks and window; `ahead` of the step none of its new tokens goes."""
        cache = step.cache
        over = cache.stored - self.sinks - self.window
        if over <= 0:
            return None
        if over == 1 and not cache.holes:
            return Drop(self._oldest(step))
        at = step.query_positions()
        newest = at.amax(1)
        first_recent = newest + 1 - self.window
        if ahead:
            first_recent = torch.minimum(first_recent, newest + 1 - (at >= 0).sum(1))
        return compact(step, self._stays(step, first_recent))

    def _oldest(self, step: Step) -> Tensor:
        """Slot of the oldest recent token: int64 [B, Hkv, 1]."""
        held = step.cache.positions
        if held is None:
            return torch.full((*step.cache.shape, 1), self.sinks, device=step.q.device)
        return torch.where(held < self.sinks, FAR, held).argmin(-1, keepdim=True).expand(-1, step.cache.shape[1], -1)


def compact(step: Step, stays: Tensor) -> Change | None:
    """The change that leaves the slots where stays, bool [B, 1 or Hkv, N], is True.

    Afterwards a row holds its tokens in order of position, then empty slots; where one slot goes from such rows, an
    empty one or the one to forget is overwritten in place, so that slot j < sinks holds position j or nothing.
    """
    cache = step.cache
    counts = stays.sum(-1)
    most = int(counts.max())
    if most == cache.stored:
        return None
    held = step.positions.keys(cache.stored, step.q.device)
    gone = (held >= 0) & ~stays
    if most == cache.stored - 1 and cache.version and int(gone.sum(-1).max()) <= 1:
        first_empty = torch.where(gone.any(-1), gone.byte().argmax(-1), (held < 0).byte().argmax(-1))
        return Drop(first_empty[..., None].expand(-1, cache.shape[1], -1))
    order = torch.where(stays, held, FAR).argsort(dim=-1, stable=True)[..., :most]
    filled = torch.arange(most, device=order.device) < counts[..., None]
    return Keep(torch.where(filled, order, -1).expand(*cache.shape, -1))
