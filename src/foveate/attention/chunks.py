"""How tokens are cut into chunks, and the order in which a recurrence walks over them.

The chunks of all sequences are rows of one array, step by step: the first chunk of every sequence, then the second
chunk of every sequence that has one, and so on. Sequences stand longest first, so those still running at a step are
a prefix. Work inside chunks is then one batched call over all rows, and only the state goes through a loop. Tokens
of different sequences never share a chunk, so not even NaN passes between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.errors import OptionError, ShapeError

State = tuple[Tensor, ...]


def power_of_two(n: int) -> int:
    """The smallest power of two >= n."""
    return 1 << max(n - 1, 0).bit_length()


def read_offsets(cu_seqlens: Tensor, batch: int, length: int) -> tuple[int, ...]:
    """The boundaries of packed sequences as integers, after checking them (one copy to the host).

    Raises ShapeError unless `cu_seqlens` is [N + 1] int32 or int64, starts at 0, never falls, ends at T, and B is 1.
    """
    shown = f"cu_seqlens {list(cu_seqlens.shape)} {cu_seqlens.dtype}"
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ShapeError(f"{shown}, allowed: [N + 1] with N >= 1, int32 or int64")
    if batch != 1:
        raise ShapeError(f"cu_seqlens needs packed sequences with B = 1, not B = {batch}")
    offsets = tuple(cu_seqlens.tolist())
    if offsets[0] != 0 or offsets[-1] != length:
        raise ShapeError(f"cu_seqlens goes from {offsets[0]} to {offsets[-1]}, allowed: from 0 to T = {length}")
    if any(end < start for start, end in pairwise(offsets)):
        raise ShapeError("cu_seqlens falls somewhere, allowed: boundaries in rising order")
    return offsets


def check_chunk_size(size: int) -> None:
    """Raise OptionError unless `size` is a power of two."""
    if size < 1 or size & (size - 1):
        raise OptionError(f"chunk_size={size}, allowed: a power of two (1, 2, 4, ..., 64, 128, ...)")


@dataclass(frozen=True)
class Chunks:
    """A cut of B sequences of length T, or of the packed sequences between `offsets`, into R chunks of `size`.

    size: C, tokens per chunk.
    counts: how many sequences are still running at each step; their sum is R.
    batch, length: B and T of the arrays that are cut.
    order: [N] sequences, longest first; None when all have one length.
    index: [R, C] the token in each slot, 0 in slots past the end; None when all have one length.
    valid: [R, C] whether a slot holds a token.
    slot: [T] the place of each token in the flattened [R * C].
    """

    size: int
    counts: tuple[int, ...]
    batch: int
    length: int
    order: Tensor | None = None
    index: Tensor | None = None
    valid: Tensor | None = None
    slot: Tensor | None = None

    @classmethod
    def cut(cls, batch: int, length: int, size: int, offsets: Sequence[int] | None, device: torch.device) -> Chunks:
        """Cut [B, T] or packed sequences; chunks are no longer than the longest sequence needs."""
        if offsets is None:
            size = min(size, power_of_two(length))
            return cls(size, (batch,) * -(-length // size), batch, length)
        lengths = [end - start for start, end in pairwise(offsets)]
        size = min(size, power_of_two(max(lengths)))
        order = sorted(range(len(lengths)), key=lambda n: -lengths[n])
        starts: list[int] = []
        ends: list[int] = []
        counts: list[int] = []
        running = len(order)
        for begin in range(0, max(lengths), size):
            while lengths[order[running - 1]] <= begin:
                running -= 1
            counts.append(running)
            starts += [offsets[n] + begin for n in order[:running]]
            ends += [offsets[n + 1] for n in order[:running]]
        index = torch.tensor(starts)[:, None] + torch.arange(size)
        valid = index < torch.tensor(ends)[:, None]
        slot = torch.empty(length, dtype=torch.int64)
        slot[index[valid]] = valid.flatten().nonzero().flatten()
        index = index.masked_fill(~valid, 0)
        return cls(
            size,
            tuple(counts),
            batch,
            length,
            torch.tensor(order).to(device),
            index.to(device),
            valid.to(device),
            slot.to(device),
        )

    def split(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[B, T, ...] -> [R, C, ...] with `fill` in slots past the end of a sequence."""
        if self.index is not None:
            assert self.valid is not None
            mask = self.valid.reshape(*self.valid.shape, *[1] * (x.dim() - 2))
            return x[0][self.index].masked_fill(~mask, fill)
        steps = len(self.counts)
        missing = steps * self.size - self.length
        if missing:
            x = F.pad(x, [0, 0] * (x.dim() - 2) + [0, missing], value=fill)
        return x.unflatten(1, (steps, self.size)).transpose(0, 1).flatten(0, 1)

    def join(self, y: Tensor) -> Tensor:
        """[R, C, ...] -> [B, T, ...], the inverse of `split`."""
        if self.slot is not None:
            return y.flatten(0, 1)[self.slot][None]
        steps = len(self.counts)
        y = y.unflatten(0, (steps, self.batch)).transpose(0, 1).flatten(1, 2)
        return y[:, : self.length].contiguous()

    def walk(self, state: State, advance: Callable[[slice, State], State]) -> State:
        """Carry a state through the chunks, step by step.

        Args:
            state: tensors [N, ...], one row per sequence, in the caller's order.
            advance: (rows, state before them) -> state after them; `rows` is a slice of the R rows.
        Returns:
            the final states [N, ...] in the caller's order.
        """
        if self.order is not None:
            state = tuple(each[self.order] for each in state)
        finished: list[State] = []
        row = 0
        for count in self.counts:
            if count < state[0].shape[0]:
                finished.append(tuple(each[count:] for each in state))
                state = tuple(each[:count] for each in state)
            state = advance(slice(row, row + count), state)
            row += count
        if finished:
            state = tuple(torch.cat(parts) for parts in zip(state, *reversed(finished)))
        if self.order is None:
            return state
        back = self.order.argsort()
        return tuple(each[back] for each in state)
