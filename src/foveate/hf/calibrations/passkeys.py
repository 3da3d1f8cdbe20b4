"""Long prompts with several passkeys hidden in prose, and questions for all of them: DuoAttention's training data."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.tasks.text import paragraphs

ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
# The spelling alphabet: common words, about one token each, that follow each other in no likely way.
ALPHABET = """
    alfa bravo charlie delta echo foxtrot golf hotel india juliett kilo lima mike november oscar papa quebec romeo
    sierra tango uniform victor whiskey xray yankee zulu
"""
WORDS = tuple(ALPHABET.split())
DEPTHS = 1000


@dataclass(frozen=True)
class PasskeyPrompts:
    """A source of prompts.

    lengths: tokens of the context, one is drawn per prompt. passkeys: how many, each of `words` words.
    text: a UTF-8 file of filler prose, None for Python's manual.
    """

    tokenizer: Any
    lengths: tuple[int, ...]
    passkeys: int
    words: int
    text: str | None = None

    def sample(self, seed: str) -> tuple[Tensor, Tensor]:
        """Token ids int64 [1, N] and bool [1, N], True on the questions and answers after the context."""
        rng = random.Random(seed)
        keys = [" ".join(rng.choices(WORDS, k=self.words)) for _ in range(self.passkeys)]
        needles = [
            self._ids(f"\n\nRemember: the {name} passkey to the vault is {key}.\n\n")
            for name, key in zip(ORDINALS, keys)
        ]
        context = self._context(needles, rng.choice(self.lengths), rng)
        asked = [
            self._ids(f"\n\nQuestion: What is the {name} passkey to the vault?\nAnswer: {key}.")
            for name, key in zip(ORDINALS, keys)
        ]
        tail = [token for each in asked for token in each]
        ids = torch.tensor([context + tail])
        return ids, torch.arange(ids.shape[1])[None] >= len(context)

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def _context(self, needles: list[list[int]], length: int, rng: random.Random) -> list[int]:
        first = self.tokenizer.bos_token_id
        start = ([] if first is None else [first]) + self._ids("The text below hides passkeys. Remember them.\n\n")
        room = length - len(start) - sum(map(len, needles))
        filler = self._filler(max(room, 0), rng)
        depths = sorted(rng.sample(range(DEPTHS), len(needles)))
        places = [round((0.05 + 0.9 * depth / DEPTHS) * len(filler)) for depth in depths]
        context, done = start, 0
        for place, needle in zip(places, needles):
            context = context + filler[done:place] + needle
            done = place
        return context + filler[done:]

    def _filler(self, count: int, rng: random.Random) -> list[int]:
        prose = paragraphs(self.text)
        at = rng.randrange(len(prose))
        found: list[int] = []
        while len(found) < count:
            found += self._ids(prose[at % len(prose)] + "\n\n")
            at += 1
        return found[:count]
