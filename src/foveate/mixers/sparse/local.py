"""Local attention: softmax over the tokens within a reach, the plainest sparse pattern and a strong one.

    causal      query i reads keys i - reach + 1 .. i       (`reach` keys)
    not causal  query i reads keys i - reach .. i + reach   (2 reach + 1 keys)
    o_i = softmax over them of (q_i . k_j / sqrt(D)) v_j;   y = o W_o

Paper: Luong et al. 2015 (arXiv 1508.04025), with the window of CAB (2210.07661), whose `wsize` is `reach`: keys outside
the sequence are left out. Projections with bias, no positions.

State: keys and values of the last reach - 1 tokens, [B, H, reach - 1, D] each. Cost: O(N reach D) per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from foveate.mixers.softmax.rotary import SoftmaxMixer, SoftmaxState
from foveate.mixers.sparse.bands import band_places, bands, unband
from foveate.registry import register


@register(
    "local",
    kind="mixer",
    paper="Effective Approaches to Attention-based Neural Machine Translation",
    arxiv="1508.04025",
    year=2015,
    applies_to="from scratch",
    small={"reach": 5},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.502 and 2.661, causal text behind a short convolution "
        "4.08 and 4.29 (perplexity per byte), super-resolution 11.06 and 10.78 dB: first in noncausal-self, as in the "
        "leaderboard (benchmarks/results/claims/cab.json). Multi-query recall, 64 pairs in 256 tokens: 0.004 "
        "(benchmarks/results/mqar.json)."
    ),
)
class LocalMixer(SoftmaxMixer):
    """Softmax attention within a reach.

    reach: keys to each side, the query's own counted if causal.    causal: a token reads no later one.
    """

    patterns = frozenset({"causal-self", "noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-cross": "queries and a context have no common places that a reach could count",
        "noncausal-cross": "queries and a context have no common places that a reach could count",
    }

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        reach: int = 15,
        causal: bool = True,
    ) -> None:
        self.require(reach >= 1, f"reach={reach}, allowed: >= 1")
        super().__init__(
            dim=dim,
            layer=layer,
            layers=layers,
            heads=heads,
            window=reach - 1 if causal else None,
            rotary=False,
            causal=causal,
        )
        self.reach = reach
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, state: SoftmaxState) -> tuple[Tensor, SoftmaxState]:
        if self.causal:
            return super()._attend(q, k, v, state)
        N, reach = q.shape[2], self.reach
        queries, keys = band_places(N, reach, reach, reach, q.device)
        seen = (keys[:, None] >= 0) & ((queries[..., None] - keys[:, None]).abs() <= reach)
        # Rows that fill up the last block read something, and are cut off.
        seen = seen | (queries < 0)[..., None]
        o = F.scaled_dot_product_attention(
            bands(q, reach, 0, 0), bands(k, reach, reach, reach), bands(v, reach, reach, reach), attn_mask=seen
        )
        return unband(o, N), state
