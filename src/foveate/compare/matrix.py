"""What is compared: methods, tasks, lengths and seeds, checked before any work, with every prompt made."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from foveate import registry
from foveate.compare.subject import DENSE
from foveate.errors import DataError, OptionError
from foveate.methods import Method, create
from foveate.options import parse_spec
from foveate.tasks.base import Example, Task


@dataclass(frozen=True)
class Group:
    """All seeds of one method on one task at one length."""

    method: str
    task: str
    length: int


@dataclass(frozen=True)
class Matrix:
    """The checked settings. `methods` has the untouched model ("dense") first."""

    methods: dict[str, Method | None]
    tasks: dict[str, Task]
    lengths: tuple[int, ...]
    seeds: tuple[int, ...]

    @classmethod
    def of(
        cls, methods: Sequence[str], tasks: Sequence[str], lengths: Sequence[int] | int, seeds: Sequence[int] | int
    ) -> Matrix:
        """Raises UnknownNameError, OptionError or CompositionError for what cannot be compared."""
        made: dict[str, Method | None] = {DENSE: None}
        for spec in _texts("methods", methods):
            if spec != DENSE:
                made[spec] = create(spec)
        chosen: dict[str, Task] = {}
        for spec in _texts("tasks", tasks):
            registry.card(parse_spec(spec)[0], kind="task")
            chosen[spec] = registry.create(spec)
        if not chosen:
            raise OptionError(f"tasks=[], allowed: at least one of {', '.join(registry.names(kind='task'))}")
        return cls(made, chosen, check_lengths(lengths), _seeds(seeds))

    def seeds_of(self, task: str) -> tuple[int, ...]:
        """The seeds a task is run with: a task that has fewer examples than seeds gets each example once."""
        most = self.tasks[task].examples
        return self.seeds if most is None else self.seeds[:most]

    def groups(self) -> Iterator[Group]:
        """Task by task, length by length, the dense model first."""
        for task in self.tasks:
            for length in self.lengths:
                for method in self.methods:
                    yield Group(method, task, length)

    def examples(self, tokenizer: Any, vocabulary: int) -> dict[tuple[str, int, int], Example]:
        """Every prompt by (task, length, seed).

        Raises what the tasks raise (a length that does not fit), and DataError for a tokenizer of another model.
        """
        made = {}
        for name, task in self.tasks.items():
            for length in self.lengths:
                for seed in self.seeds_of(name):
                    example = made[name, length, seed] = task.example(tokenizer, length, seed)
                    _check_vocabulary(example, vocabulary)
        return made


def _check_vocabulary(example: Example, vocabulary: int) -> None:
    largest = max((*example.context, *example.target, *(each for turn in example.turns for each in turn.question)))
    if largest >= vocabulary:
        raise DataError(
            f"the tokenizer makes token {largest}, and the model has {vocabulary}: it belongs to another model; "
            "load both from the same place"
        )


def _texts(what: str, given: Sequence[str]) -> list[str]:
    if isinstance(given, str) or not all(isinstance(each, str) for each in given):
        raise OptionError(f'{what}={given!r}, allowed: a list of specs such as ["snapkv:budget=256"]')
    return list(dict.fromkeys(each.strip() for each in given))


def check_lengths(given: Sequence[int] | int) -> tuple[int, ...]:
    """Prompt lengths, ascending, each once; OptionError for anything but whole numbers above 0."""
    found = (given,) if isinstance(given, int) else tuple(given)
    if not found or any(isinstance(each, bool) or not isinstance(each, int) or each < 1 for each in found):
        raise OptionError(f"lengths={given!r}, allowed: whole numbers of tokens >= 1, at least one")
    return tuple(sorted(dict.fromkeys(found)))


def _seeds(given: Sequence[int] | int) -> tuple[int, ...]:
    found = tuple(range(given)) if isinstance(given, int) and not isinstance(given, bool) else given
    if isinstance(found, bool) or not found or any(isinstance(e, bool) or not isinstance(e, int) for e in found):
        raise OptionError(f"seeds={given!r}, allowed: a number of seeds >= 1, or a list of whole numbers")
    return tuple(dict.fromkeys(found))
