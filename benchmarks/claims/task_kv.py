"""Task-KV's claim in small: which heads lie far from their layer's centre depends on the task, and keeping those
whole, with sinks, recent and middle keys elsewhere, stays closer to the dense model than as many keys in every head.

The overlap is Jaccard's, of the third of each layer's query heads that lie farthest. SnapKV and Task-KV hold the same
number of keys.

    python benchmarks/claims/task_kv.py [--device cuda] [--length 2048] [--seeds 4]
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from claim import record
from closeness import Prompt, by_spec, closeness, parser, prompts
from keeping import load, mean
from torch import Tensor

from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.methods import Method
from foveate.methods.cache import Change
from foveate.methods.keep.task_kv import farthest, semantic_vectors
from foveate.methods.prompt import window_weights
from foveate.methods.step import Step
from foveate.tasks.niah import NiahSingle
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.variable_tracking import VariableTracking
from foveate.tasks.word_counts import CommonWords

WINDOW, TOP = 32, 256


@dataclass(frozen=True, kw_only=True)
class FarHeads(Method):
    """Notes which query heads lie far from their layer's centre, and keeps everything."""

    heard: list[Tensor] = field(default_factory=list)

    def keep(self, step: Step) -> Change | None:
        said = semantic_vectors(window_weights(step, WINDOW).mean(2), step.v, TOP)
        distance = (said - said.mean(1, keepdim=True)).norm(dim=-1)[0]
        self.heard.append(farthest(distance, distance.shape[0] // 3, central=False).cpu())
        return None


@torch.no_grad()
def far_heads(model: Any, prompt: Prompt) -> Tensor:
    """Bool [layers, Hq]."""
    probe = FarHeads()
    with apply(model, probe) as run:
        held = {cache_keyword(model): run.new_cache()}
        model(torch.tensor([prompt[0]], device=model.device), logits_to_keep=1, **held)
    return torch.stack(probe.heard)


def overlap(a: Tensor, b: Tensor) -> float:
    return float((a & b).sum() / (a | b).sum())


def overlaps(sets: dict[str, Sequence[Tensor]]) -> list[dict[str, Any]]:
    """Mean overlap of two prompts of one task, and of two tasks."""
    rows = []
    for one, other in itertools.combinations_with_replacement(sets, 2):
        if one == other:
            pairs = list(itertools.combinations(sets[one], 2))
        else:
            pairs = list(itertools.product(sets[one], sets[other]))
        rows.append({"tasks": [one, other], "jaccard": mean([overlap(a, b) for a, b in pairs])})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    started, given = time.perf_counter(), parser(__doc__, length=2048, seeds=4).parse_args()
    if given.seeds < 2:
        raise SystemExit("--seeds: at least 2, or no two prompts of a task can be compared")
    model, tokenizer = load(given)
    tasks = {
        "niah-single": NiahSingle(),
        "variable-tracking": VariableTracking(),
        "common-words": CommonWords(),
        "text": Perplexity(target=32),
    }
    asked = {name: prompts(task, tokenizer, given) for name, task in tasks.items()}
    heads = overlaps({name: [far_heads(model, prompt) for prompt in made] for name, made in asked.items()})
    methods = []
    for ratio in (0.4, 0.6):
        forced = f"ratio={ratio},sinks=4,recent=64"
        methods += [
            f"snapkv:ratio={ratio},window=64,kernel=7",
            f"task-kv:{forced}",
            f"task-kv:{forced},beta=0.0,least=0",
        ]
    record(
        "task_kv",
        "the heads far from their layer's centre depend on the task; keeping them whole stays closer to dense",
        given,
        started,
        model=model,
        heads=heads,
        **{name: closeness(model, by_spec(methods), made) for name, made in asked.items()},
    )


if __name__ == "__main__":
    main()
