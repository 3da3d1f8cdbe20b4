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

Votes read all keys, so they are kept for that in 8 bits, unrotated, beside the cache (`bits=8`): each channel less its
mean and divided by its spread over the first tokens, which no softmax feels, then one scale per key. bits=None keeps
them in the cache's own type and votes by exact products.

Differs from the authors' code: query head h uses KV head h // G (theirs h mod Hkv, which crosses groups:
head_map="modulo"); scores are not rounded to bfloat16, but come of keys in 8 bits; batches are served, every row
choosing for itself. The cache's keys are rotated: the local window is read as it lies, and the chosen tokens alone are
turned back from their positions to their ranks, the queries turned to match, the two parts merged by their
log-sum-exps. An angle is so off by the rounding of the model's own, 2^-24 of a position. Layers with a sliding window
of their own are dense.
Cost of a decode step: a new choice O(N Hq D) and a top-k over N, then O(L D); a reused choice O(L D). The C++ kernel
reads chosen tokens where they lie and copies those of a choice that has served a few steps; elsewhere every new choice
is copied. State, once more than L tokens are stored: a byte per number of a key and four per key (bits=None: the keys
again), with reuse the choice and its copy; a request holds, once per rotary embedding, the rotations to the L ranks and
back from N positions. Needs the rotary embedding (UnsupportedModelError).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import attend, merge
from foveate.attention.backends import cpp_votes
from foveate.attention.byte_keys import ByteKeys
from foveate.attention.scoring import RotaryTable, Rows, attend_rows, reads_in_place, take_rows, voted_slots
from foveate.errors import UnsupportedModelError
from foveate.methods.base import Method
from foveate.methods.select import ballots
from foveate.methods.select.reuse import WhenDissimilar
from foveate.methods.select.rotations import Rotations
from foveate.methods.step import Phase, Reading, RopeLike, Step
from foveate.options import option
from foveate.registry import register

# Steps that a choice is read where it lies, where that is possible, before it is copied: a copy costs what it saves in
# two to three steps (one core of a Zen 3, 3584 of 32k keys, float32 and bfloat16).
LEND = 3


@dataclass
class Selection:
    """One layer's selection cache.

    codings: how its keys are coded; None: they are not.
    query: [B, Hq, D] qbar of the choice, float32. index: [B, sinks + budget] int64, the places of the first tokens and
    the chosen ones among a row's tokens. served: [B] int64 on the host, the steps that a choice has served; -1: none
    was made. copied: bool [B] on the host, whether keys, values [B, Hkv, sinks + budget, D] hold them, keys at their
    ranks.
    """

    codings: ballots.Codings | None
    query: Tensor
    index: Tensor
    served: Tensor
    copied: Tensor
    keys: Tensor | None = None
    values: Tensor | None = None


