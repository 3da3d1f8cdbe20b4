"""Gated DeltaNet: the delta rule with a data-dependent decay, so that the memory both overwrites and forgets.

    q, k, v = silu(conv(x W)) each;  q, k of unit length per head;  beta = sigmoid(x W_b)
    a_t = exp(-exp(A_log) softplus(x W_a + dt_bias))
    S_t = a_t S_{t-1} + k_t^T beta_t (v_t - k_t a_t S_{t-1});  o_t = K^-0.5 q_t S_t
    y = (RMSNorm(o) per head * silu(x W_g)) W_o

Paper: Yang et al. 2024 (arXiv 2412.06464). beta, a and the gate are per value head; value heads may be more than
query/key heads. Default widths follow the paper's layer: keys 3/4 dim, values twice the keys.

State: [B, HV, K, V] float32 and the last inputs of three convolutions. Cost: O(N K V) per value head.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import GatedRMSNorm, ShortConvolution
from foveate.registry import register

STEP_RANGE = (1e-3, 0.1)


def initial_step_bias(like: Tensor) -> Tensor:
    """softplus^-1(dt) for dt log-uniform in [1e-3, 0.1], shaped like `like`."""
    low, high = (math.log(each) for each in STEP_RANGE)
    step = torch.empty_like(like).uniform_(low, high).exp()
    return step + torch.log(-torch.expm1(-step))


@register(
    "gated-deltanet",
    kind="mixer",
    paper="Gated Delta Networks: Improving Mamba2 with Delta Rule",
    arxiv="2412.06464",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, best of the rates tried: "
        "accuracy 0.991 with 21 kB of state; softmax 1.000 with 132 kB, plain linear attention 0.906 with "
        "17 kB (benchmarks/results/mqar_long.json)."
    ),
)
class GatedDeltaNetMixer(Mixer):
    """The delta rule with decay.

    head_dim: K (default 3/4 dim / heads).    expand_v: V over K.    value_heads: HV, a multiple of heads (default:
    heads).    kernel: taps of the short convolutions.    negative_eigenvalues: beta in (0, 2).
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        head_dim: int | None = None,
        expand_v: float = 2.0,
        value_heads: int | None = None,
        kernel: int = 4,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.key_dim = 3 * dim // (4 * heads) if head_dim is None else head_dim
        self.value_dim = int(self.key_dim * expand_v)
        self.value_heads = heads if value_heads is None else value_heads
        self.require(
            self.key_dim >= 1 and self.value_dim >= 1,
            f"head_dim={self.key_dim}, expand_v={expand_v}, allowed: key and value heads of at least one channel",
        )
        self.require(
            self.value_heads >= heads and self.value_heads % heads == 0,
            f"value_heads={value_heads}, allowed: a multiple of heads = {heads}",
        )
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        keys, values = heads * self.key_dim, self.value_heads * self.value_dim
        self.q_proj = nn.Linear(dim, keys, bias=False)
        self.k_proj = nn.Linear(dim, keys, bias=False)
        self.v_proj = nn.Linear(dim, values, bias=False)
        self.q_conv = ShortConvolution(keys, kernel)
        self.k_conv = ShortConvolution(keys, kernel)
        self.v_conv = ShortConvolution(values, kernel)
        self.a_proj = nn.Linear(dim, self.value_heads, bias=False)
        self.b_proj = nn.Linear(dim, self.value_heads, bias=False)
        self.g_proj = nn.Linear(dim, values, bias=False)
        self.A_log = nn.Parameter(torch.empty(self.value_heads))
        self.dt_bias = nn.Parameter(torch.empty(self.value_heads))
        self.o_norm = GatedRMSNorm(self.value_dim)
        self.o_proj = nn.Linear(values, dim, bias=False)
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        rate = torch.empty_like(self.A_log).uniform_(0, 16).clamp(min=1e-4)
        return {"A_log": rate.log(), "dt_bias": initial_step_bias(self.dt_bias)}

    def start(self, batch: int, like: Tensor) -> LinearState:
        return LinearState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=empty_memory(batch, self.value_heads, self.key_dim, self.value_dim, like),
            convolutions=tuple(each.start(batch, like) for each in (self.q_conv, self.k_conv, self.v_conv)),
        )

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        projected = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
        convolved = [
            conv(each, cache, cu_seqlens)
            for conv, each, cache in zip((self.q_conv, self.k_conv, self.v_conv), projected, state.convolutions)
        ]
        q, k = (split_heads(y, self.heads) for y, _ in convolved[:2])
        v = split_heads(convolved[2][0], self.value_heads)
        step, strength = self.a_proj(x), self.b_proj(x)
        wide = exact(step)
        g = -self.A_log.to(wide).exp() * F.softplus(step.to(wide) + self.dt_bias.to(wide))
        beta = self.strongest * torch.sigmoid(strength.to(wide))
        o, memory = recur(q, k, v, state.memory, g=g, beta=beta, qk_l2norm=True, cu_seqlens=cu_seqlens)
        o = self.o_norm(o, split_heads(self.g_proj(x), self.value_heads))
        caches = tuple(cache for _, cache in convolved)
        return self.o_proj(o.flatten(2)), replace(state, memory=memory, convolutions=caches)
