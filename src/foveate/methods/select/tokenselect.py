"""TokenSelect: query heads vote for single tokens, one set per layer, read at compact positions.  (arXiv 2411.02886)

What attention needs is scattered, so tokens are chosen, not pages. Every cached key is scored by the present queries;
a softmax turns each head's scores into votes, so that no head outvotes the others by scale, and the tokens with most
votes are read by all heads, between the first tokens and the last ones. They are read as if they stood side by side:
positions are ranks, and stay in the range the model was trained on. Neighbouring queries choose alike, so a choice is
kept until the query has turned away from the one that made it.

    qbar_h = mean over the M queries of R(q_i, local + i)             R: rotary embedding; keys are scored unrotated
    s[j] = sum over h of softmax_j(scale qbar_h . k_j),  j in [sinks, N - local);  optional max-pool over `kernel`
    read: the first `sinks`, the `budget` best by s, the last `local`;  all of them, when N <= sinks + budget + local
    o_i = softmax(R(q_i, L - M + i) . R(k_r, r) / sqrt(D)) v          r: rank among the L = sinks + budget + local
    keep the choice while cos(qbar, qbar of the choice) >= reuse, all heads as one vector

A prompt is read in chunks of `chunk` queries, each stored, selected for and attended in turn (`prompt=False`: dense).
N counts the chunk. scale is 1 as in the authors' code; 1/sqrt(D) makes softer votes. The selection cache is theirs
too, switched off as released (reuse=None), its threshold untested by them; tokens that left the local window since the
choice was made are not read until the next one. Ties go to the earlier token.

Differs from the authors' code: query head h uses KV head h // G (theirs h mod Hkv, which crosses groups:
head_map="modulo"); scores are not rounded to bfloat16; batches are served, every row choosing for itself. Unrotated
keys are stored beside the rotated ones (half as many bytes again, all told): the local window is read as it lies, and
the chosen tokens alone are rotated to their ranks, the queries turned to match, the two parts merged by their
log-sum-exps. Layers with a sliding window of their own are dense.
Cost of a decode step: a new choice O(N Hq D) and a top-k over N, then O(L D); a reused choice O(L D). The C++ kernel
reads chosen tokens where they lie and copies those of a choice that has served a few steps; elsewhere every new choice
is copied. State: unrotated keys, with reuse the choice and its copy; a request holds the rotations to the L ranks once
per rotary embedding. Needs the rotary embedding (UnsupportedModelError).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import attend, merge
from foveate.attention.scoring import RotaryTable, Rows, attend_rows, reads_in_place, take_rows, voted_slots
from foveate.errors import UnsupportedModelError
from foveate.methods.base import Method
from foveate.methods.select.reuse import WhenDissimilar
from foveate.methods.select.rotations import Rotations
from foveate.methods.step import Phase, Reading, RopeLike, Step
from foveate.options import option
from foveate.registry import register

UNROTATED = "tokenselect"
# Steps that a choice is read where it lies, where that is possible, before it is copied: a copy costs what it saves in
# two to three steps (one core of a Zen 3, 3584 of 32k keys, float32 and bfloat16).
LEND = 3


@dataclass
class Selection:
    """One layer's selection cache.

    query: [B, Hq, D] qbar. index: [B, sinks + budget] int64, the places of the first tokens and the chosen ones among a
    row's tokens. served: [B] int64 on the host, the steps that a choice has served; -1: none was made.
    copied: bool [B] on the host, whether keys, values [B, Hkv, sinks + budget, D] hold them, keys at their ranks.
    """

    query: Tensor
    index: Tensor
    served: Tensor
    copied: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Part:
    """Tokens of one row, or of all: q [b, Hq, M, D] at true positions, keys, unrotated keys, values [b, Hkv, N, D].

    bare: q unrotated, where it is known already.
    """

    rows: slice
    q: Tensor
    bare: Tensor | None
    k: Tensor
    unrotated: Tensor
    v: Tensor

    def upto(self, start: int, stop: int) -> Part:
        """The queries [start, stop) and the keys up to the last of them."""
        n = self.k.shape[2] - self.q.shape[2] + stop
        keys = (each[:, :, :n] for each in (self.k, self.unrotated, self.v))
        bare = None if self.bare is None else self.bare[:, :, start:stop]
        return Part(self.rows, self.q[:, :, start:stop], bare, *keys)


@register(
    "tokenselect",
    kind="select",
    paper="TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic Token-Level KV "
    "Cache Selection",
    arxiv="2411.02886",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"sinks": 2, "local": 12, "chunk": 12, "budget": 8},
    known={"causality": "the queries of a chunk choose together, by the paper's design"},
    claim=(
        "Bundled model, 2k tokens, a fifth of the keys, 2 windows of 64 steps: KL divergence from dense 0.072, with "
        "choices kept 0.083, with hard votes 0.062; a window of as many keys 0.065, so it is not beaten on text here. "
        "Passkeys 0.00 of 2, the window 0.50, dense 1.00 (benchmarks/results/claims/tokenselect.json). Beyond the "
        "model's 8192 positions, at 12288 and 16384 tokens, 4 seeds: passkeys 0.25 with 4224 keys, none with the "
        "defaults, the dense model and StreamingLLM (benchmarks/results/extrapolation.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TokenSelect(Method):
    """Reads the tokens that most attention heads vote for, at compact positions, in prompts and decode steps."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill", "extend", "decode"})
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    alone: ClassVar[bool] = True

    budget: int = option(2048, "tokens chosen between the first and the last ones", at_least=1)
    sinks: int = option(128, "first tokens, always read", at_least=0)
    local: int = option(512, "last tokens, always read", at_least=1)
    chunk: int = option(512, "queries of a prompt that choose together, at most local", at_least=1)
    scale: float = option(1.0, "factor of the scores before the vote's softmax", above=0)
    kernel: int = option(1, "width over which the votes are max-pooled, odd", at_least=1)
    reuse: float | None = option(
        0.9, "similarity of queries from which on a choice serves again; None: choose at every step", at_least=-1
    )
    prompt: bool = option(True, "select in prompts too")
    head_map: str = option(
        "group", "KV head of a query head: h // G, or h mod Hkv as in the authors' kernel", one_of=("group", "modulo")
    )

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise self.refuse("kernel", "an odd number")
        if self.chunk > self.local:
            raise self.refuse("chunk", f"<= local={self.local}: a longer chunk would lose its own first tokens")

    @property
    def most(self) -> int:
        """Tokens that one query reads at most, and so the length up to which it reads all."""
        return self.sinks + self.budget + self.local

    def attend(self, step: Step) -> Tensor:
        if step.window is not None:
            return step.attend()
        if step.rope is None:
            raise UnsupportedModelError("TokenSelect moves keys, and this model's rotary embedding is not known")
        if step.m == 1 and step.cache.positions is None and step.cache.has_extra(UNROTATED):
            rotations = self._rotations(step, step.rope)
            if rotations is not None:
                return self._attend_token(step, step.rope, rotations)
        bare = self._store_unrotated(step, step.rope)
        if step.cache.stored <= self.most or (step.m > 1 and not self.prompt):
            return step.attend()
        if not step.cache.holes:
            unrotated = step.cache.extra(UNROTATED)
            return self._attend_part(step, step.rope, Part(slice(None), step.q, bare, step.k, unrotated, step.v))
        out = torch.zeros(*step.q.shape[:3], step.v.shape[-1], dtype=step.q.dtype, device=step.q.device)
        for row in range(step.q.shape[0]):
            real = step.query_positions()[row] >= 0
            if bool(real.any()):
                out[row, :, real] = self._attend_part(step, step.rope, self._row(step, row, real, bare))[0]
        return out

    def _attend_token(self, step: Step, rope: RopeLike, rotations: Rotations) -> Tensor:
        """A decode step where slot j holds token j: one turn gives all rotations that it asks for."""
        N, Hq = step.cache.stored, step.q.shape[1]
        both = torch.cat((step.q, step.k[:, :, -1:]), 1)
        turned = rotations.of_token(rope, N - 1, step.q).turn_to_each(both)
        unrotated = step.cache.extra(UNROTATED)
        unrotated[:, :, -1:] = turned[:, Hq:, :1]
        if self.most >= N:
            return step.attend()
        part = Part(slice(None), step.q, None, step.k, unrotated, step.v)
        self._record(step, part, 0)
        return self._read_chosen(step, rope, rotations.ranks, part, turned[:, :Hq, 1], turned[:, :Hq, 2:])

    @staticmethod
    def _store_unrotated(step: Step, rope: RopeLike) -> Tensor | None:
        """Store the new keys unrotated. Returns the query unrotated in a decode step, where both take one call."""
        if not step.cache.has_extra(UNROTATED):
            at = step.positions.keys(step.cache.stored, step.q.device).clamp_min(0)
            step.cache.set_extra(UNROTATED, rope.unrotate(step.k, at[:, 0]))
            return None
        new, at = step.k[:, :, -step.m :], step.query_positions().clamp_min(0)
        bare = None
        if step.m == 1:
            bare, new = rope.unrotate(torch.cat((step.q, new), 1), at).split((step.q.shape[1], step.kv_heads), 1)
        else:
            new = rope.unrotate(new, at)
        step.cache.extra(UNROTATED)[:, :, -step.m :] = new
        return bare

    @staticmethod
    def _row(step: Step, row: int, real: Tensor, bare: Tensor | None) -> Part:
        """One sequence of a padded batch without its padding."""
        here = slice(row, row + 1)
        slots = (step.cache.positions_or_fail()[row, 0] >= 0).nonzero()[:, 0]
        first, n = int(slots[0]), slots.numel()

        def held(x: Tensor) -> Tensor:
            unbroken = int(slots[-1]) - first + 1 == n
            return x[here].narrow(2, first, n) if unbroken else x[here].index_select(2, slots)

        bare = None if bare is None else bare[here][:, :, real]
        unrotated = held(step.cache.extra(UNROTATED))
        return Part(here, step.q[here][:, :, real], bare, held(step.k), unrotated, held(step.v))

    def _attend_part(self, step: Step, rope: RopeLike, part: Part) -> Tensor:
        """Chunk by chunk; the first ones, where everything fits, in one dense call."""
        M, before = part.q.shape[2], part.k.shape[2] - part.q.shape[2]
        stops = [*range(self.chunk, M, self.chunk), M]
        dense = max((stop for stop in stops if before + stop <= self.most), default=0)
        outputs = []
        if dense:
            fits = part.upto(0, dense)
            outputs.append(self._read(step, fits.q, fits.k, fits.v))
        starts = [0, *stops[:-1]]
        for start, stop in zip(starts, stops):
            if stop > dense:
                outputs.append(self._attend_chunk(step, rope, part.upto(start, stop)))
        self._record(step, part, dense)
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    def _attend_chunk(self, step: Step, rope: RopeLike, part: Part) -> Tensor:
        M, N, ranks = part.q.shape[2], part.k.shape[2], self._ranks(step, rope)
        bare = part.bare
        if bare is None:
            bare = rope.unrotate(part.q, torch.arange(N - M, N, device=part.q.device)[None])
        query = _turned(rope, ranks, bare, self.local).mean(2)
        return self._read_chosen(step, rope, ranks, part, query, _turned(rope, ranks, bare, self.most - M))

    def _read_chosen(
        self, step: Step, rope: RopeLike, ranks: RotaryTable | None, part: Part, query: Tensor, reading: Tensor
    ) -> Tensor:
        """The first tokens, those chosen for qbar, and the last ones; reading: the queries at the last ranks."""
        far = self._far(step, rope, ranks, part, query, reading)
        k, v = part.k[:, :, -self.local :], part.v[:, :, -self.local :]
        if part.q.shape[2] == 1 and step.sink is None:
            return attend_rows(far, Rows(part.q, k, v), scale=step.scale, softcap=step.softcap)[0]
        near, near_lse = self._read(step, part.q, k, v, return_lse=True)
        o, lse = attend_rows(far, scale=step.scale, softcap=step.softcap)
        return merge((near, o), (near_lse, lse))[0]

    @staticmethod
    def _read(step: Step, q: Tensor, k: Tensor, v: Tensor, return_lse: bool = False):  # type: ignore[no-untyped-def]
        return attend(q, k, v, scale=step.scale, sink=step.sink, softcap=step.softcap, return_lse=return_lse)

    def _record(self, step: Step, part: Part, dense: int) -> None:
        if not step.run.record:
            return
        M, N = part.q.shape[2], part.k.shape[2]
        visible = M * (N - M) + M * (M + 1) / 2
        read = dense * (N - M) + dense * (dense + 1) / 2
        starts = range(dense, M, self.chunk)
        for m in (min(self.chunk, M - start) for start in starts):
            read += m * (self.most - m) + m * (m + 1) / 2
        share = part.q.shape[0] / step.q.shape[0]
        step.run.readings.append(Reading(step.layer, step.phase, read * share, visible * share))

    def _far(
        self, step: Step, rope: RopeLike, ranks: RotaryTable | None, part: Part, query: Tensor, reading: Tensor
    ) -> Rows:
        """The first tokens and those chosen for qbar, for `reading`."""
        rows = part.rows
        if self.reuse is None:
            state, index, lent = None, self.votes_for(query, part.unrotated), True
        else:
            state = self._choice(step, part, query)
            settled = state.copied.numpy()[rows] | (state.served.numpy()[rows] >= LEND)
            index, lent = state.index[rows], not settled.all()
        if lent and ranks is not None and step.softcap is None and reads_in_place(reading, part.unrotated, part.v):
            return Rows(reading, part.unrotated, part.v, index, ranks.rows(0, index.shape[1]))
        if state is None:
            return Rows(reading, *self._copy(rope, ranks, part, index))
        return Rows(reading, *self._copied(state, rope, ranks, part))

    def _choice(self, step: Step, part: Part, query: Tensor) -> Selection:
        """The selection cache, the choice of the part's rows made for qbar or found to serve it."""
        rows = part.rows
        if step.state is None:
            B, L = step.cache.shape[0], self.sinks + self.budget
            index = torch.zeros(B, L, dtype=torch.int64, device=step.q.device)
            asked = step.q.new_zeros(B, step.q.shape[1], step.q.shape[-1])
            step.state = Selection(asked, index, torch.full((B,), -1), torch.zeros(B, dtype=torch.bool))
        state: Selection = step.state
        assert self.reuse is not None
        # Numpy's views of the host's numbers: an operator of torch costs a decode step more.
        served, copied = state.served.numpy()[rows], state.copied.numpy()[rows]
        served += 1
        due = (served == 0) | WhenDissimilar(self.reuse, flat=True).due(1, query, state.query[rows]).numpy()
        if due.any():
            index, every = self.votes_for(query, part.unrotated), due.all()
            for held, new in ((state.query, query), (state.index, index)):
                if every:
                    held[rows] = new
                else:
                    fresh = torch.from_numpy(due).to(query.device).view(-1, *[1] * (new.dim() - 1))
                    held[rows] = torch.where(fresh, new, held[rows])
            served[due], copied[:] = 0, False
        return state

    def _copied(self, state: Selection, rope: RopeLike, ranks: RotaryTable | None, part: Part) -> tuple[Tensor, Tensor]:
        """The copies of the part's rows, made where they are not there yet."""
        rows = part.rows
        if state.keys is None or state.values is None:
            B, L = state.index.shape
            state.keys, state.values = (x.new_empty(B, x.shape[1], L, x.shape[3]) for x in (part.k, part.v))
        keys, values = state.keys[rows], state.values[rows]
        if not bool(state.copied[rows].all()):
            self._copy(rope, ranks, part, state.index[rows], (keys, values))
            state.copied[rows] = True
        return keys, values

    @staticmethod
    def _copy(
        rope: RopeLike,
        ranks: RotaryTable | None,
        part: Part,
        index: Tensor,
        out: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Keys and values by index, keys at their ranks, written to `out` where it is given."""
        keys, values = out or (None, None)
        values = take_rows(part.v, index, out=values)
        if ranks is not None:
            return take_rows(part.unrotated, index, ranks.rows(0, index.shape[1]), out=keys), values
        turned = _turned(rope, None, take_rows(part.unrotated, index), 0)
        return (turned if keys is None else keys.copy_(turned)), values

    def _ranks(self, step: Step, rope: RopeLike) -> RotaryTable | None:
        rotations = self._rotations(step, rope)
        return None if rotations is None else rotations.ranks

    def _rotations(self, step: Step, rope: RopeLike) -> Rotations | None:
        """The rotations to all ranks, made once for the layers that turn alike; None: of a layout without a table."""
        tables: dict[RopeLike, Rotations | None] = step.run.shared.setdefault((self, step.member, "ranks"), {})
        if rope not in tables:
            # A chunk of queries votes from `local` on.
            order = torch.arange(max(self.most, self.local + self.chunk), device=step.k.device)
            known = (each for each in tables.values() if each is not None and each.ranks.cos.device == order.device)
            alike = next((each for each in known if each.ranks.agrees(rope.rotate, order)), None)
            ranks = None if alike else RotaryTable.of(rope.rotate, order, step.k)
            tables[rope] = alike or (None if ranks is None else Rotations.to(ranks, (self.local, self.most - 1)))
        return tables[rope]

    def mean_query(self, q: Tensor, rope: RopeLike) -> Tensor:
        """qbar of unrotated q [B, Hq, M, D]: [B, Hq, D]."""
        return _turned(rope, None, q, self.local).mean(2)

    def votes_for(self, query: Tensor, k: Tensor) -> Tensor:
        """The first tokens and the `budget` middle ones with most votes, ascending: qbar [B, Hq, D], unrotated k ->
        int64 [B, sinks + budget]."""
        if self.head_map == "modulo":
            query = query.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
        sizes = {"first": self.sinks, "last": self.local, "count": self.budget}
        return voted_slots(query, k, self.scale, kernel=self.kernel, **sizes)

    def select(self, q: Tensor, k: Tensor, rope: RopeLike) -> Tensor:
        """What the last M of N tokens read: unrotated q [B, Hq, M, D], k [B, Hkv, N, D] -> int64 [B, n] ascending."""
        B, N = k.shape[0], k.shape[2]
        order = torch.arange(N, device=k.device).expand(B, -1)
        if self.most >= N:
            return order
        chosen = self.votes_for(self.mean_query(q, rope), k)
        return torch.cat((chosen, order[:, N - self.local :]), 1)


def _turned(rope: RopeLike, ranks: RotaryTable | None, x: Tensor, start: int) -> Tensor:
    """x [b, H, n, D] rotated to the ranks start..start + n - 1."""
    stop = start + x.shape[2]
    if ranks is not None:
        return ranks.rows(start, stop).turn(x)
    return rope.rotate(x, torch.arange(start, stop, device=x.device)[None])
