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
    """ranks: to positions 0, 1, ...  back: by 0, -1, -2, ... positions, [reached, P]; None: where that does not turn
    what stands rotated to a position to an earlier one. targets: to none, and to those ranks that a token's vectors are
    wanted at. here: from each of the POSITIONS from `first` on to the targets, cos and sin [POSITIONS, targets, P].
    last: what `of_token` gave last, and the position it was for."""

    ranks: RotaryTable
    targets: RotaryTable
    back: RotaryTable | None = None
    reached: int = 0
    first: int = 0
    here: RotaryTable | None = None
    last: tuple[int, RotaryTable] | None = None

    @classmethod
    def to(cls, ranks: RotaryTable, wanted: tuple[int, ...]) -> Rotations:
        cos, sin = (x[[0, *wanted]] for x in (ranks.cos, ranks.sin))
        cos[0], sin[0] = 1.0, 0.0
        return cls(ranks, RotaryTable(cos, sin, ranks.size, ranks.span))

    def reach(self, rope: RopeLike, tokens: int, like: Tensor) -> None:
        """Make `back` serve so many tokens: positions 0 .. tokens - 1 turned to any before them."""
        if tokens <= self.reached:
            return
        # Moves by less than all tokens, and by a share more, so that long generations make few tables.
        wanted = tokens + max(POSITIONS, tokens // 8)
        order = torch.arange(wanted, device=like.device)
        there = RotaryTable.of(rope.rotate, order, like)
        self.reached, self.back = wanted, None
        if there is None:
            return
        scale = (there.cos[:1] ** 2 + there.sin[:1] ** 2).sqrt()
        back = RotaryTable(there.cos / scale, -there.sin / scale, there.size, there.span)
        # Some move from late positions, to which the embedding itself must say what it makes of a vector.
        some = order[wanted // 2 :: max(1, wanted // 16)]
        trial = torch.linspace(-1, 2, back.size, dtype=back.cos.dtype, device=order.device).expand(1, 1, len(some), -1)
        moved = RotaryTable(back.cos[some // 2], back.sin[some // 2], back.size, back.span)
        made = moved.turn(rope.rotate(trial, some[None]))
        # Angles are rounded at 2^-24 of a position.
        tolerance = 1e-5 + 2**-22 * wanted
        if torch.allclose(made, rope.rotate(trial, (some - some // 2)[None]), rtol=0, atol=tolerance):
            self.back = back

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
