"""KNorm: keys of small norm matter most.  (arXiv 2406.11430, "A Simple and Effective L2 Norm-Based Strategy for KV
Cache Compression")

In decoder-only models the keys that later queries attend to have a low L2 norm. Each head keeps the keys of smallest
norm; no attention weight is looked at, so any fused kernel serves the prefill.

    score[j] = -||k_j||_2          float32, rotated keys (rotation leaves norms alone), [B, Hkv, N]

By default once, at the end of the prompt, as in kvpress; `when="always"` evicts after every forward, so that the cache
never outgrows the budget (the paper's language-modelling setting). `skip_layers` leaves the first layers whole; the
authors' code skips two.
Cost: O(N D) per layer, nothing stored. No recent key is forced: with a small budget the newest can go.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.methods.cache import Change
from foveate.methods.keep.eviction import Evictor
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "knorm",
    kind="keep",
    paper="A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
    arxiv="2406.11430",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24},
    claim=(
        "Bundled model, 774 tokens, half of the keys, 6 seeds: passkey 1.00 with the smallest norms, 0.00 "
        "with the largest, at a quarter 0.83; norms and attention correlate in the first layers only (-0.38 "
        "to -0.24) (benchmarks/results/claims/knorm.json). Half of the cache, question known, 20 seeds, 2k "
        "and 4k tokens: passkey 0.70 and 0.60, single needle 0.15 and 0.15; dense passkey 0.70 and 0.60, "
        "single needle 0.95 and 1.00 (benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class KNorm(Evictor):
    """Keeps the keys with the smallest L2 norm."""

    when: str = option("prompt", "once, at the end of the prompt, or after every forward", one_of=("prompt", "always"))
    skip_layers: int = option(0, "first layers that keep everything", at_least=0)

    def keep(self, step: Step) -> Change | None:
        return None if step.layer < self.skip_layers else super().keep(step)

    def prompt_ends(self, step: Step) -> Change | None:
        return None if step.layer < self.skip_layers else super().prompt_ends(step)

    def score(self, step: Step) -> Tensor:
        """Negative norm of every key: [B, Hkv, N] float32 (float64 for float64 keys)."""
        exact = torch.float64 if step.k.dtype == torch.float64 else torch.float32
        return -step.k.to(exact).norm(dim=-1)
