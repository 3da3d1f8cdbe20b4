"""MLP memories written by gradient steps while reading (Titans, Miras): closed-form inner gradients, packed sequences.

The recurrence is that of `foveate.attention.delta.weight_state_scan`, which takes any network and any loss by
autograd and judges this one. With W0 the weights at the start of token t's chunk of C tokens,

    S_t = exp(momentum_g_t) S_{t-1} - rate_t grad_W loss(M_{W0}(k_t), v_t)
    W_t = exp(g_t) W_{t-1} + S_t
    y_t = M_{W_t}(q_t)

Here M is an MLP of any depth, optionally inside x + LayerNorm(.) with a gain that is written too, and its gradients
are written out: d_L = LN'(dloss), d_{l-1} = (d_l W_l^T) act'(z_{l-1}). Every sequence keeps its own place in its
chunk, so packed sequences and rows of different lengths run together: slots of a chunk that hold no token of this call
neither decay nor write. Two retentions act where a chunk begins or ends:

    normalise   W = s(A) A with one factor per weight and head; inside a chunk s stays that of its start, and the token
                that completes the chunk reads with the new one (Moneta)
    lag         the first token of a chunk takes an exact, non-linear step, the others a linear one from there, with
                gradients at the weights after that first token (Memora)

so that C = 1 is the exact recurrence for both. Cost per head and chunk: three passes of the network over C tokens and
O(C^2) per channel; no weights per token are formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from foveate.attention.chunks import State, read_offsets
from foveate.attention.delta import LOWEST, Factors, Linear, Piece, Weights, decay_ratios
from foveate.attention.linear_call import check_log_decay
from foveate.attention.memories import LossGradient, MLPMemory, squared_error
from foveate.attention.phases import PhaseGrid
from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError, StateError

Normalise = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class MemoryState:
    """What a memory knows between calls; row n belongs to sequence n.

    weights: W, or A where it is normalised, per weight [N, H, I, O], or [N, H, D] for a gain.
    base: the weights at which the running chunk takes its gradients.
    phase: [N] int64, tokens of the running chunk that have been read.
    momentum: S, shaped as the weights; () without momentum.    scales: [N, H] per weight, factors of A in the running
    chunk; () where nothing is normalised.
    """

    weights: Weights
    base: Weights
    phase: Tensor
    momentum: Weights = ()
    scales: Weights = ()

    @classmethod
    def start(
        cls, weights: Iterable[Tensor], batch: int, *, momentum: bool, normalise: Normalise | None = None
    ) -> MemoryState:
        """Before a sequence, from initial weights per head [H, I, O] or [H, D] (float32 or float64)."""
        expanded = tuple(w.unsqueeze(0).expand(batch, *w.shape) for w in weights)
        scales = () if normalise is None else tuple(normalise(w) for w in expanded)
        return cls(
            weights=expanded,
            base=tuple(scaled(w, s) for w, s in zip(expanded, scales)) if scales else expanded,
            phase=torch.zeros(batch, dtype=torch.int64, device=expanded[0].device),
            momentum=tuple(torch.zeros_like(w) for w in expanded) if momentum else (),
            scales=scales,
        )


class Lag(Protocol):
    """The exact step of a chunk's first token."""

    def begin(self, weights: Tensor) -> Tensor:
        """The weights [N, H, I, O] at which the step's gradient is taken."""

    def step(self, weights: Tensor, decay: Tensor, step: Tensor) -> Tensor:
        """Weights after it: `weights` from `begin`, decay [N, H, 1, 1] in [0, 1], step = rate * gradient."""


