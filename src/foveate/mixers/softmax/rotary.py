"""Softmax attention with rotary positions: the dense mixer that every hybrid is compared with.

    q, k, v = x W_q, x W_k, x W_v        (qk_norm: RMSNorm of q and k per head)
    o_i = sum over j <= i, i - j <= window, of softmax_j(rotate(q_i, i) . rotate(k_j, j) / sqrt(D)) v_j
    y = o W_o

Papers: Vaswani et al. 2017 (arXiv 1706.03762); rotary positions 2104.09864; grouped queries 2305.13245; QK norm
2010.04245; the window of BASED 2402.18668 and Longformer. Bias-free projections and the half-split rotary layout of
Llama; `bias` adds Qwen2's. `window` counts the tokens before the query, as flash-attention's left window does.

State: rotated keys and values of the tokens that can still be read, [B, Hkv, S, D] each, S = length, or
min(length, window). Rows of different lengths stand at the right end of the slots. Cost: O(N S D) per head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import Positions, Rope, attend
from foveate.attention.chunks import read_offsets
from foveate.mixers.base import PATTERNS, Mixer, MixerState, start_position
from foveate.mixers.parts import RMSNorm
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class SoftmaxState(MixerState):
    """keys, values: [B, Hkv, S, D]; row b's tokens are the last length[b] slots. length: [B] int64.

    ragged: rows may have fewer than S tokens.
    """

    keys: Tensor
    values: Tensor
    length: Tensor
    ragged: bool = False

    @classmethod
    def mergeable(cls, states: Sequence[Self]) -> bool:
        # Rows of fewer slots are filled up from the left.
        return len({each.owner for each in states}) == 1

    @classmethod
    def merge(cls, states: Sequence[Self]) -> Self:
        slots = max((each.keys.shape[2] for each in states), default=0)
        ragged = any(each.ragged or each.keys.shape[2] != slots for each in states)
        return super().merge(
            [
                replace(each, keys=_to_right(each.keys, slots), values=_to_right(each.values, slots), ragged=ragged)
                for each in states
            ]
        )


def _to_right(x: Tensor, slots: int) -> Tensor:
    """Zeros in front of x [..., S, D], up to `slots` slots."""
    return F.pad(x, (0, 0, slots - x.shape[-2], 0))


@register(
    "softmax",
    kind="mixer",
    paper="Attention Is All You Need",
    arxiv="1706.03762",
    year=2017,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64: accuracy 1.000 with 132 kB of state; "
        "with windows of 64 and 16 tokens 0.028 and 0.004 (benchmarks/results/mqar.json)."
    ),
)
class SoftmaxMixer(Mixer):
    """Softmax attention with rotary positions, over all earlier tokens or a sliding window.

    kv_heads: heads of k and v (default: heads).    head_dim: D (default: dim / heads).
    window: tokens before the query that it reads (default: all).    rotary: rotate q and k (cross attention never
    does).    rope_base: theta.    qk_norm: RMSNorm of q and k.    causal: a token reads no later one.    bias: of q, k
    and v.
    """

    patterns = PATTERNS
    constant_state = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        window: int | None = None,
        rotary: bool = True,
        rope_base: float = 10000.0,
        qk_norm: bool = False,
        causal: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(head_dim is not None or dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.kv_heads = heads if kv_heads is None else kv_heads
        self.require(
            self.kv_heads >= 1 and heads % self.kv_heads == 0, f"kv_heads={kv_heads}, allowed: divisors of {heads}"
        )
        self.head_dim = dim // heads if head_dim is None else head_dim
        self.require(self.head_dim >= 1, f"head_dim={head_dim}, allowed: >= 1")
        self.require(not rotary or self.head_dim % 2 == 0, f"head_dim={self.head_dim}, allowed with rotary: even")
        self.require(window is None or window >= 0, f"window={window}, allowed: >= 0")
        self.require(window is None or causal, "window with causal=False, allowed: causal=True")
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.window, self.causal, self.constant_state = window, causal, window is not None
        self.rope = Rope(self.head_dim, rope_base) if rotary else None
        self.q_proj = nn.Linear(dim, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(dim, self.kv_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.head_dim, dim, bias=False)
        self.q_norm = RMSNorm(self.head_dim) if qk_norm else None
        self.k_norm = RMSNorm(self.head_dim) if qk_norm else None

    def start(self, batch: int, like: Tensor) -> SoftmaxState:
        empty = like.new_zeros(batch, self.kv_heads, 0, self.head_dim)
        position = start_position(batch, like)
        return SoftmaxState(
            owner=self.owner, position=position, keys=empty, values=empty, length=torch.zeros_like(position)
        )

    def state_bytes(self, batch: int, length: int) -> int:
        if not self.causal:
            return 0
        start = self.start(batch, self.meta())
        slots = length if self.window is None else min(length, self.window)
        return start.bytes() + 2 * batch * self.kv_heads * slots * self.head_dim * start.keys.element_size()

    def _heads(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q of x and k, v of the source, [B, H, N, D], not rotated."""
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (self.q_proj(x), self.k_proj(source), self.v_proj(source))
        )
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        return q, k, v

    def _output(self, o: Tensor) -> Tensor:
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def mix(
        self, x: Tensor, state: SoftmaxState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, SoftmaxState]:
        q, k, v = self._heads(x, x)
        if self.rope is not None:
            q, k = self.rope.rotate(q, positions), self.rope.rotate(k, positions)
        if cu_seqlens is None:
            o, state = self._attend(q, k, v, state)
        else:
            o, state = self._attend_packed(q, k, v, state, read_offsets(cu_seqlens, x.shape[0], x.shape[1]))
        return self._output(o), state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
        if not self.causal:
            return attend(q, k, v, causal=False), state
        M, S = q.shape[2], state.keys.shape[2]
        if S:
            k, v = (torch.cat((old.to(new.dtype), new), 2) for old, new in ((state.keys, k), (state.values, v)))
        positions = slot_positions(state.length, M, S) if state.ragged else None
        o = attend(q, k, v, positions=positions, window=self.window)
        return o, self._kept(state, k, v, state.length + M)

    def _kept(self, state: SoftmaxState, k: Tensor, v: Tensor, length: Tensor) -> SoftmaxState:
        """The state with these keys and values, cut to the window."""
        if self.window is not None and k.shape[2] > self.window:
            first = k.shape[2] - self.window
            # Clones, so that the rest of the prompt is freed.
            k, v = k[:, :, first:].clone(), v[:, :, first:].clone()
            length = length.clamp(max=self.window)
        return replace(state, keys=k, values=v, length=length)

    def _attend_packed(
        self, q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState, offsets: tuple[int, ...]
    ) -> tuple[Tensor, SoftmaxState]:
        """Each sequence alone: a fused causal call each, and no mask over them all."""
        rows = state.split([1] * state.batch)
        if state.ragged:
            rows = [without_holes(row) for row in rows]
        outputs = []
        for n, (begin, end) in enumerate(pairwise(offsets)):
            if end > begin:
                tokens = slice(begin, end)
                o, rows[n] = self._attend(q[:, :, tokens], k[:, :, tokens], v[:, :, tokens], rows[n])
                outputs.append(o)
        return torch.cat(outputs, 2), SoftmaxState.merge(rows)

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        q, k, v = self._heads(x, context)
        positions = None
        if context_padding is not None:
            places = torch.arange(context.shape[1], device=x.device).expand(context_padding.shape)
            at = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
            positions = Positions(at, places.masked_fill(~context_padding, -1)[:, None], holes=True)
            k, v = (each.masked_fill(~context_padding[:, None, :, None], 0) for each in (k, v))
        return self._output(attend(q, k, v, positions=positions, causal=False))


def slot_positions(length: Tensor, m: int, slots: int) -> Positions:
    """Where M new tokens and the slots before them stand, when row b fills only the last length[b] of the slots."""
    empty = (slots - length)[:, None]
    at = torch.arange(slots + m, device=length.device) - empty
    return Positions(at[:, slots:], at.clamp(min=-1)[:, None], holes=True)


def without_holes(row: SoftmaxState) -> SoftmaxState:
    """A state of one row without its empty slots."""
    slots = row.keys.shape[2]
    first = slots - int(row.length)
    return replace(row, keys=row.keys[:, :, first:], values=row.values[:, :, first:], ragged=False)