@dataclass
class Part:
    """Tokens of one row, or of all: q [b, Hq, M, D] and k, v [b, Hkv, N, D], rotated, token j of a row in slot j, and
    what the keys are voted on by."""

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor
    ballots: Tensor | ByteKeys

    def upto(self, start: int, stop: int) -> Part:
        """The queries [start, stop) and the keys up to the last of them."""
        n = self.k.shape[2] - self.q.shape[2] + stop
        votes = self.ballots
        votes = votes.between(0, n) if isinstance(votes, ByteKeys) else votes[:, :, :n]
        return Part(self.rows, self.q[:, :, start:stop], self.k[:, :, :n], self.v[:, :, :n], votes)


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
        "Bundled model, 2k tokens, a fifth of the keys, 2 windows of 64 steps: KL divergence from dense 0.073 with "
        "keys in 8 bits, 0.072 with keys in their own type, 0.083 with choices kept, 0.063 with hard votes; a window "
        "of as many keys 0.065, so it is not beaten on text here. Passkeys 0.00 of 2, the window 0.50, dense 1.00 "
        "(benchmarks/results/claims/tokenselect.json). Beyond the model's 8192 positions, at 12288 and 16384 tokens, "
        "4 seeds: perplexity 14.2 and 20.9, StreamingLLM 19.2 and 35.9, dense 45 and 1463; passkeys 0.25 with 4224 "
        "keys, none with the defaults, the dense model and StreamingLLM "
        "(benchmarks/results/extrapolation_tokenselect.json)."
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
    bits: int | None = option(8, "bits of the keys that are voted on; None: the cache's own type", one_of=(8, None))
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
        if step.m == 1 and step.cache.positions is None and ballots.present(step):
            out = self._attend_token(step, step.rope)
            if out is not None:
                return out
        state = None if step.cache.stored <= self.most else self._state(step)
        ballots.store(step, step.rope, self.most, None if state is None else state.codings)
        if state is None or (step.m > 1 and not self.prompt):
            return step.attend()
        if not step.cache.holes:
            held = ballots.ballots(step, slice(None), lambda x: x, state.codings)
            return self._attend_part(step, step.rope, Part(slice(None), step.q, step.k, step.v, held))
        out = torch.zeros(*step.q.shape[:3], step.v.shape[-1], dtype=step.q.dtype, device=step.q.device)
        for row in range(step.q.shape[0]):
            real = step.query_positions()[row] >= 0
            if bool(real.any()):
                out[row, :, real] = self._attend_part(step, step.rope, self._row(step, row, real, state))[0]
        return out

    def _one_call(self, step: Step, k: Tensor, v: Tensor) -> bool:
        """Whether one call of the C++ kernel takes a whole decode step."""
        plain = self.bits == 8 and self.kernel == 1 and self.head_map == "group"
        if not plain or step.softcap is not None or step.sink is not None:
            return False
        return step.q.shape[-1] <= cpp_votes.MAX_SIZE and reads_in_place(step.q, k, v)

    def _attend_token(self, step: Step, rope: RopeLike) -> Tensor | None:
        """A decode step where slot j holds token j, by one call; None: where that cannot be."""
        k, v = step.k, step.v
        rotations = self._rotations(step, rope) if self._one_call(step, k, v) else None
        if rotations is None or rotations.back is None:
            return None
        state: Selection = step.state
        assert state.codings is not None
        turns, back = rotations.of_token(rope, step.cache.stored - 1, step.q), rotations.back
        reading = torch.empty(2, *step.q.shape, dtype=step.q.dtype)
        out = cpp_votes.token_step(
            step.q,
            k,
            v,
            {
                "cos": turns.cos,
                "sin": turns.sin,
                "back_cos": back.cos,
                "back_sin": back.sin,
                "mean": state.codings.of.mean,
                "spread": state.codings.of.spread,
                "codes": step.cache.extra(ballots.KEYS),
                "steps": step.cache.extra(ballots.STEPS),
                "held": state.query,
                "index": state.index,
                "served": state.served,
                "copied": state.copied,
                "keys_copied": state.keys,
                "values_copied": state.values,
                "reading": reading,
            },
            span=turns.span,
            first=self.sinks,
            last=self.local,
            count=self.budget,
            lend=LEND,
            scale=self.scale,
            threshold=math.nan if self.reuse is None else self.reuse,
            softmax_scale=step.scale,
        )
        part = Part(slice(None), step.q, k, v, k)
        self._record(step, part, 0)
        if out is not None:
            return out
        return self._read_rows(step, part, self._chosen(step, state, rotations, part, reading[0]))

    def _row(self, step: Step, row: int, real: Tensor, state: Selection) -> Part:
        """One sequence of a padded batch without its padding."""
        here = slice(row, row + 1)
        slots = (step.cache.positions_or_fail()[row, 0] >= 0).nonzero()[:, 0]
        first, n = int(slots[0]), slots.numel()
        unbroken = int(slots[-1]) - first + 1 == n

        def held(x: Tensor) -> Tensor:
            return x[here].narrow(2, first, n) if unbroken else x[here].index_select(2, slots)

        votes = ballots.ballots(step, here, held, state.codings)
        return Part(here, step.q[here][:, :, real], held(step.k), held(step.v), votes)

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
        """The first tokens, those chosen for qbar, and the last ones."""
        M, N, rotations = part.q.shape[2], part.k.shape[2], self._rotations(step, rope)
        bare = rope.unrotate(part.q, torch.arange(N - M, N, device=part.q.device)[None])
        ranks = None if rotations is None else rotations.ranks
        query = _turned(rope, ranks, bare, self.local).mean(2).float()
        reading = _turned(rope, ranks, bare, self.most - M)
        state = self._choice(step, part, query)
        far = self._chosen(step, state, rotations, part, reading)
        return self._read_rows(step, part, far)

    def _read_rows(self, step: Step, part: Part, far: Rows) -> Tensor:
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

    def _chosen(self, step: Step, state: Selection, rotations: Rotations | None, part: Part, reading: Tensor) -> Rows:
        """The first tokens and those of the present choice, for `reading`."""
        rows, back = part.rows, None if rotations is None else rotations.back
        index = state.index[rows]
        settled = state.copied.numpy()[rows] | (state.served.numpy()[rows] >= LEND)
        if back is not None and step.softcap is None and not settled.all() and reads_in_place(reading, part.k, part.v):
            return Rows(reading, part.k, part.v, index, back, compact=True)
        if state.keys is None or state.values is None:
            B, L = state.index.shape
            state.keys, state.values = (x.new_empty(B, x.shape[1], L, x.shape[3]) for x in (part.k, part.v))
        keys, values = state.keys[rows], state.values[rows]
        if not state.copied.numpy()[rows].all():
            take_rows(part.v, index, out=values)
            if back is not None:
                take_rows(part.k, index, back, out=keys, compact=True)
            else:
                assert step.rope is not None
                ranks = torch.arange(index.shape[1], device=index.device)[None]
                keys.copy_(step.rope.rotate(step.rope.unrotate(take_rows(part.k, index), index), ranks))
            state.copied[rows] = True
        return Rows(reading, keys, values)

    def _state(self, step: Step) -> Selection:
        if step.state is None:
            B, L = step.cache.shape[0], self.sinks + self.budget
            index = torch.zeros(B, L, dtype=torch.int64, device=step.q.device)
            asked = torch.zeros(B, step.q.shape[1], step.q.shape[-1], dtype=torch.float32, device=step.q.device)
            codings = ballots.Codings.empty(step) if self.bits else None
            step.state = Selection(codings, asked, index, torch.full((B,), -1), torch.zeros(B, dtype=torch.bool))
        return step.state

    def _choice(self, step: Step, part: Part, query: Tensor) -> Selection:
        """The selection cache, the choice of the part's rows made for qbar or found to serve it."""
        rows, state = part.rows, self._state(step)
        served, copied = state.served.numpy()[rows], state.copied.numpy()[rows]
        served += 1
        due = served == 0
        if self.reuse is None:
            due[:] = True
        else:
            due |= WhenDissimilar(self.reuse, flat=True).due(1, query, state.query[rows]).numpy()
        if due.any():
            index, every = self.votes_for(query, part.ballots), due.all()
            for held, new in ((state.query, query), (state.index, index)):
                if every:
                    held[rows] = new
                else:
                    fresh = torch.from_numpy(due).to(query.device).view(-1, *[1] * (new.dim() - 1))
                    held[rows] = torch.where(fresh, new, held[rows])
            served[due], copied[due] = 0, False
        return state

    def _rotations(self, step: Step, rope: RopeLike) -> Rotations | None:
        """The rotations of the layers that turn alike, made once; None: of a layout without a table."""
        tables: dict[RopeLike, Rotations | None] = step.run.shared.setdefault((self, step.member, "ranks"), {})
        if rope not in tables:
            # A chunk of queries votes from `local` on.
            order = torch.arange(max(self.most, self.local + self.chunk), device=step.k.device)
            known = (each for each in tables.values() if each is not None and each.ranks.cos.device == order.device)
            alike = next((each for each in known if each.ranks.agrees(rope.rotate, order)), None)
            ranks = None if alike else RotaryTable.of(rope.rotate, order, step.k)
            tables[rope] = alike or (None if ranks is None else Rotations.to(ranks, (self.local, self.most - 1)))
        found = tables[rope]
        if found is not None:
            found.reach(rope, step.cache.stored, step.k)
        return found

    def mean_query(self, q: Tensor, rope: RopeLike) -> Tensor:
        """qbar of unrotated q [B, Hq, M, D]: [B, Hq, D]."""
        return _turned(rope, None, q, self.local).mean(2)

    def votes_for(self, query: Tensor, k: Tensor | ByteKeys) -> Tensor:
        """The first tokens and the `budget` middle ones with most votes, ascending: qbar [B, Hq, D], unrotated k
        [B, Hkv, N, D] -> int64 [B, sinks + budget]."""
        if self.head_map == "modulo":
            query = query.unflatten(1, (-1, k.shape[1])).transpose(1, 2).flatten(1, 2)
        sizes = {"first": self.sinks, "last": self.local, "count": self.budget}
        query = query if isinstance(k, ByteKeys) else query.to(k.dtype)
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