def memory_scan(
    memory: MLPMemory,
    state: MemoryState,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    rate: Tensor | tuple[Tensor, ...],
    g: Tensor | None = None,
    momentum_g: Tensor | None = None,
    loss_gradient: LossGradient = squared_error,
    loss_rows: Tensor | None = None,
    normalise: Normalise | None = None,
    lag: Lag | None = None,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, MemoryState]:
    """Write k -> v into the memory and read it at q, token by token.

    Args:
        state: `MemoryState.start(weights, N, momentum=..., normalise=...)`, or what the last call returned. Whatever
            way a sequence is split over calls, the outputs agree.
        q, k, v: [B, T, H, D].
        rate: inner learning rate, [B, T, H]; or one tensor per weight, [B, T, H] or [B, T, H, O].
        g, momentum_g: decay of W and of S, natural log, <= 0, [B, T, H]; momentum_g as the state has momentum or not.
        loss_gradient: (M(k) - v, loss_rows) -> gradient by M(k); [B, H, C, D].    loss_rows: [B, T, H, *].
        normalise: weight [N, H, ...] -> factor [N, H], as the state was started with.
        lag: the step of a chunk's first token; not with a gain, momentum or normalise.
        chunk_size: C, part of the definition; the same in training and decoding.
        cu_seqlens: [N + 1], boundaries of sequences packed into B = 1.
    Returns:
        y [B, T, H, D] in q's dtype; the state after the last token, float32 (float64 for float64 inputs).
    Raises:
        ShapeError, StateError, OptionError. Gradients reach everything, also through the inner gradients.
    """
    sizes = match(q=(q, "B T H D"), k=(k, "B T H D"), v=(v, "B T H D"))
    B, T, H = (sizes[letter] for letter in "BTH")
    offsets = None if cu_seqlens is None else read_offsets(cu_seqlens, B, T)
    rates = rate if isinstance(rate, tuple) else (rate,) * len(state.weights)
    check_memory(memory, state, sizes, B if offsets is None else len(offsets) - 1, chunk_size)
    _check_rows((B, T, H), state, rates, g, momentum_g, normalise, lag)
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    with torch.autocast(q.device.type, enabled=False):
        grid = PhaseGrid.cut(B, T, state.phase, chunk_size, offsets)
        run = _Run(
            memory=memory,
            grid=grid,
            q=grid.split(q.to(dtype)),
            k=grid.split(k.to(dtype)),
            v=grid.split(v.to(dtype)),
            rates=tuple(grid.split((r if r.dim() == 4 else r.unsqueeze(-1)).to(dtype)) for r in rates),
            g=_log_decay(grid, g),
            momentum_g=_log_decay(grid, momentum_g),
            loss_gradient=loss_gradient,
            loss_rows=None if loss_rows is None else grid.split(loss_rows.to(dtype)),
            normalise=normalise,
            lag=lag,
        )
        y, after = run(state, dtype)
    counts = T if offsets is None else torch.tensor(offsets, device=q.device).diff()
    return grid.join(y, B).to(q.dtype), replace(after, phase=(state.phase + counts) % chunk_size)


def _log_decay(grid: PhaseGrid, g: Tensor | None) -> Tensor | None:
    return None if g is None else grid.split(g.double().clamp(min=LOWEST))


@dataclass(frozen=True)
class _Run:
    """One call: tokens in the slots of a grid, [R, H, S, ...]."""

    memory: MLPMemory
    grid: PhaseGrid
    q: Tensor
    k: Tensor
    v: Tensor
    rates: Weights
    g: Tensor | None
    momentum_g: Tensor | None
    loss_gradient: LossGradient
    loss_rows: Tensor | None
    normalise: Normalise | None
    lag: Lag | None

    def __call__(self, state: MemoryState, dtype: torch.dtype) -> tuple[Tensor, MemoryState]:
        factors = self._factors()
        rates = self.rates if self.lag is None else tuple(r * self._linear_slots()[..., None] for r in self.rates)
        outputs: list[Tensor] = []
        groups = ("weights", "momentum", "base", "scales")
        sizes = [len(getattr(state, name)) for name in groups]

        def advance(rows: slice, carried: State) -> State:
            weights, momentum, base, scales = cut(carried, sizes)
            if self.lag is not None:
                weights, base = self._lagged(self.lag, rows, weights, base)
            inputs, deltas = self._gradients(rows, base, slice(None))
            piece = Piece(
                weights, momentum or weights, inputs, deltas, tuple(r[rows] for r in rates), _at(factors, rows)
            )
            weights, moved = piece.after()
            momentum = moved if momentum else ()
            done = self.grid.last[rows].any(1)
            linear, new, scales = self._read(piece, rows, weights, scales, done)
            outputs.append(self.memory(linear, self.q[rows]))
            base = tuple(choose(done, a, b) for a, b in zip(new, base))
            return (*weights, *momentum, *base, *scales)

        start = tuple(each.to(dtype) for name in groups for each in getattr(state, name))
        weights, momentum, base, scales = cut(self.grid.chunks.walk(start, advance), sizes)
        return torch.cat(outputs), MemoryState(weights, base, state.phase, momentum, scales)

    def _linear_slots(self) -> Tensor:
        """[R, 1, S] slots whose token takes a linear step: with a lag, not a chunk's first."""
        valid = self.grid.valid
        if self.lag is not None:
            valid = torch.cat((valid[:, :1] & ~self.grid.first[:, None], valid[:, 1:]), 1)
        return valid[:, None]

    def _factors(self) -> Factors:
        """As in `delta`, but that slots without a (linear) token neither decay W or S nor add S to W."""
        dtype, slots = self.k.dtype, self._linear_slots()
        zero = self.k.new_zeros(self.k.shape[:3], dtype=torch.float64)
        total = zero if self.g is None else (self.g * slots).cumsum(-1)
        between = decay_ratios(total, dtype)
        b = total.exp().to(dtype).unsqueeze(-1)
        if self.momentum_g is None:
            return Factors(between, b)
        total = (self.momentum_g * slots).cumsum(-1)
        ratios = decay_ratios(total, dtype)
        m = total.exp().to(dtype).unsqueeze(-1)
        between = between * slots.unsqueeze(-2)
        return Factors(between @ ratios, b, m, between @ m, ratios[:, :, -1, :, None])

    def _gradients(self, rows: slice, weights: Weights, slots: slice) -> tuple[Weights, Weights]:
        extra = None if self.loss_rows is None else self.loss_rows[rows][:, :, slots]
        k, v = self.k[rows][:, :, slots], self.v[rows][:, :, slots]
        return self.memory.gradients(weights, k, v, self.loss_gradient, extra)

    def _lagged(self, lag: Lag, rows: slice, weights: Weights, base: Weights) -> tuple[Weights, Weights]:
        """Weights after the exact step where a chunk begins here, which are also its base."""
        first = self.grid.first[rows]
        begun = tuple(lag.begin(w) for w in weights)
        inputs, deltas = self._gradients(rows, begun, slice(1))
        decay = 1.0 if self.g is None else self.g[rows][:, :, :1, None].exp().to(self.k.dtype)
        stepped = tuple(
            lag.step(w, torch.as_tensor(decay), x.transpose(-1, -2) @ (d * r[rows][:, :, :1]))
            for w, x, d, r in zip(begun, inputs, deltas, self.rates)
        )
        return (
            tuple(choose(first, a, b) for a, b in zip(stepped, weights)),
            tuple(choose(first, a, b) for a, b in zip(stepped, base)),
        )

    def _read(
        self, piece: Piece, rows: slice, weights: Weights, scales: Weights, done: Tensor
    ) -> tuple[Linear, Weights, Weights]:
        """How q passes a weight, the base of the next chunk, and the factors after this piece."""
        if self.normalise is None:
            return piece.linear, weights, scales
        renewed = tuple(self.normalise(w) for w in weights)
        last = self.grid.last[rows][:, None, :, None]

        def linear(layer: int, x: Tensor) -> Tensor:
            old, new = (s[layer][..., None, None] for s in (scales, renewed))
            return torch.where(last, new, old) * piece.linear(layer, x)

        base = tuple(scaled(w, s) for w, s in zip(weights, renewed))
        return linear, base, tuple(choose(done, a, b) for a, b in zip(renewed, scales))


