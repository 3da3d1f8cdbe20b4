"""Titans with a sliding window: memory as a gate (MAG) and memory as a layer (MAL).

Attention remembers the last tokens exactly, the neural memory all earlier ones roughly; learned vectors P, which do not
depend on the data, stand before every sequence.

    MAG    o = RMSNorm(y) * sigmoid(RMSNorm(m)),  y = SWA(x) with P always visible,  m = M([P; x])
    MAL    o = SWA(RMSNorm(M([P; x])))

M is the memory of `titans-memory` without its output gate; a token's m is read after it was written.

Paper: Behrouz et al. 2024 (arXiv 2501.00663), sections 4.2 and 4.3. It leaves open the norm and the non-linearity of
the gated product (here as above), the norm before MAL's attention, and positions: attention is rotary (2104.09864) as
in Llama, MAG scores P with neither side rotated, and in MAL P stands at -P .. -1 and leaves the window like any
token. `window` counts the tokens before the query.

State: the memory's (see `titans-memory`), and rotated keys and values of the last `window` tokens, [B, H, window, D]
each, filled up with zeros from the left. Cost: per head O(N (|W| + C D)) for a memory of |W| weights, and O(N window D)
for attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, Rope, attend
from foveate.attention.chunks import read_offsets
from foveate.attention.plan import Window
from foveate.mixers.base import Mixer, MixerState, start_position
from foveate.mixers.memory.titans import NeuralMemoryState, make_memory
from foveate.mixers.parts import RMSNorm
from foveate.registry import register

PAPER = "Titans: Learning to Memorize at Test Time"
SMALL = {"chunk": 5, "expansion": 1.5, "persistent": 3, "window": 6}


@dataclass(frozen=True)
class WindowState:
    """keys, values: [B, H, window, D], row b's tokens are the last length[b] slots.    length: [B] int64."""

    keys: Tensor
    values: Tensor
    length: Tensor


