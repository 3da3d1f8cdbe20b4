"""MAC-Attention: reuse the attention of a recent, similar query; read only what it did not cover.  (arXiv 2604.00235)

Queries of a head come back: the present one is often close to one of the last few hundred. Its attention over the old
keys is then taken over from that one, and only the keys since, and a margin before it where position matters, are
read. The parts are joined by their log-sum-exps, so the one approximation is the old query in the place of the new.

A ring holds for the last M = `memory` positions p of a sequence, per query head: the query before rotary embedding,
and output and log-sum-exp over the keys [min(F, end(p)), end(p)), end(p) = max(p + 1 - r, 0), r = `margin`; F = `sinks`
first keys are always read anew.

    match     at position t: the p in [max(0, t - M), t) with the least d2(p) = |q_t - q_p|^2 (float32, ties to the
              lowest p); a hit when d2 < 2 D (1 - threshold)^2, t >= start, its log-sum-exp is finite,
              end(t) - end(p) <= M, and end(p) >= F where F > 0
    amend     hit:  C = merge(ring[p], attention over [end(p), end(t)))
              miss: C = attention over [min(F, end(t)), end(t))
    complete  o = merge(C, attention over [end(t), t], attention over [0, min(F, end(t)))); C goes into the ring at t

Everything is read under the present query, rotated at true positions; a stored output is never turned. A miss is
dense attention. Heads decide for themselves. 2 D is the expected d2 of independent queries of unit variance: models
that normalise their queries differently need another threshold. Chains of hits are not bounded, a miss ends them.

Prompts are dense, and the ring rows of their last M positions are computed by attention over the truncated ranges,
O(M N D); so are those of later pieces of text. When another method has changed the slots, the ring is forgotten.
Layers with a window of the model's own are dense. Merged keys keep their weights.

Differs from the authors' code: ring rows in the cache's own dtype (theirs bfloat16), rows of a prompt computed directly
(theirs: subtracted from the full output, `foveate.attention.subtract`), every query head reads its own keys.
State: M Hq (2 D numbers + 4 bytes) per layer and sequence, independent of N, not shrunk by GQA. A hit reads at most
M + r + F keys. UnsupportedModelError where the rotary embedding is unknown, OptionError for options out of bounds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import Positions, Tokens, apply_sink, attend, merge
from foveate.attention.scoring import slots_of
from foveate.errors import UnsupportedModelError
from foveate.methods.base import Method
from foveate.methods.cache import Change
from foveate.methods.select.reuse import NearestQuery
from foveate.methods.step import Phase, Reading, Step
from foveate.options import option
from foveate.registry import register


@dataclass
class Summaries:
    """The ring of one layer; position p lies at slot p mod M.

    at: [B, M] int64, the position held, -1 for none. query: [B, M, Hq, D] before rotary embedding.
    o: [B, M, Hq, Dv], lse: [B, M, Hq] float32: attention over what the position's summary covers.
    version: of the cache when it was written.
    """

    at: Tensor
    query: Tensor
    o: Tensor
    lse: Tensor
    version: int = 0

    @classmethod
    def empty(cls, step: Step, size: int) -> Summaries:
        B, Hq = step.q.shape[:2]
        return cls(
            torch.full((B, size), -1, dtype=torch.int64, device=step.q.device),
            step.q.new_zeros(B, size, Hq, step.q.shape[-1]),
            step.q.new_zeros(B, size, Hq, step.v.shape[-1]),
            torch.full((B, size, Hq), -torch.inf, device=step.q.device),
            step.cache.version,
        )

    def write(self, at: Tensor, query: Tensor, o: Tensor, lse: Tensor) -> None:
        """Rows of positions at [B, m] (-1: none): query and o [B, Hq, m, D], lse [B, Hq, m]."""
        batch, new = (at >= 0).nonzero(as_tuple=True)
        slot = at[batch, new] % self.at.shape[1]
        self.at[batch, slot] = at[batch, new]
        self.query[batch, slot] = query.transpose(1, 2)[batch, new].to(self.query.dtype)
        self.o[batch, slot] = o.transpose(1, 2)[batch, new].to(self.o.dtype)
        self.lse[batch, slot] = lse.transpose(1, 2)[batch, new].to(self.lse.dtype)


@dataclass
class Outcome:
    """One decode step. o: [B, Hq, 1, Dv], lse: [B, Hq, 1]. matched: [B, Hq] int64, the position reused, -1 on a miss.

    summary_o, summary_lse: like o and lse, what the ring is to hold.
    """

    o: Tensor
    lse: Tensor
    matched: Tensor
    summary_o: Tensor
    summary_lse: Tensor


@register(
    "mac",
    kind="select",
    paper="MAC-Attention: a Match-Amend-Complete Scheme for Fast and Accurate Attention Computation",
    arxiv="2604.00235",
    year=2026,
    applies_to="pretrained, rotary",
    exact={"threshold": 1.0},
    small={"memory": 24, "margin": 4, "start": 8},
    claim=(
        "Bundled model, 2k tokens of text, 2 windows of 64 steps: thresholds 0.3, 0.5 and 0.7 read 0.16, "
        "0.36 and 0.69 of the keys at KL divergences from dense of 0.083, 0.017 and 0.003, perplexity "
        "12.35, 12.02 and 11.88 (dense 11.99): the nearer the query, the closer the output "
        "(benchmarks/results/claims/mac.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Mac(Method):
    """Takes the attention over old keys from a recent, similar query and reads the keys since; nothing is dropped."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"decode"})
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})

    threshold: float = option(0.45, "how alike queries must be: 1 never reuses, 0 reuses unrelated ones", at_most=1)
    memory: int = option(512, "last positions whose attention can be reused", at_least=1)
    margin: int = option(256, "tokens before a query's own position that its summary leaves out", at_least=1)
    start: int = option(2048, "position from which on attention is reused", at_least=0)
    sinks: int = option(0, "first tokens that summaries leave out and every step reads", at_least=0)

    def end(self, at: Tensor) -> Tensor:
        """Where the summary of each position ends."""
        return (at + 1 - self.margin).clamp_min(0)

    def attend(self, step: Step) -> Tensor:
        if step.phase != "decode" or step.window is not None:
            return step.attend()
        query = self._unrotated(step)
        outcome = self.read(step, query)
        step.state.write(step.query_positions(), query, outcome.summary_o, outcome.summary_lse)
        if step.sink is None:
            return outcome.o
        return apply_sink(outcome.o, outcome.lse, step.sink)[0]

    def keep(self, step: Step) -> Change | None:
        if step.phase == "decode" or step.window is not None:
            return None
        query, at = self._unrotated(step)[:, :, -self.memory :], step.query_positions()[:, -self.memory :]
        held = step.positions.keys(step.cache.stored, step.q.device)
        covered = torch.where(held < self.sinks, -1, held)
        # A query that stands at end(p) - 1 sees what the summary of p covers; one at -1 sees nothing.
        where = Positions(torch.where(at < 0, -1, self.end(at) - 1), covered, True, step.cache.ordered)
        o, lse = self._read(step, step.q[:, :, -self.memory :], where)
        self._ring(step).write(at, query, o, lse)
        return None

    def read(self, step: Step, query: Tensor) -> Outcome:
        """Attention of a decode step, whose query before rotary embedding is `query` [B, Hq, 1, D]; writes nothing."""
        ring, t = self._ring(step), step.query_positions()[:, -1:].expand(-1, step.q.shape[1])
        matched, slot = self.match(ring, query[:, :, 0], t)
        hit = matched >= 0
        end, first = self.end(t), self.end(t).clamp_max(self.sinks)
        begin = torch.where(hit, self.end(matched), first)
        parts = [self._range(step, *each) for each in ((begin, end), (end, t + 1))]
        if self.sinks:
            parts.append(self._range(step, torch.zeros_like(first), first))
        heads = torch.arange(t.shape[1], device=t.device)
        rows = torch.arange(t.shape[0], device=t.device)[:, None]
        old = torch.where(hit[..., None], ring.o[rows, slot, heads], 0.0)[:, :, None].to(step.q.dtype)
        old_lse = torch.where(hit, ring.lse[rows, slot, heads], -torch.inf)[:, :, None]
        summary, summary_lse = merge([old, parts[0][0]], [old_lse, parts[0][1]])
        o, lse = merge([summary, *(o for o, _ in parts[1:])], [summary_lse, *(lse for _, lse in parts[1:])])
        self._record(step, t + 1 - begin + (first if self.sinks else 0))
        return Outcome(o, lse, matched, summary, summary_lse)

    def match(self, ring: Summaries, query: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The position to reuse, -1 for none, and its slot: int64 [B, Hq]; query [B, Hq, D] stands at t [B, Hq]."""
        size, at = ring.at.shape[1], ring.at[..., None]
        fits = (at >= 0) & (at < t[:, None]) & (at >= t[:, None] - size) & (t[:, None] >= self.start)
        best, near = NearestQuery(self.threshold).match(query, ring.query, at, fits)
        slot = best % size
        lse = ring.lse.gather(1, slot[:, None])[:, 0]
        hit = near & torch.isfinite(lse)
        hit &= (self.end(t) - self.end(best) <= size) & (self.end(best) >= self.sinks)
        return torch.where(hit, best, -1), slot

    def _unrotated(self, step: Step) -> Tensor:
        if step.rope is None:
            raise UnsupportedModelError(
                "MAC-Attention compares queries before rotary embedding, and this model's is not known; "
                "see foveate.hf.rope for the kinds that are"
            )
        return step.rope.unrotate(step.q, step.query_positions().clamp_min(0))

    def _ring(self, step: Step) -> Summaries:
        """The layer's ring, a new one where another method has changed the slots since."""
        if step.state is None or step.state.version != step.cache.version:
            step.state = Summaries.empty(step, self.memory)
        ring: Summaries = step.state
        return ring

    def _range(self, step: Step, begin: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
        """Attention over the keys at positions [begin, end), int64 [B, Hq]: o [B, Hq, 1, Dv], lse [B, Hq, 1]."""
        count = (end - begin).clamp_min(0)
        if step.cache.positions is None:
            index = begin[..., None] + torch.arange(max(1, int(count.max())), device=begin.device)
            index = torch.where(index < end[..., None], index, -1)
        else:
            held = step.cache.positions
            held = held if held.shape[1] == 1 else held.repeat_interleave(step.group, 1)
            index = slots_of((held >= begin[..., None]) & (held < end[..., None]))
            index = torch.nn.functional.pad(index, (0, 0 if index.shape[-1] else 1), value=-1)
        return self._read(step, step.q, Positions(holes=True), Tokens(index))

    @staticmethod
    def _read(step: Step, q: Tensor, positions: Positions, plan: Tokens | None = None) -> tuple[Tensor, Tensor]:
        o, lse = attend(
            q,
            step.k,
            step.v,
            plan,
            scale=step.scale,
            positions=positions,
            log_weight=step.cache.log_weight,
            softcap=step.softcap,
            return_lse=True,
        )
        return o, lse

    @staticmethod
    def _record(step: Step, read: Tensor) -> None:
        if step.run.record:
            step.run.readings.append(
                Reading(step.layer, step.phase, float(read.double().mean()), float(step.cache.seen))
            )