def _at(factors: Factors, rows: slice) -> Factors:
    parts = (factors.G, factors.b, factors.m, factors.f, factors.n)
    return Factors(*(None if each is None else each[rows] for each in parts))  # type: ignore[arg-type]


def cut(carried: State, sizes: list[int]) -> list[Weights]:
    """Consecutive groups of so many tensors."""
    ends = list(accumulate(sizes, initial=0))
    return [tuple(carried[a:b]) for a, b in pairwise(ends)]


def choose(where: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a in the rows where `where` [N] holds, else b."""
    return torch.where(where.reshape(-1, *[1] * (a.dim() - 1)), a, b)


def scaled(w: Tensor, factor: Tensor) -> Tensor:
    """w [N, H, ...] times a factor [N, H]."""
    return w * factor.reshape(*factor.shape, *[1] * (w.dim() - 2))


def check_memory(memory: MLPMemory, state: MemoryState, sizes: dict[str, int], rows: int, chunk_size: int) -> None:
    """Raise unless a state of `rows` sequences is the memory's, and there are tokens and a chunk size."""
    H, D = sizes["H"], sizes["D"]
    if sizes["T"] == 0:
        raise ShapeError("q has T = 0, allowed: at least one token")
    if chunk_size < 1:
        raise OptionError(f"chunk_size={chunk_size}, allowed: >= 1")
    hidden = state.weights[0].shape[-1] if state.weights else 0
    allowed = [(rows, H, *shape) for shape in memory.shapes(D, hidden)]
    if [tuple(w.shape) for w in state.weights] != allowed:
        given = [list(w.shape) for w in state.weights]
        raise StateError(f"the memory's weights are {given}, allowed: {[list(shape) for shape in allowed]}")


def _check_rows(
    shape: tuple[int, int, int],
    state: MemoryState,
    rates: tuple[Tensor, ...],
    g: Tensor | None,
    momentum_g: Tensor | None,
    normalise: Normalise | None,
    lag: Lag | None,
) -> None:
    if len(rates) != len(state.weights):
        raise ShapeError(f"rate has {len(rates)} tensors for {len(state.weights)} weights, allowed: one for each")
    for rate, w in zip(rates, state.weights):
        if tuple(rate.shape) not in (shape, (*shape, w.shape[-1])):
            raise ShapeError(
                f"rate {list(rate.shape)}, allowed: [B, T, H] = {list(shape)}, or [B, T, H, O] with O = {w.shape[-1]}"
            )
    for name, decay in (("g", g), ("momentum_g", momentum_g)):
        if decay is not None:
            if tuple(decay.shape) != shape:
                raise ShapeError(f"{name} {list(decay.shape)} does not fit [B, T, H] = {list(shape)}")
            check_log_decay(decay, name)
    if (momentum_g is None) == bool(state.momentum) or (normalise is None) == bool(state.scales):
        raise StateError(
            f"momentum_g and normalise given: {momentum_g is not None}, {normalise is not None}, allowed: as the state "
            f"was started with: {bool(state.momentum)}, {bool(state.scales)}"
        )
    if lag is not None and (state.momentum or state.scales or any(w.dim() == 3 for w in state.weights)):
        raise OptionError("lag with momentum, normalise or a gain, allowed: matrices with decay alone")