class WindowAttention(nn.Module):
    """Rotary attention over the last tokens, and over persistent tokens if there are any.

    window: tokens before the query that it reads.
    """

    def __init__(self, dim: int, heads: int, window: int, rope_base: float) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.rope = Rope(dim // heads, rope_base)
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> WindowState:
        empty = like.new_zeros(batch, self.heads, self.window, self.q_proj.in_features // self.heads)
        return WindowState(empty, empty, start_position(batch, like))

    def forward(
        self,
        x: Tensor,
        state: WindowState,
        positions: Tensor,
        cu_seqlens: Tensor | None = None,
        persistent: Tensor | None = None,
    ) -> tuple[Tensor, WindowState]:
        """x [B, N, C], positions [B, N], persistent [P, C], or None for none -> y [B, N, C] and the state after."""
        plain, k, v = (self._heads(proj(x)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rope.rotate(plain, positions), self.rope.rotate(k, positions)
        D, P = q.shape[-1], 0 if persistent is None else persistent.shape[0]
        sinks = None
        if persistent is not None and P:
            # Two halves of features, so that persistent keys meet unrotated queries and the others rotated ones.
            q, k = torch.cat((q, plain), -1), F.pad(k, (0, D))
            pk, pv = (self._heads(proj(persistent[None].to(x.dtype))) for proj in (self.k_proj, self.v_proj))
            sinks = F.pad(pk, (D, 0)), pv
        if cu_seqlens is None:
            # One token is not worth a wait for the lengths.
            lengths = set() if x.shape[1] == 1 else set(state.length.tolist())
            o, state = self._attend(q, k, v, state, sinks, lengths.pop() if len(lengths) == 1 else None)
        else:
            o, state = self._packed(q, k, v, state, sinks, read_offsets(cu_seqlens, *x.shape[:2]))
        return self.o_proj(o.transpose(1, 2).flatten(2)), state

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def _packed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState,
        sinks: tuple[Tensor, Tensor] | None,
        offsets: Sequence[int],
    ) -> tuple[Tensor, WindowState]:
        """Each sequence alone: a windowed call each, and no mask over them all."""
        outputs, rows = [], []
        for n, ((begin, end), length) in enumerate(zip(pairwise(offsets), state.length.tolist(), strict=True)):
            row = WindowState(*(each[n : n + 1] for each in (state.keys, state.values, state.length)))
            if end > begin:
                tokens = slice(begin, end)
                o, row = self._attend(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], row, sinks, length)
                outputs.append(o)
            rows.append(row)
        merged = (torch.cat(each) for each in zip(*((row.keys, row.values, row.length) for row in rows)))
        return torch.cat(outputs, 2), WindowState(*merged)

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        state: WindowState,
        sinks: tuple[Tensor, Tensor] | None,
        filled: int | None,
    ) -> tuple[Tensor, WindowState]:
        """`filled`: slots in use if it is one number for all rows; None if it is not, or not known on the host."""
        B, _, N, _ = q.shape
        D, W = v.shape[-1], self.window
        P = 0 if sinks is None else sinks[0].shape[2]
        keys = torch.cat((F.pad(state.keys.to(k.dtype), (0, k.shape[-1] - D)), k), 2)
        values = torch.cat((state.values.to(v.dtype), v), 2)
        after = WindowState(keys[:, :, N:, :D].clone(), values[:, :, N:].clone(), (state.length + N).clamp(max=W))
        positions = None
        if filled is None:
            at = torch.arange(W + N, device=q.device) - (W - state.length)[:, None]
            first = torch.arange(P, device=q.device).expand(B, P)
            places = torch.cat((first, torch.where(at >= 0, at + P, -1)), 1)
            positions = Positions(places[:, P + W :], places[:, None], holes=True)
        else:
            keys, values = keys[:, :, W - filled :], values[:, :, W - filled :]
        if sinks is not None:
            keys, values = (torch.cat((sink.expand(B, -1, -1, -1), x), 2) for sink, x in zip(sinks, (keys, values)))
        plan = Window(left=W, sinks=P)
        return attend(q, keys, values, plan, scale=D**-0.5, positions=positions), after


class MemoryGate(nn.Module):
    """RMSNorm(y) * sigmoid(RMSNorm(m)): what attention found, let through by what the memory knows."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.y_norm, self.m_norm = RMSNorm(dim), RMSNorm(dim)

    def forward(self, y: Tensor, m: Tensor) -> Tensor:
        return self.y_norm(y) * self.m_norm(m).sigmoid().to(y.dtype)


@dataclass(frozen=True, kw_only=True)
class TitansWindowState(MixerState):
    """memory: see `NeuralMemoryState`.    window: see `WindowState`."""

    memory: NeuralMemoryState
    window: WindowState


class _TitansWindowMixer(Mixer):
    """What MAG and MAL share: a memory, a window, and persistent tokens.

    combine: how the two meet.
    """

    combine: ClassVar[type[nn.Module]]

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        window: int = 256,
        persistent: int = 4,
        rope_base: float = 10000.0,
        depth: int = 2,
        expansion: float = 4.0,
        activation: str = "silu",
        form: str = "residual",
        kernel: int = 4,
        chunk: int = 64,
        max_rate: float = 0.1,
        momentum: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        check_attention(self, persistent, rope_base)
        self.require(window >= 1, f"window={window}, allowed: >= 1")
        self.memory = make_memory(
            self,
            dim // heads,
            depth=depth,
            expansion=expansion,
            activation=activation,
            form=form,
            kernel=kernel,
            chunk=chunk,
            max_rate=max_rate,
            momentum=momentum,
        )
        self.attention = WindowAttention(dim, heads, window, rope_base)
        self.combined = self.combine(dim)
        self.persistent = nn.Parameter(torch.empty(persistent, dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"persistent": 0.02 * torch.randn_like(self.persistent)}

    def start(self, batch: int, like: Tensor) -> TitansWindowState:
        """The state of sequences that have read the persistent tokens."""
        state = TitansWindowState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=self.memory.start(batch, like),
            window=self.attention.start(batch, like),
        )
        # On the meta device only sizes are asked for, and reading changes none.
        if like.is_meta or not self.persistent.shape[0]:
            return state
        return self.read_persistent(self.persistent.to(like.dtype).expand(batch, -1, -1), state)

    def read_persistent(self, tokens: Tensor, state: TitansWindowState) -> TitansWindowState:
        """The state after the persistent tokens [B, P, C]."""
        raise NotImplementedError


def check_attention(mixer: Mixer, persistent: int, rope_base: float) -> None:
    """Raise OptionError, in the mixer's name, for heads that rotary attention cannot have."""
    dim, heads = mixer.dim, mixer.heads
    mixer.require(dim % (2 * heads) == 0, f"dim={dim} with heads={heads}, allowed: a multiple of 2 heads")
    mixer.require(persistent >= 0, f"persistent={persistent}, allowed: >= 0")
    mixer.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")


@register(
    "titans-mag",
    kind="mixer",
    paper=PAPER,
    arxiv="2501.00663",
    year=2024,
    applies_to="from scratch",
    small=SMALL,
    claim=(
        "Trained on 128 tokens with 8 pairs at the start, asked after 0, 128, 384, 896 and 1920 tokens of noise: "
        "0.990, 0.987, 0.981, 0.981 and 0.978 behind windows of 32 tokens, where a window alone has 0.213 and then "
        "nothing and softmax falls from 1.000 to 0.067: beside a window the memory holds sixteen times the length of "
        "training (benchmarks/results/claims/titans.json). Multi-query recall, 64 pairs in 256 tokens: 1.000 with 527 "
        "kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB (benchmarks/results/mqar.json)."
    ),
)
class TitansMAGMixer(_TitansWindowMixer):
    """Sliding-window attention gated by a neural memory of everything before (memory as a gate).

    window: tokens before the query that attention reads.    persistent: learned tokens that stand before every
    sequence, always visible.    rope_base: theta of the rotary positions.    depth, expansion, activation, form,
    kernel, chunk, max_rate, momentum: of the memory, as in titans-memory.
    """

    combine = MemoryGate

    def read_persistent(self, tokens: Tensor, state: TitansWindowState) -> TitansWindowState:
        _, memory = self.memory(tokens, state.memory)
        return replace(state, memory=memory)

    def mix(
        self, x: Tensor, state: TitansWindowState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TitansWindowState]:
        y, window = self.attention(x, state.window, positions, cu_seqlens, self.persistent)
        m, memory = self.memory(x, state.memory, cu_seqlens)
        return self.combined(y, m), replace(state, memory=memory, window=window)


@register(
    "titans-mal",
    kind="mixer",
    paper=PAPER,
    arxiv="2501.00663",
    year=2024,
    applies_to="from scratch",
    small=SMALL,
    claim=(
        "Trained on 128 tokens with 8 pairs at the start, asked after 0, 128, 384, 896 and 1920 tokens of noise: "
        "0.953, 0.959, 0.953, 0.898 and 0.114 before windows of 32 tokens: it outlasts its training eight times; "
        "softmax 1.000 to 0.067 (benchmarks/results/claims/titans.json). Multi-query recall, 64 pairs in 256 tokens: "
        "0.025, not learnt in 2400 steps at one rate; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class TitansMALMixer(_TitansWindowMixer):
    """Sliding-window attention over the outputs of a neural memory (memory as a layer).

    window: tokens before the query that attention reads.    persistent: learned tokens that stand before every
    sequence.    rope_base: theta of the rotary positions.    depth, expansion, activation, form, kernel, chunk,
    max_rate, momentum: of the memory, as in titans-memory.
    """

    combine = RMSNorm

    def read_persistent(self, tokens: Tensor, state: TitansWindowState) -> TitansWindowState:
        P = tokens.shape[1]
        m, memory = self.memory(tokens, state.memory)
        places = torch.arange(-P, 0, device=tokens.device).expand(tokens.shape[0], P)
        _, window = self.attention(self.combined(m), state.window, places)
        return replace(state, memory=memory, window=window)

    def mix(
        self, x: Tensor, state: TitansWindowState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, TitansWindowState]:
        m, memory = self.memory(x, state.memory, cu_seqlens)
        y, window = self.attention(self.combined(m), state.window, positions, cu_seqlens)
        return y, replace(state, memory=memory, window=window)
