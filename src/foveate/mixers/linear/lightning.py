"""Lightning Attention: linear attention with one fixed decay per head, the layer of TNL (TnlAttention).

    q, k, v = silu(x W_q), silu(x W_k), silu(x W_v)
    o_i = sum_{j <= i} exp(-s_h)^(i - j) (q_i . k_j) v_j                           no scale, no denominator
    y = (LayerNorm(o) * sigmoid(x W_1 W_2)) W_o                                    norm over all heads together

Papers: Qin et al. 2024 (arXiv 2405.17381; the block algorithm 2401.04658). Slopes s_h by `decay`: "alibi", the
authors' code, 2^(-8 (h + 1) / H) times 1 - layer / (layers - 1) + 1e-5, so the last layer hardly forgets; "lightning",
the paper's text, (8 h / H)(1 - layer / layers); "none". The gate's rank is the head width, as in the authors' module.

State: [B, H, D, D] float32. Cost: O(N D^2) per head.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.linear import head_decay
from foveate.mixers.base import Mixer, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.registry import register

DECAYS = ("alibi", "lightning", "none")


@register(
    "lightning",
    kind="mixer",
    paper="Various Lengths, Constant Speed: Efficient Language Modeling with Lightning Attention",
    arxiv="2405.17381",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.992 "
        "with 17 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class LightningMixer(Mixer):
    """Linear attention with a fixed decay per head.

    decay: how slopes fall over heads and layers, "alibi", "lightning" or "none".    gate_rank: rank of the output
    gate's projection (default: dim / heads).
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        decay: str = "alibi",
        gate_rank: int | None = None,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(decay in DECAYS, f"decay={decay!r}, allowed: {DECAYS}")
        self.require(gate_rank is None or gate_rank >= 1, f"gate_rank={gate_rank}, allowed: >= 1")
        self.decay = decay
        rank = dim // heads if gate_rank is None else gate_rank
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.gate_proj = nn.Sequential(nn.Linear(dim, rank, bias=False), nn.Linear(rank, dim, bias=False))
        self.o_norm = nn.LayerNorm(dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        head_dim = self.dim // self.heads
        memory = empty_memory(batch, self.heads, head_dim, head_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def log_decay(self) -> Tensor | None:
        """g [H], natural log, or None without decay."""
        if self.decay == "none":
            return None
        scheme = cast(Literal["alibi", "lightning"], self.decay)
        # A model of one layer has no depth to spread slopes over.
        depth = {} if self.layers == 1 else {"layer": self.layer, "layers": self.layers}
        return head_decay(self.heads, scheme, **depth)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v = (split_heads(F.silu(p(x)), self.heads) for p in (self.q_proj, self.k_proj, self.v_proj))
        g = self.log_decay()
        g = None if g is None else g.to(x.device)
        o, memory = recur(q, k, v, state.memory, g=g, scale=1.0, cu_seqlens=cu_seqlens)
        o = self.o_norm(o.flatten(2)) * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(o), replace(state, memory=memory)
