"""The attention-aware graph: links between keys that the same queries want.  (arXiv 2409.10516, 2408.08933)

Queries of attention are distributed differently from keys, so walking from key to key along ordinary nearest-neighbour
links leads a query astray. Here the prompt's queries make the links: each query's nearest keys are found exactly, and
its best ones are linked to the others (`linking`). A walk then needs to score a few per cent of the keys.

    search    score the entries and the keys not linked yet; keep the `beam` best; score what the best unexpanded ones
              link to, until all that are kept have been expanded; return the best `count`
    entries   the best keys of evenly sampled queries, at most one per ENTRY_SHARE keys
    append    new keys are scored one by one until there are more than `fresh`; then queries that came with them link
              them in

A walk expands EXPAND keys per round; of equal products the one scored first comes first. `Walk` is its definition, for
all sequences and heads at once in torch; the C++ kernel (attention/backends/cpp_graph) does the same per query head
where it is available. Graphs are arrays, [B, heads, n, degree] int32; heads is Hkv (a graph is made by all query heads
of its group, and each of them walks it) or Hq (one graph per query head, `per_query_head`).
Cost: build O(m n D) per head, m sampled queries, as much as prompt attention for m = n, and 4 degree bytes per key;
search O(scanned D + degree rounds), and while it runs a mark per key and query head: a bit, in torch 4 bytes.
Differs from the authors, whose graph code is not published: a query has several pivots, not one; walks start at
sampled entries instead of the one key nearest to the mean; unreachable keys are connected by trees below exact nearest
keys instead of by a walk for every key. Bad options raise OptionError.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from foveate.attention.backends import cpp_graph
from foveate.errors import OptionError
from foveate.methods.index.base import Found, KeyIndex
from foveate.methods.index.linking import TREE, connect, link
from foveate.methods.storage import slack

# 16 query heads, 20k keys of width 64, one thread: 1.5, 1.0, 0.8, 0.8 ms per query head at 4, 8, 16, 32, and a tenth
# more scanned at 32 (torch 2.13).
EXPAND = 16
ENTRY_SHARE = 256


@dataclass(frozen=True, kw_only=True)
class GraphOptions:
    """How a graph is made.

    neighbours: nearest keys of a query that are linked. pivots: how many of them are linked to all others.
    degree: links per key, of which TREE are for connecting. sample: queries used per query head, evenly spread over
    what is given; None: all. fresh: new keys that may wait before they are linked.
    """

    neighbours: int = 100
    pivots: int = 4
    degree: int = 32
    sample: int | None = 1024
    fresh: int = 1024
    per_query_head: bool = False

    def __post_init__(self) -> None:
        for name, least in (("neighbours", 2), ("pivots", 1), ("degree", TREE + 1), ("sample", 1), ("fresh", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise OptionError(f"attention graph: {name}={value}, allowed: >= {least}")


@dataclass
class AttentionGraph(KeyIndex):
    """Links made by queries.

    links: int32 [B, heads, capacity, degree], -1 absent. entries: int64 [B, heads, E], -1 absent.
    linked: int64 [B], keys that are in the graph; those between it and `length` are scored one by one.
    queries: [B, Hq, m, D] on the host, queries that wait for linking; real: bool [B, m], which of them exist.
    device: where links are made.
    """

    links: Tensor
    entries: Tensor
    linked: Tensor
    queries: Tensor
    real: Tensor
    options: GraphOptions
    device: torch.device

    @classmethod
    def build(
        cls,
        keys: Tensor,
        length: Tensor,
        queries: Tensor,
        options: GraphOptions | None = None,
        *,
        real: Tensor | None = None,
    ) -> AttentionGraph:
        """A graph of keys [B, Hkv, capacity, D] from queries [B, Hq, m, D], of which real [B, m] exist (all).

        Links are made on the queries' device, now and later.
        """
        options = options or GraphOptions()
        B, Hkv, Hq = keys.shape[0], keys.shape[1], queries.shape[1]
        heads = Hq if options.per_query_head else Hkv
        device = queries.device
        real = torch.ones(B, queries.shape[2], dtype=torch.bool) if real is None else real.cpu()
        queries, real = thinned(queries, real, options.sample)
        made = cls(
            torch.zeros_like(length),
            torch.full((B, heads, 0, options.degree), -1, dtype=torch.int32),
            torch.full((B, heads, 0), -1),
            torch.zeros(B, dtype=torch.int64),
            queries.cpu(),
            real,
            options,
            device,
        )
        made.append(keys, length)
        return made

    # --- taking in

    def insert(self, keys: Tensor, length: Tensor, queries: Tensor | None, real: Tensor | None) -> None:
        if queries is not None:
            self._note(queries.cpu(), real)
        due = (length - self.linked) > self.options.fresh
        if not bool(due.any()):
            return
        self._widen(int(length.max()))
        for b in due.nonzero()[:, 0].tolist():
            self._link_row(b, keys[b, :, : int(length[b])])
        self.linked = torch.where(due, length, self.linked)
        self.real = self.real & ~due[:, None]
        self._drop(self.real.any(0))

    def _note(self, queries: Tensor, real: Tensor | None) -> None:
        """Keep queries [B, Hq, m, D] for the next linking, every second one when there are twice too many."""
        self.queries = torch.cat((self.queries, queries), 2)
        new = torch.ones(queries.shape[0], queries.shape[2], dtype=torch.bool) if real is None else real.cpu()
        self.real = torch.cat((self.real, new), 1)
        most = self.options.sample
        if most is not None and self.queries.shape[2] > 2 * most:
            self._drop(torch.arange(self.queries.shape[2]) % 2 == 0)

    def _drop(self, stays: Tensor) -> None:
        self.queries, self.real = self.queries[:, :, stays], self.real[:, stays]

    def _widen(self, rows: int) -> None:
        B, heads, held, degree = self.links.shape
        if rows > held:
            grown = torch.full((B, heads, rows + slack(rows), degree), -1, dtype=torch.int32)
            grown[:, :, :held] = self.links
            self.links = grown
        most = max(self.entries.shape[2], -(-rows // ENTRY_SHARE))
        self.entries = torch.nn.functional.pad(self.entries, (0, most - self.entries.shape[2]), value=-1)

    def _sampled(self, b: int) -> Tensor:
        """The waiting queries [Hq, m, D] of a sequence. Later linkings use fewer: an eighth of the exact scores that a
        dense model would have computed for the new tokens."""
        most = self.options.sample
        if int(self.linked[b]):
            most = min(most or self.options.fresh, max(1, self.options.fresh // 8))
        queries, _ = thinned(self.queries[b : b + 1], self.real[b : b + 1], most)
        return queries[0].to(self.device)

    def _link_row(self, b: int, keys: Tensor) -> None:
        """Link all keys [Hkv, n, D] of one sequence by the queries that wait."""
        queries, n = self._sampled(b), keys.shape[1]
        most = -(-n // ENTRY_SHARE)
        for h, asked in enumerate(queries.chunk(self.links.shape[1])):
            own = keys[h * keys.shape[0] // self.links.shape[1]].to(self.device, _exact(keys))
            links = self.links[b, h, :n].to(self.device)
            asked = asked.flatten(0, 1).to(own.dtype)
            best = link(links, own, asked, neighbours=self.options.neighbours, pivots=self.options.pivots)
            entries = self._entries(self.entries[b, h, :most].to(self.device), own, best)
            connect(links, own, entries[entries >= 0])
            self.links[b, h, :n] = links.cpu()
            self.entries[b, h, :most] = entries.cpu()

    @staticmethod
    def _entries(held: Tensor, keys: Tensor, best: Tensor) -> Tensor:
        """Entries [E]: those held, and best keys of evenly sampled queries; with none, the key nearest to the mean."""
        E = held.numel()
        old = held[held >= 0]
        some = best[torch.linspace(0, max(0, best.numel() - 1), min(4 * E, best.numel())).long()]
        new = some.unique()
        new = new[~torch.isin(new, old)]
        room = E - old.numel()
        if new.numel() > room:
            new = new[torch.linspace(0, new.numel() - 1, room, device=new.device).long()] if room else new[:0]
        made = torch.cat((old, new))
        if not made.numel():
            made = (keys - keys.mean(0)).square().sum(-1).argmin()[None]
        return torch.nn.functional.pad(made, (0, E - made.numel()), value=-1)

    # --- searching

    def find(self, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
        count = min(count, int(self.length.max()))
        if cpp_graph.why_not(q, keys) is not None:
            return self.walk(q, keys, count, beam)
        index, scanned = cpp_graph.walk(
            q, keys, self.links, self.entries, self.linked, self.length, beam=beam, expand=EXPAND, count=count
        )
        return Found(index, scanned)

    def walk(self, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
        """`find` in torch."""
        B, Hq, _ = q.shape
        heads = self.links.shape[1]
        walk = Walk(q, keys, int(self.length.max()), beam)
        walk.offer(self.entries.repeat_interleave(Hq // heads, 1).flatten(0, 1))
        newest = torch.arange(int((self.length - self.linked).max()))
        newest = self.linked[:, None] + newest
        newest = torch.where(newest < self.length[:, None], newest, -1)
        walk.offer(newest.repeat_interleave(Hq, 0))
        flat, capacity = self.links.flatten(0, 2), self.links.shape[2]
        graph = torch.arange(B)[:, None] * heads + torch.arange(Hq) // (Hq // heads)
        start, linked = graph.flatten()[:, None] * capacity, self.linked.repeat_interleave(Hq)[:, None]
        while capacity and (nodes := walk.next()) is not None:
            # Keys that are not linked yet have no row of links.
            rows = torch.where((nodes >= 0) & (nodes < linked), start + nodes, -1)
            ahead = flat[rows.clamp_min(0)].long()
            walk.offer(ahead.masked_fill_((rows < 0)[..., None], -1).flatten(1))
        index, scanned = walk.best(count)
        return Found(index.view(B, Hq, -1), scanned.view(B, Hq))

    @property
    def nbytes(self) -> int:
        tensors = (self.links, self.entries, self.linked, self.length, self.queries, self.real)
        return sum(each.numel() * each.element_size() for each in tensors)


def thinned(queries: Tensor, real: Tensor, most: int | None) -> tuple[Tensor, Tensor]:
    """At most `most` (None: all) of each sequence's real queries, evenly spread: [B, Hq, m', D] and which are real.

    queries [B, Hq, m, D]; real [B, m] on the host.
    """
    picks = [row.nonzero()[:, 0] for row in real]
    if most is not None:
        picks = [x[torch.linspace(0, x.numel() - 1, most).long()] if x.numel() > most else x for x in picks]
    index = pad_sequence(picks, batch_first=True)
    there = torch.arange(index.shape[1]) < torch.tensor([pick.numel() for pick in picks])[:, None]
    spread = index.to(queries.device)[:, None, :, None].expand(-1, queries.shape[1], -1, queries.shape[3])
    return queries.gather(2, spread), there


class Walk:
    """Best-first search of S = B Hq queries at once: what has been scored, and the `beam` best of each."""

    def __init__(self, q: Tensor, keys: Tensor, n: int, beam: int) -> None:
        """q [B, Hq, D]; keys [B, Hkv, capacity, D], of which the first n rows count."""
        B, Hq, D = q.shape
        Hkv, capacity = keys.shape[1], keys.shape[2]
        owner = torch.arange(B)[:, None] * Hkv + torch.arange(Hq) // (Hq // Hkv)
        self.keys, self.first = keys.flatten(0, 2), owner.flatten() * capacity
        self.q = q.reshape(B * Hq, D).to(_exact(keys))
        S = B * Hq
        # The number of the offer that brought a key up, 0: none; the last column takes what is absent.
        self.mark = torch.zeros(S, n + 1, dtype=torch.int32)
        self.clock = 1
        self.beam = beam
        self.ids = torch.empty(S, 0, dtype=torch.int64)
        self.scores = torch.empty(S, 0, dtype=self.q.dtype)
        self.open = torch.empty(S, 0, dtype=torch.bool)
        self.scanned = torch.zeros(S, dtype=torch.int64)

    def offer(self, ids: Tensor) -> None:
        """Score keys ids [S, C] (-1 absent) that have not been scored yet, and keep the best."""
        C = ids.shape[1]
        number = torch.arange(self.clock + C - 1, self.clock - 1, -1, dtype=torch.int32).expand_as(ids)
        self.clock += C
        at = torch.where(ids >= 0, ids, self.mark.shape[1] - 1)
        fresh = (ids >= 0) & (self.mark.gather(1, at) == 0)
        at = torch.where(fresh, at, self.mark.shape[1] - 1)
        # Of a key that is offered twice at once, the first counts.
        self.mark.scatter_reduce_(1, at, number, "amax")
        fresh &= self.mark.gather(1, at) == number
        row, column = fresh.nonzero(as_tuple=True)
        if not row.numel():
            return
        found = ids[row, column]
        scores = torch.full(ids.shape, -torch.inf, dtype=self.q.dtype)
        vectors = self.keys.index_select(0, self.first[row] + found).to(self.q.dtype)
        products = (vectors * self.q.index_select(0, row)).sum(-1)
        # What is no number is never kept.
        scores[row, column] = products.masked_fill_(products.isnan(), -torch.inf)
        self.scanned += fresh.sum(1)
        self._keep(ids, scores, fresh)

    def _keep(self, ids: Tensor, scores: Tensor, fresh: Tensor) -> None:
        ids, scores = torch.cat((self.ids, ids), 1), torch.cat((self.scores, scores), 1)
        order = scores.argsort(dim=1, descending=True, stable=True)[:, : self.beam]
        self.scores, self.ids = scores.gather(1, order), ids.gather(1, order)
        self.open = torch.cat((self.open, fresh), 1).gather(1, order)

    def next(self) -> Tensor | None:
        """The EXPAND best keys not expanded yet, [S, <= EXPAND], -1 absent; None when there are none."""
        waiting = self.open & (self.scores > -torch.inf)
        # Best first already, so the first ones that wait.
        some = (~waiting).to(torch.uint8).argsort(dim=1, stable=True)[:, :EXPAND]
        there = waiting.gather(1, some)
        if not bool(there.any()):
            return None
        self.open.scatter_(1, some, False)
        return torch.where(there, self.ids.gather(1, some), -1)

    def best(self, count: int) -> tuple[Tensor, Tensor]:
        """The best [S, count] (-1 absent) and how many keys were scored [S]."""
        index = torch.where(self.scores > -torch.inf, self.ids, -1)[:, :count]
        return torch.nn.functional.pad(index, (0, count - index.shape[1]), value=-1), self.scanned


def _exact(keys: Tensor) -> torch.dtype:
    return torch.float64 if keys.dtype == torch.float64 else torch.float32
