"""cosFormer: linear attention on ReLU features whose weights fall with the distance, as a cosine.

    w_ij = relu(q_i) . relu(k_j) cos(pi (i - j) / (2 M)) >= 0,  M = max(queries, keys),  i, j = 1, 2, ...
    o_i = sum_j w_ij v_j / max(sum_j w_ij, eps);   y = o W_o

The cosine of a difference is a product of features: relu(q_i) cos a_i and relu(q_i) sin a_i, a_i = pi i / (2 M).

Paper: Qin et al. 2022 (arXiv 2202.08791), as in CAB (2210.07661): not causal, with M the length at hand.

State: none. Cost: O((M + N) D^2) per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.features import cosine_reweighted
from foveate.attention.linear import kv_matmul_attention
from foveate.mixers.base import MixerState
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


@register(
    "cosformer",
    kind="mixer",
    paper="cosFormer: Rethinking Softmax in Attention",
    arxiv="2202.08791",
    year=2022,
    applies_to="from scratch",
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.639 and 2.661 (perplexity per byte), super-resolution "
        "11.06 and 10.78 dB, pairs of sequences 0.934 and 1.000: ahead of softmax in noncausal-self and behind it in "
        "noncausal-cross, as in the leaderboard; less time than materialised softmax from 2600 tokens on "
        "(benchmarks/results/claims/cab.json)."
    ),
)
class CosformerMixer(ProjectedMixer):
    """Linear attention on ReLU features with a cosine of the distance.

    eps: the least that a row is divided by.
    """

    patterns = frozenset({"noncausal-self", "noncausal-cross"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "its angles are fractions of the whole length, which a prefix does not know",
        "causal-cross": "its angles are fractions of the number of queries, which a prefix does not know",
    }
    causal = False
    packs = False

    def __init__(self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4, eps: float = 1e-6) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(eps > 0, f"eps={eps}, allowed: > 0")
        self.eps = eps

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        return self.cross(x, x, None), state

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        queries = torch.arange(1, x.shape[1] + 1, device=x.device)
        if context_padding is None:
            keys, length = torch.arange(1, context.shape[1] + 1, device=x.device), context.shape[1]
        else:
            lengths = context_padding.sum(1).tolist()
            if len(set(lengths)) > 1:
                # M differs from row to row.
                each = zip(x.split(1), context.split(1), context_padding.split(1))
                return torch.cat([self.cross(*row) for row in each])
            keys, length = context_padding.cumsum(1), lengths[0]
        M = max(x.shape[1], length)
        q, k, v = (each.transpose(1, 2) for each in self.project(x, context))
        q, k = (cosine_reweighted(F.relu(each), at, M) for each, at in ((q, queries), (k, keys)))
        o = kv_matmul_attention(q, k, v, normalizer="clamp", scale=1.0, floor=self.eps, mask=context_padding)
        return self.o_proj(o.flatten(2))
