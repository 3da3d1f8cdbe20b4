"""Speeds alone, for break-even lengths: methods and the stock model on prompts of random tokens, in one run.

Rounds go over all methods in turn, so that a load that comes and goes meets all of them; figures are medians over
rounds. Methods whose plans depend on the text may read more or less on real text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from foveate.compare.measure import Measured, Ways, measure, warm_up
from foveate.compare.rows import with_dense
from foveate.compare.subject import DENSE, Subject, on
from foveate.errors import FoveateError
from foveate.tasks.base import Example, Turn


@dataclass(frozen=True)
class _AsksNothing:
    """A task of which only the time matters."""

    measure: str = "score"
    turns_share_cache: bool = True

    def score(self, outputs: Sequence[str], example: Example) -> float:
        return 0.0


class _NoText:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def speeds(
    subject: Subject, methods: Sequence[str], lengths: Sequence[int], *, steps: int = 16, rounds: int = 1
) -> list[dict[str, Any]]:
    """Rows with method, length, prompt_tokens, ttft_s, decode_tokens_per_s and the dense model's, shortest first.

    methods: specs with "dense" first; one that refuses the model has no row. steps: decode steps timed per round.
    """
    return [row for length in lengths for row in _at(subject, list(methods), length, steps, rounds)]


def _at(subject: Subject, methods: list[str], length: int, steps: int, rounds: int) -> list[dict[str, Any]]:
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    example = Example(tuple(ids[:-1]), (Turn(tuple(ids[-1:]), (), 1),), length, 0)
    found: dict[str, list[Measured]] = {method: [] for method in methods}
    for turn in range(rounds + 1):
        for method in list(found):
            try:
                with on(subject.model, method) as run:
                    if turn == 0:
                        warm_up(subject, run, ids)
                    else:
                        ways = Ways(min_decode_tokens=steps)
                        found[method].append(measure(subject, run, _NoText(), _AsksNothing(), example, ways))
            except FoveateError:
                # Its rows of the comparison itself say why; there is nothing to time.
                del found[method]
    made = {method: _row(method, length, some) for method, some in found.items()}
    return [with_dense(row, made[DENSE]) for row in made.values() if DENSE in made]


def _row(method: str, length: int, some: list[Measured]) -> dict[str, Any]:
    def middle(name: str) -> float | None:
        known = [value for each in some if (value := getattr(each, name)) is not None]
        return median(known) if known else None

    return {
        "method": method,
        "length": length,
        "prompt_tokens": length,
        "ttft_s": middle("ttft_s"),
        "decode_tokens_per_s": middle("decode_tokens_per_s"),
    }
