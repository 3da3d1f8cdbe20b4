"""What claims about closeness to the dense model share: arguments, prompts with the tokens that should follow, and how
far methods are from the dense model there.

Scripts take --device, --length, --seeds, --dtype and --out.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import claim
from keeping import keys_held, mean
from selecting import Prompt, distances

from foveate.methods import Method
from foveate.tasks.base import Task


def parser(doc: str | None, *, length: int, seeds: int) -> argparse.ArgumentParser:
    return claim.parser(doc, devices=("cpu", "cuda"), length=length, seeds=seeds, dtype="float32")


def prompts(task: Task, tokenizer: Any, given: argparse.Namespace) -> list[Prompt]:
    """Per seed the tokens of a prompt, its question included, and the tokens that should follow it."""
    made: list[Prompt] = []
    for seed in range(given.seeds):
        example = task.example(tokenizer, given.length, seed)
        if not example.turns:
            made.append((example.context, example.target))
            continue
        turn = example.turns[0]
        answer = tokenizer.encode(" " + ", ".join(turn.answers), add_special_tokens=False)
        made.append((example.context + turn.question, answer))
    return made


def closeness(model: Any, methods: dict[str, str | Method], given: list[Prompt]) -> list[dict[str, Any]]:
    """Per method, by its label: the mean KL divergence from the dense model in nats over the tokens that follow the
    prompts (but the first, which SnapKV leaves dense and which weighs much in a short answer), the share of them with
    the dense model's likeliest token, their own loss, the keys held."""
    rows = []
    for row, loss, stats in distances(model, methods, given, first=False):
        held = mean([keys_held(each) / each.seen for each in stats])
        rows.append({**row, "loss": loss, "keys_held": held})
        print(rows[-1], flush=True)
    return rows


def by_spec(methods: Sequence[str]) -> dict[str, str | Method]:
    return {method: method for method in methods}
