"""Recycled Attention (RefreshKV): full attention now and then, its most attended keys in between.  (arXiv 2411.05787)

Consecutive decode steps of a head attend to almost the same tokens. A full step ranks all keys by the weights of its
query and remembers the best; the steps after it read only those and what has been said since. Nothing is evicted, so
the next full step can choose anything again. Full steps come at a fixed stride, or when the query has turned away
from the one of the last full step.

    full step:      o over all N keys;  s[j] = max over the query heads h of a group of softmax_j(q_h . k_j / sqrt(D))
                    I = the `budget` keys with the highest s (the step's own token takes part in the ranking)
    recycled step:  o over I and the tokens from the last full step's own to the present one
    stride:         decode step t = 1, 2, ... is full when t mod `stride` = 0
    similarity:     at every `interval`-th step, full when the mean over heads of cos(q, q of the last full step) falls
                    below `threshold`; each layer and each sequence decides for itself

The prompt is dense, and its last query (or the mean weights of its last `observe` ones, pooled over `kernel` keys, as
SnapKV has it) makes the first I; so does every further piece of text of more than one token, and steps are counted
from there. Weights are float32 softmax per head before the group's maximum. Keys keep true positions. `strict` reads
`budget` tokens in all: the lowest-scored of I make room for the appended ones. When another method has changed the
slots since I was made, the step is full.

The paper is known here by its text; inferred: the reduction over a group, that tokens since the last full step are
read, the token of that step included (so that no step misses its predecessor), the comparison interval, all defaults.

State: I, int64 [Hkv, budget] per layer, and a query. Cost: recycled O(budget D), full O(N D) plus a second pass over
the keys and a top-k. Training pattern: `training_plan`. OptionError for options out of bounds.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention.plan import Blocks, Dense, Plan, Tokens
from foveate.attention.positions import Positions
from foveate.attention.scoring import top_mask, top_slots
from foveate.attention.statistics import attention_rows, by_group
from foveate.errors import OptionError
from foveate.methods.budgets import Budgeted
from foveate.methods.cache import Change
from foveate.methods.prompt import hide_padding, pool_votes, window_weights
from foveate.methods.select.reuse import EveryStride, Reuse, WhenDissimilar
from foveate.methods.select.scores import last_votes
from foveate.methods.step import Phase, RunState, Step
from foveate.options import option
from foveate.registry import register


@dataclass
class Recycling:
    """One layer's selection.

    index: [B, Hkv, K] int64, slots read most by the last full step, ascending (best first when strict), -1 absent.
    since: [B] int64 on the host, slot of that step's own token.
    query: [B, Hq, D], that step's query. version: of the cache at that time. number: decode steps since the prompt.
    """

    index: Tensor
    since: Tensor
    query: Tensor
    version: int
    number: int = 0


@register(
    "recycled",
    kind="select",
    paper="Recycled Attention: Efficient inference for long-context language models",
    arxiv="2411.05787",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 12, "stride": 5},
    claim=(
        "Bundled model, reading half of the cache, question known, 20 seeds, 2k and 4k tokens: "
        "passkey 0.60 and 0.60, single needle 0.20 and 0.15; "
        "dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Recycled(Budgeted):
    """Reads everything now and then, and in between the keys that were read most; the cache stays whole."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"decode"})

    budget: int = option(4096, "keys remembered from a full step, per KV head", at_least=1)
    ratio: float | None = option(
        None, "share of the tokens not to remember, instead of budget (0.875: an eighth stays)", at_least=0, below=1
    )
    schedule: str = option("stride", "what brings the next full step", one_of=("stride", "similarity"))
    stride: int = option(50, "a full step every so many", at_least=1)
    interval: int = option(5, "steps between comparisons of queries", at_least=1)
    threshold: float = option(0.8, "similarity of queries below which a step is full", at_least=-1)
    compare: str = option(
        "rotated", "queries compared after or before rotary embedding", one_of=("rotated", "unrotated")
    )
    reduce: str = option("max", "how the weights of a group's query heads are reduced", one_of=("max", "mean"))
    strict: bool = option(False, "read `budget` tokens in all, the appended ones included")
    observe: int = option(1, "last queries of a prompt that rank its keys", at_least=1)
    kernel: int = option(1, "width over which the prompt's weights are pooled, odd", at_least=1)

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise self.refuse("kernel", "an odd number")

    @property
    def needs(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({"rope"}) if self.schedule == "similarity" and self.compare == "unrotated" else frozenset()

    @property
    def policy(self) -> Reuse:
        if self.schedule == "stride":
            return EveryStride(self.stride)
        return WhenDissimilar(self.threshold, self.interval)

    def attend(self, step: Step) -> Tensor:
        if step.phase != "decode":
            return step.attend()
        due = self._due(step)
        if bool(due.all()):
            out = step.attend()
        elif not bool(due.any()):
            return step.attend(self._recycled(step))
        else:
            out = self._attend_mixed(step, due)
        self._refresh(step, due)
        return out

    def keep(self, step: Step) -> Change | None:
        if step.phase != "decode":
            step.state = None
            self._refresh(step)
        return None

    def _due(self, step: Step) -> Tensor:
        """Bool [B] on the host: rows that read everything now."""
        state = step.state
        if state is None:
            return torch.ones(step.q.shape[0], dtype=torch.bool)
        state.number += 1
        if state.version != step.cache.version:
            return torch.ones(step.q.shape[0], dtype=torch.bool)
        return self.policy.due(state.number, self._compared(step), state.query)

    def _compared(self, step: Step) -> Tensor:
        return (step.q if self.compare == "rotated" else step.unrotated()[0])[:, :, -1]

    def _attend_mixed(self, step: Step, due: Tensor) -> Tensor:
        """Some rows of the batch read everything, the others recycle."""
        plan, share = self._recycled(step), float(due.double().mean())
        quiet = dataclasses.replace(step, run=RunState(record=False))
        full, recycled = quiet.attend(), quiet.attend(plan)
        step.record(Dense(), share=share)
        step.record(plan, share=1 - share)
        return torch.where(due.to(full.device)[:, None, None, None], full, recycled)

    def _recycled(self, step: Step) -> Plan:
        """The remembered keys, and the tokens from the last full step's own on; a slot in both counts once."""
        state, n, device = step.state, step.cache.stored, step.q.device
        first, last = int(state.since.min()), int(state.since.max())
        if state.index.shape[-1] > last and not self.strict:
            return Dense()
        since = state.since.to(device)[:, None, None]
        index = torch.where(state.index < since, state.index, -1)
        if self.strict:
            room = (state.index >= 0).sum(-1, keepdim=True) - (n - since)
            present = index >= 0
            index = torch.where(present & (present.cumsum(-1) <= room), index, -1)
            index = index[..., : max(0, index.shape[-1] - (n - last)) + 1]
        recent = torch.arange(first, n, device=device).expand(*index.shape[:2], -1)
        if first != last:
            recent = torch.where(recent >= since, recent, -1)
        return Tokens(torch.cat((index, recent), -1))

    def _refresh(self, step: Step, due: Tensor | None = None) -> None:
        """Rank all keys by the present query, for the rows that are due (default: all)."""
        state = step.state
        index = self._rank(step)
        since = torch.full((step.q.shape[0],), step.cache.stored - 1)
        query = self._compared(step)
        if due is not None and not bool(due.all()):
            rows = due.to(index.device)[:, None, None]
            index = torch.where(rows, *_same_width(index, state.index))
            since = torch.where(due, since, state.since)
            query = torch.where(rows, query, state.query)
        number = 0 if state is None else state.number
        step.state = Recycling(index, since, query.clone(), step.cache.version, number)

    def _rank(self, step: Step) -> Tensor:
        """Slots with the highest weights, of equals the lower ones: int64 [B, Hkv, K], ordered as `Recycling` says."""
        if step.phase != "decode" and (self.observe > 1 or self.kernel > 1):
            scores = by_group(window_weights(step, self.observe).mean(2), step.kv_heads, self.reduce)
        else:
            scores = last_votes(step, step.kv_heads, self.reduce)
        if step.phase != "decode":
            scores = pool_votes(scores, self.kernel, "avg")
        scores = hide_padding(scores, step)
        count = self.count(step.real_tokens())
        if isinstance(count, Tensor):
            count = count[:, None]
        index = top_slots(scores, count)
        if not self.strict:
            return index
        best = torch.where(index >= 0, scores.gather(2, index.clamp_min(0)), -torch.inf)
        return index.gather(2, best.argsort(dim=-1, descending=True, stable=True))


def _same_width(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    width = max(a.shape[-1], b.shape[-1])
    pad = torch.nn.functional.pad
    return pad(a, (0, width - a.shape[-1]), value=-1), pad(b, (0, width - b.shape[-1]), value=-1)


def training_plan(
    q: Tensor, k: Tensor, *, budget: int, stride: int, reduce: str = "max", scale: float | None = None
) -> Blocks:
    """What each position of a training sequence reads, so that it equals decoding token by token.

    q: [B, Hq, T, D], k: [B, Hkv, T, D], rotated. Row t at an anchor (t mod stride = 0) or before the first one reads
    every j <= t; any other row reads the `budget` best keys of its anchor a = stride * (t // stride), and a..t.
    Returns a plan of single tokens (blocks of 1 x 1) to attend to; the choice carries no gradient. Memory: the
    pairs that are read, (N + (stride - 1) budget) / stride per row, and a few rows of weights.
    """
    if budget < 1 or stride < 1:
        raise OptionError(f"training_plan: budget={budget}, stride={stride}, allowed: >= 1")
    B, T, Hkv = q.shape[0], q.shape[2], k.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    order = torch.arange(T, device=q.device)
    counts: list[Tensor] = []
    columns: list[list[Tensor]] = [[] for _ in range(B * Hkv)]
    for a in range(0, T, stride):
        at = order[a : a + 1].expand(B, 1)
        with torch.no_grad():
            weights = attention_rows(q[:, :, a : a + 1], k[:, :, : a + 1], scale=scale, positions=Positions(q=at))
        best = top_mask(by_group(weights[:, :, 0], Hkv, reduce), budget)
        rows = order[a : a + stride, None]
        read = (order >= a) & (order <= rows)
        read = read | torch.nn.functional.pad(best, (0, T - a - 1))[:, :, None]
        read[:, :, 0] |= order <= a
        counts.append(read.sum(-1).flatten(0, 1))
        for held, own in zip(columns, read.flatten(0, 1)):
            held.append(own.nonzero()[:, 1].to(torch.int32))
    ends = torch.cat(counts, -1).flatten().cumsum(0)
    row_ptr = torch.nn.functional.pad(ends, (1, 0))
    return Blocks(row_ptr, torch.cat([each for held in columns for each in held]), B, Hkv, block_m=1, block_n=1)
