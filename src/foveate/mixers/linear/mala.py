"""MALA: linear attention whose weights grow sharper with the size of the query, as softmax's do.

The norm of phi(q) cancels in normalised linear attention. MALA normalises by a factor and an offset in place of the
division, so that it does not; the layer adds a 5x5 convolution of the values and a gate. With phi = elu + 1, R a rotary
turn by the token's row and column, s = D^-0.5:

    z_i = s phi(q_i) . mean_j phi(k_j);   beta_i = 1 + 1 / (z_i + eps);   gamma_i = z_i / N
    o_i = sum_j (beta_i (s / N) R phi(q_i) . R phi(k_j) - gamma_i) v_j
    y = ((o + conv5x5(v)) * gate) W_o,   q, k, v, gate = x W

Paper: Fan et al. 2025 (arXiv 2507.00698). Weights sum to 1 without R, about so with it, and may be negative: R comes
after phi, and z is of the features before R, as in the authors' code. Pairs of channels (2i, 2i + 1) are turned, the
first half of a head by the row, the second by the column, with D / 4 rates from 1 down to 1e-4. attention="softmax" is
the same layer with softmax (of R q and R k), which the paper's backbone uses in its last two stages. "mala-causal" is
derived from the definition, and not in the authors' code: means and N are those of the prefix, R turns by the position,
and there is no convolution.

State ("mala-causal"): sum R phi(k)^T v [B, H, D, D], sum phi(k) [B, H, D, 1], and sum v with the count
[B, H, D + 1], all float32. Cost: O(N D^2) per head; softmax O(N^2 D).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from foveate.attention import Rope, apply_rotary, attend
from foveate.attention.features import elu_plus_one
from foveate.attention.linear import kv_matmul_attention
from foveate.attention.scans import elementwise_scan
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.grid import Grid, GridMixer, convolve
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.registry import register

PAPER = "Rectifying Magnitude Neglect in Linear Attention"


def grid_angles(grid: Grid, head_dim: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [H W, D / 2] of the turns of each pair of channels, the first half by row, the second by column."""
    dtype = exact(like)
    rates = 10000.0 ** -torch.linspace(0, 1, head_dim // 4, dtype=dtype, device=like.device)
    row, column = (torch.arange(size, dtype=dtype, device=like.device)[:, None] * rates for size in grid)
    angles = torch.cat((row[:, None].expand(-1, grid[1], -1), column.expand(grid[0], -1, -1)), -1).flatten(0, 1)
    return angles.cos(), angles.sin()


@register(
    "mala",
    kind="mixer",
    paper=PAPER,
    arxiv="2507.00698",
    year=2025,
    applies_to="from scratch",
    small={"height": 4, "width": 6},
    claim=(
        "Fashion-MNIST, four layers, 1500 steps, two seeds: accuracy 0.887, softmax in the same block 0.887, linear "
        "attention 0.839; from queries of size 0.5 to 8 the largest weight grows from 0.044 to 0.355, softmax's from "
        "0.045 to 0.784, and linear attention's stays at 0.023 (benchmarks/results/claims/mala_fashion.json)."
    ),
)
class MALAMixer(GridMixer):
    """Magnitude-aware linear attention on a grid of tokens.

    height, width: the grid (width: default height).    attention: "linear", or "softmax" in the same layer.
    rotary: turn queries and keys by row and column.    eps: added to z in beta.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        height: int = 14,
        width: int | None = None,
        attention: str = "linear",
        rotary: bool = True,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads, height=height, width=width)
        self.require(attention in ("linear", "softmax"), f"attention={attention!r}, allowed: 'linear', 'softmax'")
        self.require(
            not rotary or self.head_dim % 4 == 0,
            f"dim={dim} with heads={heads}, allowed with rotary: a multiple of {4 * heads}",
        )
        self.require(eps >= 0, f"eps={eps}, allowed: >= 0")
        self.attention, self.rotary, self.eps = attention, rotary, eps
        self.qkvo_proj = nn.Linear(dim, 4 * dim)
        self.local = nn.Conv2d(dim, dim, 5, padding=2, groups=dim)
        self.o_proj = nn.Linear(dim, dim)

    def image(self, x: Tensor, grid: Grid) -> Tensor:
        q, k, v, gate = self.qkvo_proj(x).chunk(4, -1)
        local = convolve(self.local, v, grid)
        q, k, v = (split_heads(each, self.heads) for each in (q, k, v))
        if self.attention == "softmax":
            q, k = self._turned(q, k, grid)
            o = attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), causal=False).transpose(1, 2)
        else:
            q, k = elu_plus_one(q), elu_plus_one(k)
            o = kv_matmul_attention(q, k, v, normalizer="affine", eps=self.eps, rotated=self._turned(q, k, grid))
        return self.o_proj((o.flatten(2) + local) * gate)

    def _turned(self, q: Tensor, k: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
        if not self.rotary:
            return q, k
        cos, sin = (each[:, None] for each in grid_angles(grid, self.head_dim, q))
        return apply_rotary(q, cos, sin, "interleaved"), apply_rotary(k, cos, sin, "interleaved")


@dataclass(frozen=True, kw_only=True)
class MALAState(LinearState):
    """keys: sum of phi(k), [B, H, D, 1].    values: sum of v, and in the last column the number of tokens,
    [B, H, D + 1]."""

    keys: Tensor
    values: Tensor


@register(
    "mala-causal",
    kind="mixer",
    paper=PAPER,
    arxiv="2507.00698",
    year=2025,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.618 "
        "with 17 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class MALACausalMixer(Mixer):
    """Magnitude-aware linear attention over the tokens so far, for language.

    rotary: turn queries and keys by their position.    rope_base: theta.    eps: added to z in beta.
    """

    lacking: ClassVar[Mapping[str, str]] = {
        "noncausal-self": "it is defined by means of prefixes; 'mala' is the form that reads all tokens of an image",
        "causal-cross": "it is defined by means of prefixes, and a context has none",
        "noncausal-cross": "it is defined by means of prefixes, and a context has none",
    }

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        rotary: bool = True,
        rope_base: float = 10000.0,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.head_dim = dim // heads
        self.require(not rotary or self.head_dim % 2 == 0, f"head width {self.head_dim}, allowed with rotary: even")
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.require(eps >= 0, f"eps={eps}, allowed: >= 0")
        self.eps = eps
        self.rope = Rope(self.head_dim, rope_base, "interleaved") if rotary else None
        self.qkvo_proj = nn.Linear(dim, 4 * dim)
        self.o_proj = nn.Linear(dim, dim)

    def start(self, batch: int, like: Tensor) -> MALAState:
        D = self.head_dim
        return MALAState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=empty_memory(batch, self.heads, D, D, like),
            keys=empty_memory(batch, self.heads, D, 1, like),
            values=torch.zeros(batch, self.heads, D + 1, dtype=exact(like), device=like.device),
        )

    def mix(
        self, x: Tensor, state: MALAState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MALAState]:
        *heads, gate = self.qkvo_proj(x).chunk(4, -1)
        q, k, v = (split_heads(each, self.heads).to(exact(x)) for each in heads)
        q, k = elu_plus_one(q), elu_plus_one(k)
        one = torch.ones_like(v[..., :1])
        z, keys = recur(q, k, one, state.keys, cu_seqlens=cu_seqlens)
        if self.rope is not None:
            q, k = (self.rope.rotate(each.transpose(1, 2), positions).transpose(1, 2) for each in (q, k))
        o, memory = recur(q, k, v, state.memory, cu_seqlens=cu_seqlens)
        counted = torch.cat((v, one), -1)
        summed, values = elementwise_scan(
            counted, torch.zeros_like(counted), initial_state=state.values, cu_seqlens=cu_seqlens
        )
        total, count = summed[..., :-1], summed[..., -1:]
        z = z / count
        o = (1 + 1 / (z + self.eps)) * o / count - z * total / count
        y = self.o_proj(o.to(gate.dtype).flatten(2) * gate)
        return y, replace(state, memory=memory, keys=keys, values=values)
