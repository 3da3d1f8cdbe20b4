"""Task-KV: heads far from their layer's semantic centre keep all keys, the others a few.  (arXiv 2501.15113)

What a head says about a prompt is one vector, its attention-weighted value. Most heads of a layer say nearly the same;
the few that lie far from the centre depend on the task, so they are found anew for every request, at the end of its
prompt, and keep everything. All other heads keep sinks, recent tokens and the best of the tokens between.

    C_h[j] = mean over the last `window` queries i of p_h[i, j]                  float32 softmax over all N keys
    v_h    = sum over the `top` keys j with most C_h of C_h[j] V_h[j]            of a KV head: the mean over its group
    d_h    = |v_h - mean_h v_h|
    f      = round(n beta - (n beta - m) r / (R - 1)), half up, in [1, n]        layer r of R, n KV heads, m = `least`
    whole: the f - 1 heads with most d and the head with least; for f = 1 that with most
    others: `sinks` first, `recent` last, and the k keys between them with most pooled mean over the group of C
    k      = floor((budget n - N f) / (n - f)) - sinks - recent;  f falls while k would be below 0

`budget` counts keys per KV head in the mean over the layer: a layer holds at most budget x n keys, and fewer by less
than n. Where even f = 0 leaves k < 0, which only `ratio` can ask for, heads still keep sinks and recent tokens; with
beta = 0 and least = 0 no head is kept whole. Ties go to the lower head and the earlier key. A prompt within the budget
is left as it is; later tokens stay. Cost: window x N scores per query head, once; storage is packed per head.

No official code exists. What the paper leaves open: Euclidean distance, pooling of C for the choice of keys alone, one
slot for the head nearest to the centre (`central`), rounding, and GQA, where n counts KV heads and a group's vector is
its mean (`group="max"`: a group is as far as the farthest of its heads). Heads with large values look far; `normalise`
compares directions. The defaults are the paper's for Mistral-7B, a GQA model; for Llama-2-7B: beta=0.25, least=4.
Evaluated at 40 to 60 % of the cache. Query-aware when the question ends the prompt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.scoring import top_mask, top_slots
from foveate.attention.statistics import by_group
from foveate.methods.budgets import TwoClass, affordable
from foveate.methods.cache import Change, KeepRagged
from foveate.methods.prompt import PromptKeep, pool_votes, window_weights
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "task-kv",
    kind="keep",
    paper="Task-KV: Task-aware KV Cache Optimization via Semantic Differentiation of Attention Heads",
    arxiv="2501.15113",
    year=2025,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 36, "sinks": 2, "recent": 8, "window": 8, "top": 16},
    claim=(
        "Bundled model, 1k tokens, 2 seeds, 60 % of the keys: KL divergence from dense 0.033 on needles, "
        "0.075 on variable tracking, 0.213 on common words (SnapKV 0.130, 1.881, 0.301), but 0.160 on plain "
        "text (0.060); at 40 % 0.028, 1.705, 0.684 and 0.945 (0.511, 2.704, 0.511 and 0.274). The chosen "
        "heads agree by 0.58 to 0.82 within a task, by 0.51 to 0.62 between tasks "
        "(benchmarks/results/claims/task_kv.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TaskKV(PromptKeep):
    """Heads that say something else than their layer keep the whole prompt, others sinks, recent and middle keys."""

    ragged: ClassVar[bool] = True

    beta: float = option(0.3, "share of a layer's KV heads kept whole in the first layer", at_least=0, at_most=1)
    least: int = option(1, "KV heads kept whole in the last layer; between, the number falls evenly", at_least=0)
    sinks: int = option(16, "first tokens that every head keeps", at_least=0)
    recent: int = option(256, "last tokens of the prompt that every head keeps", at_least=1)
    window: int = option(32, "last queries of the prompt that describe heads and score keys", at_least=1)
    top: int = option(256, "keys whose values describe a head", at_least=1)
    kernel: int = option(7, "width over which neighbouring scores are pooled, odd", at_least=1)
    pool: str = option("avg", "how neighbouring scores are pooled", one_of=("avg", "max"))
    central: bool = option(True, "the head nearest to the centre takes one of two or more places")
    group: str = option(
        "mean", "how far a group of query heads is: its mean vector, or its farthest head", one_of=("mean", "max")
    )
    normalise: bool = option(False, "compare the vectors' directions, not their lengths")

    def check(self) -> None:
        if self.kernel % 2 == 0:
            raise self.refuse("kernel", "an odd number")
        if self.ratio is None and self.budget < self.sinks + self.recent:
            raise self.refuse("budget", f">= sinks + recent = {self.sinks + self.recent}, which every head keeps")

    @property
    def observed(self) -> int:
        return self.window

    def choose(self, step: Step) -> Change | None:
        B, H = step.cache.shape
        tokens = step.real_tokens()
        rows = tokens.tolist() if isinstance(tokens, Tensor) else [tokens] * B
        if all(self.spares(n) for n in rows):
            return None
        mass = window_weights(step, self.window).mean(2)
        distances = self.distances(mass, step.v)
        scores = pool_votes(by_group(mass, H), self.kernel, self.pool)
        held = step.cache.positions
        mask = torch.zeros(B, H, step.cache.stored, dtype=torch.bool, device=step.q.device)
        for row in range(B):
            # A prompt's padding is the same for all heads.
            real = slice(None) if held is None else held[row, 0] >= 0
            mask[row][:, real] = self.chosen(distances[row], scores[row][:, real], step.layer, step.layers)
        return KeepRagged(mask)

    def spares(self, tokens: int) -> bool:
        """Whether a prompt of `tokens` keeps everything."""
        return tokens <= max(int(self.count(tokens)), self.sinks + self.recent)

    def distances(self, mass: Tensor, values: Tensor) -> Tensor:
        """How far each KV head lies from its layer's centre: [B, Hkv] float32.

        mass: C, [B, Hq, N] float32.    values: [B, Hkv, N, Dv].
        """
        H = values.shape[1]
        said = semantic_vectors(mass, values, self.top)
        if self.normalise:
            said = F.normalize(said, dim=-1)
        centre = said.mean(1, keepdim=True)
        if self.group == "mean":
            return (by_group(said, H) - centre).norm(dim=-1)
        return by_group((said - centre).norm(dim=-1), H, "max")

    def chosen(self, distance: Tensor, scores: Tensor, layer: int, layers: int) -> Tensor:
        """Bool like scores [Hkv, N] of a sequence without padding: what the heads of `layer` keep.

        distance: [Hkv]. Fewer heads are whole than `whole_count` says where the budget is too small for them.
        """
        N = scores.shape[-1]
        if self.spares(N):
            return torch.ones_like(scores, dtype=torch.bool)
        classes, fixed = self.classes(distance, N, layer, layers), self.sinks + self.recent
        between = scores[:, self.sinks : N - self.recent]
        kept = F.pad(top_mask(between, classes.rest_of(N) - fixed), (self.sinks, self.recent), value=True)
        return kept | classes.full[0][:, None]

    def classes(self, distance: Tensor, tokens: int, layer: int, layers: int) -> TwoClass:
        """What the heads keep of a prompt longer than the budget: distance [Hkv]; one row, for this layer."""
        H = distance.shape[0]
        least = self.sinks + self.recent
        whole = self.whole_count(layer, layers, H)
        count, rest = affordable(H * int(self.count(tokens)), tokens, H, whole, least)
        return TwoClass(farthest(distance, count, self.central)[None], rest)

    def whole_count(self, layer: int, layers: int, heads: int) -> int:
        """f(r): KV heads that layer r keeps whole when the budget allows."""
        first = heads * self.beta
        count = first - (first - self.least) * layer / max(1, layers - 1)
        fewest = 0 if self.beta == 0 and self.least == 0 else 1
        return min(heads, max(fewest, math.floor(count + 0.5)))


def semantic_vectors(mass: Tensor, values: Tensor, top: int) -> Tensor:
    """Per query head the sum of the values of its `top` heaviest keys, each times its weight: [B, Hq, Dv] float32.

    mass: [B, Hq, N] float32.    values: [B, Hkv, N, Dv]. The weights are not renormalised.
    """
    slots = top_slots(mass, top)
    heads = torch.arange(mass.shape[1], device=mass.device) // (mass.shape[1] // values.shape[1])
    batch = torch.arange(mass.shape[0], device=mass.device)
    rows = values[batch[:, None, None], heads[None, :, None], slots].to(mass.dtype)
    return torch.einsum("bht,bhtd->bhd", mass.gather(-1, slots), rows)


def farthest(distance: Tensor, count: int, central: bool) -> Tensor:
    """Bool like distance [H]: the `count` farthest heads; with `central` and count > 1, the nearest in place of one."""
    if not central or count < 2:
        return top_mask(distance, count)
    far = top_mask(distance, count - 1)
    return far | top_mask(-distance.masked_fill(far, torch.inf), 1)
