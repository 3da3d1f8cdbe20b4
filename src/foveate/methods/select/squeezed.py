"""Squeezed Attention: read the keys of a fixed context whose cluster centre the query wants.  (arXiv 2411.09688)

Many questions share one long context. Its keys are clustered once, per head; a question is compared with the centres
only, and from a centre and the cluster's size follows what weight each key of the cluster would get. Keys above one
threshold, the same for all heads and layers, are read exactly; so each head reads as many as it needs.

The context is the first prompt (all pieces of a chunked one), P tokens; its last W = `window` are observed and never
clustered.

    clusters    C = max(1, int(share (P - W))) by K-means++ (Euclidean, seed 0) on keys divided by their norm; centre
                c_i = mean of the keys themselves, n_i of them; an empty cluster has c = 0, n = 0
    weight      p[q, i] = exp(q.c_i / sqrt(D)) / sum_m n_m exp(q.c_m / sqrt(D))    of one key in cluster i; sum n p = 1
                S_i = mean of p[q, i] over the step's M queries and the G query heads of a KV head
    threshold   T = quantile_`sparsity`, linear, of S of every clustered key of all layers and heads, S taken over the
                W observed queries
    read        keys j with S[label j] > T, the observed window, and everything after the context, causally

Two levels: the coarse one is K-means on the fine centres, max(1, int(coarse_share (P - W))) of them, and a coarse
centre is the mean of the fine centres in it. The coarse lookup runs first, with its own threshold; sizes n of the fine
one then count surviving keys only. The same keys serve all M queries of a head.

The context itself is dense, as are contexts of at most `window` tokens. Keys are rotated at true positions.
Differs from the authors' code: float32 with the maximum subtracted (theirs overflows in float16 offline), the window
always is read (theirs: as long as T < 1 / M), GQA (clusters per KV head; theirs has none), a threshold per sequence.
When another method evicts, sizes count what is left. Where one replaces the keys, labels are lost and all are read.

State: centres C D per KV head, 4 bytes per key and level. Clustering O(iterations P C D) per head, once. A step:
O(M C D) for the centres, O(P) for the labels, then the chosen keys. OptionError for options out of bounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.plan import Dense, Plan, Tokens
from foveate.attention.scoring import slots_of
from foveate.attention.statistics import by_group
from foveate.attention.summaries import centroids
from foveate.methods.base import Method
from foveate.methods.cache import Change
from foveate.methods.prompt import Tail
from foveate.methods.select.clusters import kmeans
from foveate.methods.step import Phase, Step
from foveate.options import option
from foveate.registry import register


@dataclass
class Pool:
    """What the layers of one request found, until the first lookup turns it into one threshold per sequence.

    weights, sizes: [B, Hkv, C] per layer. threshold: [B].
    """

    weights: list[Tensor] = field(default_factory=list)
    sizes: list[Tensor] = field(default_factory=list)
    threshold: Tensor | None = None

    def cut(self, sparsity: float) -> Tensor:
        """The threshold, float32 [B]."""
        if self.threshold is None:
            self.threshold = pooled_quantile(self.weights, self.sizes, sparsity).float()
            self.weights, self.sizes = [], []
        return self.threshold


@dataclass
class Level:
    """Clusters of one layer: centres [B, Hkv, C, D], in the keys' dtype, and the pool of its request."""

    centres: Tensor
    pool: Pool


@dataclass
class Squeeze:
    """levels: coarse first. Labels are the cache's extras: 0 not clustered, i: cluster i - 1."""

    levels: list[Level]


