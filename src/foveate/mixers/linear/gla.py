"""GLA: gated linear attention, a data-dependent decay per key channel.

    q, k = x W_q, x W_k (width dim / 2);  v = x W_v
    g = logsigmoid(x W_1 W_2 + b) / 16,  W_1 of low rank;  S_t = diag(exp(g_t)) S_{t-1} + k_t^T v_t
    o_t = K^-0.5 q_t S_t;  y = (RMSNorm(o) per head * silu(x W_g)) W_o

Paper: Yang et al. 2023 (arXiv 2312.06635). The division by 16 keeps decays near 1 at the start.

State: [B, H, K, V] float32. Cost: O(N K V) per head.
"""

from __future__ import annotations

from dataclasses import replace

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import GatedRMSNorm
from foveate.registry import register


@register(
    "gla",
    kind="mixer",
    paper="Gated Linear Attention Transformers with Hardware-Efficient Training",
    arxiv="2312.06635",
    year=2023,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, best of the rates tried: "
        "accuracy 0.791 with 9 kB of state; softmax 1.000 with 132 kB, plain linear attention 0.906 with 17 "
        "kB (benchmarks/results/mqar_long.json)."
    ),
)
class GLAMixer(Mixer):
    """Gated linear attention.

    expand_k, expand_v: total key and value width over dim.    gate_rank: rank of the decay's projection.
    temperature: what log-sigmoid is divided by.    least_decay: lower bound of g, natural log (default: none).
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        gate_rank: int = 16,
        temperature: float = 16.0,
        least_decay: float | None = None,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        keys, values = int(dim * expand_k), int(dim * expand_v)
        self.require(
            keys >= 1 and values >= 1 and keys % heads == 0 and values % heads == 0,
            f"dim={dim}, expand_k={expand_k}, expand_v={expand_v}, allowed: key and value widths that are multiples "
            f"of heads = {heads}",
        )
        self.require(gate_rank >= 1, f"gate_rank={gate_rank}, allowed: >= 1")
        self.require(temperature > 0, f"temperature={temperature}, allowed: > 0")
        self.require(least_decay is None or least_decay <= 0, f"least_decay={least_decay}, allowed: <= 0")
        self.key_dim, self.value_dim = keys // heads, values // heads
        self.temperature, self.least_decay = temperature, least_decay
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.decay_proj = nn.Sequential(nn.Linear(dim, gate_rank, bias=False), nn.Linear(gate_rank, keys))
        self.o_norm = GatedRMSNorm(self.value_dim)
        self.o_proj = nn.Linear(values, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.heads, self.key_dim, self.value_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v, gate = (split_heads(p(x), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj, self.g_proj))
        raw = self.decay_proj(x)
        g = F.logsigmoid(raw.to(exact(raw))) / self.temperature
        if self.least_decay is not None:
            g = g.clamp(min=self.least_decay)
        o, memory = recur(q, k, v, state.memory, g=split_heads(g, self.heads), cu_seqlens=cu_seqlens)
        return self.o_proj(self.o_norm(o, gate).flatten(2)), replace(state, memory=memory)
