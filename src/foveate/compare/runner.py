"""The runner: every method on every task, length and seed, the dense model first, each cell kept once finished."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.compare import breakeven
from foveate.compare.cells import CellStore, example_digest, profile_digest
from foveate.compare.environment import (
    device_name,
    environment,
    load_average,
    model_facts,
    now,
    source_digest,
    versions,
)
from foveate.compare.matrix import Group, Matrix, check_lengths
from foveate.compare.measure import Ways, measure, warm_up
from foveate.compare.memory import quick_collections
from foveate.compare.progress import showing
from foveate.compare.results import Comparison
from foveate.compare.rows import needles_of, refused_row, row_of, with_dense
from foveate.compare.speed import speeds
from foveate.compare.subject import DENSE, Subject, on
from foveate.errors import FoveateError, OptionError
from foveate.hf.identity import identify
from foveate.methods import describe


def compare(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str] = ("full",),
    tasks: Sequence[str] = ("niah-single",),
    lengths: Sequence[int] | int = (2048,),
    seeds: Sequence[int] | int = 3,
    query_aware: bool = True,
    out: str | os.PathLike[str] = "foveate-report",
    progress: bool = True,
    stride: int = 1,
    *,
    min_decode_tokens: int = 8,
    break_even_lengths: Sequence[int] = (),
) -> Comparison:
    """Compare methods with the untouched model: quality, latency, memory, bytes and density.

        fv.compare(model, tokenizer, ["full", "snapkv:budget=256"], ["niah-single", "perplexity"]).save()

    Args:
        model, tokenizer: a transformers causal LM in evaluation mode, and its own tokenizer.
        methods: specs ("snapkv:budget=256", "a+b"); "dense", the untouched model, is put in front by itself.
        tasks: specs ("niah-single", "multi-turn:questions=3", "data-file:path=mine.jsonl").
        lengths: prompt lengths in tokens.
        seeds: how many examples per task and length, or their seeds.
        query_aware: whether the question is part of the prompt when a method compresses it; else the context is
            read and compressed before the question comes.
        out: a folder; finished cells are kept in out/cells and reused by a run with equal settings.
        progress: show progress and notes on stderr.
        stride: perplexity: target tokens read per step; 1 is what decoding does.
        min_decode_tokens: decode steps timed at least per example.
        break_even_lengths: prompt lengths of an extra microbenchmark from which break-even lengths are found; without
            it, they come from the measured rows of two lengths or more.
    Returns:
        a Comparison: rows, table(), to_json(path), report(path), save(). A method that refuses the model has a row
        with `error`, and the others go on.
    Raises:
        UnknownNameError, OptionError, CompositionError, UnsupportedModelError, DataError before any work;
        ResultsError when a finished cell cannot be written (a rerun goes on from there).
    """
    matrix = Matrix.of(methods, tasks, lengths, seeds)
    ways = _ways(query_aware, stride, min_decode_tokens)
    facts = model_facts(model)
    if not callable(tokenizer):
        raise OptionError(f"compare: tokenizer={tokenizer!r}, allowed: the model's own tokenizer")
    extra = check_lengths(break_even_lengths) if break_even_lengths else ()
    examples = matrix.examples(tokenizer, model.get_input_embeddings().num_embeddings)
    folder = Path(out)
    runner = Runner(model, tokenizer, matrix, ways, examples, CellStore(folder / "cells"), facts)
    with _evaluation(model), quick_collections(), showing(progress, runner.total) as show:
        rows = runner.run(show)
        timed = runner.time_lengths(extra, show) or runner.speeds(rows)
    settings = {**runner.settings(), "break_even_lengths": list(extra)}
    told = [each.as_dict() for each in _verdicts(matrix, timed)]
    return Comparison(environment(model.device), facts, settings, rows, told, runner.notes(), folder)


def _verdicts(matrix: Matrix, timed: Sequence[dict[str, Any]]) -> list[breakeven.BreakEven]:
    methods = [method for method in matrix.methods if method != DENSE]
    return [breakeven.break_even(method, breakeven.points_of(timed, method)) for method in methods]


def _ways(query_aware: bool, stride: int, min_decode_tokens: int) -> Ways:
    if not isinstance(query_aware, bool):
        raise OptionError(f"query_aware={query_aware!r}, allowed: True or False")
    for name, value, least in (("stride", stride, 1), ("min_decode_tokens", min_decode_tokens, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise OptionError(f"{name}={value!r}, allowed: a whole number >= {least}")
    return Ways(query_aware, stride, min_decode_tokens)


@dataclass
class Runner:
    """The state of one comparison while it runs."""

    model: Any
    tokenizer: Any
    matrix: Matrix
    ways: Ways
    examples: dict[tuple[str, int, int], Any]
    store: CellStore
    facts: dict[str, Any]
    computed: int = 0
    reused: int = 0
    refusals: dict[str, str] = field(default_factory=dict)
    _warm: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.subject = Subject.of(self.model, self.tokenizer)
        self._digests = {at: example_digest(example) for at, example in self.examples.items()}
        self._constant = {
            "model": self.facts,
            "versions": versions(),
            "source": source_digest(),
            "device": device_name(self.model.device),
            "threads": torch.get_num_threads(),
            **asdict(self.ways),
        }
        identity = identify(self.model)
        self._described = {
            spec: [describe(method), profile_digest(method, identity)] if method is not None else [DENSE, None]
            for spec, method in self.matrix.methods.items()
        }

    @property
    def total(self) -> int:
        return len(self.examples) * len(self.matrix.methods)

    def run(self, show: Any) -> list[dict[str, Any]]:
        """All rows, in order: task, length, method."""
        rows: list[dict[str, Any]] = []
        dense: dict[str, Any] = {}
        for group in self.matrix.groups():
            row = self._row(group, show)
            if group.method == DENSE:
                dense = row
            rows.append(with_dense(row, dense))
        for note in self.notes():
            show.say(note)
        return rows

    def _row(self, group: Group, show: Any) -> dict[str, Any]:
        seeds = self.matrix.seeds_of(group.task)
        examples = {seed: self.examples[group.task, group.length, seed] for seed in seeds}
        cells: dict[int, dict[str, Any]] = {}
        for done, seed in enumerate(seeds):
            show.at(group, seed)
            key = self._key(group, seed)
            found = self.store.load(key)
            if found is not None:
                self.reused += 1
            else:
                try:
                    measured = self._measure(group, examples[seed])
                except (FoveateError, torch.OutOfMemoryError) as error:
                    show.step(len(seeds) - done)
                    return self._refused(group, seeds, error, show)
                self.computed += 1
                found = self.store.save(key, measured)
            cells[seed] = found
            show.step(1)
        row = row_of(group, cells, {seed: each.depth for seed, each in examples.items()}, self.ways.query_aware)
        row["needles"] = needles_of(examples[seeds[0]], row["tokens_seen"])
        return row

    def _key(self, group: Group, seed: int) -> dict[str, Any]:
        method, profile = self._described[group.method]
        return {
            **self._constant,
            "method": method,
            "profile": profile,
            "task": group.task,
            "length": group.length,
            "seed": seed,
            "example": self._digests[group.task, group.length, seed],
        }

    def _measure(self, group: Group, example: Any) -> dict[str, Any]:
        task = self.matrix.tasks[group.task]
        with on(self.model, group.method) as run:
            if group.method not in self._warm:
                prompt = [*example.context, *(example.turns[0].question if example.turns else example.target)]
                warm_up(self.subject, run, prompt[: self.matrix.lengths[0]])
                self._warm.add(group.method)
            measured = measure(self.subject, run, self.tokenizer, task, example, self.ways)
        return {**measured.as_dict(), "date": now(), "loadavg": load_average()}

    def _refused(self, group: Group, seeds: Sequence[int], error: Exception, show: Any) -> dict[str, Any]:
        if isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        row = refused_row(group, seeds, self.ways.query_aware, error)
        if group.method not in self.refusals:
            self.refusals[group.method] = row["error"]
            show.say(f"{group.method} refused: {row['error']}")
        return row

    def time_lengths(self, lengths: tuple[int, ...], show: Any) -> list[dict[str, Any]]:
        """The extra microbenchmark for break-even lengths; nothing when none are asked for."""
        if not lengths:
            return []
        show.say(f"timing prompts of {', '.join(f'{each:,}' for each in lengths)} tokens for the break-even lengths")
        return speeds(self.subject, list(self.matrix.methods), lengths)

    def speeds(self, rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Rows whose decode speed is that of one token at a time."""
        return [row for row in rows if row["perplexity"] is None or self.ways.stride == 1]

    def settings(self) -> dict[str, Any]:
        """What was asked for, and how many cells that took."""
        return {
            "methods": list(self.matrix.methods),
            "tasks": list(self.matrix.tasks),
            "lengths": list(self.matrix.lengths),
            "seeds": list(self.matrix.seeds),
            **asdict(self.ways),
            "cells_computed": self.computed,
            "cells_reused": self.reused,
        }

    def notes(self) -> list[str]:
        """What a reader should know about where the cells came from."""
        notes = []
        if self.reused:
            count = f"{self.reused} of {self.reused + self.computed}"
            notes.append(f"reused {count} finished cells from {self.store.folder}")
        notes += [f"{name} was damaged and was computed again" for name in self.store.damaged]
        return notes


@contextlib.contextmanager
def _evaluation(model: Any) -> Iterator[None]:
    """The model in evaluation mode; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
