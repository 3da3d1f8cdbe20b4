"""Performer: softmax attention by positive random features, whose products estimate exp(q . k) without bias.

    phi(x)_r = m^-0.5 (exp(w_r . x' - |x'|^2 / 2 - c) + 1e-4),  x' = x D^-0.25,  w_r ~ N(0, I)
    o_i = sum_j phi(q_i) . phi(k_j) v_j / max(sum_j phi(q_i) . phi(k_j), least);   y = o W_o

c is the largest w_r . x' of the query, or over all keys of a head, so that nothing overflows.

Paper: Choromanski et al. 2020 (arXiv 2009.14794), as in CAB (2210.07661). w is orthogonal, fixed and saved with the
layer; with `redraw`, training draws a plain Gaussian one for every call. Not causal over itself here, since c is the
largest over all keys; over a context it is causal as well, because each query is read alone. (CAB's released causal
path leaves its running sum out.)

State: none. Cost: O((M + N) m D) per head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from foveate.attention.features import gaussian_projection
from foveate.attention.linear import kv_matmul_attention
from foveate.mixers.base import MixerState, exact
from foveate.mixers.linear.projected import ProjectedMixer
from foveate.registry import register


@register(
    "performer",
    kind="mixer",
    paper="Rethinking Attention with Performers",
    arxiv="2009.14794",
    year=2020,
    applies_to="from scratch",
    small={"features": 9, "redraw": False},
    claim=(
        "Two seeds, 400 steps, softmax second: masked text 2.732 and 2.661 (perplexity per byte), pairs of sequences "
        "0.027 and 1.000, a walk told by another sequence 0.013 and 1.000: last of the attentions that read a "
        "context, as in the leaderboard; less time than materialised softmax from 2620 tokens on "
        "(benchmarks/results/claims/cab.json)."
    ),
)
class PerformerMixer(ProjectedMixer):
    """Softmax attention by positive random features.

    features: m.    redraw: new random features for every call in training.    eps: added to every feature.
    least: the least that a row is divided by.    causal: only says which cross pattern it is used as.
    """

    patterns = frozenset({"noncausal-self", "noncausal-cross", "causal-cross"})
    lacking: ClassVar[Mapping[str, str]] = {
        "causal-self": "features of keys are scaled by the largest exponent over all tokens, later ones too",
    }
    packs = False

    def __init__(
        self,
        *,
        dim: int,
        layer: int = 0,
        layers: int = 1,
        heads: int = 4,
        features: int = 16,
        redraw: bool = True,
        eps: float = 1e-4,
        least: float = 0.1,
        causal: bool = False,
    ) -> None:
        super().__init__(dim=dim, layer=layer, layers=layers, heads=heads)
        self.require(features >= 1, f"features={features}, allowed: >= 1")
        self.require(eps >= 0, f"eps={eps}, allowed: >= 0")
        self.require(least > 0, f"least={least}, allowed: > 0")
        self.features, self.redraw, self.eps, self.least, self.causal = features, redraw, eps, least, causal
        self.projection: Tensor
        self.register_buffer("projection", torch.empty(heads, features, self.head_dim))
        self.reset_parameters()

    def initial_values(self) -> dict[str, Tensor]:
        return {"projection": self._drawn(self.projection, orthogonal=True)}

    def _drawn(self, like: Tensor, *, orthogonal: bool) -> Tensor:
        """[H, m, D] random rows."""
        rows = [
            gaussian_projection(
                self.features, self.head_dim, orthogonal=orthogonal, dtype=exact(like), device=like.device
            )
            for _ in range(self.heads)
        ]
        return torch.stack(rows).to(like.dtype)

    def mix(
        self, x: Tensor, state: MixerState, positions: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, MixerState]:
        return self.cross(x, x, None), state

    def cross(self, x: Tensor, context: Tensor, context_padding: Tensor | None) -> Tensor:
        if context_padding is not None and not bool(context_padding.all()):
            # The largest exponent is taken over real keys.
            rows = [self.cross(x[n : n + 1], context[n : n + 1, real], None) for n, real in enumerate(context_padding)]
            return torch.cat(rows)
        projection = self.projection
        if self.redraw and self.training:
            projection = self._drawn(projection, orthogonal=False)
        q, k, v = self.project(x, context)
        with torch.autocast(x.device.type, enabled=False):
            q, k = (each.to(exact(each)) * self.head_dim**-0.25 for each in (q, k))
            phi_q, phi_k = self._phi(q, projection, (-1,)), self._phi(k, projection, (-2, -1))
            o = kv_matmul_attention(
                *(each.transpose(1, 2) for each in (phi_q, phi_k, v.to(q.dtype))),
                normalizer="clamp",
                scale=1.0,
                floor=self.least,
            )
        return self.o_proj(o.to(v.dtype).flatten(2))

    def _phi(self, x: Tensor, projection: Tensor, over: tuple[int, ...]) -> Tensor:
        """Features [B, H, N, m] of x [B, H, N, D]; c is the largest over the axes `over`."""
        along = x @ projection.to(x.dtype).transpose(-1, -2)
        exponent = along - x.square().sum(-1, keepdim=True) / 2 - along.amax(over, keepdim=True)
        return (exponent.exp() + self.eps) * self.features**-0.5
