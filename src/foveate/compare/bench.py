"""The microbenchmark: prefill and decode times of methods against the stock model, in one run.

Prompts are random tokens (methods whose plans depend on the text may read more or less on real text). Repeats go
round all methods in turn, so that a load that comes and goes meets all of them; figures are medians over repeats.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch

from foveate.compare import breakeven
from foveate.compare.environment import environment, model_facts
from foveate.compare.files import document, write_atomic
from foveate.compare.matrix import Matrix
from foveate.compare.measure import Measured, Ways, measure, warm_up
from foveate.compare.results import SCHEMA_VERSION
from foveate.compare.rows import with_dense
from foveate.compare.subject import DENSE, Subject, on
from foveate.errors import OptionError
from foveate.tasks.base import Example, Turn


@dataclass(frozen=True)
class Bench:
    """Times per method and length; `rows` have the speed fields of results.json."""

    environment: dict[str, Any]
    model: dict[str, Any]
    settings: dict[str, Any]
    rows: list[dict[str, Any]]
    break_even: list[dict[str, Any]] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return {
            "schema_version": SCHEMA_VERSION,
            "environment": self.environment,
            "model": self.model,
            "settings": self.settings,
            "rows": self.rows,
            "break_even": self.break_even,
        }

    def to_json(self, path: str | os.PathLike[str]) -> Path:
        """Write the figures; raises ResultsError when they cannot be written."""
        return write_atomic(Path(path), document(self.as_dict()))

    def table(self) -> Any:
        """A rich Table: dense first."""
        from foveate.compare.table import bench_table

        return bench_table(self.rows, self.break_even)


@dataclass(frozen=True)
class _Speed:
    """A task that asks nothing."""

    measure: str = "score"
    turns_share_cache: bool = True

    def score(self, outputs: Sequence[str], example: Example) -> float:
        return 0.0


class _NoText:
    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return ""


def bench(
    model: Any,
    methods: Sequence[str] = ("full",),
    length: int | Sequence[int] = 8192,
    *,
    steps: int = 32,
    repeats: int = 3,
) -> Bench:
    """Time to first token, decode speed, peak and cache bytes of methods against the stock model.

    Args:
        model: a transformers causal LM.
        methods: specs; "dense" (the stock model) comes first by itself.
        length: prompt tokens; several give break-even lengths.
        steps: decode steps timed per repeat. repeats: rounds over all methods, after one untimed warm-up each.
    Raises what `apply` raises for methods and models, and OptionError for numbers below 1.
    """
    for name, value in (("steps", steps), ("repeats", repeats)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name}={value!r}, allowed: a whole number >= 1")
    matrix = Matrix.of(methods, ["passkey"], length, 1)
    subject = Subject.of(model)
    rows = [row for tokens in matrix.lengths for row in _rows(subject, list(matrix.methods), tokens, steps, repeats)]
    told = [
        breakeven.break_even(method, breakeven.points_of(rows, method)).as_dict()
        for method in matrix.methods
        if method != DENSE and len(matrix.lengths) > 1
    ]
    settings = {"methods": list(matrix.methods), "lengths": list(matrix.lengths), "steps": steps, "repeats": repeats}
    return Bench(environment(model), model_facts(model), settings, rows, told)


def _rows(subject: Subject, methods: list[str], length: int, steps: int, repeats: int) -> list[dict[str, Any]]:
    vocabulary = subject.model.get_input_embeddings().num_embeddings
    ids = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0)).tolist()
    # Two tokens at least: the last one stands for the question.
    example = Example(tuple(ids[:-1]), (Turn(tuple(ids[-1:]), (), 1),), length, 0)
    ways = Ways(min_decode_tokens=steps)
    found: dict[str, list[Measured]] = {method: [] for method in methods}
    for repeat in range(repeats + 1):
        for method in methods:
            with on(subject.model, method) as run:
                if repeat == 0:
                    warm_up(subject, run, ids)
                else:
                    found[method].append(measure(subject, run, _NoText(), _Speed(), example, ways))
    made = {method: _row(method, length, some) for method, some in found.items()}
    return [with_dense(row, made[DENSE]) for row in made.values()]


def _row(method: str, length: int, some: list[Measured]) -> dict[str, Any]:
    def middle(name: str) -> float | None:
        known = [value for each in some if (value := getattr(each, name)) is not None]
        return median(known) if known else None

    figures = some[0].figures
    return {
        "method": method,
        "length": length,
        "prompt_tokens": length,
        "ttft_s": middle("ttft_s"),
        "decode_tokens_per_s": middle("decode_tokens_per_s"),
        "peak_bytes": middle("peak_bytes"),
        "cache_bytes": figures.cache_bytes,
        "density": figures.density,
        "repeats": [
            {"ttft_s": each.ttft_s, "decode_tokens_per_s": each.decode_tokens_per_s, "peak_bytes": each.peak_bytes}
            for each in some
        ],
    }
