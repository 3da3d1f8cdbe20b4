"""The one sparse format that kernels read: compressed rows of key blocks, and columns."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class SparsePlan:
    """Device tensors, built without host sync, immutable, shared over layers and steps.

    Row = one block of `block_m` queries of one head of one sequence; `heads` is 1, Hkv or Hq.
    row_ptr: int64 [rows + 1]; col: int32 [nnz], ascending within a row.
    n_full: int32 [rows], the first blocks of each row that need no causal mask (M queries are the last of N).
    columns: int32 [B, heads, V] or None, single key slots for every row (< 0 absent), read besides the blocks.
    order: int32 [rows], longest rows first, for a balanced launch.
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

    @classmethod
    def from_csr(
        cls, row_ptr: Tensor, col: Tensor, *, batch: int, heads: int, m: int, n: int, block_m: int, block_n: int
    ) -> SparsePlan:
        counts = row_ptr.diff()
        rows_per_head = -(-m // block_m)
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=col.device), counts)
        first_query = (row % rows_per_head) * block_m + (n - m)
        full = (col.long() + 1) * block_n - 1 <= first_query
        n_full = torch.zeros(counts.numel(), dtype=torch.int32, device=col.device)
        n_full.index_add_(0, row, full.to(torch.int32))
        order = torch.argsort(counts, descending=True, stable=True).to(torch.int32)
        return cls(row_ptr, col, n_full, order, batch, heads, m, n, block_m, block_n)

    def with_columns(self, columns: Tensor) -> SparsePlan:
        return replace(self, columns=columns.to(torch.int32))

    @property
    def nnz(self) -> int:
        return self.col.numel()

    def stats(self) -> dict[str, float]:
        """Blocks, share of all causal blocks, the longest row over the mean row, bytes."""
        counts = self.row_ptr.diff()
        rows_per_head = -(-self.m // self.block_m)
        last = torch.arange(1, rows_per_head + 1) * self.block_m + (self.n - self.m)
        causal = (-(-torch.clamp(last, max=self.n) // self.block_n)).sum().item() * self.batch * self.heads
        mean = counts.float().mean().item()
        tensors = (self.row_ptr, self.col, self.n_full, self.order)
        return {
            "blocks": float(self.nnz),
            "density": self.nnz / causal,
            "imbalance": counts.max().item() / mean if mean else 1.0,
            "bytes": float(sum(each.numel() * each.element_size() for each in tensors)),
        }


def csr_from_mask(mask: Tensor, *, m: int, n: int, block_m: int, block_n: int) -> SparsePlan:
    """From bool [B, H, R, C]."""
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
