"""HGRN2: HGRN with an outer-product state; what is not forgotten is the key.

    q = silu(x W_q);  f, v = x W_f, x W_i;  a = lb + (1 - lb) sigmoid(f);  k = 1 - a
    S_t = diag(a_t) S_{t-1} + k_t^T v_t;  o_t = K^-0.5 q_t S_t;  y = RMSNorm(o) W_o         norm over all heads together

Paper: Qin et al. 2024 (arXiv 2404.07904). Lower bounds as in `hgrn`. K = V = dim / H; the paper's K is 128, so
heads = dim / 128.

State: [B, H, K, V] float32. Cost: O(N K V) per head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, start_position
from foveate.mixers.linear.hgrn import bounded_log_forget
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import RMSNorm
from foveate.registry import register


@register(
    "hgrn2",
    kind="mixer",
    paper="HGRN2: Gated Linear RNNs with State Expansion",
    arxiv="2404.07904",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.937 "
        "with 17 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class HGRN2Mixer(Mixer):
    """Gated linear attention whose keys are one minus its decay."""

    shared = ("lower_bounds",)

    def __init__(self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.f_proj = nn.Linear(dim, dim, bias=False)
        self.i_proj = nn.Linear(dim, dim, bias=False)
        self.lower_bounds = nn.Parameter(torch.zeros(layers, dim)) if layer > 0 else None
        self.o_norm = RMSNorm(dim, 1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def initial_values(self) -> dict[str, Tensor]:
        return {} if self.lower_bounds is None else {"lower_bounds": torch.zeros_like(self.lower_bounds)}

    def start(self, batch: int, like: Tensor) -> LinearState:
        head_dim = self.dim // self.heads
        memory = empty_memory(batch, self.heads, head_dim, head_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, v = F.silu(self.q_proj(x)), self.i_proj(x)
        g = bounded_log_forget(self.f_proj(x), self.lower_bounds, self.layer)
        k = (-torch.expm1(g)).to(v.dtype)
        q, k, v, g = (split_heads(each, self.heads) for each in (q, k, v, g))
        o, memory = recur(q, k, v, state.memory, g=g, cu_seqlens=cu_seqlens)
        return self.o_proj(self.o_norm(o.flatten(2))), replace(state, memory=memory)
