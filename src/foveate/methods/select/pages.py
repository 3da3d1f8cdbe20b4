"""Pages: summaries of runs of stored keys, kept up to date as keys are appended.

A page is `size` consecutive real tokens of a KV head, in the order of the slots: padding is skipped, so a left-padded
row has the pages it would have alone. A token's place in that order is its rank; while nothing is padding, rank and
slot are the same. Appending costs the pages it touches; any other change of the cache (its `version`) a rebuild,
O(N D).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.backends.torch_dense import gather_rows
from foveate.attention.scoring import query_scores, top_slots
from foveate.attention.summaries import bounds, in_chunks, total
from foveate.methods.cache import LayerCache
from foveate.methods.storage import slack


@dataclass
class Pages:
    """Page summaries of one layer.

    kind: "bounds" (greatest and least of every feature) or "mean". skip: first tokens that belong to no page.
    summary: [B, Hkv, capacity, 2 D] in the keys' dtype, or [B, Hkv, capacity, D] float32 sums; the last row takes
        what belongs to no page.
    covered: slots summarised; version: of the cache that they were.
    ranked: [B, 1 or Hkv, capacity] int64, the slot of every rank, and filled: [B, 1 or Hkv] int64, how many; None
        while rank and slot are the same.
    """

    kind: str
    size: int
    skip: int = 0
    summary: Tensor | None = None
    covered: int = 0
    version: int = -1
    ranked: Tensor | None = None
    filled: Tensor | None = None

    # --- keeping up

    def update(self, cache: LayerCache) -> None:
        """Take in what was appended since the last call, or everything when slots have changed."""
        fresh = (
            self.summary is not None
            and self.version == cache.version
            and self.covered <= cache.stored
            and (self.ranked is not None) == cache.holes
        )
        if not fresh:
            self.covered, self.version = 0, cache.version
            self.summary = self.ranked = self.filled = None
        if self.covered == cache.stored and self.summary is not None:
            return
        if not cache.holes:
            self._extend(cache)
        elif self.summary is None:
            self._rank(cache)
        else:
            self._scatter(cache)
        self.covered = cache.stored

    def _extend(self, cache: LayerCache) -> None:
        """Summarise the last page anew and the pages after it."""
        first = max(0, self.covered - self.skip) // self.size
        start = self.skip + first * self.size
        self._write(first, cache.keys[:, :, start:])

    def _rank(self, cache: LayerCache) -> None:
        """Summarise everything by rank: real tokens first, in the order of their slots."""
        real = cache.positions_or_fail() >= 0
        order = (~real).byte().argsort(dim=-1, stable=True)
        self.filled = real.sum(-1)
        n = int(self.filled.max())
        self.ranked = F.pad(order, (0, slack(order.shape[-1])))
        keys = gather_rows(cache.keys, order[..., :n].expand(*cache.shape, -1))
        beyond = torch.arange(n, device=keys.device) >= self.filled[..., None]
        self._write(0, keys[:, :, self.skip :], beyond[..., self.skip :])

    def _write(self, first: int, keys: Tensor, beyond: Tensor | None = None) -> None:
        n = keys.shape[2]
        count = -(-n // self.size)
        self._grow(keys, first + count)
        assert self.summary is not None
        if not n:
            return
        target = self.summary[:, :, first : first + count]
        # Full pages need no mask.
        full = n // self.size if beyond is None else 0
        if full:
            target[:, :, :full] = self._summarise(keys[:, :, : full * self.size].unflatten(2, (full, self.size)))
        if full < count and beyond is None:
            # A page of fewer keys, all of them real.
            target[:, :, full:] = self._summarise(keys[:, :, None, full * self.size :])
        elif beyond is not None:
            chunks, _ = in_chunks(keys, self.size)
            missing = chunks.shape[2] * self.size - n
            real = ~F.pad(beyond, (0, missing), value=True).unflatten(-1, chunks.shape[2:4])
            target[:] = self._summarise(chunks, real)

    def _summarise(self, chunks: Tensor, real: Tensor | None = None) -> Tensor:
        return total(chunks, real, dtype=torch.float32) if self.kind == "mean" else bounds(chunks, real)

    def _grow(self, keys: Tensor, pages: int) -> None:
        held = 0 if self.summary is None else self.summary.shape[2] - 1
        if self.summary is not None and pages <= held:
            return
        B, H, _, D = keys.shape
        capacity = pages + slack(pages) + 1
        grown: Tensor
        if self.kind == "mean":
            grown = torch.zeros(B, H, capacity, D, dtype=torch.float32, device=keys.device)
        else:
            grown = keys.new_full((B, H, capacity, 2 * D), torch.inf)
            grown[..., :D] = -torch.inf
        if self.summary is not None:
            grown[:, :, :held] = self.summary[:, :, :held]
        self.summary = grown

    def _scatter(self, cache: LayerCache) -> None:
        """Add new tokens to pages that differ from row to row."""
        assert self.ranked is not None
        assert self.filled is not None
        new = slice(self.covered, cache.stored)
        real = cache.positions_or_fail()[..., new] >= 0
        rank = torch.where(real, self.filled[..., None] + real.cumsum(-1) - 1, -1)
        last = int(rank.max()) + 1
        if last >= self.ranked.shape[-1]:
            self.ranked = F.pad(self.ranked, (0, last - self.ranked.shape[-1] + slack(last)))
        slots = torch.arange(self.covered, cache.stored, device=rank.device).expand_as(rank)
        self.ranked.scatter_(2, torch.where(real, rank, self.ranked.shape[-1] - 1), slots)
        self.filled = self.filled + real.sum(-1)
        keys = cache.keys[:, :, new]
        self._grow(keys, -(-max(0, last - self.skip) // self.size))
        assert self.summary is not None
        nowhere = self.summary.shape[2] - 1
        page = torch.where(rank >= self.skip, (rank - self.skip) // self.size, nowhere)
        page = page.expand(*cache.shape, -1)[..., None].expand_as(keys)
        D = keys.shape[-1]
        if self.kind == "mean":
            self.summary.scatter_add_(2, page, keys.float())
        else:
            self.summary[..., :D].scatter_reduce_(2, page, keys, "amax")
            self.summary[..., D:].scatter_reduce_(2, page, keys, "amin")

    # --- asking

    @property
    def tokens(self) -> int | Tensor:
        """Real tokens: an int, or int64 [B, 1 or Hkv] where padding makes rows differ."""
        return self.covered if self.filled is None else self.filled

    @property
    def most(self) -> int:
        """Real tokens of the longest row."""
        return self.covered if self.filled is None else int(self.filled.max())

    def upper_bounds(self, q: Tensor) -> Tensor:
        """Unscaled bound of q . k over every page's keys, kind "bounds": q [B, Hq, D] -> [B, Hq, pages] float32.

        sum over d of max(q_d greatest_d, q_d least_d). Pages beyond a row's own are not numbers.
        """
        both = torch.cat((q.clamp_min(0), q.clamp_max(0)), -1)
        return query_scores(both, self._used())

    def mean_scores(self, q: Tensor) -> Tensor:
        """Unscaled q . (sum of the page's keys) / size, kind "mean": q [B, Hq, D] -> [B, Hq, pages] float32.

        A page that is not full counts its missing keys as zero.
        """
        return query_scores(q.float(), self._used()) / self.size

    def _used(self) -> Tensor:
        assert self.summary is not None
        return self.summary[:, :, : -(-max(0, self.most - self.skip) // self.size)]

    def slots(self, pages: Tensor, *, ends: bool = False) -> Tensor:
        """The slots of pages [B, H, n] int64 (ascending, -1 absent): int64 [B, H, n * size], -1 absent.

        ends: every head's list is known to end with the last page. Where it does, the slots that page lacks are cut
        off, not marked, unless rows differ; on a GPU only where `ends` says so, as looking means waiting.
        """
        rank = self.skip + pages[..., None] * self.size + torch.arange(self.size, device=pages.device)
        if self.skip or self.ranked is not None:
            # Else the ranks of absent pages are negative already.
            rank = torch.where(pages[..., None] >= 0, rank, -1)
        rank = rank.flatten(2)
        if self.ranked is None:
            last = (self.covered - self.skip - 1) // self.size
            lacking = self.skip + (last + 1) * self.size - self.covered
            if lacking and not ends and pages.device.type == "cpu":
                ends = bool((pages[..., -1] == last).all())
            if lacking and ends:
                return rank[..., :-lacking]
        return self.slot_of(rank)

    def slot_of(self, rank: Tensor) -> Tensor:
        """The slots of ranks [B, H, n] int64; absent where a rank is negative or beyond the row."""
        if self.ranked is None or self.filled is None:
            return rank.masked_fill(rank >= self.covered, -1)
        heads = rank.shape[1]
        ranked, filled = spread(self.ranked, heads), spread(self.filled, heads)
        inside = (rank >= 0) & (rank < filled[..., None])
        return torch.where(inside, ranked.gather(2, rank.clamp(0, ranked.shape[-1] - 1)), -1)


def spread(x: Tensor, heads: int) -> Tensor:
    """[B, 1 or H or Hkv, ...] given to each of `heads` heads."""
    return x.expand(-1, heads, *x.shape[2:]) if x.shape[1] == 1 else x.repeat_interleave(heads // x.shape[1], 1)


def best_pages(scores: Tensor, count: int | Tensor) -> Tensor:
    """The `count` best pages of scores [B, H, pages], ascending: int64 [B, H, n], -1 absent; ties go to the earlier."""
    return top_slots(scores, count)
