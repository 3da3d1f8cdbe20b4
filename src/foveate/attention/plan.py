"""Plans: which keys each query reads.

A plan names slots of the stored keys; causality, windows of the model and padding are the positions' business
(positions.py) and always apply on top. Every plan can say its definition (`to_mask`), the share of the visible
pairs that it reads (`density`) and the one sparse form that kernels read (`lower`). No plan holds an M x N mask.

In `to_mask` and `density` the M queries are the last of N keys unless positions are given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from foveate.attention.positions import Positions
from foveate.attention.sparse_plan import SparsePlan, csr_from_mask, made_once
from foveate.errors import PlanError

CPU = torch.device("cpu")


class Plan:
    """Base of all plans."""

    def to_mask(self, m: int, n: int, positions: Positions | None = None) -> Tensor:
        """Bool [B or 1, H or 1, M, N], H = Hkv or Hq: True where the query reads the key. The definition."""
        positions = positions or Positions()
        return self.reads(m, n, positions) & positions.visible(m, n, self.device)

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        """The plan's own choice before visibility, bool, broadcastable to [B, H, M, N]."""
        raise PlanError(f"{type(self).__name__} defines no mask")

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        """Pairs read over visible pairs, in [0, 1]; 1 where nothing is visible."""
        positions = positions or Positions()
        visible = positions.visible(m, n, self.device)
        mask = self.reads(m, n, positions) & visible
        total = visible.expand_as(mask).sum().item() if mask.dim() == visible.dim() else visible.sum().item()
        return mask.sum().item() / total if total else 1.0

    def lower(self, m: int, n: int, block: int = 64) -> SparsePlan:
        """The one sparse form that kernels read, for M queries that are the last of N keys."""
        rows, cols = -(-m // block), -(-n // block)
        mask = self.to_mask(m, n)
        padded = torch.zeros(*mask.shape[:2], rows * block, cols * block, dtype=torch.bool, device=mask.device)
        padded[..., :m, :n] = mask
        tiles = padded.unflatten(2, (rows, block)).unflatten(4, (cols, block)).any(5).any(3)
        return csr_from_mask(tiles, m=m, n=n, block_m=block, block_n=block)

    @property
    def device(self) -> torch.device:
        return CPU


@dataclass(frozen=True)
class Dense(Plan):
    """Every visible key."""

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        return torch.ones(1, 1, m, n, dtype=torch.bool, device=positions_device(positions))

    def to_mask(self, m: int, n: int, positions: Positions | None = None) -> Tensor:
        positions = positions or Positions()
        return positions.visible(m, n, positions_device(positions))

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        return 1.0


@dataclass(frozen=True)
class Window(Plan):
    """Query i reads key j when pos_i - pos_j <= left or pos_j < sinks: at most left + 1 + sinks keys."""

    left: int
    sinks: int = 0

    def __post_init__(self) -> None:
        if self.left < 0 or self.sinks < 0:
            raise PlanError(f"Window(left={self.left}, sinks={self.sinks}): both must be >= 0")

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        device = positions_device(positions)
        q = positions.queries(m, n, device)[:, None, :, None]
        k = positions.keys(n, device)[:, :, None, :]
        return (q - k <= self.left) | (k < self.sinks)

    def to_mask(self, m: int, n: int, positions: Positions | None = None) -> Tensor:
        positions = positions or Positions()
        return self.reads(m, n, positions) & positions.visible(m, n, positions_device(positions))

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        if positions is not None and not positions.aligned:
            visible = positions.visible(m, n, positions_device(positions))
            return (self.reads(m, n, positions) & visible).sum().item() / max(1, visible.sum().item())
        q = torch.arange(n - m, n)
        visible = q + 1
        read = torch.minimum(visible, self.left + 1 + torch.clamp(q - self.left, min=0, max=self.sinks))
        return read.sum().item() / visible.sum().item()


@dataclass(frozen=True)
class Tokens(Plan):
    """A list of key slots per head: index [B, H, K] for all queries, or [B, H, M, K] for each.

    index: int32 or int64, H = Hkv (query heads of a group read the same keys) or Hq; an entry < 0 or >= N is
    absent; a slot named twice counts once only if its second entry is made absent. length [B, H]: entries in
    use (all, when None).
    """

    index: Tensor
    length: Tensor | None = None

    def __post_init__(self) -> None:
        if self.index.dim() not in (3, 4) or self.index.dtype not in (torch.int32, torch.int64):
            raise PlanError(
                f"Tokens: index {list(self.index.shape)} {self.index.dtype}, allowed: int32 or int64 [B, H, K] "
                "or [B, H, M, K]"
            )
        if self.length is not None and self.length.shape != self.index.shape[:2]:
            raise PlanError(f"Tokens: length {list(self.length.shape)}, allowed: {list(self.index.shape[:2])}")

    @property
    def device(self) -> torch.device:
        return self.index.device

    def valid(self, n: int) -> Tensor:
        """Bool like `index`: entries that name a key."""
        inside = (self.index >= 0) & (self.index < n)
        if self.length is not None:
            order = torch.arange(self.index.shape[-1], device=self.device)
            limit = self.length.reshape(*self.length.shape, *[1] * (self.index.dim() - 2))
            inside = inside & (order < limit)
        return inside

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        index = self.index if self.index.dim() == 4 else self.index[:, :, None]
        valid = self.valid(n).reshape(index.shape)
        mask = torch.zeros(*index.shape[:-1], n + 1, dtype=torch.bool, device=self.device)
        mask.scatter_(-1, torch.where(valid, index, n).long(), True)
        return mask[..., :n].expand(-1, -1, m, -1)

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        if m == 1 and (positions is None or not positions.holes):
            # One query sees all N keys: count entries, no N-wide mask.
            return self.valid(n).sum().item() / (self.index.shape[0] * self.index.shape[1] * n)
        return super().density(m, n, positions)


@dataclass(frozen=True)
class Counted:
    """factor * count + offset, worked out when it is asked for: an operator less for each step of a prompt.

    count: a tensor of one number, which stays on its device until then.
    """

    count: Tensor
    factor: float
    offset: float

    def __float__(self) -> float:
        return float(self.count) * self.factor + self.offset

    def __mul__(self, by: float) -> Counted:
        return Counted(self.count, self.factor * by, self.offset * by)


@dataclass(frozen=True)
class Blocks(Plan):
    """Key blocks per query block, in compressed rows.

    row_ptr: int64 [B * H * R + 1]; col: int32, ascending within a row; R = ceil(M / block_m) rows per head.
    Query row i belongs to query block i // block_m, key slot j to key block j // block_n.
    spare: col may be longer, for lists made without knowing their length on the host; what lies past row_ptr[-1] is
    never read. own_last: every row ends with its own block, the one on the diagonal (M = N, block_m = block_n), so that
    `share` follows from row_ptr alone.
    """

    row_ptr: Tensor
    col: Tensor
    batch: int
    heads: int
    block_m: int
    block_n: int
    spare: bool = False
    own_last: bool = False

    def __post_init__(self) -> None:
        if (self.row_ptr.numel() - 1) % (self.batch * self.heads):
            raise PlanError(
                f"Blocks: row_ptr has {self.row_ptr.numel()} entries, which is no multiple of "
                f"batch x heads = {self.batch} x {self.heads} plus one"
            )
        if self.own_last and self.block_m != self.block_n:
            raise PlanError(f"Blocks: own_last with blocks of {self.block_m} x {self.block_n}, allowed: square ones")

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def rows(self) -> int:
        return (self.row_ptr.numel() - 1) // (self.batch * self.heads)

    @classmethod
    def from_mask(cls, mask: Tensor, *, block_m: int, block_n: int, own_last: bool = False) -> Blocks:
        """From bool [B, H, R, C]: which of C key blocks each of R query blocks reads."""
        if mask.dim() != 4 or mask.dtype != torch.bool:
            raise PlanError(f"Blocks.from_mask: {list(mask.shape)} {mask.dtype}, allowed: bool [B, H, R, C]")
        counts = mask.flatten(0, 2).sum(-1)
        row_ptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=mask.device)
        row_ptr[1:] = counts.cumsum(0)
        col = mask.nonzero()[:, 3].to(torch.int32)
        return cls(row_ptr, col, mask.shape[0], mask.shape[1], block_m, block_n, own_last=own_last)

    @classmethod
    def from_lowered(cls, plan: SparsePlan, *, own_last: bool = False) -> Blocks:
        """The plan whose lowered form for M and N of `plan` is known already (no columns)."""
        if plan.columns is not None:
            raise PlanError("Blocks.from_lowered: a plan with columns, allowed: key blocks alone")
        blocks = cls(
            plan.row_ptr, plan.col, plan.batch, plan.heads, plan.block_m, plan.block_n, plan.spare, own_last=own_last
        )
        blocks.lowered(plan.m, plan.n, plan)
        return blocks

    def lowered(self, m: int, n: int, known: SparsePlan | None = None) -> SparsePlan:
        """`lower`, made once per plan and size, and anew once its tensors were written to."""
        return made_once(self, ("lowered", m, n), lambda: known or self.lower(m, n), self.row_ptr, self.col)

    @property
    def listed(self) -> Tensor:
        """col without the room to spare: int32 [nnz]; waits for the device where there is some."""
        return self.col[: int(self.row_ptr[-1])] if self.spare else self.col

    def block_mask(self, cols: int) -> Tensor:
        """Bool [B, H, R, cols], the inverse of `from_mask`."""
        counts = self.row_ptr.diff()
        row = torch.repeat_interleave(torch.arange(counts.numel(), device=self.device), counts)
        mask = torch.zeros(counts.numel(), cols, dtype=torch.bool, device=self.device)
        mask[row, self.listed.long()] = True
        return mask.reshape(self.batch, self.heads, self.rows, cols)

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        if self.rows != -(-m // self.block_m):
            raise PlanError(f"Blocks: {self.rows} rows of {self.block_m} queries do not cover M = {m}")
        mask = self.block_mask(-(-n // self.block_n))
        mask = mask.repeat_interleave(self.block_m, 2)[:, :, :m]
        return mask.repeat_interleave(self.block_n, 3)[..., :n]

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        if positions is not None and not positions.aligned:
            return super().density(m, n, positions)
        return float(self.share(m, n))

    def share(self, m: int, n: int) -> Tensor | Counted:
        """The density as a number that stays on the plan's device until `float` asks, for callers that must not wait.

        (A plan with room to spare waits, unless its rows end with their own blocks.)
        """
        if self.own_last and m == n:
            return self._own_last_share(n)
        counts, col = self.row_ptr.diff(), self.listed
        lists = torch.arange(counts.numel(), device=self.device)
        row = torch.repeat_interleave(lists, counts, output_size=col.numel()) % self.rows
        first = col.long() * self.block_n
        width = (n - first).clamp(max=self.block_n)
        # A tile's queries see min(t, width) of its keys, t counting up from `before` + 1 to `last`.
        before = row * self.block_m + (n - m) - first
        last = ((row + 1) * self.block_m).clamp(max=m) + (n - m) - first
        read = (_ramp(last, width) - _ramp(before, width)).sum()
        return read.double() / (self.batch * self.heads * (m * (n - m) + m * (m + 1) / 2))

    def _own_last_share(self, n: int) -> Tensor | Counted:
        """All but the last entry of a row are whole blocks: block_n keys for each of the row's queries."""
        b, rows, heads = self.block_n, self.rows, self.batch * self.heads
        short = n - (rows - 1) * b
        own = heads * ((rows - 1) * (b * (b + 1) // 2) + short * (short + 1) // 2)
        visible = heads * (n * (n + 1) // 2)
        factor, offset = b * b / visible, (own - heads * rows * b * b) / visible
        if short == b:
            return Counted(self.row_ptr[-1], factor, offset)
        last = (self.row_ptr[rows::rows] - self.row_ptr[rows - 1 : -1 : rows]).sum() - heads
        return self.row_ptr[-1].double() * factor + offset - last.double() * (b * (b - short) / visible)

    def lower(self, m: int, n: int, block: int = 64) -> SparsePlan:
        return SparsePlan.from_csr(
            self.row_ptr,
            self.listed,
            batch=self.batch,
            heads=self.heads,
            m=m,
            n=n,
            block_m=self.block_m,
            block_n=self.block_n,
        )


@dataclass(frozen=True)
class VerticalSlash(Plan):
    """Key columns for all queries, and block diagonals.

    vertical: int [B, H, V], key slots (< 0: absent). slash: int [B, H, S], offsets in blocks (< 0: absent):
    query block r reads key block r - offset, both of `block` tokens, counted so that the last query block ends
    with the last key (M and N a multiple of each other's block only when M = N).
    """

    vertical: Tensor
    slash: Tensor
    block: int = 64

    def __post_init__(self) -> None:
        if self.vertical.dim() != 3 or self.slash.dim() != 3:
            raise PlanError("VerticalSlash: vertical and slash must be [B, H, V] and [B, H, S]")

    @property
    def device(self) -> torch.device:
        return self.vertical.device

    def slash_blocks(self, m: int, n: int) -> Blocks:
        """The block diagonals alone, for M = N."""
        if m != n:
            raise PlanError(f"VerticalSlash needs a self-contained prompt (M = N), not M={m}, N={n}")
        lowered = SparsePlan.from_diagonals(self.slash, n=n, block=self.block)
        return Blocks(lowered.row_ptr, lowered.col, lowered.batch, lowered.heads, self.block, self.block)

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        columns = Tokens(self.vertical).reads(1, n, positions)
        return columns | self.slash_blocks(m, n).reads(m, n, positions)

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        if positions is not None and not positions.aligned:
            return super().density(m, n, positions)
        on_diagonals = float(self.slash_blocks(m, n).share(m, n))
        return on_diagonals + self._beside_diagonals(n).double().mean().item() / (n * (n + 1) / 2)

    def _beside_diagonals(self, n: int) -> Tensor:
        """Pairs that columns add to the diagonals: int64 [B, H]. O(V S), no M x N mask."""
        column, offset = (once(x.long()).clamp_min(-1) for x in (self.vertical, self.slash))
        column = column.masked_fill(column >= n, -1)
        begin = (column // self.block)[..., None] + offset[:, :, None]
        # Queries of the diagonal's block that see the column; in its own block those before it do not.
        begin, end = begin * self.block, ((begin + 1) * self.block).clamp_max(n)
        begin = torch.where(offset[:, :, None] == 0, column[..., None], begin)
        covered = torch.where(offset[:, :, None] >= 0, (end - begin).clamp_min(0), 0).sum(-1)
        return torch.where(column >= 0, n - column - covered, 0).sum(-1)

    def lower(self, m: int, n: int, block: int = 64) -> SparsePlan:
        lowered = self.slash_blocks(m, n).lower(m, n)
        return lowered.with_columns(self.vertical)


@dataclass(frozen=True)
class PerHead(Plan):
    """One plan per KV head, for heads that attend in different ways."""

    plans: Sequence[Plan] = field(default_factory=tuple)

    def __post_init__(self) -> None:
        if not self.plans:
            raise PlanError("PerHead needs one plan per KV head, not none")

    def reads(self, m: int, n: int, positions: Positions) -> Tensor:
        masks = []
        for head, plan in enumerate(self.plans):
            k = positions.k
            own = positions if k is None else Positions(positions.q, k[:, min(head, k.shape[1] - 1)][:, None])
            masks.append(plan.reads(m, n, own).expand(-1, 1, -1, -1))
        batch = max(mask.shape[0] for mask in masks)
        return torch.cat([mask.expand(batch, -1, m, n) for mask in masks], dim=1)

    def density(self, m: int, n: int, positions: Positions | None = None) -> float:
        return sum(plan.density(m, n) for plan in self.plans) / len(self.plans)


def once(index: Tensor) -> Tensor:
    """Every number once per row, in order, -1 for what was there before."""
    index = index.sort(-1).values
    again = torch.zeros_like(index, dtype=torch.bool)
    again[..., 1:] = index[..., 1:] == index[..., :-1]
    return index.masked_fill(again, -1)


def _ramp(upto: Tensor, width: Tensor) -> Tensor:
    """Sum over t = 1 .. upto of min(t, width)."""
    inside = torch.minimum(upto.clamp_min(0), width)
    return inside * (inside + 1) // 2 + (upto - width).clamp_min(0) * width


def positions_device(positions: Positions) -> torch.device:
    for tensor in (positions.q, positions.k):
        if tensor is not None:
            return tensor.device
    return CPU
