"""Needle in a haystack, in the four forms of RULER: single, multi-key, multi-value, multi-query.  (arXiv 2404.06654)

A needle is "The secret number of KEY is VALUE." `keys` different keys have `values` needles each; the needles lie
at drawn depths in a haystack; `queries` of the keys are asked for at once, and every value of each is expected.

    single       1 key,  1 value, 1 query
    multi-key    4 keys, 1 value, 1 query     the other needles distract
    multi-value  1 key,  4 values, 1 query
    multi-query  4 keys, 1 value, 4 queries

Haystacks: "prose" (sentences of Python's manual, or of the text file at `text`), "repeat" (five short sentences
again and again), "needles" (nothing but further needles with other keys).
RULER's niah_single_1 is `niah-single:haystack=repeat`, its niah_multikey_2 is `niah-single:haystack=needles`, its
niah_multikey_3 the same with key=uuids,value=uuids.

Differs from RULER: our wording; prose instead of essays; exact length, without the answer's tokens; the first
asked needle's depth is spread evenly over the seeds (theirs: 40 depths, drawn); score by `found`, as there.

Errors: a length too small raises OptionError with the smallest. Cost: linear in the length.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from foveate.errors import OptionError
from foveate.options import option
from foveate.registry import register
from foveate.tasks import haystack
from foveate.tasks.base import DraftedTask
from foveate.tasks.prompt import Draft, Question
from foveate.tasks.text import sentences
from foveate.tasks.words import KINDS, compounds, draw

_PAPER = "RULER: What's the Real Context Size of Your Long-Context Language Models?"
# Needle haystacks of more than this many pairs (about 300k tokens) are not made.
_MOST_PAIRS = 20_000
_NAMES = {"numbers": "number", "words": "word", "uuids": "code"}


@register("niah", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models")
@dataclass(frozen=True, kw_only=True)
class Niah(DraftedTask):
    """Needles in a haystack, with any number of keys, values and queries (by default one each)."""

    keys: int = option(1, "different keys in the haystack", at_least=1, at_most=1000)
    values: int = option(1, "needles (values) per key", at_least=1, at_most=1000)
    queries: int = option(1, "keys asked for", at_least=1, at_most=1000)
    haystack: str = option("prose", "what surrounds the needles", one_of=("prose", "repeat", "needles"))
    key: str = option("words", "what keys are", one_of=KINDS)
    value: str = option("numbers", "what values are", one_of=KINDS)
    depth: float | None = option(
        None,
        "where the first asked needle lies, 0 start to 1 end; None: spread evenly over the seeds",
        at_least=0,
        at_most=1,
    )
    text: str | None = option(None, "UTF-8 text file for haystack=prose; None: Python's manual")

    def check(self) -> None:
        if self.queries > self.keys:
            raise OptionError(f"{type(self).__name__}: queries={self.queries}, allowed: <= keys={self.keys}")
        if self.keys * self.values > _MOST_PAIRS // 2:
            given = f"keys * values = {self.keys * self.values}"
            raise OptionError(f"{type(self).__name__}: {given}, allowed: <= {_MOST_PAIRS // 2}")
        if self.text is not None:
            sentences(self.text)

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"niah {seed}")
        keys = draw(self.key, self.keys, rng)
        drawn = draw(self.value, self.keys * self.values, rng)
        depths = [haystack.depth_of(seed) if self.depth is None else self.depth]
        depths += [rng.random() for _ in drawn[1:]]
        pairs = [(keys[place // self.values], value) for place, value in enumerate(drawn)]
        needles = [(depth, needle(self.value, *pair)) for depth, pair in zip(depths, pairs, strict=True)]
        filler, most, padding = self._filler(rng, set(keys))
        asked = pairs[: self.queries * self.values]
        return Draft(
            body=lambda units: introduction(self.value) + " ".join(haystack.weave(filler(units), needles)),
            padding=padding,
            questions=(question(self.value, asked),),
            most=most,
            depth=depths[0] if len(asked) == 1 else None,
            meta={"keys": keys[: self.queries], "depths": depths[: len(asked)]},
        )

    def _filler(self, rng: random.Random, taken: set[str]) -> tuple[Callable[[int], list[str]], int | None, str]:
        if self.haystack == "repeat":
            return haystack.repeated, None, haystack.gap(haystack.REPEATED)
        if self.haystack == "prose":
            text = haystack.prose(self.text, rng)
            return text, None, haystack.gap(text(8))
        others = haystack.lazily(other_needles(self.key, self.value, rng, taken))
        return others, _MOST_PAIRS - len(taken), haystack.gap(haystack.REPEATED)


@register("niah-single", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models")
@dataclass(frozen=True, kw_only=True)
class NiahSingle(Niah):
    """One needle in a haystack, one question for it."""


@register(
    "niah-multikey", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models"
)
@dataclass(frozen=True, kw_only=True)
class NiahMultikey(Niah):
    """Several needles with different keys, one of them asked for."""

    keys: int = option(4, "different keys in the haystack", at_least=1, at_most=1000)


@register(
    "niah-multivalue", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models"
)
@dataclass(frozen=True, kw_only=True)
class NiahMultivalue(Niah):
    """Several needles with one key; all its values are asked for."""

    values: int = option(4, "needles (values) per key", at_least=1, at_most=1000)


@register(
    "niah-multiquery", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models"
)
@dataclass(frozen=True, kw_only=True)
class NiahMultiquery(Niah):
    """Several needles with different keys, all asked for in one question."""

    keys: int = option(4, "different keys in the haystack", at_least=1, at_most=1000)
    queries: int = option(4, "keys asked for", at_least=1, at_most=1000)


def introduction(value: str) -> str:
    """What stands before a haystack; `value` is a kind of words.KINDS."""
    return f"Secret {_NAMES[value]}s are hidden in the text below. Remember them.\n\n"


def needle(value: str, key: str, answer: str) -> str:
    """The sentence that states one value."""
    return f"The secret {_NAMES[value]} of {key} is {answer}."


def question(value: str, asked: Sequence[tuple[str, str]]) -> Question:
    """The question for all `asked` (key, answer) pairs; its cue is the beginning of the first one's needle."""
    keys = list(dict.fromkeys(key for key, _ in asked))
    owners = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + " and " + keys[-1]
    ask = (
        f"What is the secret {_NAMES[value]} of" if len(asked) == 1 else f"What are all the secret {_NAMES[value]}s of"
    )
    cue = f"The secret {_NAMES[value]} of {keys[0]} is"
    reply = " ".join(needle(value, *pair) for pair in asked).removeprefix(cue).strip()
    return Question(f"{ask} {owners}?", cue, tuple(answer for _, answer in asked), reply)


def other_needles(key: str, value: str, rng: random.Random, taken: set[str]) -> Iterator[str]:
    """Needles in drawn order whose keys differ from each other and from those `taken`."""
    used = set(taken)
    words = iter(rng.sample(compounds(), _MOST_PAIRS))
    while len(used) < _MOST_PAIRS:
        drawn = next(words) if key == "words" else draw(key, 1, rng)[0]
        if drawn not in used:
            used.add(drawn)
            yield needle(value, drawn, draw(value, 1, rng)[0])
