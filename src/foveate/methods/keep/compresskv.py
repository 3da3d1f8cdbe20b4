"""CompressKV: a layer's semantic retrieval heads choose which prompt tokens stay.  (arXiv 2508.02401)

Most heads look at the first and last tokens, so votes averaged over all heads lose evidence in the middle. A few heads
per layer attend to the evidence and its surroundings; they are ranked once per model by the mass they put on a needle
while the model answers with it (`foveate calibrate compresskv`). Only the best `first_k` query heads of each layer
vote, every KV head of the layer keeps the same tokens, and layers that suffer more from eviction keep more.

    votes[j] = mean over the layer's `first_k` best query heads h of
               avgpool_j( sum over the last `window` queries i of p_h[i, j] )
    keep the B_l - window keys with most votes, and the last `window` keys; all, when N <= B_l
    B_l      = clip(least + round(e_l (B L - least L)), least, 3 B), then +-1 in order of e until the sum is B L

p is the float32 softmax over all N keys; e_l, summing to 1 over the L layers, is the calibrated relative error of the
layer's attention output when its cache is evicted. Cost: first_k x window x N scores per layer, once.

Differs from the authors' code: kept slots are sorted; padding is masked; where a prompt is so short that B < least, all
layers keep B. `ratio` gives B from the prompt's length. A layer with a sliding window of its own has no scores and no
error (NaN): it does not share, and is left as it is.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.scoring import slots_of, top_mask
from foveate.attention.statistics import attention_rows
from foveate.methods.budgets import ByError
from foveate.methods.cache import Change, Keep
from foveate.methods.calibrated import Calibrated, check_table, table_profile
from foveate.methods.profile import ModelIdentity, Profile
from foveate.methods.prompt import PromptKeep, hide_padding, pool_votes
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register

MOST = 3


@register(
    "compresskv",
    kind="keep",
    paper="CompressKV: Semantic Retrieval Heads Know What Tokens are Not Important Before Generation",
    arxiv="2508.02401",
    year=2025,
    applies_to="pretrained, calibrated",
    exact={"budget": 10**6},
    small={"budget": 24, "window": 8, "least": 12},
    calibration="compresskv",
    claim=(
        "Bundled model, 1k tokens with 8 pairs to recall, 6 seeds, a fifteenth of the keys: the answer costs "
        "0.98 nats per token with semantic heads and calibrated budgets, 1.25 with semantic heads alone, 1.35 "
        "with all heads, 1.57 with random ones (dense 0.39): the paper's order, though no answer is found "
        "whole (dense 0.83) (benchmarks/results/claims/compresskv.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CompressKV(Calibrated, PromptKeep):
    """Keeps the prompt keys that a layer's semantic retrieval heads attend to; budgets follow each layer's error."""

    calibration: ClassVar[str] = "compresskv"

    window: int = option(8, "last queries of the prompt that vote; their own keys always stay", at_least=1)
    kernel: int = option(5, "width over which neighbouring votes are pooled, odd", at_least=1)
    pool: str = option("avg", "how neighbouring votes are pooled", one_of=("avg", "max"))
    first_k: int = option(4, "query heads per layer that vote, the best of the calibrated ranking", at_least=1)
    allocate: bool = option(True, "share the budget between layers by their calibrated error; else all get the same")
    least: int = option(32, "fewest keys of a layer when budgets are shared", at_least=1)

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise self.refuse("kernel", "an odd number")
        if self.ratio is None and self.budget <= self.window:
            raise self.refuse("budget", f"> window={self.window}, which is part of it")
        if self.allocate and self.least <= self.window:
            raise self.refuse("least", f"> window={self.window}, which every layer keeps")

    @staticmethod
    def example_profile(model: ModelIdentity) -> Profile:
        """A made-up profile: scores and errors rise with the layer and the head."""
        scores = torch.linspace(0, 1, model.layers * model.heads).view(model.layers, model.heads)
        error = torch.arange(1.0, model.layers + 1, dtype=torch.float64)
        return table_profile("compresskv", model, semantic=scores, error=error / error.sum())

    def check_profile(self, profile: Profile) -> None:
        check_table(profile, "semantic", (profile.model.layers, profile.model.heads))
        check_table(profile, "error", (profile.model.layers,))

    @cached_property
    def voters(self) -> Tensor:
        """int64 [layers, first_k or fewer]: the query heads that vote, best first; ties go to the lower head."""
        scores = self.table("semantic").float().nan_to_num(-torch.inf)
        return scores.argsort(dim=1, descending=True, stable=True)[:, : self.first_k]

    @property
    def observed(self) -> int:
        return self.window

    def layer_count(self, layer: int, mean: int) -> int:
        """B_l: keys that a layer keeps when layers keep `mean` on average."""
        if not self.allocate:
            return mean
        error = tuple(self.table("error").double().tolist())
        return ByError(error, mean, min(self.least, mean), MOST * mean).keys[layer]

    def choose(self, step: Step) -> Change | None:
        tokens = step.real_tokens()
        mean = self.budget if self.ratio is None else self.count(tokens)
        if isinstance(mean, Tensor):
            layer = [self.layer_count(step.layer, each) for each in mean.tolist()]
            count: int | Tensor = torch.minimum(torch.tensor(layer, device=mean.device), torch.as_tensor(tokens))
        else:
            count = self.layer_count(step.layer, mean)
        if self._keeps_all(count, tokens):
            return None
        mask = top_mask(hide_padding(self.score(step), step), count[:, None] if isinstance(count, Tensor) else count)
        return Keep(slots_of(mask))

    def score(self, step: Step) -> Tensor:
        """Votes for every slot, the same for all KV heads, the window highest: [B, Hkv, N] float32."""
        B, H = step.cache.shape
        if step.cache.stored <= self.window:
            return torch.ones(B, H, step.cache.stored, device=step.q.device)
        votes = self.votes(step, self.voters[step.layer].to(step.q.device))
        scores = F.pad(votes, (0, self.window), value=float(votes.max()) + 1.0)
        return scores[:, None].expand(B, H, -1)

    def votes(self, step: Step, heads: Tensor) -> Tensor:
        """Pooled votes of some query heads, int64 [K], for the keys before the window: [B, N - window] float32."""
        kv = heads // step.group
        positions = step.positions
        positions = dataclasses.replace(
            positions,
            q=None if positions.q is None else positions.q[:, -self.window :],
            k=_of_heads(positions.k, kv),
        )
        weights = attention_rows(
            step.q[:, heads, -self.window :],
            step.k[:, kv],
            scale=step.scale,
            positions=positions,
            window=step.window,
        )
        mass = weights.sum(2)[..., : step.cache.stored - self.window]
        return pool_votes(mass, self.kernel, self.pool).mean(1)


def _of_heads(held: Tensor | None, heads: Tensor) -> Tensor | None:
    """Positions [B, 1 or Hkv, N] of some KV heads."""
    return held if held is None or held.shape[1] == 1 else held[:, heads]
