"""Rotations that decode steps ask for again and again, made once for the layers that turn alike."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.scoring import RotaryTable
from foveate.methods.step import RopeLike

# Positions of decode steps whose rotations are made at once.
POSITIONS = 1024


@dataclass
class Rotations:
    """ranks: to positions 0, 1, ...  targets: to none, and to those ranks that a token's vectors are wanted at.
    here: from each of the POSITIONS from `first` on to the targets, cos and sin [POSITIONS, targets, P].
    last: what `of_token` gave last, and the position it was for."""

    ranks: RotaryTable
    targets: RotaryTable
    first: int = 0
    here: RotaryTable | None = None
    last: tuple[int, RotaryTable] | None = None

    @classmethod
    def to(cls, ranks: RotaryTable, wanted: tuple[int, ...]) -> Rotations:
        cos, sin = (x[[0, *wanted]] for x in (ranks.cos, ranks.sin))
        cos[0], sin[0] = 1.0, 0.0
        return cls(ranks, RotaryTable(cos, sin, ranks.size, ranks.span))

    def of_token(self, rope: RopeLike, at: int, like: Tensor) -> RotaryTable:
        """Turns a vector that stands rotated at position `at` to the targets.

        rope: the one that ranks is of. like: [..., D], of the type and on the device to use.
        """
        if self.last is None or self.last[0] != at:
            if self.here is None or not 0 <= at - self.first < POSITIONS:
                self.first = at
                order = torch.arange(at, at + POSITIONS, device=like.device)
                here = RotaryTable.of(rope.rotate, order, like)
                assert here is not None
                here = RotaryTable(here.cos[:, None], here.sin[:, None], here.size, here.span)
                self.here = self.targets.undoing(here)
            i, here = at - self.first, self.here
            self.last = at, RotaryTable(here.cos[i], here.sin[i], here.size, here.span)
        return self.last[1]
