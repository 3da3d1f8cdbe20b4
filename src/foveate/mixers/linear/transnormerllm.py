"""TransNormerLLM: linear attention with a fixed decay per head, a norm of the output and a linear gate.

    q, k, v, u = split(x W);  q, k = silu(q), silu(k)
    LRPE-d:  q = [cos(theta t) q, sin(theta t) q], k alike, so that q_s . k_t = sum_d q_d k_d cos(theta_d (s - t))
    S_t = exp(-s_h) S_{t-1} + k_t^T v_t;  o_t = q_t S_t                                     no scale, no denominator
    y = (norm(o) * u) W_o                                        norm by the root mean square over the heads together

The authors call the mixer GLA; it is not the gated linear attention of "gla". Their block is
x = x + mixer(norm(x)); x = x + SGLU(norm(x)), with norms without gain: `simple_norm` and `SGLU` here, or the shell's
RMSNorm and SwiGLU.

Paper: Qin et al. 2023 (arXiv 2307.14995). Slopes s_h are those of "lightning" with decay="alibi". LRPE is in layer 0
only, as in the released models. theta is learned, from 10000^(-2 n / (H D)) for n = 0 .. H D - 1 over all heads. The
state is the paper's robust form, which never divides by a decay; positions are part of the state, so LRPE goes on right
whatever number of tokens a call has.

State: [B, H, K, D] float32, K = D, or 2 D with LRPE. Cost: O(N K D) per head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.linear import head_decay
from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import RMSNorm
from foveate.registry import register


def simple_norm(dim: int, eps: float = 1e-6) -> RMSNorm:
    """SRMSNorm: x / sqrt(mean(x^2) + eps) over the last axis, without a gain."""
    return RMSNorm(dim, eps, gain=False)


class SGLU(nn.Module):
    """((x W_1) * (x W_2)) W_3, a gated feed-forward layer without an activation; width 2816 for dim 1024."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.l1 = nn.Linear(dim, width, bias=False)
        self.l2 = nn.Linear(dim, width, bias=False)
        self.l3 = nn.Linear(width, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.l3(self.l1(x) * self.l2(x))


def lrpe(x: Tensor, theta: Tensor, positions: Tensor) -> Tensor:
    """LRPE-d: x [B, N, H, D] at positions [B, N], theta [H, D] -> [x cos(theta t), x sin(theta t)] [B, N, H, 2 D]."""
    wide = exact(x)
    angle = positions[..., None, None].to(wide) * theta.to(wide)
    return torch.cat((x * angle.cos(), x * angle.sin()), -1).to(x.dtype)


@register(
    "transnormerllm",
    kind="mixer",
    paper="TransNormerLLM: A Faster and Better Large Language Model with Improved TransNormer",
    arxiv="2307.14995",
    year=2023,
    applies_to="from scratch",
    small={"lrpe": True},
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps at one rate: accuracy 0.989 "
        "with 17 kB of state; softmax 1.000 with 132 kB, linear attention 0.658 with 17 kB "
        "(benchmarks/results/mqar.json)."
    ),
)
class TransNormerLLMMixer(Mixer):
    """Linear attention with fixed decays, an output norm and a linear gate.

    lrpe: give positions by LRPE-d (default: in layer 0 only).    eps: of the norm.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        lrpe: bool | None = None,
        eps: float = 1e-6,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(eps > 0, f"eps={eps}, allowed: > 0")
        self.head_dim = dim // heads
        used = layer == 0 if lrpe is None else lrpe
        self.theta = nn.Parameter(torch.empty(heads, self.head_dim)) if used else None
        self.qkvu_proj = nn.Linear(dim, 4 * dim, bias=False)
        self.o_norm = simple_norm(dim, eps)
        self.o_proj = nn.Linear(dim, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        if self.theta is None:
            return {}
        n = torch.arange(self.dim, dtype=exact(self.theta), device=self.theta.device)
        return {"theta": (10000.0 ** (-2 * n / self.dim)).view_as(self.theta)}

    def log_decay(self) -> Tensor:
        """g [H], natural log."""
        return head_decay(self.heads, "alibi", layer=self.layer, layers=self.layers)

    def start(self, batch: int, like: Tensor) -> LinearState:
        keys = self.head_dim if self.theta is None else 2 * self.head_dim
        memory = empty_memory(batch, self.heads, keys, self.head_dim, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        q, k, v, u = self.qkvu_proj(x).chunk(4, -1)
        q, k, v = (split_heads(each, self.heads) for each in (F.silu(q), F.silu(k), v))
        if self.theta is not None:
            q, k = lrpe(q, self.theta, positions), lrpe(k, self.theta, positions)
        g = self.log_decay().to(x.device)
        o, memory = recur(q, k, v, state.memory, g=g, scale=1.0, cu_seqlens=cu_seqlens)
        return self.o_proj(self.o_norm(o.flatten(2)) * u), replace(state, memory=memory)
