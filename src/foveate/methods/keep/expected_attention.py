"""Expected Attention: keep the keys that future queries are expected to attend to.  (arXiv 2510.00636)

Queries of a head are close to a Gaussian. Its mean and covariance are measured on the prompt, before rotary embedding,
and turned by the average rotation of the coming positions; the expected weight of every key then has a closed form.
No later query is looked at, and the norm of the value tells how much a weight would matter.

    mu, S    mean and biased covariance of the unrotated queries after the first `sinks` tokens, per query head
    R        mean over the next `future` positions of the rotation;  mu <- R mu,  S <- R S R^T
    e[j]   = mu . k_j scale + k_j^T S k_j scale^2 / 2          (the log of E exp(q . k_j scale))
    s[j]   = (mean over the group of softmax_j(e) + epsilon) * ||v_j||          [B, Hkv, N], j >= sinks

The first `sinks` keys always stay and count in the budget; the others are ranked by s. Once, at the end of the prompt.
A chunked prompt carries mean and covariance from piece to piece. `covariance=False` takes the mean query alone,
`value_norm=False` the weight alone.

Cost: O(N D^2) per query head in pieces, D^2 floats per query head meanwhile. float32 throughout (float64 for float64
input). A model whose rotary embedding is unknown or changes with the length is refused (UnsupportedModelError).
Differs from kvpress: padding is left out, and statistics cannot be loaded from another text. Ada-KV budgets over these
scores: `adakv:base=expected-attention`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from typing import ClassVar

import torch
from torch import Tensor

from foveate.errors import UnsupportedModelError
from foveate.methods.keep.eviction import force, newest, slot_positions
from foveate.methods.prompt import PromptKeep
from foveate.methods.step import RopeLike, Step
from foveate.options import option
from foveate.registry import register

# Positions and tokens handled at once; they bound memory.
POSITIONS, TOKENS = 32, 4096


@dataclass
class QueryMoments:
    """Unrotated queries so far: count [B], mean [B, Hq, D], spread [B, Hq, D, D] (the sum of outer products of
    deviations from the mean)."""

    count: Tensor
    mean: Tensor
    spread: Tensor

    def joined(self, other: QueryMoments) -> QueryMoments:
        """Moments of both samples together."""
        count = self.count + other.count
        share = (other.count / count.clamp_min(1))[:, None, None]
        gap = other.mean - self.mean
        between = gap[..., :, None] * gap[..., None, :] * (self.count[:, None, None] * share)[..., None]
        return QueryMoments(count, self.mean + gap * share, self.spread + other.spread + between)


@register(
    "expected-attention",
    kind="keep",
    paper="Expected Attention: KV Cache Compression by Estimating Attention from Future Queries Distribution",
    arxiv="2510.00636",
    year=2025,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24, "future": 64},
    claim=(
        "Bundled model, half of the cache, question known, 20 seeds, 2k and 4k tokens: "
        "passkey 0.00 and 0.00, single needle 0.10 and 0.10; "
        "dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ExpectedAttention(PromptKeep):
    """Keeps the prompt keys that queries like the prompt's, at coming positions, are expected to attend to."""

    needs: ClassVar[frozenset[str]] = frozenset({"rope"})

    future: int = option(512, "coming positions whose rotations are averaged", at_least=1)
    sinks: int = option(4, "first tokens that always stay and are left out of the statistics", at_least=0)
    covariance: bool = option(True, "use the covariance of the queries, not their mean alone")
    value_norm: bool = option(True, "weigh by the norm of the value")
    epsilon: float = option(0.0, "added to the expected weight before the value norm", at_least=0)

    def note(self, step: Step) -> None:
        given = self.moments(step)
        step.state = step.state.joined(given) if isinstance(step.state, QueryMoments) else given

    def score(self, step: Step) -> Tensor:
        """Expected weight times value norm of every slot: [B, Hkv, N]; the sinks get the highest plus one."""
        moments = step.state if isinstance(step.state, QueryMoments) else self.moments(step)
        at = slot_positions(step)
        open_to_choice = at >= self.sinks
        logits = self.logits(step, moments).unflatten(1, (step.kv_heads, -1))
        logits = logits.masked_fill(~open_to_choice[:, :, None], -torch.inf)
        # A sequence with nothing but sinks has no weight to share out.
        scores = logits.softmax(-1).nan_to_num(0.0).mean(2)
        if self.value_norm:
            scores = (scores + self.epsilon) * step.v.to(scores.dtype).norm(dim=-1)
        return force(scores, (at >= 0) & ~open_to_choice)

    def moments(self, step: Step) -> QueryMoments:
        """Statistics of this step's unrotated queries that stand after the sinks."""
        rope = _rope(step)
        parts = zip(step.q.split(TOKENS, dim=2), step.query_positions().split(TOKENS, dim=1))
        return reduce(QueryMoments.joined, (moments_of(rope, _exact(q), at, self.sinks) for q, at in parts))

    def logits(self, step: Step, moments: QueryMoments) -> Tensor:
        """Log of the expected unnormalised weight of every slot: [B, Hq, N]."""
        turn = mean_rotations(_rope(step), newest(step) + 1, self.future, moments.mean)
        mean = moments.mean @ turn.transpose(-1, -2)
        spread = turn[:, None] @ moments.spread @ turn.transpose(-1, -2)[:, None]
        covariance = spread / moments.count.clamp_min(1)[:, None, None, None] if self.covariance else None
        pieces = step.k.split(TOKENS, dim=2)
        return torch.cat([expected_logits(_exact(k), mean, covariance, step.scale) for k in pieces], dim=2)


