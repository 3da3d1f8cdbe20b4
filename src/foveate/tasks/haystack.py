"""Filler text and where needles lie in it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence

from foveate.tasks.text import sentences

# Short sentences about nothing, repeated in this order (the passkey papers' kind of filler, our words).
REPEATED = (
    "Rain fell on the roof all night.",
    "The bread was warm from the oven.",
    "A cat slept under the old table.",
    "Somebody left the gate open again.",
    "The river runs slowly to the sea.",
)
_GOLDEN_RATIO = 0.6180339887498949


def repeated(units: int) -> list[str]:
    """`units` sentences of `REPEATED`."""
    return [REPEATED[place % len(REPEATED)] for place in range(units)]


def prose(path: str | None, rng: random.Random) -> Callable[[int], list[str]]:
    """k -> k sentences of the text at `path` (None: Python's manual), from a drawn place on, round and round."""
    text = sentences(path)
    start = rng.randrange(len(text))
    return lambda units: [text[(start + place) % len(text)] for place in range(units)]


def gap(sentences: Iterable[str]) -> str:
    """The text that fills a gap smaller than a sentence, for `Draft.padding`."""
    return " " + " ".join(sentences)


def lazily(lines: Iterator[str]) -> Callable[[int], list[str]]:
    """k -> the first k of `lines`, which are made only when they are needed."""
    made: list[str] = []

    def first(units: int) -> list[str]:
        made.extend(itertools.islice(lines, max(0, units - len(made))))
        return made[:units]

    return first


def depth_of(seed: int) -> float:
    """A needle depth in [0, 1) per seed; few seeds already cover the range evenly (golden-ratio sequence)."""
    return (0.3 + seed * _GOLDEN_RATIO) % 1.0


def weave(units: Sequence[str], needles: Iterable[tuple[float, str]]) -> list[str]:
    """The units with each needle (depth, sentence) put before unit round(depth * number of units)."""
    places = sorted(
        ((round(depth * len(units)), depth, needle) for depth, needle in needles), key=lambda each: each[:2]
    )
    woven: list[str] = []
    done = 0
    for place, _, needle in places:
        woven.extend(units[done:place])
        woven.append(needle)
        done = place
    woven.extend(units[done:])
    return woven
