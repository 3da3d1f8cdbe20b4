"""What a training run is: a TOML file with three tables, read into dataclasses.

    [model]                                    # options of HybridConfig; vocab_size follows the data
    mixers = ["softmax", "softmax"]
    dim = 64

    [data]
    task = "mqar"                              # or text = ["book.txt"]
    length = 256
    task_options = { pairs = 64 }

    [run]
    output = "runs/mqar-softmax"
    steps = 2000

Unknown tables and options raise UnknownNameError with the nearest names; values are checked when the dataclass is made.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from foveate.errors import DataError, OptionError, UnknownNameError
from foveate.lm.synthetic import TASKS, check_task_options
from foveate.options import check_fields, check_names, nearest, option, options_of


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What is learned from: a synthetic task, or text."""

    task: str | None = option(None, "a synthetic task", one_of=(*TASKS, None))
    task_options: Mapping[str, Any] | None = option(None, "the task's own options")
    slices: tuple[dict[str, Any], ...] = option((), "further test sets: task options that replace the ones above")
    train: int = option(20000, "training examples of a task", at_least=1)
    test: int = option(1000, "test examples of a task", at_least=1)
    text: tuple[str, ...] = option((), "text files; 'manual' is Python's own manual")
    tokenizer: str = option("bytes", "'bytes', or a tokenizer's folder or hub name")
    separator: str | None = option(None, "what stands between documents in a file")
    isolate: bool = option(False, "documents in one block do not see each other")
    length: int = option(512, "tokens of an example", at_least=2)
    held_out: float = option(0.05, "share of the text that tests", above=0, below=1)
    seed: int = option(0, "of the examples", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)
        _check_each("text", self.text, str, "files' names")
        _check_each("slices", self.slices, Mapping, "tables of task options")
        if (self.task is None) == (not self.text):
            raise OptionError(
                f"DataConfig: task={self.task!r}, text={list(self.text)}, allowed: exactly one of a task and text files"
            )
        if self.task is not None:
            for each in ({}, *self.slices):
                check_task_options(self.task, {**(self.task_options or {}), **each})


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """How it is learned, and where the run is kept."""

    output: str = option(..., "folder for checkpoints, log and the model")
    steps: int = option(1000, "optimiser steps", at_least=1)
    batch: int = option(32, "examples per step and device", at_least=1)
    accumulate: int = option(1, "batches per optimiser step", at_least=1)
    learning_rate: float = option(1e-3, "peak learning rate", above=0)
    final_rate: float = option(0.0, "last learning rate over the peak (cosine)", at_least=0, at_most=1)
    warmup: int = option(100, "steps of linear warm-up", at_least=0)
    weight_decay: float = option(0.1, "of matrices; vectors and norms have none", at_least=0)
    beta2: float = option(0.95, "AdamW's second beta", at_least=0, below=1)
    clip: float = option(1.0, "largest gradient norm", above=0)
    precision: str = option("float32", "of the computation", one_of=("float32", "bfloat16"))
    gradient_checkpointing: bool = option(False, "run layers again in the backward pass, for memory")
    device: str = option("auto", "where to run", one_of=("auto", "cpu"))
    evaluate_every: int = option(200, "steps between tests", at_least=1)
    log_every: int = option(20, "steps between lines of the log", at_least=1)
    save_every: int = option(500, "steps between checkpoints", at_least=1)
    keep: int = option(2, "checkpoints that are kept", at_least=1)
    stop_at: float | None = option(None, "stop when the test accuracy reaches this", above=0, at_most=1)
    resume: str = option("never", "'never', 'auto' (the last checkpoint, if any) or a checkpoint's folder")
    seed: int = option(0, "of weights and order", at_least=0)

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """A training run: options of the model (`HybridConfig`), the data and the run."""

    data: DataConfig
    run: RunConfig
    model: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, tables: dict[str, Any]) -> TrainConfig:
        """From nested plain data, as TOML gives it."""
        known = [each.name for each in fields(cls)]
        for name in tables:
            if name not in known:
                raise UnknownNameError(f"a training config has no table {name!r}{nearest(name, known)}")
        for name in ("data", "run"):
            if name not in tables:
                raise OptionError(f"a training config without a table [{name}], allowed: [model], [data] and [run]")
        for name, table in tables.items():
            if not isinstance(table, dict):
                raise OptionError(f"a training config with {name}={table!r}, allowed: a table [{name}]")
        return cls(
            model=dict(tables.get("model", {})),
            data=_made(DataConfig, tables["data"]),
            run=_made(RunConfig, tables["run"]),
        )

    @classmethod
    def read(cls, path: str | Path) -> TrainConfig:
        """From a TOML file. Raises DataError for a file that cannot be read as TOML."""
        try:
            tables = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
            raise DataError(f"{path}: not a readable TOML file ({error})") from error
        return cls.from_dict(tables)


def _check_each(name: str, given: tuple[Any, ...], kind: type, allowed: str) -> None:
    if not all(isinstance(each, kind) for each in given):
        raise OptionError(f"DataConfig: {name}={list(given)!r}, allowed: {allowed}")


T = TypeVar("T")


def _made(kind: type[T], table: dict[str, Any]) -> T:
    known = options_of(kind)
    check_names(kind.__name__, table, known)
    for each in known:
        if each.required and each.name not in table:
            raise OptionError(f"{kind.__name__}: {each.name} is missing ({each.help})")
    # TOML has lists where the dataclasses have tuples.
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in table.items()})
