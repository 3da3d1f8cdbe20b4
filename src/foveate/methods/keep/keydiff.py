"""KeyDiff: keep the keys that differ most from the rest.  (arXiv 2504.15364)

Keys that resemble their neighbours get little attention each; distinctive ones get much. A head's anchor is the mean
direction of its keys; those that point away from it stay. No query is looked at, so a prompt can be read in pieces
under a fixed budget: with `when="always"` every piece ends with an eviction.

    anchor = mean over the held keys of k_j / ||k_j||
    score[j] = -cos(k_j, anchor)          float32, rotated keys, [B, Hkv, N]

By default once, at the end of the prompt, as in kvpress; the paper's setting is `when="always"` with a chunked prompt.
Cost: O(N D) per layer, nothing stored. The key of an empty slot counts nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.methods.keep.eviction import Evictor, slot_positions
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "keydiff",
    kind="keep",
    paper="KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM Inference in "
    "Resource-Constrained Environments",
    arxiv="2504.15364",
    year=2025,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24},
    claim=(
        "Bundled model, 774 tokens in pieces under a budget of 384 keys, 6 seeds: needle 1.00 as dense, tova "
        "0.67, a window 0.50, h2o 0.33, knorm 0.00 (benchmarks/results/claims/keydiff.json). Half of the "
        "cache, question known, 20 seeds, 2k and 4k tokens: passkey 0.70 and 0.60, single needle 0.85 and "
        "0.85; dense passkey 0.70 and 0.60, single needle 0.95 and 1.00 "
        "(benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class KeyDiff(Evictor):
    """Keeps the keys that point away from the mean direction of all keys."""

    when: str = option("prompt", "once, at the end of the prompt, or after every forward", one_of=("prompt", "always"))

    def score(self, step: Step) -> Tensor:
        """Negative cosine of every key with the anchor: [B, Hkv, N] float32 (float64 for float64 keys)."""
        exact = torch.float64 if step.k.dtype == torch.float64 else torch.float32
        directions = F.normalize(step.k.to(exact), dim=-1)
        if step.cache.holes:
            # The sum has the direction of the mean.
            directions = directions * (slot_positions(step) >= 0)[..., None]
        anchor = F.normalize(directions.sum(2, keepdim=True), dim=-1)
        return -(directions * anchor).sum(-1)
