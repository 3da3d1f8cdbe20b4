"""How the launchers of the linear family cut sequences into pieces, and the sums they prepare."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from foveate.attention.backends.triton import runtime
from foveate.attention.backends.triton.scan_configs import DeltaConfig, ScanConfig, VectorConfig, columns
from foveate.attention.backends.triton.scan_parts import (
    FIXED,
    LOWEST,
    NONE,
    SCALAR,
    VECTOR,
    cumulative_kernel,
    gate_gradient_kernel,
)
from foveate.errors import ShapeError


@dataclass(frozen=True)
class Cut:
    """Sequences cut into pieces of `length` tokens, a multiple of the chunk.

    total: tokens of all sequences. tokens: of one sequence, when all are equal.
    pieces, per_sequence: how many, in all and per sequence.
    offsets: of packed sequences only, whose tables kernels read.
    """

    sequences: int
    total: int
    tokens: int
    length: int
    pieces: int
    per_sequence: int
    device: torch.device
    offsets: tuple[int, ...] | None = None

    @property
    def table(self) -> Tensor | None:
        """[pieces, 4] int64 as `scan_parts.bounds` reads it, for packed sequences."""
        return None if self.offsets is None else _tables(self.offsets, self.length, self.device)[0]

    @property
    def first(self) -> Tensor | None:
        """[N + 1] int64, each sequence's first piece, for packed sequences."""
        return None if self.offsets is None else _tables(self.offsets, self.length, self.device)[1]

    @property
    def split(self) -> bool:
        """Whether some sequence has several pieces."""
        return self.pieces > self.sequences if self.offsets is None else self.per_sequence > 1

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What `bounds` takes besides the piece."""
        return self.tokens, self.length, self.per_sequence

    @classmethod
    def fill(
        cls, q: Tensor, v: Tensor, offsets: Sequence[int] | None, config: ScanConfig | DeltaConfig | VectorConfig, *,
        longest: int | None = None,
    ) -> Cut:  # fmt: skip
        """Pieces enough to fill the device, for inputs q [B, T, H, K] and v [B, T, HV, V]."""
        # Under symbolic shapes only B and T stay symbols.
        (B, T), (HV, V) = v.shape[:2], map(int, v.shape[2:])
        sequences = B if offsets is None else len(offsets) - 1
        per_piece = HV * runtime.cdiv(V, columns(V, config.block_v, config.chunk, q.element_size()))
        wanted = config.per_sm * runtime.multiprocessors(q.device.index)
        pieces = sequences
        if 2 * sequences * per_piece < wanted:
            pieces = max(sequences, min(wanted // per_piece, B * T // (config.chunk * config.shortest)))
        return cls.plan(B, T, offsets, chunk=config.chunk, pieces=pieces, device=q.device, longest=longest)

    @classmethod
    def plan(
        cls, batch: int, tokens: int, offsets: Sequence[int] | None, *,
        chunk: int, pieces: int, device: torch.device, longest: int | None = None,
    ) -> Cut:  # fmt: skip
        """About `pieces` pieces in all, none longer than `longest` tokens; none of an empty batch.

        Raises ShapeError for sequences without any token, and for more than a grid takes.
        """
        lengths = [tokens] if offsets is None else [b - a for a, b in pairwise(offsets)]
        most = max(lengths)
        if most == 0:
            raise ShapeError("q has T = 0, allowed: at least one token")
        total = sum(lengths) if offsets is not None else batch * tokens
        wanted = max(1, runtime.cdiv(pieces * most, max(1, total)))
        size = runtime.cdiv(runtime.cdiv(most, wanted), chunk) * chunk
        if longest is not None:
            size = min(size, max(1, longest // chunk) * chunk)
        if offsets is None:
            per_sequence = runtime.cdiv(tokens, size)
            cut = cls(batch, batch * tokens, tokens, size, batch * per_sequence, per_sequence, device)
        else:
            pieces = sum(runtime.cdiv(each, size) for each in lengths)
            per_sequence = runtime.cdiv(most, size)
            cut = cls(len(lengths), tokens, tokens, size, pieces, per_sequence, device, tuple(offsets))
        if max(cut.pieces, cut.sequences) > runtime.GRID_AXIS:
            raise ShapeError(
                f"{cut.sequences} sequences in {cut.pieces} pieces, allowed: at most {runtime.GRID_AXIS} of both, "
                "a limit of CUDA's grids; give fewer sequences at a time"
            )
        return cut

    def by_piece(self, x: Tensor) -> Tensor:
        """Rows [N, ...] of sequences as rows of their pieces, where none is split."""
        table = self.table
        return x if table is None else x[table[:, 0]]

    def after(self, states: Tensor, final: Tensor) -> Tensor:
        """The state after each piece [pieces, ...], from those before the pieces and those after the sequences."""
        following = torch.cat([states[1:], states[:1]])
        if self.offsets is None:
            last = torch.arange(self.sequences, device=states.device) * self.per_sequence + (self.per_sequence - 1)
            following[last] = final
            return following
        _, _, ends, sequence = _tables(self.offsets, self.length, self.device)
        following[ends] = final[sequence]
        return following


@functools.lru_cache(maxsize=32)
def _tables(offsets: tuple[int, ...], size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`Cut.table`, `Cut.first`, the pieces that end a sequence, and whose. Kept: a copy to the device waits for it."""
    rows: list[tuple[int, int, int, int]] = []
    first = [0]
    for n, (begin, end) in enumerate(pairwise(offsets)):
        for at in range(begin, end, size):
            rows.append((n, at, min(at + size, end), (at == begin) + 2 * (at + size >= end)))
        first.append(len(rows))
    ends = [(piece, row[0]) for piece, row in enumerate(rows) if row[3] >= 2]
    # Kept over calls, so that they must serve training even where inference made them.
    with torch.inference_mode(False):
        table = torch.tensor(rows, dtype=torch.int64).view(len(rows), 4).to(device)
        last = torch.tensor(ends, dtype=torch.int64).view(len(ends), 2).to(device)
        return table, torch.tensor(first).to(device), last[:, 0].contiguous(), last[:, 1].contiguous()


