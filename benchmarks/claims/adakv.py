"""Ada-KV's claim in small: heads that share a layer's budget by their scores lose less than heads with equal ones.

Two measures per budget: the attention of the coming query that the kept keys hold (the bound of the paper is on what
they lose), and the answers found.

    python benchmarks/claims/adakv.py [--length 1024] [--seeds 4]
"""

from __future__ import annotations

import time
from typing import Any

import torch
from claim import record
from keeping import arguments, load, mean, retrieval

from foveate.attention.statistics import attention_rows
from foveate.hf import apply
from foveate.methods import Method
from foveate.methods.base import describe
from foveate.methods.cache import Change, Keep, KeepRagged
from foveate.methods.keep.adakv import AdaKV
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.step import Step
from foveate.tasks.recall import Recall


def held_mass(model: Any, prompts: list[list[int]], method: SnapKV | AdaKV) -> float:
    """Mean attention that the prompt's last query pays to the keys that `method` keeps."""
    tally: list[float] = []

    class Probe(Method):
        """Measures what would be kept, and keeps everything."""

        def keep(self, step: Step) -> Change | None:
            change = method.choose(step)
            weights = attention_rows(step.q[:, :, -1:], step.k, scale=step.scale)[0, :, 0]
            mass = weights.unflatten(0, (step.kv_heads, -1)).mean(1)
            if isinstance(change, KeepRagged):
                mass = mass * change.mask[0]
            elif isinstance(change, Keep):
                mass = mass.gather(-1, change.index[0])
            tally.append(float(mass.sum(-1).mean()))
            return None

    for ids in prompts:
        with torch.no_grad(), apply(model, Probe()):
            model(torch.tensor([ids], device=model.device))
    return mean(tally)


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=4)
    model, tokenizer = load(given)
    task = Recall(pairs=8)
    examples = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    prompts = [list(example.context + example.turns[0].question) for example in examples]
    votes: dict[str, Any] = {"window": 16, "kernel": 7, "pool": "max"}
    mass = []
    for budget in (32, 64, 128):
        for method in (
            SnapKV(budget=budget, **votes),
            AdaKV(budget=budget, **votes),
            AdaKV(budget=budget, variant="kvpress", **votes),
        ):
            mass.append({"method": describe(method), "budget": budget, "held_mass": held_mass(model, prompts, method)})
            print(mass[-1], flush=True)
    options = "window=16,kernel=7,pool=max"
    methods = ["full"]
    for budget in (32, 64):
        methods += [f"{each}:budget={budget},{options}" for each in ("snapkv", "adakv")]
    rows = retrieval(model, tokenizer, methods, task, given, question_seen=True)
    claim = "budgets shared by a layer's heads keep more attention than equal ones"
    record("adakv", claim, given, started, model=model, mass=mass, rows=rows)


if __name__ == "__main__":
    main()
