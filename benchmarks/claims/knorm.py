"""KNorm's claim in small: keys of small norm take more attention, so a passkey survives when only they are kept.

Per layer: rank correlation over the keys of a prompt between norm and the mean weight they take (the paper: negative
in all but the first layers). Then a passkey with the keys of smallest norm, with those of largest norm, and all.

    python benchmarks/claims/knorm.py [--length 768] [--seeds 6]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from claim import record
from keeping import arguments, load, mean, retrieval
from torch import Tensor

from foveate.hf import apply
from foveate.methods import Method
from foveate.methods.cache import Change
from foveate.methods.keep.h2o import ObservedAttention
from foveate.methods.keep.knorm import KNorm
from foveate.methods.step import Step
from foveate.registry import register
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity


@register("knorm-reversed", kind="keep", paper="control", year=2024, applies_to="pretrained")
@dataclass(frozen=True, kw_only=True)
class LargestNorms(KNorm):
    """The control: keeps the keys with the largest norm."""

    def score(self, step: Step) -> Tensor:
        return -super().score(step)


def correlations(model: Any, ids: list[int]) -> list[float]:
    """Rank correlation of norm and mean weight, per layer, the mean over heads."""
    made: dict[int, float] = {}

    class Probe(Method):
        """Compares two scores of every key."""

        def keep(self, step: Step) -> Change | None:
            ranks = [each.score(step)[0].argsort(-1).argsort(-1).double() for each in (KNorm(), ObservedAttention())]
            made[step.layer] = -float(mean([float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(*ranks)]))
            return None

    with torch.no_grad(), apply(model, Probe()):
        model(torch.tensor([ids], device=model.device))
    return [round(made[layer], 3) for layer in sorted(made)]


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=768, seeds=6)
    model, tokenizer = load(given)
    text = list(Perplexity(target=1).example(tokenizer, given.length, 0).context)
    ranks = correlations(model, text)
    print(ranks, flush=True)
    methods = ["full"]
    for ratio in (0.5, 0.75):
        methods += [
            f"{name}:ratio={ratio}{skip}" for name in ("knorm", "knorm-reversed") for skip in ("", ",skip_layers=2")
        ]
    rows = retrieval(model, tokenizer, methods, Passkey(), given, question_seen=True)
    claim = "keys of small norm take more attention; a passkey survives on them"
    record("knorm", claim, given, started, model=model, correlation_by_layer=ranks, rows=rows)


if __name__ == "__main__":
    main()
