"""Mamba-2: a state-space layer whose scan is linear attention with a data-dependent scalar decay (SSD).

    [z, (u, B, C), r] = x W_in;  (u, B, C) = silu(conv(u, B, C));  dt = softplus(r + dt_bias) per head
    S_t = exp(-exp(A_log) dt_t) S_{t-1} + B_t^T (dt_t u_t);  o_t = C_t S_t + D u_t
    y = RMSNorm(o * silu(z)) W_out                                  norm over each group's share of the width

Paper: Dao and Gu 2024 (arXiv 2405.21060). B and C are shared by the heads of a group, as keys and queries of grouped
attention. Parameters are laid out as in the authors' layer; their clamp of dt is not there (its default has no bound).

State: [B, H, state_dim, expand dim / H] float32 and the last inputs of the convolution. Cost: O(N state_dim expand
dim).
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.gated_deltanet import initial_step_bias
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import GatedRMSNorm, ShortConvolution
from foveate.registry import register


@register(
    "mamba2",
    kind="mixer",
    paper="Transformers are SSMs: Generalized Models and Efficient Algorithms Through Structured State Space Duality",
    arxiv="2405.21060",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.987 "
        "with 71 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class Mamba2Mixer(Mixer):
    """State-space duality.

    expand: inner width over dim.    state_dim: channels of B and C.    groups: sets of B and C, a divisor of heads.
    kernel: taps of the short convolution.    The paper's head width is 64: heads = expand dim / 64.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        expand: float = 2.0,
        state_dim: int = 128,
        groups: int = 1,
        kernel: int = 4,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        inner = int(dim * expand)
        self.require(
            inner >= 1 and inner % heads == 0, f"dim={dim}, expand={expand}, allowed: a width that {heads} heads divide"
        )
        self.require(groups >= 1 and heads % groups == 0, f"groups={groups}, allowed: divisors of heads = {heads}")
        self.require(state_dim >= 1, f"state_dim={state_dim}, allowed: >= 1")
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.inner, self.state_dim, self.groups = inner, state_dim, groups
        convolved = inner + 2 * groups * state_dim
        self.in_proj = nn.Linear(dim, inner + convolved + heads, bias=False)
        self.conv = ShortConvolution(convolved, kernel, bias=True)
        self.A_log = nn.Parameter(torch.empty(heads))
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.o_norm = GatedRMSNorm(inner, gate_first=True, groups=groups)
        self.o_proj = nn.Linear(inner, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        rate = torch.empty_like(self.A_log).uniform_(1, 16)
        return {"A_log": rate.log(), "dt_bias": initial_step_bias(self.dt_bias), "D": torch.ones_like(self.D)}

    def start(self, batch: int, like: Tensor) -> LinearState:
        return LinearState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=empty_memory(batch, self.heads, self.state_dim, self.inner // self.heads, like),
            convolutions=(self.conv.start(batch, like),),
        )

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        shared = self.groups * self.state_dim
        z, convolved, raw = self.in_proj(x).split([self.inner, self.inner + 2 * shared, self.heads], -1)
        convolved, cache = self.conv(convolved, state.convolutions[0], cu_seqlens)
        u, b, c = convolved.split([self.inner, shared, shared], -1)
        wide = exact(raw)
        dt = F.softplus(raw.to(wide) + self.dt_bias.to(wide))
        g = -self.A_log.to(wide).exp() * dt
        u = split_heads(u, self.heads)
        v = (u * dt[..., None]).to(u.dtype)
        q, k = split_heads(c, self.groups), split_heads(b, self.groups)
        o, memory = recur(q, k, v, state.memory, g=g, scale=1.0, cu_seqlens=cu_seqlens)
        o = (o + self.D.to(o.dtype)[:, None] * u).flatten(2)
        return self.o_proj(self.o_norm(o, z)), replace(state, memory=memory, convolutions=(cache,))
