"""Aaren: softmax attention whose query is learned and the same for every token, and so a recurrence.

    q = t W_q with one learned token t;  k, v = x W_k, x W_v;  s_i = D^-0.5 q . k_i per head
    o_i = softmax(s_1 .. s_i) [v_1 .. v_i];  y = o W_o

A prefix is summed up by its largest score, its sum of exponentials and its weighted sum of values; these combine
associatively, so all prefixes are one scan, and a new token costs O(1).

Paper: Feng et al. 2024 (arXiv 2405.13956). Bias-free projections. A layer does not see the order of tokens within a
prefix: positions have to come with x, or from other layers. t starts as a standard normal vector.

State: m, u [B, H] and w [B, H, D], float32. Cost: O(N D) per head, O(log N) dependent steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from foveate.attention.scans import prefix_softmax
from foveate.mixers.base import Mixer, MixerState, exact, start_position
from foveate.mixers.linear.recurrence import split_heads
from foveate.registry import register


@dataclass(frozen=True, kw_only=True)
class AarenState(MixerState):
    """most: [B, H] the largest score, -inf before the first token.    total: [B, H] sum of exp(score - most).
    weighted: [B, H, D] sum of exp(score - most) v.    All float32 (float64 for float64)."""

    most: Tensor
    total: Tensor
    weighted: Tensor


@register(
    "aaren",
    kind="mixer",
    paper="Attention as an RNN",
    arxiv="2405.13956",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Which byte is in the majority of a prefix: 1.000, as softmax; text, four layers, 400 steps: perplexity per "
        "byte 7.25 against 3.17, and 4.29 against 4.07 behind a short convolution, with 2.7 kB of state against 1574 "
        "kB; a token takes 1.6 to 2.1 ms from 512 to 16384 tokens on an H200 (benchmarks/results/claims/aaren.json). "
        "One query per layer cannot ask for a key: multi-query recall 0.015 (benchmarks/results/mqar.json)."
    ),
)
class AarenMixer(Mixer):
    """Softmax attention of one learned query over every prefix.

    scaled: scores are divided by sqrt(D).
    """

    def __init__(self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4, scaled: bool = True) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.head_dim = dim // heads
        self.scale = self.head_dim**-0.5 if scaled else 1.0
        self.query = nn.Parameter(torch.empty(dim))
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"query": torch.randn_like(self.query)}

    def start(self, batch: int, like: Tensor) -> AarenState:
        zeros = torch.zeros(batch, self.heads, self.head_dim, dtype=exact(like), device=like.device)
        return AarenState(
            owner=self.owner,
            position=start_position(batch, like),
            most=torch.full_like(zeros[..., 0], -torch.inf),
            total=torch.zeros_like(zeros[..., 0]),
            weighted=zeros,
        )

    def mix(
        self, x: Tensor, state: AarenState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, AarenState]:
        k, v = split_heads(self.k_proj(x), self.heads), split_heads(self.v_proj(x), self.heads)
        q = split_heads(self.q_proj(self.query), self.heads)
        wide = exact(k)
        scores = (k.to(wide) * q.to(wide)).sum(-1) * self.scale
        before = state.most, state.total, state.weighted
        o, (most, total, weighted) = prefix_softmax(scores, v, initial_state=before, cu_seqlens=cu_seqlens)
        return self.o_proj(o.flatten(2)), replace(state, most=most, total=total, weighted=weighted)