def kind_of(g: Tensor | None) -> int:
    if g is None:
        return NONE
    return {1: FIXED, 3: SCALAR, 4: VECTOR}[g.dim()]


def rows_of(x: Tensor) -> Tensor:
    """[B, T, H, D] so that batch and token are one axis of one stride, and the last axis is dense."""
    B, T, _, _ = x.shape
    if (x.stride(3) != 1 and x.shape[3] != 1) or (B > 1 and x.stride(0) != T * x.stride(1)):
        return x.contiguous()
    return x


def steps(x: Tensor | None) -> tuple[int, int]:
    """Strides of token and head."""
    return (0, 0) if x is None else (x.stride(1), x.stride(2))


def decay_sums(g: Tensor | None, cut: Cut, chunk: int) -> Tensor | None:
    """What kernels read as G: base-2 decays summed inside chunks, [HV, chunk] (FIXED: every chunk's), [HV, total]
    (SCALAR) or [total, HV * K] (VECTOR)."""
    if g is None:
        return None
    if g.dim() == 1:
        one = g.float().clamp(min=LOWEST) * runtime.LOG2E
        return one[:, None] * torch.arange(1, chunk + 1, dtype=torch.float32, device=g.device)
    B, T = g.shape[:2]
    channels = g.dim() == 4
    if channels:
        g = g.contiguous().flatten(2)
    if B > 1 and g.stride(0) != T * g.stride(1):
        g = g.contiguous()
    H = g.shape[2]
    out = torch.empty((cut.total, H) if channels else (H, cut.total), dtype=torch.float32, device=g.device)
    strides = out.stride() if channels else out.stride()[::-1]
    block = min(128 if channels else 16, runtime.power_of_two(H))
    grid = (runtime.cdiv(cut.length, chunk), cut.pieces, runtime.cdiv(H, block))
    cumulative_kernel[grid](
        g, cut.table, out, g.stride(1), g.stride(2), *strides, *cut.sizes, H, BLOCK_H=block, C=chunk, num_warps=4
    )
    return out


def sum_from_end(rows: Tensor, anchor: Tensor, cut: Cut) -> Tensor:
    """rows [total, H] float32 summed from each token to the end of its piece, plus anchor [pieces, H]."""
    H = rows.shape[1]
    out = torch.empty_like(rows)
    block = min(32, runtime.power_of_two(H))
    gate_gradient_kernel[(runtime.cdiv(H, block), cut.pieces)](
        rows, anchor, cut.table, out, cut.total, *cut.sizes, H, BLOCK_H=block, C=64, num_warps=4
    )
    return out
