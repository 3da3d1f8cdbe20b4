"""Passkey retrieval: a five-digit number in repeated filler.  (Mohtashami and Jaggi, arXiv 2305.16300)

The context says that a pass key is hidden, then repeats short filler sentences; at the example's depth one needle
states the key, as in the paper with the number twice. The cue is the beginning of the answer.

Differs from the paper: our filler sentences and wording; exact length; depth fixed per seed, not drawn.

Errors: a length too small raises OptionError with the smallest. Cost: linear in the length.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from foveate.options import option
from foveate.registry import register
from foveate.tasks import haystack
from foveate.tasks.base import DraftedTask
from foveate.tasks.prompt import Draft, Question
from foveate.tasks.words import draw

_INTRODUCTION = "A pass key is hidden in the text below. Remember it.\n\n"
_NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."


@register(
    "passkey",
    kind="task",
    paper="Landmark Attention: Random-Access Infinite Context Length for Transformers",
    arxiv="2305.16300",
    year=2023,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class Passkey(DraftedTask):
    """Find a number that is stated once in a long text of repeated sentences."""

    digits: int = option(5, "digits of the pass key", at_least=1, at_most=64)
    depth: float | None = option(
        None, "where the key lies, 0 start to 1 end; None: spread evenly over the seeds", at_least=0, at_most=1
    )

    def draft(self, length: int, seed: int) -> Draft:
        rng = random.Random(f"passkey {seed}")
        key = draw("numbers", 1, rng, digits=self.digits)[0]
        depth = haystack.depth_of(seed) if self.depth is None else self.depth
        needle = _NEEDLE.format(key=key)
        return Draft(
            body=lambda units: _INTRODUCTION + " ".join(haystack.weave(haystack.repeated(units), [(depth, needle)])),
            padding=haystack.gap(haystack.REPEATED),
            questions=(Question("What is the pass key?", "The pass key is", (key,)),),
            depth=depth,
            meta={"key": key},
        )
