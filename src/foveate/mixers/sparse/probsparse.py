"""ProbSparse: full attention for the queries that differ most from a uniform one, the mean of values for the others.

    u = min(factor ceil(ln N), N);   for each query, u keys are drawn (with replacement, one draw for all)
    sparsity(i) = max over drawn of q_i . k_j - (sum over drawn of q_i . k_j) / N
    o_i = softmax(q_i . K / sqrt(D)) V for the u queries of a head with the largest sparsity, else mean(V);   y = o W_o

Paper: Zhou et al. 2021, Informer (arXiv 2012.07436), as in CAB (2210.07661), which divides by N, not by the number of
draws, as Informer's code does. The draw depends on `seed` and N alone, so that a layer gives one answer; Informer's is
new for every call.

State: none. Cost: O(N D ln N) per head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention import attend
from foveate.attention.shapes import match
from foveate.mixers.base import MixerState, exact
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


@register(
    "probsparse",
    kind="mixer",
    paper="Informer: Beyond Efficient Transformer for Long Sequence Time-Series Forecasting",
    arxiv="2012.07436",
    year=2021,
    applies_to="from scratch",
    small={"factor": 2},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.674 and 2.661 (perplexity per byte), super-resolution "
        "10.75 and 10.78 dB; less time than materialised softmax from 6026 tokens on, the last to "
        "(benchmarks/results/claims/cab.json)."
    ),
)
class ProbSparseMixer(ProjectedMixer):
    """Full attention for the few queries that matter most.

    factor: queries, and drawn keys, per ceil(ln N).    seed: of the drawn keys.
    """

    patterns = frozenset({"noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "which queries count is decided among all of them, later ones too",
        "causal-cross": "which queries count is decided among all of them, later ones too",
        "noncausal-cross": "the number of queries that count is that of the drawn keys, of one length",
    }
    causal = False
    packs = False

    def __init__(
        self, *, dim: int, layer: int = 0, layers: int = 1, heads: int = 4, factor: int = 5, seed: int = 0
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(factor >= 1, f"factor={factor}, allowed: >= 1")
        self.factor, self.seed = factor, seed

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        N = x.shape[1]
        count = min(self.factor * math.ceil(math.log(N)), N)
        sample = torch.randint(N, (N, count), generator=torch.Generator().manual_seed(self.seed)).to(x.device)
        return self.mix_sampled(x, sample), state

    def mix_sampled(self, x: Tensor, sample: Tensor) -> Tensor:
        """The layer with given draws: x [B, N, C], sample [N, u] int64, the keys drawn for each query; u queries of
        each head get full attention."""
        match(x=(x, "B N C"), sample=(sample, "N u"))
        q, k, v = self.project(x, x)
        o = v.mean(2, keepdim=True).expand_as(v)
        if sample.shape[1]:
            best = self._sparsity(q, k, sample).topk(sample.shape[1], -1).indices
            index = best[..., None].expand(-1, -1, -1, self.head_dim)
            o = o.scatter(2, index, attend(q.gather(2, index), k, v, causal=False))
        return self.output(o)

    @torch.no_grad()
    def _sparsity(self, q: Tensor, k: Tensor, sample: Tensor) -> Tensor:
        """[B, H, N]; a draw at a time, so that no N x u x D array is held."""
        q, k = (each.to(exact(each)) for each in (q, k))
        logits = torch.stack([(q * k[:, :, drawn]).sum(-1) for drawn in sample.unbind(1)], -1)
        return logits.amax(-1) - logits.sum(-1) / q.shape[2]
