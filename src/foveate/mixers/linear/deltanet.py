"""DeltaNet: linear attention that writes what its memory does not yet know (the delta rule).

    q, k, v = silu(conv(x W)) each;  q, k of unit length per head;  beta = sigmoid(x W_b) per head
    S_t = S_{t-1} + k_t^T beta_t (v_t - k_t S_{t-1});  o_t = K^-0.5 q_t S_t
    y = RMSNorm(o) per head W_o                                                     (gate: times silu(x W_g))

Papers: Schlag et al. 2021 (arXiv 2102.11174), Yang et al. 2024 (2406.06484). K = V = dim / H.

State: [B, H, K, V] float32 and the last inputs of three convolutions. Cost: O(N K V) per head.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.base import Mixer, exact, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.mixers.parts import RMSNorm, ShortConvolution
from foveate.registry import register


@register(
    "deltanet",
    kind="mixer",
    paper="Parallelizing Linear Transformers with the Delta Rule over Sequence Length",
    arxiv="2406.06484",
    year=2024,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, best of the rates tried: "
        "accuracy 0.990 with 19 kB of state; softmax 1.000 with 132 kB, plain linear attention 0.906 with "
        "17 kB (benchmarks/results/mqar_long.json)."
    ),
)
class DeltaNetMixer(Mixer):
    """The delta rule without decay.

    kernel: taps of the short convolutions.    gate: multiply the output by silu(x W_g).
    negative_eigenvalues: beta in (0, 2), so that a write may flip what is stored.
    """

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        kernel: int = 4,
        gate: bool = False,
        negative_eigenvalues: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(kernel >= 1, f"kernel={kernel}, allowed: >= 1")
        self.strongest = 2.0 if negative_eigenvalues else 1.0
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.q_conv = ShortConvolution(dim, kernel)
        self.k_conv = ShortConvolution(dim, kernel)
        self.v_conv = ShortConvolution(dim, kernel)
        self.b_proj = nn.Linear(dim, heads, bias=False)
        self.g_proj = nn.Linear(dim, dim, bias=False) if gate else None
        self.o_norm = RMSNorm(dim // heads, 1e-5)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        head_dim = self.dim // self.heads
        return LinearState(
            owner=self.owner,
            position=start_position(batch, like),
            memory=empty_memory(batch, self.heads, head_dim, head_dim, like),
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
        q, k, v = (split_heads(y, self.heads) for y, _ in convolved)
        strength = self.b_proj(x)
        beta = self.strongest * torch.sigmoid(strength.to(exact(strength)))
        o, memory = recur(q, k, v, state.memory, beta=beta, qk_l2norm=True, cu_seqlens=cu_seqlens)
        o = self.o_norm(o).flatten(2)
        if self.g_proj is not None:
            o = o * F.silu(self.g_proj(x))
        return self.o_proj(o), replace(state, memory=memory, convolutions=tuple(cache for _, cache in convolved))
