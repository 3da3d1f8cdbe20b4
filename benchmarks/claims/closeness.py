"""What claims about closeness to the dense model share, on any device: arguments, next-token distributions, the result.

Scripts take --device, --length, --seeds, --dtype and --out (default benchmarks/results/claims).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from keeping import RESULTS, mean
from torch import Tensor

from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.methods import Method
from foveate.tasks.base import Task

Prompt = tuple[list[int], list[int]]


def parser(doc: str | None, *, length: int, seeds: int) -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument("--length", type=int, default=length)
    made.add_argument("--seeds", type=int, default=seeds)
    made.add_argument("--dtype", default="float32")
    made.add_argument("--out", type=Path, default=RESULTS)
    return made


def prompts(task: Task, tokenizer: Any, given: argparse.Namespace) -> list[Prompt]:
    """Per seed the tokens of a prompt, its question included, and the tokens that should follow it."""
    made = []
    for seed in range(given.seeds):
        example = task.example(tokenizer, given.length, seed)
        if not example.turns:
            made.append((list(example.context), list(example.target)))
            continue
        turn = example.turns[0]
        answer = tokenizer.encode(" " + ", ".join(turn.answers), add_special_tokens=False)
        made.append((list(example.context + turn.question), answer))
    return made


@torch.no_grad()
def distributions(model: Any, method: str | Method, prompt: Prompt) -> tuple[Tensor, float]:
    """Log-probabilities [n - 1, vocabulary] of the following tokens but the first, which are fed one by one, and the
    share of keys held then. The first is left out: the prompt's own pass predicts it."""
    first, then = prompt
    rows = []
    with apply(model, method) as run:
        held = {cache_keyword(model): run.new_cache()}
        model(torch.tensor([first], device=model.device), logits_to_keep=1, **held)
        for token in then[:-1]:
            rows.append(model(torch.tensor([[token]], device=model.device), **held).logits[0, -1])
        stats = run.stats
    lengths = [length for layer in stats.lengths for length in layer]
    return F.log_softmax(torch.stack(rows).float(), -1), sum(lengths) / len(lengths) / stats.seen


def closeness(model: Any, methods: dict[str, str | Method], given: list[Prompt]) -> list[dict[str, Any]]:
    """Per method, by its label: the mean KL divergence from the dense model in nats over the tokens that follow the
    prompts (but the first), the share of them with the dense model's likeliest token, their own loss, the keys held."""
    dense = [distributions(model, "full", prompt)[0] for prompt in given]
    rows = []
    for label, method in {"full": "full", **methods}.items():
        kl, same, loss, held = [], [], [], []
        for prompt, expected in zip(given, dense):
            made, share = distributions(model, method, prompt)
            kl.append(float(F.kl_div(made, expected, log_target=True, reduction="none").sum(-1).mean()))
            same.append(float((made.argmax(-1) == expected.argmax(-1)).float().mean()))
            loss.append(-float(made.gather(1, torch.tensor(prompt[1][1:], device=made.device)[:, None]).mean()))
            held.append(share)
        rows.append(
            {
                "method": label,
                "kl_to_dense": mean(kl),
                "same_token": mean(same),
                "loss": mean(loss),
                "keys_held": mean(held),
            }
        )
        print(rows[-1], flush=True)
    return rows


def by_spec(methods: Sequence[str]) -> dict[str, str | Method]:
    return {method: method for method in methods}
