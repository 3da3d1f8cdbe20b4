"""Chunks in which every sequence keeps its own place, so that calls may stop and go on anywhere.

A chunk's slots are the tokens at its phases 0 to C - 1. A call fills some of them: the slots before its first token
(filled by earlier calls) and after its last are empty.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from foveate.attention.chunks import Chunks


@dataclass(frozen=True)
class PhaseGrid:
    """Tokens in chunks of `size` slots, each at its sequence's own phase.

    chunks: the order of the R chunks, see `Chunks`.    valid: [R, S] slots that hold a token of this call.
    last: [R, S] slots that complete their chunk.    first: [R] whether slot 0 begins a chunk with a token of this call.
    source, place: [R, S] token of each slot and [B T] slot of each token; None when the slots are simply the tokens.
    """

    chunks: Chunks
    valid: Tensor
    last: Tensor
    first: Tensor
    source: Tensor | None = None
    place: Tensor | None = None

    @classmethod
    def cut(cls, B: int, T: int, phase: Tensor, size: int, offsets: tuple[int, ...] | None) -> PhaseGrid:
        """A grid for [B, T], or for packed sequences between `offsets`, whose rows have read `phase` tokens."""
        device = phase.device
        if offsets is None and T == 1:
            # Decoding: nothing is read on the host.
            valid = torch.ones(B, 1, dtype=torch.bool, device=device)
            return cls(Chunks.cut(B, 1, size, None, device), valid, (phase == size - 1)[:, None], phase == 0)
        phases = phase.tolist()
        if offsets is None and not any(phases):
            chunks = Chunks.cut(B, T, size, None, device)
            steps = len(chunks.counts)
            valid = (torch.arange(steps * chunks.size, device=device) < T).view(steps, -1)
            return cls._made(chunks, valid.repeat_interleave(B, 0), size)
        bounds = offsets or tuple(range(0, B * T + 1, T))
        lengths = [b - a for a, b in pairwise(bounds)]
        # A sequence without tokens gets no chunk: it stays as it is.
        spans = [n + p if n else 0 for n, p in zip(lengths, phases)]
        starts = list(accumulate(spans, initial=0))
        chunks = Chunks.cut(1, starts[-1], size, starts, device)
        assert chunks.index is not None
        assert chunks.valid is not None
        assert chunks.slot is not None
        shifts = torch.tensor([s + p - b for s, p, b in zip(starts, phases, bounds)])
        at = torch.arange(bounds[-1]) + shifts.repeat_interleave(torch.tensor(lengths))
        token = torch.full((starts[-1],), -1)
        token[at] = torch.arange(bounds[-1])
        source = token.to(device)[chunks.index].masked_fill(~chunks.valid, -1)
        grid = cls._made(chunks, source >= 0, size)
        return replace(grid, source=source.clamp(min=0), place=chunks.slot[at.to(device)])

    @classmethod
    def _made(cls, chunks: Chunks, valid: Tensor, size: int) -> PhaseGrid:
        last = torch.zeros_like(valid)
        if chunks.size == size:
            last[:, -1] = valid[:, -1]
        return cls(chunks, valid, last, valid[:, 0])

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, H, ...] -> [R, H, S, ...] with `fill` in slots without a token."""
        if self.source is None:
            return self.chunks.split(x, fill).transpose(1, 2)
        mask = ~self.valid.reshape(*self.valid.shape, *[1] * (x.dim() - 2))
        return x.flatten(0, 1)[self.source].masked_fill(mask, fill).transpose(1, 2)

    def join(self, y: Tensor, B: int) -> Tensor:
        """[R, H, S, ...] -> [B, T, H, ...], the inverse of `split`."""
        y = y.transpose(1, 2)
        if self.place is None:
            return self.chunks.join(y)
        return y.flatten(0, 1)[self.place].unflatten(0, (B, -1))
