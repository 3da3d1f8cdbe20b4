"""Storage of per-token rows: uniform buffers that grow by a little, and packed segments of different lengths.

Growth is amortised: slack is a 64th of the length, so a token costs the copy of 64 rows on average, and at most
1.6 % of the memory lies idle.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def slack(length: int, least: int = 16) -> int:
    """Free rows to keep beyond `length`."""
    return max(least, length // 64)


class Rows:
    """A growing [B, H, capacity, ...] buffer of which the first `length` rows are in use."""

    def __init__(self, like: Tensor, length: int = 0) -> None:
        self.length = 0
        shape = (*like.shape[:2], length + slack(length), *like.shape[3:])
        self.buffer = torch.empty(shape, dtype=like.dtype, device=like.device)

    @classmethod
    def of(cls, rows: Tensor) -> Rows:
        """A buffer that holds a copy of rows [B, H, n, ...]."""
        made = cls(rows, rows.shape[2])
        made.append(rows)
        return made

    @property
    def used(self) -> Tensor:
        return self.buffer[:, :, : self.length]

    def append(self, rows: Tensor) -> None:
        end = self.length + rows.shape[2]
        if end > self.buffer.shape[2]:
            grown = self.buffer.new_empty((*self.buffer.shape[:2], end + slack(end), *self.buffer.shape[3:]))
            grown[:, :, : self.length] = self.used
            self.buffer = grown
        self.buffer[:, :, self.length : end] = rows
        self.length = end

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more without growing again."""
        if self.length + rows <= self.buffer.shape[2]:
            return
        grown = self.buffer.new_empty((*self.buffer.shape[:2], self.length + rows, *self.buffer.shape[3:]))
        grown[:, :, : self.length] = self.used
        self.buffer = grown

    def take(self, index: Tensor) -> None:
        """Keep rows index [B, H, n] (absent entries must be made valid by the caller)."""
        heads = max(self.buffer.shape[1], index.shape[1])
        used = self.used.expand(-1, heads, *self.used.shape[2:])
        shape = (*index.shape, *[1] * (used.dim() - 3))
        spread = index.view(shape).expand(-1, heads, -1, *used.shape[3:])
        replacement = Rows(used, index.shape[2])
        replacement.append(used.gather(2, spread))
        self.buffer, self.length = replacement.buffer, replacement.length

    def overwrite_from_end(self, index: Tensor) -> None:
        """Remove one row per head, index [B, H, 1], by moving the last row into its place."""
        last = self.buffer[:, :, self.length - 1 : self.length]
        shape = (*index.shape, *[1] * (self.buffer.dim() - 3))
        spread = index.view(shape).expand(-1, self.buffer.shape[1], -1, *self.buffer.shape[3:])
        self.buffer.scatter_(2, spread, last.clone())
        self.length -= 1

    def batch(self, index: Tensor) -> None:
        self.buffer = self.buffer.index_select(0, index.to(self.buffer.device))

    def nbytes(self) -> int:
        return self.buffer.numel() * self.buffer.element_size()


class Segments:
    """Packed rows: segment s lies at start[s], uses length[s] rows and owns capacity[s]."""

    def __init__(self, parts: dict[str, list[Tensor]]) -> None:
        """parts: for each field, one tensor [n_s, ...] per segment (all fields with the same lengths)."""
        first = next(iter(parts.values()))
        self.length = [part.shape[0] for part in first]
        self._lay_out(parts)

    def reserve(self, rows: int) -> None:
        """Make room for `rows` more in every segment without laying out again."""
        if any(n + rows > held for n, held in zip(self.length, self.capacity)):
            self._lay_out({name: self.segments(name) for name in self.fields}, rows)

    def _lay_out(self, parts: dict[str, list[Tensor]], least: int = 2) -> None:
        self.capacity = [n + slack(n, least=least) for n in self.length]
        self.start = [0, *torch.tensor(self.capacity).cumsum(0).tolist()[:-1]]
        self.fields = {}
        for name, segments in parts.items():
            flat = segments[0].new_empty((sum(self.capacity), *segments[0].shape[1:]))
            for begin, segment in zip(self.start, segments):
                flat[begin : begin + segment.shape[0]] = segment
            self.fields[name] = flat

    def segment(self, name: str, s: int) -> Tensor:
        return self.fields[name][self.start[s] : self.start[s] + self.length[s]]

    def segments(self, name: str) -> list[Tensor]:
        return [self.segment(name, s) for s in range(len(self.length))]

    def append(self, rows: dict[str, Tensor], counts: list[int] | None = None) -> None:
        """Append rows[name] [S, M, ...] to every segment, or only the last counts[s] of each."""
        some = next(iter(rows.values()))
        M = some.shape[1]
        counts = counts or [M] * len(self.length)
        if any(n + more > cap for n, more, cap in zip(self.length, counts, self.capacity)):
            self._grow(counts)
        device = some.device
        if M == 1 and all(counts):
            at = torch.tensor([b + n for b, n in zip(self.start, self.length)], device=device)
            for name, new in rows.items():
                self.fields[name].index_copy_(0, at, new[:, 0].to(self.fields[name].dtype))
        else:
            for s, more in enumerate(counts):
                begin = self.start[s] + self.length[s]
                for name, new in rows.items():
                    self.fields[name][begin : begin + more] = new[s, M - more :]
        self.length = [n + more for n, more in zip(self.length, counts)]

    def _grow(self, counts: list[int]) -> None:
        old = {name: self.segments(name) for name in self.fields}
        lengths = self.length
        self.length = [n + more for n, more in zip(lengths, counts)]
        self._lay_out(old)
        self.length = lengths

    def remove(self, rows: Sequence[tuple[int, int]]) -> None:
        """Remove (segment, row) pairs, at most one of each segment, by moving the segment's last row into its place."""
        device = next(iter(self.fields.values())).device
        into = torch.tensor([self.start[s] + row for s, row in rows], device=device)
        last = torch.tensor([self.start[s] + self.length[s] - 1 for s, _ in rows], device=device)
        for flat in self.fields.values():
            flat.index_copy_(0, into, flat.index_select(0, last))
        for s, _ in rows:
            self.length[s] -= 1

    def pick(self, keep: list[Tensor | None]) -> None:
        """Keep the given rows of each segment (None: all)."""
        parts = {
            name: [seg if rows is None else seg[rows] for seg, rows in zip(self.segments(name), keep)]
            for name in self.fields
        }
        self.length = [part.shape[0] for part in next(iter(parts.values()))]
        self._lay_out(parts)

    def batch(self, index: list[int], per_row: int) -> None:
        order = [b * per_row + h for b in index for h in range(per_row)]
        parts = {name: [self.segment(name, s) for s in order] for name in self.fields}
        self.length = [self.length[s] for s in order]
        self._lay_out(parts)

    def nbytes(self) -> int:
        return sum(flat.numel() * flat.element_size() for flat in self.fields.values())
