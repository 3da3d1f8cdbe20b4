"""LongHeads: every head reads its own few chunks, at distances that fit the trained length.  (arXiv 2402.10685)

A model fails beyond its trained length because distances leave the range it knows. Here a query reads A = L / w chunks
of w tokens: the first, the one before its own, its own, and the ones that suit it best; and it reads them as if they
stood side by side, so no distance exceeds L = `length`. Heads choose for themselves, and together cover the context.

    chunk key   of a full chunk, q, k rotated to places 0..w-1 inside it, without a causal mask:
                u = mean over the w rows of softmax(q k^T / sqrt(D)) v     (and over the G heads of a KV head)
                c = softmax(u k^T / sqrt(D)) k
    chosen      at position t, n = t + 1 >= `start` tokens, G = n // w full chunks: chunk 0, the A - 3 of 1..G-2 with
                the highest score, chunk G - 1, and the last n mod w tokens; score: a group's sum of q . c, q unrotated
    distances   the chosen chunks in order, then the query's own: key j of the r-th has index r w + (j mod w), the query
                that of its own slot, at most L - 1

Before `start`, attention is dense. The chosen chunks are A - 1, or A - 2 beside the query's own when it ends a chunk;
all, at true distances, while there are no more. Prompts and decode steps follow one rule, so a prompt equals its
tokens one by one. `official_prompt` is the authors' code for prompts: b = t // w, chunks 0, b - 1 and the A - 3 best
between them beside the query's own; the query stands one after the last key and does not read its own; it starts one
token later. It chooses per query head where `per_query_head` (the authors have no GQA).

Keys stay as the cache has them: instead of turning a chunk's keys to their index, the query is turned by the distance
that they would move, once per chosen chunk, and the parts are merged by their log-sum-exps. So a prompt reads every
chunk once per head, for all queries that chose it. State: chunk keys, N / w D per KV head, and w queries. Cost:
O(N / w D + L D) per query and head. Layers with a sliding window are left dense.

Alone: it moves positions. UnsupportedModelError without a known rotary embedding, or where keys and values differ in
width. OptionError for a length that is no multiple of the chunk or below 3 of them, or a start before A - 1 are full.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Positions, apply_sink, attend, merge
from foveate.attention.backends.torch_dense import flat_rows
from foveate.attention.ragged import attend_ragged
from foveate.attention.scoring import slots_of, top_mask
from foveate.attention.summaries import attended
from foveate.errors import UnsupportedModelError
from foveate.methods.base import Method
from foveate.methods.step import Phase, Reading, RopeLike, Step
from foveate.options import option
from foveate.registry import register

# Queries of a prompt whose choices are sorted together.
TOGETHER = 1 << 14
# Queries up to which each reads its chunks for itself.
FEW = 16


@dataclass
class Chunks:
    """keys: [B, H, chunks, D], representations of full chunks; queries: [B, Hq, w, D], rotated, of the unfinished one
    (row t mod w holds position t)."""

    keys: Tensor
    queries: Tensor


@dataclass
class Part:
    """Tokens of one row of a batch, or of all: queries q [b, Hq, M, D] of the last M of N keys k, v [b, Hkv, N, D];
    slot j holds position j."""

    rows: slice
    q: Tensor
    k: Tensor
    v: Tensor

    @property
    def first(self) -> int:
        """Position of the first query."""
        return self.k.shape[2] - self.q.shape[2]


@dataclass
class Wanted:
    """bare: [b, Hq, m, D], queries unrotated. chunks, places: int64 [b, H, m, n], what they read beside their own chunk
    (-1 absent), and where a query stands for the keys of that chunk as they lie."""

    bare: Tensor
    chunks: Tensor
    places: Tensor


@register(
    "longheads",
    kind="select",
    paper="LongHeads: Multi-Head Attention is Secretly a Long Context Processor",
    arxiv="2402.10685",
    year=2024,
    applies_to="pretrained, rotary",
    exact={"start": 10**6},
    small={"chunk": 4, "length": 16, "start": 16},
    claim=(
        "Bundled model (8192 positions), 4 seeds, passkeys at 12288 and 16384 tokens: chunks of 128 up to 6144 keys "
        "find 0.75 (and the one tried), the defaults 0.25 and 0.50; dense attention and StreamingLLM with 4096 keys "
        "none, TokenSelect with 4224 keys 0.25. Perplexity of the next tokens at 12288: 13.8 (2 seeds), StreamingLLM "
        "19.2, dense 45.1 (benchmarks/results/extrapolation.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LongHeads(Method):
    """Each head reads the first, the last and its best chunks, with distances of the trained length."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill", "extend", "decode"})
    needs: ClassVar[frozenset[str]] = frozenset({"rope"})
    alone: ClassVar[bool] = True

    chunk: int = option(256, "tokens per chunk", at_least=1)
    length: int = option(4096, "tokens that a query reads, at most the trained length", at_least=3)
    start: int = option(4096, "tokens up to which attention is dense", at_least=1)
    per_query_head: bool = option(False, "each query head represents and chooses its own chunks")
    official_prompt: bool = option(False, "prompts as in the authors' code: a query does not read its own key")

    def check(self) -> None:
        if self.length % self.chunk or self.length < 3 * self.chunk:
            raise self.refuse("length", f"a multiple of chunk={self.chunk}, at least 3 of them")
        if self.start <= self.length - self.chunk:
            raise self.refuse(
                "start", f"> length - chunk = {self.length - self.chunk}: before, there are too few chunks"
            )

    def attend(self, step: Step) -> Tensor:
        if step.window is not None:
            return step.attend()
        if step.rope is None:
            raise UnsupportedModelError("LongHeads moves keys, and this model's rotary embedding is not known")
        if step.k.shape[-1] != step.v.shape[-1]:
            raise UnsupportedModelError(
                f"LongHeads asks keys with values, and their widths differ: {step.k.shape[-1]} and {step.v.shape[-1]}"
            )
        if step.state is None:
            heads = step.q.shape[1] if self.per_query_head else step.kv_heads
            B, Hq, _, D = step.q.shape
            step.state = Chunks(step.k.new_zeros(B, heads, 0, D), step.q.new_zeros(B, Hq, self.chunk, D))
        out = torch.zeros_like(step.q)
        for part, place in _parts(step):
            self._represent(step, step.rope, part)
            made = self._attend_part(step, step.rope, part)
            out[part.rows, :, place] = made
        return out

    def _represent(self, step: Step, rope: RopeLike, part: Part) -> None:
        """Make the keys of the chunks that this step completes; remember the queries of the one it leaves open."""
        state, w, rows = step.state, self.chunk, part.rows
        begin = part.first // w
        waiting = state.queries[rows, :, : part.first - begin * w]
        q = torch.cat((waiting, part.q), 2)
        full = q.shape[2] // w
        rest = q[:, :, full * w :]
        state.queries[rows, :, : rest.shape[2]] = rest
        if not full:
            return
        span = slice(begin * w, (begin + full) * w)
        made = self.chunk_keys(q[:, :, : full * w], part.k[:, :, span], part.v[:, :, span], rope, step.scale, begin)
        missing = begin + full - state.keys.shape[2]
        if missing > 0:
            state.keys = F.pad(state.keys, (0, 0, 0, missing))
        state.keys[rows, :, begin : begin + full] = made

    def chunk_keys(self, q: Tensor, k: Tensor, v: Tensor, rope: RopeLike, scale: float, begin: int = 0) -> Tensor:
        """Representations [b, H, chunks, D] of full chunks, from the begin-th on: q [b, Hq, chunks * w, D], k and v
        like it, rotated at true positions."""
        w, N = self.chunk, k.shape[2]
        at = torch.arange(begin * w, begin * w + N, device=k.device)[None]

        def inside(x: Tensor) -> Tensor:
            return rope.rotate(rope.unrotate(x, at), at % w).unflatten(2, (-1, w))

        values = v.unflatten(2, (-1, w))
        return attended(inside(q), inside(k), values, scale=scale, per_query_head=self.per_query_head)

    def _attend_part(self, step: Step, rope: RopeLike, part: Part) -> Tensor:
        """Dense up to `start`, then by chunks."""
        first, N = part.first, part.k.shape[2]
        official = self.official_prompt and step.phase != "decode"
        dense = min(N, self.start if official else self.start - 1) - first
        outputs, read = [], 0.0
        if dense > 0:
            outputs.append(self._dense(step, part, dense))
            read += dense * first + dense * (dense + 1) / 2
        t = first + max(0, dense)
        while t < N:
            stop = min(N, t + TOGETHER)
            made, chosen = self._attend_chosen(step, rope, part, t, stop, official)
            outputs.append(made)
            read += chosen
            t = stop
        if step.run.record:
            M, share = N - first, part.q.shape[0] / step.q.shape[0]
            visible = M * first + M * (M + 1) / 2
            step.run.readings.append(Reading(step.layer, step.phase, read * share, visible * share))
        return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]

    @staticmethod
    def _dense(step: Step, part: Part, count: int) -> Tensor:
        n = part.first + count
        o: Tensor = attend(
            part.q[:, :, :count],
            part.k[:, :, :n],
            part.v[:, :, :n],
            scale=step.scale,
            sink=step.sink,
            softcap=step.softcap,
        )
        return o

    def _attend_chosen(
        self, step: Step, rope: RopeLike, part: Part, t: int, stop: int, official: bool
    ) -> tuple[Tensor, float]:
        """Positions [t, stop): their output, and how many keys they read in all, per head."""
        w, first = self.chunk, part.first
        at = torch.arange(t, stop, device=part.q.device)
        bare = rope.unrotate(part.q[:, :, t - first : stop - first], at[None])
        edges = [t, *range((t // w + 1) * w, stop, w), stop]
        choices, outputs, lses = [], [], []
        for a, b in pairwise(edges):
            choices.append(self.choose(step, bare[:, :, a - t : b - t], part.rows, at[a - t : b - t], official))
            o, lse = self._own_chunk(step, part, a, b, official)
            outputs.append(o)
            lses.append(lse)
        most = max(each.shape[-1] for each in choices)
        chosen = torch.cat([F.pad(each, (0, most - each.shape[-1]), value=-1) for each in choices], 2)
        present = chosen >= 0
        # By how many chunks a chosen one comes closer to the query.
        skipped = (at // w)[:, None] - present.sum(-1, keepdim=True) - chosen + torch.arange(most, device=at.device)
        places = (at[:, None] - skipped * w).clamp_min(0)
        near = torch.cat(outputs, 2), torch.cat(lses, 2)
        want = Wanted(bare, chosen, places)
        add = self._add_by_query if stop - t <= FEW else self._add_by_chunk
        o, lse = add(step, rope, part, want, *near)
        read = float(present.sum()) * w / (bare.shape[0] * chosen.shape[1])
        read += float((at % w + (0 if official else 1)).sum())
        o = o if step.sink is None else apply_sink(o, lse, step.sink)[0]
        return o.to(part.q.dtype), read

    def _own_chunk(self, step: Step, part: Part, t: int, stop: int, official: bool) -> tuple[Tensor, Tensor]:
        """The queries of positions [t, stop) over their own chunk, at true distances."""
        begin, first = t // self.chunk * self.chunk, part.first
        positions = None
        if official:
            # They stop before their own keys.
            at = torch.arange(t - begin - 1, stop - begin - 1, device=part.q.device)
            positions = Positions(at.expand(part.q.shape[0], -1), holes=True)
        o, lse = attend(
            part.q[:, :, t - first : stop - first],
            part.k[:, :, begin:stop],
            part.v[:, :, begin:stop],
            scale=step.scale,
            positions=positions,
            softcap=step.softcap,
            return_lse=True,
        )
        return o, lse

    def _add_by_chunk(
        self, step: Step, rope: RopeLike, part: Part, want: Wanted, o: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Add the wanted chunks to o [b, Hq, m, D], lse [b, Hq, m]: each is read once, by all queries that chose it."""
        w, (B, H, _, n), chunks = self.chunk, want.chunks.shape, part.k.shape[2] // self.chunk
        G, shared = want.bare.shape[1] // H, H // part.k.shape[1]
        o, lse = o.to(lse.dtype), lse.clone()
        order = want.chunks.flatten(2).sort(dim=-1, stable=True).indices
        numbers = torch.arange(B * H, device=o.device).view(B, H, 1, 1) * (chunks + 1)
        counts = torch.bincount((want.chunks + 1 + numbers).flatten(), minlength=B * H * (chunks + 1))
        for segment, (begin, *readers) in enumerate(counts.view(B * H, chunks + 1).tolist()):
            b, h = divmod(segment, H)
            heads, kv = slice(h * G, h * G + G), slice(h // shared, h // shared + 1)
            for g, count in enumerate(readers):
                if not count:
                    continue
                entries = order[b, h, begin : begin + count]
                begin += count
                rows, span = entries // n, slice(g * w, g * w + w)
                asked = want.bare[b : b + 1, heads].index_select(2, rows)
                asked = rope.rotate(asked, want.places[b, h].flatten()[entries][None])
                far, far_lse = attend(
                    asked.reshape(1, 1, G * count, -1),
                    part.k[b : b + 1, kv, span],
                    part.v[b : b + 1, kv, span],
                    scale=step.scale,
                    # More queries than keys stand nowhere by default.
                    positions=Positions(rows.new_zeros(1, G * count)),
                    causal=False,
                    softcap=step.softcap,
                    return_lse=True,
                )
                far, far_lse = far.view(G, count, -1), far_lse.view(G, count)
                held, held_lse = o[b, heads].index_select(1, rows), lse[b, heads].index_select(1, rows)
                # A chunk holds keys, so its own log-sum-exp is finite.
                share = torch.sigmoid(far_lse - held_lse)[..., None]
                o[b, heads].index_copy_(1, rows, torch.lerp(held, far.to(held.dtype), share))
                lse[b, heads].index_copy_(1, rows, torch.logaddexp(held_lse, far_lse))
        return o, lse

    def _add_by_query(
        self, step: Step, rope: RopeLike, part: Part, want: Wanted, o: Tensor, lse: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The same for few queries: every query with every chunk that it chose is a sequence of its own."""
        w, (B, Hq, m, D), n = self.chunk, want.bare.shape, want.chunks.shape[-1]
        H, K = want.chunks.shape[1], part.k.shape[1]
        places = want.places.flatten(2).repeat_interleave(Hq // H, 1)
        asked = rope.rotate(want.bare[:, :, :, None].expand(-1, -1, -1, n, -1).flatten(2, 3), places)
        rows = asked.unflatten(1, (H, -1)).transpose(2, 3).reshape(B, -1, 1, D)
        present, number = want.chunks >= 0, want.chunks.clamp_min(0)
        (keys, first), (values, _) = flat_rows(part.k), flat_rows(part.v)
        alike = part.k.stride() == part.v.stride()
        if keys is not None and values is not None and alike and step.softcap is None:
            # They are read where they lie.
            start = first.repeat_interleave(H // K, 1)[..., None] + number * w
            length = present * w
            far, far_lse = attend_ragged(
                rows, keys, values, start.flatten(), length.flatten(), scale=step.scale, return_lse=True
            )
        else:
            b, h = (torch.arange(size, device=o.device) for size in (B, H))
            at = b[:, None, None, None], (h // (H // K))[:, None, None], number
            held = (
                x[:, :, : x.shape[2] // w * w].unflatten(2, (-1, w))[at].flatten(0, 3)[:, None]
                for x in (part.k, part.v)
            )
            far, far_lse = attend(
                rows.view(-1, Hq // H, 1, D),
                *held,
                scale=step.scale,
                causal=False,
                softcap=step.softcap,
                return_lse=True,
            )
            far_lse = far_lse.view(B, H, m, n, -1).masked_fill(~present[..., None], -torch.inf)
        far, far_lse = far.view(B, H, m * n, -1, D).transpose(2, 3), far_lse.view(B, H, m * n, -1).transpose(2, 3)
        outputs, lses = far.reshape(B, Hq, m, n, D).unbind(3), far_lse.reshape(B, Hq, m, n).unbind(3)
        return merge([o, *outputs], [lse, *lses])

    def choose(self, step: Step, q: Tensor, rows: slice, at: Tensor, official: bool = False) -> Tensor:
        """Chunks beside their own that queries q [b, Hq, m, D], unrotated, at positions at [m] of one chunk read: int64
        [b, H, m, n] ascending, -1 absent."""
        keys = step.state.keys[rows]
        H, G = keys.shape[1], keys.shape[2]
        own = int(at[0]) // self.chunk
        order = torch.arange(min(G, own), device=q.device)
        scores = (q.unflatten(1, (H, -1)).sum(2) @ keys[:, :, : order.numel()].transpose(-1, -2)).float()
        # A query that ends its chunk has one chunk less beside it, and its previous one is not forced.
        ends = (at + 1) % self.chunk == 0 if not official else torch.zeros_like(at, dtype=torch.bool)
        middle = (order > 0) & ((order < own - 1) | ends[:, None])
        most = self.length // self.chunk - 3
        best = top_mask(scores.masked_fill(~middle, -torch.inf), most)
        return slots_of((best | ((order == 0) | ~middle)).flatten(1, 2)).unflatten(1, (H, at.numel()))


def _parts(step: Step) -> Iterator[tuple[Part, Tensor | slice]]:
    """The batch as it is, or, where padding makes its rows differ, row by row; and the step's queries that it has."""
    if not step.cache.holes:
        yield Part(slice(None), step.q, step.k, step.v), slice(None)
        return
    for row in range(step.q.shape[0]):
        here = slice(row, row + 1)
        real = step.query_positions()[row] >= 0
        slots = (step.cache.positions_or_fail()[row, 0] >= 0).nonzero()[:, 0]
        if bool(real.any()):
            k, v = step.k[here].index_select(2, slots), step.v[here].index_select(2, slots)
            yield Part(here, step.q[here][:, :, real], k, v), real.nonzero()[:, 0]