def moments_of(rope: RopeLike, q: Tensor, at: Tensor, sinks: int) -> QueryMoments:
    """Moments of rotated queries q [B, Hq, M, D] at positions [B, M] >= sinks, before their rotation."""
    counted = (at >= sinks).to(q.dtype)
    count, weights = counted.sum(1), counted[:, None, :, None]
    plain = rope.unrotate(q, at.clamp_min(0))
    mean = (plain * weights).sum(2) / count.clamp_min(1)[:, None, None]
    deviation = (plain - mean[:, :, None]) * weights
    return QueryMoments(count, mean, deviation.transpose(-1, -2) @ deviation)


def expected_logits(k: Tensor, mean: Tensor, covariance: Tensor | None, scale: float) -> Tensor:
    """log E exp(scale q . k), [B, Hq, N]: q Gaussian, mean [B, Hq, D], covariance [B, Hq, D, D]; k [B, Hkv, N, D]."""
    keys = k[:, :, None]
    first = (keys @ mean.unflatten(1, (k.shape[1], -1))[..., None])[..., 0] * scale
    if covariance is None:
        return first.flatten(1, 2)
    second = ((keys @ covariance.unflatten(1, (k.shape[1], -1))) * keys).sum(-1)
    return (first + second * (scale**2 / 2)).flatten(1, 2)


def mean_rotations(rope: RopeLike, start: Tensor, future: int, like: Tensor) -> Tensor:
    """Mean rotation matrix over positions start .. start + future - 1: start [B] -> [B, D, D] in like's dtype."""
    made = {first: _mean_rotation(rope, first, future, like) for first in set(start.tolist())}
    return torch.stack([made[first] for first in start.tolist()])


def _mean_rotation(rope: RopeLike, first: int, future: int, like: Tensor) -> Tensor:
    """Column i is the mean of the rotated unit vector i."""
    D = like.shape[-1]
    unit = torch.eye(D, dtype=like.dtype, device=like.device)
    total = torch.zeros_like(unit)
    for at in _ranges(first, first + future):
        positions = torch.arange(at.start, at.stop, device=like.device)[None]
        total += rope.rotate(unit[None, :, None].expand(-1, -1, len(at), -1), positions)[0].sum(1)
    return (total / future).T


def _ranges(first: int, end: int) -> Iterator[range]:
    for start in range(first, end, POSITIONS):
        yield range(start, min(start + POSITIONS, end))


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _rope(step: Step) -> RopeLike:
    if step.rope is None:
        raise UnsupportedModelError(
            "expected-attention needs queries before rotary embedding, and this model's rotary embedding is not known; "
            "see foveate.hf.rope for the kinds that are"
        )
    return step.rope
