"""RetNet: multi-scale retention, linear attention with one fixed decay per head and rotary positions.

    q, k = rotate(x W_q), rotate(x W_k);  v = x W_v                        K = dim expand_k / H, V = dim expand_v / H
    o_i = K^-0.5 sum_{j <= i} gamma_h^(i - j) (q_i . k_j) v_j,             gamma_h = 1 - 2^(-5 - h)
    y = (RMSNorm(o) per head * silu(x W_g)) W_o

Paper: Sun et al. 2023 (arXiv 2307.08621). RMSNorm in place of the paper's GroupNorm without mean, half-split rotary
layout, as in the layer studied in arXiv 2507.06457.

State: [B, H, K, V] float32. Cost: O(N K V) per head.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from foveate.attention import Rope
from foveate.attention.linear import head_decay
from foveate.mixers.base import Mixer, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import GatedRMSNorm
from foveate.registry import register


@register(
    "retnet",
    kind="mixer",
    paper="Retentive Network: A Successor to Transformer for Large Language Models",
    arxiv="2307.08621",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.446 "
        "with 33 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class RetNetMixer(Mixer):
    """Multi-scale retention.

    expand_k, expand_v: total key and value width over dim.    rope_base: theta of the rotary angles.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        expand_k: float = 1.0,
        expand_v: float = 2.0,
        rope_base: float = 10000.0,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        keys, values = int(dim * expand_k), int(dim * expand_v)
        self.require(
            keys >= 1 and values >= 1 and keys % (2 * heads) == 0 and values % heads == 0,
            f"dim={dim}, expand_k={expand_k}, expand_v={expand_v}, allowed: key width a multiple of 2 heads = "
            f"{2 * heads}, value width a multiple of heads",
        )
        self.require(rope_base > 0, f"rope_base={rope_base}, allowed: > 0")
        self.key_dim, self.value_dim = keys // heads, values // heads
        self.rope = Rope(self.key_dim, rope_base)
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.o_norm = GatedRMSNorm(self.value_dim)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.heads, self.key_dim, self.value_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        heads_first = split_heads(x, self.heads).transpose(1, 2)
        return self.rope.rotate(heads_first, positions).transpose(1, 2)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k = self._rotated(self.q_proj(x), positions), self._rotated(self.k_proj(x), positions)
        v = split_heads(self.v_proj(x), self.heads)
        g = head_decay(self.heads, "retnet").to(x.device)
        o, memory = recur(q, k, v, state.memory, g=g, cu_seqlens=cu_seqlens)
        o = self.o_norm(o, split_heads(self.g_proj(x), self.heads))
        return self.o_proj(o.flatten(2)), replace(state, memory=memory)
