"""Plain linear attention: softmax's exp(q.k) replaced by a product of features, and so one running sum as state.

    o_i = sum_{j <= i} (phi(q_i) . phi(k_j)) v_j / (sum_{j <= i} phi(q_i) . phi(k_j) + eps)          (normalize)
    o_i = K^-0.5 sum_{j <= i} (phi(q_i) . phi(k_j)) v_j                                                (otherwise)

Paper: Katharopoulos et al. 2020 (arXiv 2006.16236), with phi = elu + 1 and normalisation. Bias-free projections; no
positions. Without causality, and for cross attention, the sums run over all keys.

State: sum of phi(k)^T v and of phi(k), [B, H, K, V + 1] float32. Cost: O(N K V) per head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention.features import elu_plus_one
from foveate.attention.linear import Normalizer, kv_matmul_attention
from foveate.mixers.base import PATTERNS, Mixer, start_position
from foveate.mixers.linear.recurrence import LinearState, empty_memory, recur, split_heads
from foveate.registry import register

FEATURES: dict[str, Callable[[Tensor], Tensor]] = {
    "elu": elu_plus_one,
    "relu": F.relu,
    "silu": F.silu,
    "identity": lambda x: x,
}


@register(
    "linear",
    kind="mixer",
    paper="Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
    arxiv="2006.16236",
    year=2020,
    applies_to="from scratch",
    claim=(
        "Multi-query recall, 64 pairs in 256 tokens, two layers of width 64, 2400 steps: accuracy 0.658 at rate "
        "0.00215 and 0.906 at 0.005 with 17 kB of state; softmax 1.000 with 132 kB (benchmarks/results/mqar.json, "
        "mqar_long.json)."
    ),
)
class LinearMixer(Mixer):
    """Linear attention with a fixed feature map and no decay.

    feature_map: "elu" (elu + 1), "relu", "silu" or "identity".    normalize: divide by the sum of weights; wants
    non-negative features.    eps: added to that sum.    causal: a token reads no later one.
    """

    patterns = PATTERNS

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        feature_map: str = "elu",
        normalize: bool = True,
        eps: float = 1e-6,
        causal: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(dim % heads == 0, f"dim={dim} with heads={heads}, allowed: a multiple")
        self.require(feature_map in FEATURES, f"feature_map={feature_map!r}, allowed: {tuple(FEATURES)}")
        self.require(
            not normalize or feature_map in ("elu", "relu"),
            f"feature_map={feature_map!r} with normalize=True, allowed: 'elu', 'relu', whose sums cannot be 0 or less",
        )
        self.feature_map, self.normalize, self.eps, self.causal = feature_map, normalize, eps, causal
        self.head_dim = dim // heads
        self.q_proj = nn.Linear(dim, dim, bias=False)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.v_proj = nn.Linear(dim, dim, bias=False)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def start(self, batch: int, like: Tensor) -> LinearState:
        memory = empty_memory(batch, self.heads, self.head_dim, self.head_dim + self.normalize, like)
        return LinearState(owner=self.owner, position=start_position(batch, like), memory=memory)

    def _features(self, x: Tensor, source: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        phi = FEATURES[self.feature_map]
        q, k = phi(split_heads(self.q_proj(x), self.heads)), phi(split_heads(self.k_proj(source), self.heads))
        return q, k, split_heads(self.v_proj(source), self.heads)

    def mix(
        self, x: Tensor, state: LinearState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, LinearState]:
        if not self.causal:
            return self._all_to_all(x, x, None, cu_seqlens), state
        q, k, v = self._features(x, x)
        o, memory = recur(
            q,
            k,
            v,
            state.memory,
            # The scale cancels in a division.
            scale=1.0 if self.normalize else None,
            normalize=self.normalize,
            eps=self.eps,
            cu_seqlens=cu_seqlens,
        )
        return self.o_proj(o.flatten(2)), replace(state, memory=memory)

    def _all_to_all(self, x: Tensor, source: Tensor, padding: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
        q, k, v = self._features(x, source)
        normalizer: Normalizer = "sum" if self.normalize else "none"
        if cu_seqlens is None:
            o = kv_matmul_attention(q, k, v, normalizer=normalizer, eps=self.eps, mask=padding)
            return self.o_proj(o.flatten(2))
        lengths = cu_seqlens.diff().tolist()
        pieces = [
            kv_matmul_attention(*each, normalizer=normalizer, eps=self.eps)
            for each in zip(*(tensor.split(lengths, 1) for tensor in (q, k, v)))
            if each[0].shape[1]
        ]
        return self.o_proj(torch.cat(pieces, 1).flatten(2))

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        return self._all_to_all(x, context, context_padding, None)
