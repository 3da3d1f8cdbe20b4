"""MLP memories written once per chunk: the coarser test-time training of the open Titans implementation.

Chunk c of C tokens takes one gradient of sum_t rate_t |M_base(k_t) - v_t|^2 / D (mean over the features), and gates of
one value per chunk, the mean of its tokens' logits:

    G_c = soft norm map, then modulation, of the gradient      (both optional)
    S_c = eta_c S_{c-1} - G_c
    W_c = (1 - alpha_c) W_{c-1} + S_c                          (orthogonal: + newton_schulz(S_c) in place of S_c)
    token t, from 0, reads W_{floor((t + 1) / C)}: the last token of a chunk reads what its own chunk wrote

The base weights are refreshed to W every `refresh` chunks, or never: W itself never starts again. Of an incomplete
chunk only sums over its tokens are kept, so a state has one size and a sequence may be split anywhere. Cost per head
and chunk: three passes of the network over C tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from foveate.attention.chunks import State, read_offsets
from foveate.attention.delta import Weights, apply_rule
from foveate.attention.memories import MLPMemory, squared_error
from foveate.attention.phases import PhaseGrid
from foveate.attention.shapes import match
from foveate.attention.weight_states import MemoryState, check_memory, choose, cut, scaled
from foveate.errors import OptionError, ShapeError

# Of the quintic Newton-Schulz iteration that brings all singular values near 1 (Jordan et al. 2024, Muon).
_QUINTIC = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int = 5, eps: float = 1e-7) -> Tensor:
    """About U V^T of the singular value decomposition x = U S V^T, over the last two axes."""
    tall = x.shape[-2] > x.shape[-1]
    y = x.transpose(-1, -2) if tall else x
    y = y / y.square().sum((-1, -2), keepdim=True).clamp(min=eps**2).sqrt()
    a, b, c = _QUINTIC
    for _ in range(steps):
        square = y @ y.transpose(-1, -2)
        y = a * y + (b * square + c * square @ square) @ y
    return y.transpose(-1, -2) if tall else y


def soft_norm(x: Tensor, largest: float) -> Tensor:
    """x [N, H, ...] with its norm n per head mapped to (c/2)(1 + tanh(2 n / c)), c = largest: below c, but not below
    c/2."""
    flat = x.flatten(2)
    norm = flat.square().sum(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return (flat * (largest / 2 * (1 + torch.tanh(2 * norm / largest)) / norm)).view_as(x)


@dataclass(frozen=True)
class ChunkState:
    """What such a memory knows between calls; row n belongs to sequence n.

    memory: W, S, the base and the phase, see `MemoryState`.
    pending: gradients of the running chunk's tokens, summed, shaped as the weights.
    logits: [N, H, gates] of the running chunk's tokens, summed.
    age: [N] int64, complete chunks since the base was refreshed.
    """

    memory: MemoryState
    pending: Weights
    logits: Tensor
    age: Tensor

    @classmethod
    def start(cls, memory: MemoryState, gates: int) -> ChunkState:
        w = memory.weights[0]
        return cls(
            memory,
            tuple(torch.zeros_like(each) for each in memory.weights),
            w.new_zeros(*w.shape[:2], gates),
            torch.zeros_like(memory.phase),
        )


def chunk_memory_scan(
    memory: MLPMemory,
    state: ChunkState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor,
    logits: Tensor,
    chunk_size: int = 64,
    refresh: int | None = None,
    max_norm: float | None = None,
    orthogonal: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, ChunkState]:
    """Write k -> v into the memory chunk by chunk and read it at q.

    Args:
        state: `ChunkState.start(MemoryState.start(...), gates)`, or what the last call returned.
        q, k, v: [B, T, H, D].    rate: [B, T, H].
        logits: [B, T, H, gates] of alpha, then of eta when the state has momentum, then, or not, one per weight of the
            modulation: each gate is the sigmoid of its mean over a chunk.
        chunk_size: C.    refresh: chunks between refreshes of the base; None: never.
        max_norm: c of the soft norm map.    orthogonal: Newton-Schulz of S's matrices.
        cu_seqlens: [N + 1], boundaries of sequences packed into B = 1.
    Returns:
        y [B, T, H, D] in q's dtype; the state after the last token, float32 (float64 for float64 inputs).
    Raises:
        ShapeError, StateError, OptionError. Gradients reach everything, also through the inner gradients.
    """
    sizes = match(q=(q, "B T H D"), k=(k, "B T H D"), v=(v, "B T H D"), rate=(rate, "B T H"))
    match(q=(q, "B T H D"), logits=(logits, "B T H *"))
    B, T = sizes["B"], sizes["T"]
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, T)
    check_memory(memory, state.memory, sizes, B if offsets is None else len(offsets) - 1, chunk_size)
    _check_options(state, logits, refresh, max_norm)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        grid = PhaseGrid.cut(B, T, state.memory.phase, chunk_size, offsets)
        run = _Run(
            memory=memory,
            grid=grid,
            q=grid.split(q.to(dtype)),
            k=grid.split(k.to(dtype)),
            v=grid.split(v.to(dtype)),
            rate=grid.split(rate.to(dtype).unsqueeze(-1)) / sizes["D"],
            logits=grid.split(logits.to(dtype)).sum(2),
            chunk_size=chunk_size,
            refresh=refresh,
            max_norm=max_norm,
            orthogonal=orthogonal,
        )
        y, after = run(state, dtype)
    counts = T if offsets is None else torch.tensor(offsets, device=q.device).diff()
    phase = (state.memory.phase + counts) % chunk_size
    return grid.join(y, B).to(q.dtype), replace(after, memory=replace(after.memory, phase=phase))


@dataclass(frozen=True)
class _Run:
    """One call: tokens in the slots of a grid, [R, H, S, .]; logits [R, H, gates] are sums over the slots."""

    memory: MLPMemory
    grid: PhaseGrid
    q: Tensor
    k: Tensor
    v: Tensor
    rate: Tensor
    logits: Tensor
    chunk_size: int
    refresh: int | None
    max_norm: float | None
    orthogonal: bool

    def __call__(self, state: ChunkState, dtype: torch.dtype) -> tuple[Tensor, ChunkState]:
        held, outputs = state.memory, []
        sizes = [len(held.weights), len(held.momentum), len(held.base), len(state.pending), 1, 1]

        def advance(rows: slice, carried: State) -> State:
            weights, momentum, base, pending, (logits,), (age,) = cut(carried, sizes)
            inputs, deltas = self.memory.gradients(base, self.k[rows], self.v[rows], squared_error)
            rate, last = self.rate[rows], self.grid.last[rows]
            pending = tuple(p + _gradient(x * rate, d, p) for p, x, d in zip(pending, inputs, deltas))
            logits = logits + self.logits[rows]
            moved, written = self._write(weights, momentum, pending, logits)
            outputs.append(self._read(self.q[rows], weights, written, last))
            done = last.any(1)
            age = age + done
            renewed = done & (age == self.refresh) if self.refresh is not None else torch.zeros_like(done)
            groups = (
                tuple(choose(done, a, b) for a, b in zip(written, weights)),
                tuple(choose(done, a, b) for a, b in zip(moved, momentum)),
                tuple(choose(renewed, a, b) for a, b in zip(written, base)),
                tuple(choose(done, torch.zeros_like(p), p) for p in pending),
            )
            return (
                *(each for group in groups for each in group),
                choose(done, torch.zeros_like(logits), logits),
                age.masked_fill(renewed, 0),
            )

        tensors = (*held.weights, *held.momentum, *held.base, *state.pending, state.logits)
        start = (*(each.to(dtype) for each in tensors), state.age)
        final = cut(self.grid.chunks.walk(start, advance), sizes)
        weights, momentum, base, pending, (logits,), (age,) = final
        return torch.cat(outputs), ChunkState(MemoryState(weights, base, held.phase, momentum), pending, logits, age)

    def _write(self, weights: Weights, momentum: Weights, pending: Weights, logits: Tensor) -> tuple[Weights, Weights]:
        """S and W if the chunk is complete."""
        gates = (logits / self.chunk_size).sigmoid()
        modulation = gates[..., 1 + bool(momentum) :]
        steps = pending if self.max_norm is None else tuple(soft_norm(p, self.max_norm) for p in pending)
        if modulation.shape[-1]:
            steps = tuple(scaled(p, modulation[..., n]) for n, p in enumerate(steps))
        moved = tuple(-p for p in steps)
        if momentum:
            moved = tuple(scaled(s, gates[..., 1]) - p for s, p in zip(momentum, steps))
        added = tuple(newton_schulz(s) if s.dim() == 4 else s for s in moved) if self.orthogonal else moved
        written = tuple(scaled(w, 1 - gates[..., 0]) + s for w, s in zip(weights, added))
        return moved if momentum else (), written

    def _read(self, q: Tensor, before: Weights, after: Weights, last: Tensor) -> Tensor:
        """Slots read the weights before the chunk, the one that completes it the weights after it."""
        y = self.memory(lambda n, x: apply_rule(x, before[n]), q)
        ending = self.memory(lambda n, x: apply_rule(x, after[n]), q[:, :, -1:])
        y_last = torch.where(last[:, None, -1:, None], ending, y[:, :, -1:])
        return torch.cat((y[:, :, :-1], y_last), 2)


def _gradient(inputs: Tensor, deltas: Tensor, like: Tensor) -> Tensor:
    """Summed over tokens: a matrix's, or an elementwise weight's."""
    return (inputs * deltas).sum(-2) if like.dim() == 3 else inputs.transpose(-1, -2) @ deltas


def _check_options(state: ChunkState, logits: Tensor, refresh: int | None, max_norm: float | None) -> None:
    if refresh is not None and refresh < 1:
        raise OptionError(f"refresh={refresh}, allowed: None or >= 1")
    if max_norm is not None and not max_norm > 0:
        raise OptionError(f"max_norm={max_norm}, allowed: None or > 0")
    gates = 1 + bool(state.memory.momentum)
    allowed = (gates, gates + len(state.pending))
    if logits.shape[-1] not in allowed or logits.shape[-1] != state.logits.shape[-1]:
        raise ShapeError(
            f"logits {list(logits.shape)} and the state's {list(state.logits.shape)}, allowed: one number of gates out "
            f"of {allowed}"
        )
