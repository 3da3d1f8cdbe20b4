"""Aggregation: which words occur most often.  (RULER, arXiv 2404.06654)

common-words: a numbered list in drawn order, in which `words` words occur `often` times each, all others `seldom`
times. Asked: these words.
frequent-words: a text of about n made-up words of six letters; the word of rank r occurs
floor(n r^-alpha / zeta(alpha)) times. Rank 1 is the noise "...". Asked: the words of rank 2, 3 and 4.

Both put what must be found everywhere in the context, so a method that drops part of it loses counts.
Score: the fraction of the words found in the output.

Differs from RULER: our wording; words from Python's manual and a list of ours, none part of another word; when all
are used, rare words come back for another `seldom` times; exact length without the answer's tokens (the gap
is filled with dots).

Errors: a length too small raises OptionError with the smallest; for common-words one so large that rare words
would be as frequent as the common ones, with the largest. Cost: linear in the length.
"""

from __future__ import annotations

import math
import random
import string
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.errors import OptionError
from foveate.options import option
from foveate.registry import register
from foveate.tasks.base import DraftedTask
from foveate.tasks.prompt import Draft, Question
from foveate.tasks.words import different, vocabulary

_PAPER = "RULER: What's the Real Context Size of Your Long-Context Language Models?"
# RULER's numbers, and its smaller ones for contexts of less than 4096 tokens.
_LONG = 4096
_OFTEN, _SELDOM = (30, 3), (6, 1)
# As many as the shortest text can show, and more: the shortest text is the same at every length.
_FEWEST_CODED = 20
_EXAMPLE_OFTEN, _EXAMPLE_RARE_WORDS = 3, 10


@register("common-words", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models")
@dataclass(frozen=True, kw_only=True)
class CommonWords(DraftedTask):
    """Name the words that occur most often in a long numbered list."""

    words: int = option(10, "common words, all of them asked for", at_least=1, at_most=100)
    often: int | None = option(None, "times a common word occurs; None: 30, below 4096 tokens 6", at_least=2)
    seldom: int | None = option(None, "times a rare word occurs; None: 3, below 4096 tokens 1", at_least=1)
    worked_example: bool = option(True, "a solved example before the list")

    def check(self) -> None:
        for length in (1, _LONG):
            often, seldom = self._counts(length)
            if often <= seldom:
                raise OptionError(f"CommonWords: often={often}, allowed: > seldom={seldom}")

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"common-words {seed}")
        often, seldom = self._counts(length)
        words = rng.sample(vocabulary(), len(vocabulary()))
        common, rare = words[: self.words], words[self.words :]
        before = self._solved(rng) if self.worked_example else ""

        def body(units: int) -> str:
            listed = common * often + [rare[place // seldom % len(rare)] for place in range(units)]
            random.Random(f"common-words {seed} order").shuffle(listed)
            return before + self._introduction() + numbered(listed)

        return Draft(
            body=body,
            padding=" ... ... ... ...",
            questions=(self._question(common),),
            most=(often - 1) // seldom * seldom * len(rare),
            meta={"often": often, "seldom": seldom},
        )

    def _counts(self, length: int) -> tuple[int, int]:
        often, seldom = (ours[length < _LONG] for ours in zip(_OFTEN, _SELDOM, strict=True))
        return self.often or often, self.seldom or seldom

    def _introduction(self) -> str:
        return "In this numbered list some words come again and again, others are rare.\n\n"

    def _question(self, common: Sequence[str]) -> Question:
        return Question(
            f"Question: Which {self.words} words occur most often in the list?",
            f"Answer: The {self.words} words that occur most often are:",
            tuple(common),
            numbered(common),
        )

    def _solved(self, rng: random.Random) -> str:
        words = rng.sample(vocabulary(), self.words + _EXAMPLE_RARE_WORDS)
        common, rare = words[: self.words], words[self.words :]
        listed = common * _EXAMPLE_OFTEN + rare
        rng.shuffle(listed)
        asked = self._question(common)
        return f"{self._introduction()}{numbered(listed)}\n\n{asked.text} {asked.cue} {numbered(common)}\n\n"


@register(
    "frequent-words", kind="task", paper=_PAPER, arxiv="2404.06654", year=2024, applies_to="causal language models"
)
@dataclass(frozen=True, kw_only=True)
class FrequentWords(DraftedTask):
    """Name the three most frequent made-up words in a text with Zipf's law."""

    alpha: float = option(2.0, "exponent of Zipf's law", above=1.0, at_most=8.0)
    letters: int = option(6, "letters of a made-up word", at_least=3, at_most=32)
    vocabulary: int | None = option(None, "different words; None: a fiftieth of the length, at least 20", at_least=5)

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"frequent-words {seed}")
        size = self.vocabulary or max(_FEWEST_CODED, length // 50)
        coded = different(size - 1, lambda: "".join(rng.choices(string.ascii_lowercase, k=self.letters)))
        ranked = ["...", *coded]
        share = [rank**-self.alpha / _zeta(self.alpha) for rank in range(1, size + 1)]
        # From here on the floors keep rank 4 above rank 5.
        fewest = math.ceil(1 / (share[3] - share[4]))

        def body(units: int) -> str:
            text = [word for word, part in zip(ranked, share, strict=True) for _ in range(int((fewest + units) * part))]
            random.Random(f"frequent-words {seed} order").shuffle(text)
            return f"Some made-up words occur more often than others in this text.\n\n{' '.join(text)}"

        return Draft(
            body=body,
            padding=" ... ... ... ...",
            questions=(
                Question(
                    "Question: Which three made-up words occur most often? Leave out the dots.",
                    "Answer: The three words that occur most often are:",
                    tuple(ranked[1:4]),
                ),
            ),
            meta={"vocabulary": size},
        )


def numbered(words: Sequence[str]) -> str:
    """ "1. first 2. second" """
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def _zeta(alpha: float) -> float:
    import torch

    return float(torch.special.zeta(torch.tensor(alpha, dtype=torch.float64), torch.ones((), dtype=torch.float64)))
