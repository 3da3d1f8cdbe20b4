"""Ada-KV's claim in small: heads that share a layer's budget by their scores lose less than heads with equal ones.

Two measures per budget: the attention of the coming query that the kept keys hold (the bound of the paper is on what
they lose), and the answers found.

    python benchmarks/claims/adakv.py [--length 1024] [--seeds 4]
"""

from __future__ import annotations

import time
from typing import Any

import torch
from keeping import arguments, load, mean, record, retrieval

from foveate.attention.statistics import attention_rows
from foveate.hf import apply
from foveate.methods import Method, create
from foveate.methods.base import Composed
from foveate.methods.cache import Change
from foveate.methods.keep.adakv import AdaKV
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.step import Step
from foveate.tasks.recall import Recall


class Tally(list[float]):
    """Weights that kept keys hold, one number per layer and example."""


def held_mass(model: Any, prompts: list[list[int]], method: Method) -> float:
    """Mean attention that the prompt's last query pays to the keys that `method` keeps."""
    tally = Tally()

    class Probe(Method):
        """Measures what would be kept, and keeps everything."""

        def keep(self, step: Step) -> Change | None:
            change = method.choose(step) if step.phase == "prefill" else None  # type: ignore[attr-defined]
            if change is not None:
                weights = attention_rows(step.q[:, :, -1:], step.k, scale=step.scale)[0, :, 0]
                mask = change.mask[0] if hasattr(change, "mask") else torch.zeros(step.kv_heads, step.cache.stored)
                if not hasattr(change, "mask"):
                    mask.scatter_(-1, change.index[0].cpu(), 1.0)
                tally.append(
                    float((weights.unflatten(0, (step.kv_heads, -1)).mean(1) * mask.to(weights)).sum(-1).mean())
                )
            return None

    for ids in prompts:
        with torch.no_grad(), apply(model, Composed(parts=(Probe(), create("full")))):
            model(torch.tensor([ids], device=model.device))
    return mean(tally)


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=4)
    model, tokenizer = load(given)
    task = Recall(pairs=8)
    examples = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    prompts = [list(example.context + example.turns[0].question) for example in examples]
    votes = {"window": 16, "kernel": 7, "pool": "max"}
    mass = []
    for budget in (32, 64, 128):
        for method in (
            SnapKV(budget=budget, **votes),
            AdaKV(budget=budget, **votes),
            AdaKV(budget=budget, variant="kvpress", **votes),
        ):
            mass.append({"method": repr(method), "budget": budget, "held_mass": held_mass(model, prompts, method)})
            print(mass[-1], flush=True)
    options = "window=16,kernel=7,pool=max"
    methods = ["full"]
    for budget in (32, 64):
        methods += [f"{each}:budget={budget},{options}" for each in ("snapkv", "adakv")]
    rows = retrieval(model, tokenizer, methods, task, given, question_seen=True)
    record(
        "adakv",
        "budgets shared by a layer's heads keep more attention than equal ones",
        model,
        given,
        started,
        mass=mass,
        rows=rows,
    )


if __name__ == "__main__":
    main()
