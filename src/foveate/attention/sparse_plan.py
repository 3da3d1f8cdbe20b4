"""The one sparse format that kernels read: compressed rows of key blocks, and columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
# Lists that may be longer than this are counted before memory is asked for: one wait costs less than the memory.
SPARE_ENTRIES = 1 << 25


@dataclass(frozen=True)
class ByKeys:
    """The same blocks listed by key block, for gradients of keys and values.

    ptr: int64 [lists + 1], one list per key block of each head of each sequence; row: int32 [nnz], query blocks
    within their head, ascending; n_masked: int32 [lists], the first entries of a list that need a causal mask;
    order: int32 [lists], head after head, longest lists first.
    """

    ptr: Tensor
    row: Tensor
    n_masked: Tensor
    order: Tensor


@dataclass(frozen=True)
class SparsePlan:
    """Device tensors, built with at most one host sync, immutable, shared over layers and steps.

    Row = one block of `block_m` queries of one head of one sequence; `heads` is 1, Hkv or Hq.
    row_ptr: int64 [rows + 1]; col: int32 [nnz], ascending within a row; `spare`: col may be longer, for lists made
    without knowing nnz on the host, and what lies past row_ptr[-1] is never read.
    n_full: int32 [rows], the first blocks of each row that need no causal mask (M queries are the last of N).
    columns: int32 [B, heads, V] or None, single key slots for every row (< 0 absent), read besides the blocks.
    order: int32 [rows], the launch's: head after head, so that the keys in use stay in the L2 cache, and the longest
    rows of a head first, for a balanced end.
    """

    row_ptr: Tensor
    col: Tensor
    n_full: Tensor
    order: Tensor
    batch: int
    heads: int
    m: int
    n: int
    block_m: int
    block_n: int
    columns: Tensor | None = None
    spare: bool = False

    @classmethod
    def from_csr(
        cls, row_ptr: Tensor, col: Tensor, *, batch: int, heads: int, m: int, n: int, block_m: int, block_n: int
    ) -> SparsePlan:
        counts = row_ptr.diff()
        row = _lists_of_entries(counts, col)
        full = _needs_no_mask(row % -(-m // block_m), col, m, n, block_m, block_n)
        n_full = torch.zeros(counts.numel(), dtype=torch.int32, device=col.device)
        n_full.index_add_(0, row, full.to(torch.int32))
        order = _longest_first(counts, batch * heads)
        return cls(row_ptr, col, n_full, order, batch, heads, m, n, block_m, block_n)

    @classmethod
    def from_diagonals(cls, slash: Tensor, *, n: int, block: int, spare: bool = False) -> SparsePlan:
        """Row r reads block r - offset for each offset in slash [B, H, S] (< 0: absent; repeats count once), M = N.

        Without `spare` waits for the device once, for how many blocks are listed. With it `col` has room for as many as
        S offsets can list, and nothing is waited for unless that is more than SPARE_ENTRIES.
        O(listed blocks) time and memory, with `spare` O(room).
        """
        rows = -(-n // block)
        lists = slash.flatten(0, 1).long()
        absent = torch.where((lists < 0) | (lists >= rows), rows, lists).sort(-1).values
        repeated = torch.nn.functional.pad(absent[:, 1:] == absent[:, :-1], (1, 0))
        offsets = absent.masked_fill(repeated, rows).sort(-1).values
        row = torch.arange(rows, device=slash.device).expand(offsets.shape[0], -1).contiguous()
        counts = torch.searchsorted(offsets, row, right=True).flatten()
        row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=slash.device)
        row_ptr[1:] = counts.cumsum(0)
        room = offsets.shape[0] * room_of_rows(rows, offsets.shape[1])
        spare = spare and room <= SPARE_ENTRIES
        of = _lists_of_places(row_ptr, room if spare else int(row_ptr[-1]))
        inside = of.clamp(max=counts.numel() - 1)
        # Ascending blocks are descending offsets: the last entry of a row is its smallest offset.
        back = (row_ptr[inside + 1] - 1 - torch.arange(of.numel(), device=slash.device)).clamp(min=0)
        col = (inside % rows - offsets[inside // rows, back]).to(torch.int32)
        # Only the block on the diagonal needs a mask, if it has more than one token.
        own = (offsets == 0).any(-1, keepdim=True) & (block > 1)
        n_full = (counts.view(-1, rows) - own.long()).flatten().to(torch.int32)
        order = _longest_first(counts, lists.shape[0])
        return cls(row_ptr, col, n_full, order, slash.shape[0], slash.shape[1], n, n, block, block, spare=spare)

    def with_columns(self, columns: Tensor) -> SparsePlan:
        return replace(self, columns=columns.to(torch.int32))

    @property
    def nnz(self) -> int:
        """Listed blocks; waits for the device where `col` has room to spare."""
        return int(self.row_ptr[-1]) if self.spare else self.col.numel()

    @property
    def row_blocks(self) -> int:
        """Rows of one head."""
        return -(-self.m // self.block_m)

    @property
    def key_blocks(self) -> int:
        return -(-self.n // self.block_n)

    @cached_property
    def by_keys(self) -> ByKeys:
        """The transposed lists; columns are not in them."""
        col = self.col[: self.nnz]
        row = _lists_of_entries(self.row_ptr.diff(), col)
        lists = self.batch * self.heads * self.key_blocks
        entry = row // self.row_blocks * self.key_blocks + col
        # Entries are ordered by row, so a stable sort leaves each list's rows ascending.
        listed = entry.sort(stable=True)
        ptr = torch.searchsorted(listed.values, torch.arange(lists + 1, device=entry.device))
        own = (row % self.row_blocks)[listed.indices]
        masked = ~_needs_no_mask(own, col[listed.indices], self.m, self.n, self.block_m, self.block_n)
        n_masked = torch.zeros(lists, dtype=torch.int32, device=entry.device)
        n_masked.index_add_(0, listed.values, masked.to(torch.int32))
        return ByKeys(ptr, own.to(torch.int32), n_masked, _longest_first(ptr.diff(), self.batch * self.heads))

    def stats(self) -> dict[str, float]:
        """Blocks, share of all causal blocks, the longest row over the mean row, bytes."""
        counts = self.row_ptr.diff()
        last = torch.arange(1, self.row_blocks + 1) * self.block_m + (self.n - self.m)
        causal = (-(-torch.clamp(last, max=self.n) // self.block_n)).sum().item() * self.batch * self.heads
        mean = counts.float().mean().item()
        tensors = (self.row_ptr, self.col, self.n_full, self.order)
        nnz = self.nnz
        return {
            "blocks": float(nnz),
            "density": nnz / causal,
            "imbalance": counts.max().item() / mean if mean else 1.0,
            "bytes": float(sum(each.numel() * each.element_size() for each in tensors)),
        }


def csr_from_mask(mask: Tensor, *, m: int, n: int, block_m: int, block_n: int) -> SparsePlan:
    """From bool [B, H, R, C]. Waits for the device once: without the number of blocks, room for all of the mask's would
    be needed, four bytes for each of its one."""
    counts = mask.flatten(0, 2).sum(-1)
    row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=mask.device)
    row_ptr[1:] = counts.cumsum(0)
    return SparsePlan.from_csr(
        row_ptr,
        mask.nonzero()[:, 3].to(torch.int32),
        batch=mask.shape[0],
        heads=mask.shape[1],
        m=m,
        n=n,
        block_m=block_m,
        block_n=block_n,
    )


def made_once(owner: object, what: object, make: Callable[[], T], *sources: Tensor) -> T:
    """make(), kept with its owner under the name `what`, and made anew once a source tensor was written to.

    A frozen dataclass made by `replace` starts with nothing kept. Traced by torch.compile, nothing is kept.
    """
    if torch.compiler.is_compiling():
        return make()
    kept = vars(owner).setdefault("_made", {})
    versions = tuple(0 if each.is_inference() else each._version for each in sources)
    if what not in kept or kept[what][0] != versions:
        kept[what] = (versions, make())
    made: T = kept[what][1]
    return made


def _lists_of_entries(counts: Tensor, entries: Tensor) -> Tensor:
    """Which list each entry belongs to, int64 [nnz]; no host sync."""
    lists = torch.arange(counts.numel(), device=entries.device)
    return torch.repeat_interleave(lists, counts, output_size=entries.numel())


def _lists_of_places(row_ptr: Tensor, places: int) -> Tensor:
    """Which list each place of `col` belongs to, int64; the number of lists for places past the last one."""
    return torch.searchsorted(row_ptr, torch.arange(places, device=row_ptr.device), right=True) - 1


def lists_of_room(row_ptr: Tensor, col: Tensor) -> tuple[Tensor, Tensor]:
    """Which list each entry of a col with room to spare belongs to, and col; past the last list, the number of lists
    and 0. No host sync."""
    row = _lists_of_places(row_ptr, col.numel())
    return row, torch.where(row < row_ptr.numel() - 1, col, 0)


def room_of_rows(rows: int, most: int) -> int:
    """Blocks that the rows of a causal square can list, `most` in each."""
    width = min(rows, most)
    return width * (width + 1) // 2 + (rows - width) * width


def _needs_no_mask(row: Tensor, col: Tensor, m: int, n: int, block_m: int, block_n: int) -> Tensor:
    """Whether the first query of a row sees the whole key block."""
    return (col.long() + 1) * block_n - 1 <= row * block_m + (n - m)


def _longest_first(counts: Tensor, heads: int) -> Tensor:
    """Head after head, longest lists first within a head, int32."""
    order = counts.view(heads, -1).argsort(dim=1, descending=True, stable=True)
    first = torch.arange(heads, device=counts.device)[:, None] * order.shape[1]
    return (order + first).flatten().to(torch.int32)
