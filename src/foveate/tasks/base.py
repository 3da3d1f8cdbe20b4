"""What a task is: it makes examples of an exact length in a model's own tokens, and scores what the model wrote.

A runner uses a task so:

    example = task.example(tokenizer, length=4096, seed=0)
    ids = example.context + example.turns[0].question     # exactly 4096 tokens
    ... generate up to turns[0].max_new_tokens tokens greedily, decode them ...
    task.score([output], example)                          # 0 to 1

The context stands apart from the questions, so that a method can compress it before it has seen a question
(query-agnostic) or after (query-aware); the runner decides and records which. Of several turns, either all run one
after another on one kept cache (`task.turns_share_cache`), or each runs on a copy of the context's cache.

Equal options, tokenizer, length and seed give equal tokens: no clock, no network, no global random state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from foveate.errors import OptionError, ShapeError
from foveate.options import check_fields, option
from foveate.tasks.prompt import Draft, assemble
from foveate.tasks.scoring import found


@dataclass(frozen=True)
class Turn:
    """One question.

    question: token ids that follow the context (in later turns on a kept cache: the answer before).
    answers: the expected strings.
    max_new_tokens: how many tokens the answer may take.
    """

    question: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True)
class Example:
    """One prompt with known answers.

    context: token ids, with the tokenizer's beginning-of-sequence token where it has one.
    turns: the questions; empty for perplexity.
    length: len(context) + len(turns[0].question), or len(context) + len(target) for perplexity.
    depth: where in the context the answer lies, 0 (start) to 1 (end); None where it lies at no one place.
    meta: facts for the report (keys, values, positions), plain data.
    target: token ids that follow the context and are scored by their likelihood; empty where text is generated.
    """

    context: tuple[int, ...]
    turns: tuple[Turn, ...]
    length: int
    seed: int
    depth: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)
    target: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Task:
    """A way of making examples and of scoring outputs. Holds options only."""

    measure: ClassVar[str] = "score"
    registered_name: ClassVar[str]

    def __post_init__(self) -> None:
        check_fields(self)
        self.check()

    def check(self) -> None:
        """Rules between options, and files that must be readable; raises before any work."""

    @property
    def turns_share_cache(self) -> bool:
        """Whether the turns run one after another on one kept cache (else each on a copy of the context's)."""
        return True

    @property
    def examples(self) -> int | None:
        """How many different examples there are; None when every seed gives another."""
        return None

    def example(self, tokenizer: Any, length: int, seed: int) -> Example:
        """The example of one seed.

        Args:
            tokenizer: a transformers tokenizer; only the model's own makes `length` true.
            length: tokens of context and first question together.
            seed: any integer.

        Raises OptionError when the length is too small (or too large) for the task, naming the bound.
        """
        raise NotImplementedError

    def match(self, output: str, answers: Sequence[str]) -> float:
        """How right one output is, 0 to 1: the fraction of the answers that occur in it, in either case."""
        return found(output, answers)

    def score(self, outputs: Sequence[str], example: Example) -> float:
        """The mean of `match` over the turns, 0 to 1; 0 where there are none.

        Args:
            outputs: one decoded output per turn, without the prompt.

        Raises ShapeError when the numbers of outputs and turns differ.
        """
        if isinstance(outputs, str) or len(outputs) != len(example.turns):
            given = "one string" if isinstance(outputs, str) else f"{len(outputs)} outputs"
            raise ShapeError(f"{given} for {len(example.turns)} turns; give a list with one output per turn")
        if not example.turns:
            return 0.0
        scores = [self.match(output, turn.answers) for output, turn in zip(outputs, example.turns, strict=True)]
        return sum(scores) / len(scores)


@dataclass(frozen=True, kw_only=True)
class DraftedTask(Task):
    """A task whose prompt grows with filler: it writes a `Draft`, and the length is reached exactly here."""

    chat: bool = option(False, "put the prompt into the tokenizer's chat template (the cue opens the reply)")

    def draft(self, length: int, seed: int) -> Draft:
        """The texts of one example; `length` may choose sizes, the exact fit is made by the caller."""
        raise NotImplementedError

    def example(self, tokenizer: Any, length: int, seed: int) -> Example:
        check_length(self, length)
        draft = self.draft(length, seed)
        context, questions, units = assemble(
            type(self).registered_name, tokenizer, draft, length, chat=self.chat, on_one_cache=self.turns_share_cache
        )
        turns = tuple(
            Turn(ids, asked.answers, new_tokens)
            for asked, (ids, new_tokens) in zip(draft.questions, questions, strict=True)
        )
        meta = {**draft.meta, "filler_units": units, "chat": self.chat}
        return Example(context, turns, length, seed, draft.depth, meta)


def check_length(task: Task, length: int) -> None:
    """Raise OptionError unless `length` is a whole number above 0."""
    if isinstance(length, bool) or not isinstance(length, int) or length < 1:
        raise OptionError(f"{task.registered_name}: length={length!r}, allowed: a whole number of tokens >= 1")


def perplexity_from_nll(nll_sum: float, count: int) -> float:
    """exp(nll_sum / count): the perplexity of `count` tokens whose negative log-likelihoods (natural log) sum so."""
    if count < 1:
        raise OptionError(f"perplexity of count={count} tokens, allowed: >= 1")
    try:
        return math.exp(nll_sum / count)
    except OverflowError:
        return math.inf
