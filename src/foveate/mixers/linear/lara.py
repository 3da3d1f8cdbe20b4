"""LARA: linear randomised attention, softmax attention estimated by few samples around landmarks.

    mu_c = q~_c + k~_c, landmarks q~, k~ as means of segments;   w_c = mu_c (+ N(0, 1) in training)
    phi(x, w) = w . x / sqrt(D) - |x|^2 / (2 sqrt(D))  (a logarithm)
    kv_c = sum_n softmax over n of phi(k_n, w_c) v_n
    o_p  = sum_c softmax over c of (mu_c . q_p / sqrt(D) + phi(q_p, w_c) + LSE_n phi(k_n, w_c) - phi(mu_c, w_c)) kv_c

Each sample estimates attention for all queries; the softmax over c weighs samples per query (importance sampling).

Paper: Zheng et al. 2022 (arXiv 2204.04667), as in CAB (2210.07661). All tokens are landmarks where there are fewer.

State: none; landmarks see all tokens. Cost: O(N m D) per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from foveate.mixers.base import MixerState, exact
from foveate.mixers.linear.nystromformer import segment_means
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


@register(
    "lara",
    kind="mixer",
    paper="Linear Complexity Randomized Self-attention Mechanism",
    arxiv="2204.04667",
    year=2022,
    applies_to="from scratch",
    small={"landmarks": 5, "noise": False},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.657 and 2.661 (perplexity per byte), super-resolution "
        "10.74 and 10.78 dB; less time than materialised softmax from 1203 tokens on, the first to "
        "(benchmarks/results/claims/cab.json)."
    ),
)
class LaraMixer(ProjectedMixer):
    """Attention estimated from samples around landmarks.

    landmarks: m.    noise: draw the samples around the landmarks in training (else they are the landmarks).
    """

    patterns = frozenset({"noncausal-self"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "a landmark is the mean of a segment that holds later tokens",
        "causal-cross": "landmarks of queries are means that hold later ones",
        "noncausal-cross": "queries and keys must be cut into the same segments",
    }
    causal = False
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        landmarks: int = 16,
        noise: bool = True,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(landmarks >= 1, f"landmarks={landmarks}, allowed: >= 1")
        self.landmarks, self.noise = landmarks, noise

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        q, k, v = self.project(x, x)
        with torch.autocast(x.device.type, enabled=False):
            o = self._attend(*(each.to(exact(each)) for each in (q, k, v)))
        return self.output(o.to(v.dtype)), state

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mu = segment_means(q, self.landmarks) + segment_means(k, self.landmarks)
        w = mu + torch.randn_like(mu) if self.noise and self.training else mu
        of_keys = self._log_phi(k, w)
        kv = of_keys.softmax(-1) @ v
        own = (mu * w).sum(-1) * self.head_dim**-0.5 - self._half_square(mu)
        weight = of_keys.logsumexp(-1) - own
        # Half the square of q is the same for all samples.
        logits = q @ (mu + w).transpose(-1, -2) * self.head_dim**-0.5 + weight.unsqueeze(-2)
        return logits.softmax(-1) @ kv

    def _log_phi(self, x: Tensor, w: Tensor) -> Tensor:
        """phi(x_n, w_c) [B, H, m, N]."""
        return w @ x.transpose(-1, -2) * self.head_dim**-0.5 - self._half_square(x).unsqueeze(-2)

    def _half_square(self, x: Tensor) -> Tensor:
        return x.square().sum(-1) * self.head_dim**-0.5 / 2
