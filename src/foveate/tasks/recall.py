"""Associative recall: many key-value pairs, and keys to look up.

As in MQAR (Zoology, arXiv 2312.04927) a key that comes back must call its value; here in words, for a pretrained
model, as the key of a new line:

    amber-castle: 4821
    ...
    amber-castle:        and the model goes on

There is no question in words: so SmolLM2-135M-Instruct (CPU, float32) found 42 of 74 values among 40 to 90 pairs, but
1 of 12 when "What is the number of KEY?" came before the key.

`pairs=None` fills the whole length with pairs, `pairs=n` spreads n of them over prose. Each of the `queries` looks
up another key, on a copy of the context's cache; the score is the mean.

Differs from MQAR: text instead of bare token ids, and lookups that do not see each other. In a chat template the key
opens the model's reply.

Errors: a length too small raises OptionError with the smallest; one that needs more than 20,000 pairs, with
the largest. Cost: linear in the length.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from foveate.errors import OptionError
from foveate.options import option
from foveate.registry import register
from foveate.tasks import haystack
from foveate.tasks.base import DraftedTask
from foveate.tasks.prompt import Draft, Question
from foveate.tasks.text import sentences
from foveate.tasks.words import compounds, draw

_INTRODUCTION = "Each name has a number.\n\n"
_DIGITS = 4
# Four digits give 9000 values, so values repeat; keys do not.
_MOST_PAIRS = 20_000


@register(
    "recall",
    kind="task",
    paper="Zoology: Measuring and Improving Recall in Efficient Language Models",
    arxiv="2312.04927",
    year=2023,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class Recall(DraftedTask):
    """Look up values by their keys in a long list of key-value pairs."""

    queries: int = option(4, "keys looked up, each on a copy of the context's cache", at_least=1, at_most=1000)
    pairs: int | None = option(
        None, "pairs in the context, spread over prose; None: nothing but pairs", at_least=1, at_most=_MOST_PAIRS // 2
    )
    depth: float | None = option(
        None,
        "where the first asked pair lies, 0 start to 1 end; None: spread evenly over the seeds",
        at_least=0,
        at_most=1,
    )
    text: str | None = option(None, "UTF-8 text file that the pairs are spread over; None: Python's manual")

    @property
    def turns_share_cache(self) -> bool:
        return False

    def check(self) -> None:
        if self.pairs is not None and self.queries > self.pairs:
            raise OptionError(f"Recall: queries={self.queries}, allowed: <= pairs={self.pairs}")
        if self.text is not None:
            sentences(self.text)

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"recall {seed}")
        depths = [(haystack.depth_of(seed) + place / self.queries) % 1.0 for place in range(self.queries)]
        if self.depth is not None:
            depths[0] = self.depth
        depths += [rng.random() for _ in range(self.queries, self.pairs or 0)]
        prose = haystack.prose(self.text, rng)
        drawn = _pairs(rng)
        last, needles = next(drawn), [(depth, *next(drawn)) for depth in depths]
        if self.pairs is None:
            filler, padding = haystack.lazily(_line(*pair) for pair in drawn), "\n" + _line(*last)
        else:
            filler, padding = prose, haystack.gap(prose(8))
        lines = [(depth, _line(key, value)) for depth, key, value in needles]
        asked = needles[: self.queries]
        return Draft(
            body=lambda units: _INTRODUCTION + "\n".join(haystack.weave(filler(units), lines)),
            padding=padding,
            questions=tuple(Question("", f"{key}:", (value,), lead="\n") for _, key, value in asked),
            most=None if self.pairs else _MOST_PAIRS - self.queries - 1,
            depth=depths[0] if self.queries == 1 else None,
            meta={"keys": [key for _, key, _ in asked], "depths": depths[: self.queries]},
        )


def _pairs(rng: random.Random) -> Iterator[tuple[str, str]]:
    for key in rng.sample(compounds(), _MOST_PAIRS):
        yield key, draw("numbers", 1, rng, digits=_DIGITS)[0]


def _line(key: str, value: str) -> str:
    return f"{key}: {value}"
