"""BASED's linear attention: features of the second-order Taylor expansion of exp, normalised.

    q, k = x W_q, x W_k of few channels F per head;  v = x W_v
    w_ij = 1 + s + s^2 / 2 with s = q_i . k_j / sqrt(F), which is at least 1/2
    o_i = sum_{j <= i} w_ij v_j / (sum_{j <= i} w_ij + eps);  y = o W_o

Paper: Arora et al. 2024 (arXiv 2402.18668). The hybrid of the paper also has layers of softmax over a short window
("softmax:window=128") and of short convolutions ("baseconv").

State: [B, H, E, V + 1] float32, E = 1 + F + F (F + 1) / 2 with `packed`, which keeps each product of two channels
once, else 1 + F + F^2; outputs are the same. Cost: O(N E V) per head.
"""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor, nn

from foveate.attention.features import taylor2
from foveate.mixers.base import Mixer, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.registry import register


@register(
    "based",
    kind="mixer",
    paper="Simple linear attention language models balance the recall-throughput tradeoff",
    arxiv="2402.18668",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, best of the rates tried: "
        "accuracy 0.991 with 40 kB of state; softmax 1.000 with 132 kB, plain linear attention 0.906 with "
        "17 kB (benchmarks/results/mqar_long.json)."
    ),
)
class BasedMixer(Mixer):
    """Linear attention with second-order Taylor features.

    feature_dim: F, channels of q and k per head; recall and state grow with it.    packed: keep symmetric products
    once.    eps: added to the sum of weights.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        feature_dim: int = 16,
        packed: bool = True,
        eps: float = 1e-12,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(feature_dim >= 1, f"feature_dim={feature_dim}, allowed: >= 1")
        self.feature_dim, self.packed, self.eps = feature_dim, packed, eps
        self.q_proj = nn.Linear(dim, heads * feature_dim, bias=False)
        self.k_proj = nn.Linear(dim, heads * feature_dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        F = self.feature_dim
        expanded = 1 + F + (F * (F + 1) // 2 if self.packed else F * F)
        memory = empty_memory(batch, self.heads, expanded, self.dim // self.heads + 1, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v = (split_heads(proj(x), self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj))
        q, k = (taylor2(each, packed=self.packed) for each in (q, k))
        o, memory = recur(q, k, v, state.memory, scale=1.0, normalize=True, eps=self.eps, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(2)), replace(state, memory=memory)
