"""PyramidKV: SnapKV with a budget that falls from the first layer to the last.  (arXiv 2406.02069)

Attention is spread in the lower layers and gathers on few tokens in the upper ones. So with the same total, lower
layers keep more and upper layers fewer keys; which keys, the votes of the prompt's last `window` queries say
(see snapkv.py).

    room  = budget - window              mean keys per layer besides the window
    least = room // beta,  most = 2 room - least;  where most >= N - window: most = N - window, least = 2 room - most
    layer l of L keeps the best  most - l * ((most - least) // (L - 1))  keys, and the window

N < budget keeps everything; N < 2 room is plain SnapKV. The floors make the total slightly larger than budget * L.
`variant="kvpress"` counts as kvpress does: real numbers, room = budget (or N (1 - ratio)), the rounded number includes
the window, and unless N >= most >= least >= window every layer keeps `budget` (or round(N (1 - ratio))) keys.

Cost: as SnapKV. Bad options raise OptionError.
Differs from the authors' code: one choice per KV head (theirs repeats keys to query heads). With `ratio` the original
arithmetic takes int(N (1 - ratio)) for the budget; where that is no more than the window, the window stays.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from foveate.attention.scoring import top_slots
from foveate.methods.budgets import Pyramid
from foveate.methods.cache import Change, Keep
from foveate.methods.prompt import WindowVotes, hide_padding
from foveate.methods.step import Step
from foveate.options import option
from foveate.registry import register


@register(
    "pyramidkv",
    kind="keep",
    paper="PyramidKV: Dynamic KV Cache Compression based on Pyramidal Information Funneling",
    arxiv="2406.02069",
    year=2024,
    applies_to="pretrained",
    exact={"budget": 10**6},
    small={"budget": 24, "window": 8},
    claim=(
        "Bundled model, 1k tokens with pairs to recall, 6 seeds: the answer costs 1.02 nats per token with 62 "
        "keys and 0.80 with 112, SnapKV 1.18 with 53 and 0.82 with 101 (dense 0.39) "
        "(benchmarks/results/claims/pyramidkv.json). Half of the cache, question known, 20 seeds, 2k and 4k "
        "tokens: passkey 0.00 and 0.00, single needle 0.60 and 0.60; dense passkey 0.70 and 0.60, single "
        "needle 0.95 and 1.00 (benchmarks/results/needles_0.5_aware.json)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class PyramidKV(WindowVotes):
    """Keeps the prompt keys that the last prompt queries attend to: many in the first layers, few in the last."""

    budget: int = option(1024, "keys kept per KV head in the mean over layers, the window included", at_least=1)
    beta: int = option(20, "how steep: the last layer keeps 1 / beta of the mean, besides the window", at_least=1)
    variant: str = option("original", "how layer budgets are counted", one_of=("original", "kvpress"))

    def check(self) -> None:
        super().check()
        if self.ratio is None and self.budget <= self.window:
            raise self.refuse("budget", f"> window={self.window}, which is part of it")

    def layer_count(self, layer: int, layers: int, tokens: int) -> int:
        """Keys that a KV head of `layer` keeps of a prompt of `tokens`, the window included."""
        real = self.variant == "kvpress"
        if self.ratio is None:
            mean: float = self.budget
        else:
            mean = tokens * (1.0 - self.ratio) if real else int(self.count(tokens))
        return Pyramid(layers, mean, self.window, self.beta, real).of_layer(layer, tokens)

    def choose(self, step: Step) -> Change | None:
        tokens = step.real_tokens()
        counts: int | Tensor
        if isinstance(tokens, Tensor):
            counts = torch.tensor([self.layer_count(step.layer, step.layers, n) for n in tokens.tolist()])[:, None]
        else:
            counts = self.layer_count(step.layer, step.layers, tokens)
        if self._keeps_all(counts, step.cache.stored):
            return None
        return Keep(top_slots(hide_padding(self.score(step), step), counts, tight=True))