@register(
    "squeezed",
    kind="select",
    paper="Squeezed Attention: Accelerating Long Context Length LLM Inference",
    arxiv="2411.09688",
    year=2024,
    applies_to="pretrained",
    exact={"threshold": -1.0},
    small={"window": 8, "share": 0.2},
    claim=(
        "Bundled model, 2k tokens, 2 windows of 64 steps: reading 0.63, 0.43 and 0.18 of the keys the KL "
        "divergence from dense is 0.320, 0.415 and 0.434; Quest at 0.50, 0.30 and 0.09 has 0.004, 0.030 and "
        "0.227, a window at 0.51, 0.30 and 0.10 0.034, 0.045 and 0.417: not reproduced here "
        "(benchmarks/results/claims/squeezed.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class Squeezed(Method):
    """Clusters the first prompt's keys and reads those whose centre the query wants; the cache stays whole."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"extend", "decode"})

    window: int = option(100, "last tokens of the context: observed to set the threshold, always read", at_least=1)
    share: float = option(0.05, "clusters per clustered key", above=0, at_most=1)
    sparsity: float = option(0.7, "share of the clustered keys not to read, over all heads", at_least=0, at_most=1)
    levels: int = option(1, "levels of clusters", one_of=(1, 2))
    coarse_share: float = option(0.01, "coarse clusters per clustered key", above=0, at_most=1)
    coarse_sparsity: float = option(
        0.7, "share of the clustered keys that the coarse level drops", at_least=0, at_most=1
    )
    threshold: float | None = option(None, "weight above which keys are read, instead of sparsity, on both levels")
    iterations: int = option(300, "rounds of K-means at most", at_least=1)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Per level, coarse first."""
        return (self.sparsity,) if self.levels == 1 else (self.coarse_sparsity, self.sparsity)

    def plan(self, step: Step) -> Plan:
        if not isinstance(step.state, Squeeze) or not step.cache.has_extra(_name(0)):
            return Dense()
        levels = step.state.levels
        thresholds = [
            each.pool.cut(sparsity)
            if self.threshold is None
            else torch.full((step.q.shape[0],), self.threshold, device=step.q.device)
            for each, sparsity in zip(levels, self.sparsities)
        ]
        labels = [step.cache.extra(_name(index)) for index in range(len(levels))]
        real = None if step.q_positions is None else step.q_positions >= 0
        read = lookup(step.q, [each.centres for each in levels], labels, thresholds, scale=step.scale, real=real)
        return Tokens(slots_of(read))

    def keep(self, step: Step) -> Change | None:
        if step.phase == "decode":
            return None
        if step.run.chunked:
            self._carry(step)
        elif step.phase == "prefill":
            self._calibrate(step, step.q[:, :, -self.window :])
        return None

    def prompt_ends(self, step: Step) -> Change | None:
        if isinstance(step.state, Tail):
            self._calibrate(step, step.state.q)
        return None

    def _carry(self, step: Step) -> None:
        q, held = step.q[:, :, -self.window :], step.state
        if isinstance(held, Tail) and q.shape[2] < self.window:
            q = torch.cat((held.q, q), 2)[:, :, -self.window :]
        step.state = Tail(q.clone(), step.query_positions()[:, -1:])

    def _calibrate(self, step: Step, observed: Tensor) -> None:
        """Cluster what is stored and put this layer's weights under the observed queries into the pool."""
        step.state = None
        n = step.cache.stored - self.window
        tokens = torch.as_tensor(step.real_tokens()).expand(step.q.shape[0]) - self.window
        if n <= 0 or int(tokens.max()) <= 0:
            return
        real = step.positions.keys(step.cache.stored, step.q.device)[..., :n] >= 0
        made = [self._cluster(step.k[b, :, :n], real[b if real.shape[0] > 1 else 0]) for b in range(step.q.shape[0])]
        levels = []
        for index in range(self.levels):
            most = max(row[index][0].shape[1] for row in made)
            centres = torch.stack([F.pad(row[index][0], (0, 0, 0, most - row[index][0].shape[1])) for row in made])
            labels = F.pad(torch.stack([row[index][1] for row in made]), (0, self.window))
            step.cache.set_extra(_name(index), labels)
            sizes = count(labels, most)
            weights = weigh(observed, centres, sizes, scale=step.scale)
            levels.append(Level(centres, self._pool(step, index, weights, sizes)))
        step.state = Squeeze(levels)

    def _cluster(self, keys: Tensor, real: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of one sequence's keys [Hkv, n, D]: per level, coarse first, centres [Hkv, C, D] and labels int32 [Hkv, n].

        real: bool [1 or Hkv, n]; the same number of keys must be real in every head.
        """
        H, n, D = keys.shape
        slots = slots_of(real.expand(H, n)[None])[0]
        tokens = slots.shape[1]
        if not tokens:
            return [(keys.new_zeros(H, 1, D), slots.new_zeros((H, n), dtype=torch.int32))] * self.levels
        x = keys.gather(1, slots[..., None].expand(-1, -1, D))
        fine = kmeans(F.normalize(x.float(), dim=-1), max(1, int(self.share * tokens)), iterations=self.iterations)
        centres = centroids(x, fine, int(fine.max()) + 1)
        found = [(centres, fine)]
        if self.levels == 2:
            most = max(1, min(int(self.coarse_share * tokens), centres.shape[1]))
            parent = kmeans(F.normalize(centres.float(), dim=-1), most, iterations=self.iterations)
            found.insert(0, (centroids(centres, parent, most), parent.gather(1, fine)))
        return [(each, _spread(labels, slots, n)) for each, labels in found]

    def _pool(self, step: Step, index: int, weights: Tensor, sizes: Tensor) -> Pool:
        """The request's pool of this level, with this layer in it."""
        key = ("squeezed", step.member, index)
        layers, pool = step.run.shared.get(key, (set(), None))
        if pool is None or step.layer in layers:
            layers, pool = set(), Pool()
        layers.add(step.layer)
        step.run.shared[key] = (layers, pool)
        pool.weights.append(weights)
        pool.sizes.append(sizes)
        return pool


def _name(level: int) -> str:
    return f"squeezed.labels.{level}"


def _spread(labels: Tensor, slots: Tensor, n: int) -> Tensor:
    """Labels [H, tokens] at their slots [H, tokens]: int32 [H, n], plus one, 0 elsewhere."""
    wide = torch.zeros(labels.shape[0], n, dtype=torch.int32, device=labels.device)
    return wide.scatter_(1, slots, (labels + 1).to(torch.int32))


def count(labels: Tensor, clusters: int, alive: Tensor | None = None) -> Tensor:
    """Keys per cluster: labels int [B, Hkv, N] (0: not clustered), alive bool like them -> float32 [B, Hkv, C]."""
    sizes = torch.zeros(*labels.shape[:2], clusters + 1, device=labels.device)
    ones = torch.ones(labels.shape, device=labels.device) if alive is None else alive.float()
    return sizes.scatter_add_(2, labels.long(), ones)[..., 1:]


def weigh(q: Tensor, centres: Tensor, sizes: Tensor, *, scale: float, real: Tensor | None = None) -> Tensor:
    """S: the weight of one key of each cluster, the mean over queries and groups, float32 [B, Hkv, C].

    q: [B, Hq, M, D], centres: [B, Hkv, C, D], sizes: [B, Hkv, C]; real: bool [B, M], queries that are no padding.
    """
    B, Hq, M, _ = q.shape
    H = centres.shape[1]
    scores = (q.reshape(B, H, Hq // H * M, -1) @ centres.to(q.dtype).transpose(-1, -2)).float().mul_(scale)
    total = torch.logsumexp(scores + sizes.float().log()[:, :, None], -1, keepdim=True)
    # An empty cluster's score may be far above the rest: it weighs nothing.
    p = torch.exp((scores - total).masked_fill(sizes[:, :, None] == 0, -torch.inf)).view(B, Hq, M, -1)
    if real is None:
        return by_group(p.mean(2), H)
    shown = torch.where(real[:, None, :, None], p, 0.0).sum(2) / real.sum(1).clamp_min(1)[:, None, None]
    return by_group(shown, H)


def lookup(
    q: Tensor,
    centres: Sequence[Tensor],
    labels: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    *,
    scale: float,
    real: Tensor | None = None,
) -> Tensor:
    """The keys to read: bool [B, Hkv, N].

    q: [B, Hq, M, D]. Per level, coarse first: centres [B, Hkv, C, D]; labels int [B, Hkv, N], 0 for keys that are
    always read, i for cluster i - 1; thresholds [B]. A level counts only the keys that the one before it left.
    """
    clustered = labels[0] > 0
    alive = clustered
    for centre, own, threshold in zip(centres, labels, thresholds):
        weights = weigh(q, centre, count(own, centre.shape[2], alive), scale=scale, real=real)
        wanted = (weights > threshold[:, None, None]).gather(2, (own - 1).clamp_min(0).long())
        alive = alive & wanted
    return alive | ~clustered


def pooled_quantile(weights: Sequence[Tensor], sizes: Sequence[Tensor], share: float) -> Tensor:
    """Per sequence, the linear quantile of all layers' weights, each counted as often as its cluster has keys.

    weights, sizes: [B, Hkv, C] per layer. Returns float64 [B]; -inf for a sequence without clustered keys.
    """
    values = torch.cat([each.flatten(1).double() for each in weights], 1)
    counts = torch.cat([each.flatten(1).double() for each in sizes], 1)
    values, order = values.sort(-1)
    ends = counts.gather(1, order).cumsum(-1)
    total = ends[:, -1:]
    rank = share * (total - 1).clamp_min(0)
    low, high = (
        values.gather(1, torch.searchsorted(ends, each, right=True).clamp_max(values.shape[1] - 1))
        for each in (rank.floor(), rank.ceil())
    )
    return torch.where(total > 0, low + (rank - rank.floor()) * (high - low), -torch.inf)[:, 0]
