"""Multi-turn retrieval: several questions on one context, one after another.

The context is a haystack with `questions` needles (as in niah-multikey); every turn asks for another one. A method
that forgets what the first question does not need fails in the later ones: what SCBench (arXiv 2412.10319) tests
with its two shared-context modes, which `turns_share_cache` switches.

    turns_share_cache=True    multi-turn: each question and answer stays on the one kept cache
    turns_share_cache=False   multi-request: each question runs on a copy of the context's cache

Length counts the context and the first question, so the context is the same in both modes.
Score: the mean over the turns.

Differs from SCBench: needles only, our wording, exact length; the model's own answers stay in the cache.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.options import option
from foveate.registry import register
from foveate.tasks import haystack
from foveate.tasks.base import DraftedTask
from foveate.tasks.niah import introduction, needle, question
from foveate.tasks.prompt import Draft
from foveate.tasks.text import sentences
from foveate.tasks.words import draw


@register(
    "multi-turn",
    kind="task",
    paper="SCBench: A KV Cache-Centric Analysis of Long-Context Methods",
    arxiv="2412.10319",
    year=2024,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class MultiTurn(DraftedTask):
    """Several questions, one after another, about needles in one kept context."""

    turns_share_cache: bool = option(True, "turns on one kept cache; else each on a copy of the context's cache")
    questions: int = option(3, "turns, and needles in the context", at_least=1, at_most=100)
    text: str | None = option(None, "UTF-8 text file for the haystack; None: Python's manual")

    def check(self) -> None:
        if self.text is not None:
            sentences(self.text)

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"multi-turn {seed}")
        keys = draw("words", self.questions, rng)
        values = draw("numbers", self.questions, rng)
        depths = [(haystack.depth_of(seed) + place / self.questions) % 1.0 for place in range(self.questions)]
        needles = [
            (depth, needle("numbers", key, value)) for depth, key, value in zip(depths, keys, values, strict=True)
        ]
        filler = haystack.prose(self.text, rng)
        return Draft(
            body=lambda units: introduction("numbers") + " ".join(haystack.weave(filler(units), needles)),
            padding=haystack.gap(filler(8)),
            questions=tuple(question("numbers", [pair]) for pair in zip(keys, values, strict=True)),
            meta={"keys": keys, "depths": depths},
        )
