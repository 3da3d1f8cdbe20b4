"""TOVA: hold a fixed number of keys; what the newest query attends to least goes.  (arXiv 2401.06104)

A transformer with a bounded cache is a recurrent network with as many states. After every forward, the attention
weights of the last query, averaged over all query heads of the layer, score the keys, and the best `budget` stay. No
key is forced: neither the first ones nor the newest.

    a[j] = mean over all Hq heads of p[last, j]          float32, one score per key and layer
    if n > budget: keep the `budget` keys with the highest a

p is the softmax over the keys held at that step, the new one included: a decode step reads budget + 1 keys, then one
goes. Keys keep their rotation and true positions. `force_last` (as kvpress has it) keeps the newest key.

Cost: one row of scores per query head and forward, O(N D); nothing is stored. Bad options raise OptionError.
All KV heads of a layer hold the same tokens, as in the paper; `per_head` lets each choose by its own query heads.
After another method has given the heads different tokens, a token's score is still the mean over all heads (0 from
those that do not hold it), and each head keeps the best of its own.
Differs from the authors' code: positions count true tokens (theirs follow the length of the cache). Learned sinks,
softcaps and weights of merged keys are left out of p.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.statistics import by_group
from foveate.methods.keep.eviction import Evictor, force, newest, slot_positions
from foveate.methods.prompt import window_weights
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "tova",
    kind="keep",
    paper="Transformers are Multi-State RNNs",
    arxiv="2401.06104",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24},
    claim=(
        "Bundled model, 256 of 1024 keys of text: perplexity 17.9, a window 38.2 (dense 11.0) "
        "(benchmarks/results/claims/tova.json). Half of the cache, question known, 20 seeds, 2k and 4k "
        "tokens: passkey 0.70 and 0.60, single needle 0.70 and 0.60; dense passkey 0.70 and 0.60, single "
        "needle 0.95 and 1.00 (benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TOVA(Evictor):
    """Keeps a fixed number of keys per layer, dropping the one that the newest query attends to least."""

    force_last: bool = option(False, "the newest key always stays")
    per_head: bool = option(False, "each KV head chooses by its own query heads; the original has one choice a layer")

    @property
    def observed(self) -> int:
        return 1

    def score(self, step: Step) -> Tensor:
        """The last query's mean weight on every slot, [B, Hkv, N] float32; a forced key gets the highest plus one."""
        weights = by_group(window_weights(step, 1)[:, :, 0], step.kv_heads)
        scores = weights if self.per_head else layer_mean(weights, step)
        if not self.force_last:
            return scores
        return force(scores, slot_positions(step) == newest(step)[:, None, None])


def layer_mean(weights: Tensor, step: Step) -> Tensor:
    """Mean over the KV heads of the weight on each slot's token: [B, Hkv, N] -> [B, Hkv, N]."""
    at = step.cache.positions
    if at is None or at.shape[1] == 1 or bool((at == at[:, :1]).all()):
        return weights.mean(1, keepdim=True).expand_as(weights)
    token = at.clamp_min(0).long().flatten(1)
    held = torch.where(at >= 0, weights, 0.0).flatten(1)
    total = held.new_zeros(held.shape[0], step.cache.seen).scatter_add_(1, token, held)
    return (total / step.kv_heads).gather(1, token).view_as(weights)
