"""Recycled attention's claim in small: at equal budget, keys recycled from a full step now and then keep a needle that
sinks and a window lose, also when the question comes long after the prompt.

Twice: the prompt ends with the question (as in RULER); and the question comes, token by token, after 64 tokens of
other text. Beside it, the attention that the keys chosen at the prompt's end still hold, by the number of steps since,
against a window's.

    python benchmarks/claims/recycled.py [--length 2048] [--seeds 4]
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from claim import record
from keeping import arguments, load, losses, mean, retrieval
from selecting import distributions, divergence
from torch import Tensor

from foveate.attention.scoring import top_mask
from foveate.attention.statistics import by_group
from foveate.hf import apply
from foveate.methods import Method
from foveate.methods.cache import Change
from foveate.methods.select.scores import last_weights
from foveate.methods.step import Step
from foveate.tasks.niah import Niah
from foveate.tasks.perplexity import Perplexity

BETWEEN = 64


@dataclass(frozen=True, kw_only=True)
class Watch(Method):
    """Reads everything, and notes the mass on the keys that the prompt's last query chose, and on a window."""

    budget: int
    chosen: dict[int, Tensor] = field(default_factory=dict)
    held: dict[int, list[tuple[float, float]]] = field(default_factory=dict)

    def keep(self, step: Step) -> Change | None:
        mass = by_group(last_weights(step), step.kv_heads, "mean")
        if step.phase == "prefill":
            self.chosen[step.layer] = top_mask(by_group(last_weights(step), step.kv_heads, "max"), self.budget)
            return None
        old = self.chosen[step.layer]
        since = mass.shape[-1] - old.shape[-1]
        recycled = (mass[..., : old.shape[-1]] * old).sum(-1) + mass[..., old.shape[-1] :].sum(-1)
        window = mass[..., :4].sum(-1) + mass[..., -(self.budget - 4 + since) :].sum(-1)
        self.held.setdefault(since, []).append((float(recycled.mean()), float(window.mean())))
        return None


def needle_after(model: Any, tokenizer: Any, methods: list[str], given: Any) -> list[dict[str, Any]]:
    task, prose = Niah(depth=0.2), Perplexity(target=BETWEEN)
    examples = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    rows = []
    for method in methods:
        found, loss = [], []
        for seed, example in enumerate(examples):
            turn = example.turns[0]
            answer = tokenizer.encode(" " + turn.answers[0], add_special_tokens=False)
            between = prose.example(tokenizer, 512, 40 + seed).target
            text = [*between, *turn.question, *answer]
            with apply(model, method) as run:
                likely, _ = losses(model, run, [example.context], text)
            found.append(float(likely[-len(answer) :, 1].min()))
            loss.append(-float(likely[-len(answer) :, 0].mean()))
        rows.append({"method": method, "found": mean(found), "answer_loss": mean(loss)})
        print(rows[-1], flush=True)
    return rows


def mass_by_age(model: Any, tokenizer: Any, budget: int, given: Any) -> list[dict[str, float]]:
    watch = Watch(budget=budget)
    window = Perplexity(target=BETWEEN).example(tokenizer, given.length, 0)
    distributions(model, watch, window.context, window.target)
    rows = []
    for since in (1, 2, 4, 8, 16, 32, BETWEEN - 1):
        recycled, recent = (mean([pair[side] for pair in watch.held[since]]) for side in (0, 1))
        rows.append({"steps_since": since, "recycled_mass": recycled, "window_mass": recent})
    print(rows, flush=True)
    return rows


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=4)
    model, tokenizer = load(given)
    budget = given.length // 8
    methods = ["full", f"streaming-llm:window={budget - 4}", f"streaming-llm:window={budget - 4},reindex=false"]
    methods += [f"recycled:budget={budget},stride={stride}" for stride in (8, 16, 50)]
    methods += [f"recycled:budget={budget},schedule=similarity,threshold={each}" for each in (0.8, 0.9)]
    torch.manual_seed(0)
    record(
        "recycled",
        "a needle survives keys recycled every few steps, and not a window of the same budget",
        given,
        started,
        model=model,
        question_in_prompt=retrieval(model, tokenizer, methods, Niah(depth=0.2), given, question_seen=True),
        question_later=needle_after(model, tokenizer, methods, given),
        mass=mass_by_age(model, tokenizer, budget, given),
        divergence=divergence(model, tokenizer, methods[1:], given),
    )


if __name__ == "__main__":
    main()
