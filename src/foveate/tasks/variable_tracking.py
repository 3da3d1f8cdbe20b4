"""Variable tracking: follow copies of copies back to a value.  (RULER, arXiv 2404.06654)

`chains` chains of statements lie in repeated filler, in order, at drawn depths:

    VAR ABCDE = 12345      then, `hops` times,      VAR FGHIJ = VAR ABCDE

Asked: all variables that hold the value of the first chain, hops + 1 names of five capitals. A worked example with
names of three capitals precedes the text, as in RULER (`worked_example=False` leaves it out).
Score: `scoring="found"` the fraction of the names in the output (RULER); `scoring="iou"` intersection over union
with all words of the output (The Sparse Frontier, arXiv 2504.17768).

Differs from RULER: our wording and filler, exact length without the answer's tokens.

Errors: a length too small raises OptionError with the smallest. Cost: linear in the length.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

from foveate.options import option
from foveate.registry import register
from foveate.tasks import haystack
from foveate.tasks.base import DraftedTask
from foveate.tasks.prompt import Draft, Question
from foveate.tasks.scoring import found, set_overlap
from foveate.tasks.words import capitals, draw

_INTRODUCTION = "Variables get their values in the text below, some of them from other variables.\n\n"
_QUESTION = "Question: Which variables have the value {value}?"
_CUE = "Answer: {count} variables have the value {value}:"
_EXAMPLE_UNITS = 5


@register(
    "variable-tracking",
    kind="task",
    paper="RULER: What's the Real Context Size of Your Long-Context Language Models?",
    arxiv="2404.06654",
    year=2024,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class VariableTracking(DraftedTask):
    """Name all variables that got a value through a chain of assignments in a long text."""

    chains: int = option(1, "chains of assignments, the first of them asked for", at_least=1, at_most=100)
    hops: int = option(4, "copies after a chain's first assignment", at_least=1, at_most=100)
    worked_example: bool = option(True, "a solved example before the text")
    scoring: str = option("found", "fraction of names found, or intersection over union", one_of=("found", "iou"))

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"variable-tracking {seed}")
        names = capitals(self.chains * (self.hops + 1), 5, rng)
        values = draw("numbers", self.chains, rng, digits=5)
        chains = [names[first : first + self.hops + 1] for first in range(0, len(names), self.hops + 1)]
        needles: list[tuple[float, str]] = []
        for chain, value in zip(chains, values, strict=True):
            depths = sorted(rng.random() for _ in chain)
            needles += zip(depths, statements(chain, value), strict=True)
        before = self._solved(rng) if self.worked_example else ""
        return Draft(
            body=lambda units: before + _INTRODUCTION + " ".join(haystack.weave(haystack.repeated(units), needles)),
            padding=haystack.gap(haystack.REPEATED),
            questions=(self._question(values[0], chains[0]),),
            meta={"value": values[0], "variables": chains[0]},
        )

    def match(self, output: str, answers: Sequence[str]) -> float:
        return found(output, answers) if self.scoring == "found" else set_overlap(output, " ".join(answers))

    def _question(self, value: str, chain: Sequence[str]) -> Question:
        text, cue = _QUESTION.format(value=value), _CUE.format(value=value, count=len(chain))
        return Question(text, cue, tuple(chain))

    def _solved(self, rng: random.Random) -> str:
        chain = capitals(self.hops + 1, 3, rng)
        value = draw("numbers", 1, rng, digits=5)[0]
        depths = [(place + 0.5) / len(chain) for place in range(len(chain))]
        needles = zip(depths, statements(chain, value), strict=True)
        text = " ".join(haystack.weave(haystack.repeated(_EXAMPLE_UNITS), needles))
        asked = self._question(value, chain)
        return f"{_INTRODUCTION}{text}\n\n{asked.text} {asked.cue} {' '.join(chain)}\n\n"


def statements(names: Sequence[str], value: str) -> list[str]:
    """The assignments of one chain: the first name gets the value, each other one the name before it."""
    copies = [f"VAR {name} = VAR {source}." for source, name in itertools.pairwise(names)]
    return [f"VAR {names[0]} = {value}.", *copies]
