"""Where the last tokens of packed heads lie, so that the oldest can be dropped without looking at the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Ring:
    """Rows of the last tokens of one head of each sequence; other heads with the same history share it.

    A head holds `before` rows that never move, then its last tokens. When the oldest row is dropped in place
    (DropRagged), the newest token, which lies in the last row, moves there.

    rows: int64 [B, widest] on the host, oldest first from `oldest` on, round and round within `size`.
    size, oldest: int64 [B] on the host.
    """

    rows: Tensor
    size: Tensor
    oldest: Tensor

    @classmethod
    def of(cls, kept: Sequence[Tensor], before: int, sizes: Sequence[int]) -> Ring:
        """From the positions that a head of each sequence holds, in the order of its rows; the `before` rows that
        stay have the lowest positions."""
        rows = before + torch.arange(max(sizes)).repeat(len(kept), 1)
        for b, (held, size) in enumerate(zip(kept, sizes)):
            # A head that is not full yet holds its tokens in order: the rows above are right when it is.
            if held.shape[0] == before + size:
                rows[b, :size] = held.argsort()[before:].cpu()
        return cls(rows, torch.tensor(list(sizes)), torch.zeros(len(kept), dtype=torch.int64))

    def turn(self, b: int) -> int:
        """The row of sequence b's oldest token, which the newest takes over from now on."""
        # Through numpy views: a torch scalar read costs ten times as much, and this runs per layer and token.
        at, oldest = self.rows.numpy(), self.oldest.numpy()
        row = int(at[b, oldest[b]])
        oldest[b] = (oldest[b] + 1) % self.size.numpy()[b]
        return row
