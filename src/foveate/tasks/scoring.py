"""How outputs are matched with expected answers.

`found` is the rule of RULER (arXiv 2404.06654): the fraction of the expected strings that occur in the output, in
either case.
`numbered_pairs` and `set_overlap` are the stricter rules of The Sparse Frontier (arXiv 2504.17768) for its needle
and variable-tracking tasks. All return 0 to 1 and take time linear in the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_ANSWER_SECTION = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_NUMBERED_PAIR = re.compile(
    r"(?P<number>\d+)\.\s*The answer for\s+(?P<key>[\w-]+)\s+is:?\s+(?P<value>.+?)(?:\.|$)",
    re.IGNORECASE | re.MULTILINE,
)
_VAR = re.compile(r"\bVAR\s+")


def found(output: str, answers: Sequence[str]) -> float:
    """The fraction of `answers` that occur in `output`, in either case; 0 when there are no answers."""
    text = output.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers) if answers else 0.0


def any_found(output: str, answers: Sequence[str]) -> float:
    """1 when at least one of `answers` occurs in `output`, in either case, else 0."""
    text = output.lower()
    return float(any(answer.lower() in text for answer in answers))


def numbered_pairs(output: str, pairs: Sequence[tuple[str, str]]) -> float:
    """The fraction of `pairs` (key, value) that the output states in order, as "2. The answer for KEY is VALUE."

    The i-th pair must stand under the number i, its key exactly, its value in either case. Only the
    <answer> section is read where there is one; of two statements under one number the first counts.
    """
    stated: dict[int, tuple[str, str]] = {}
    for each in _NUMBERED_PAIR.finditer(_answer_section(output)):
        stated.setdefault(int(each["number"]), (each["key"], _flat(each["value"])))
    right = sum(stated.get(number) == (key, _flat(value)) for number, (key, value) in enumerate(pairs, 1))
    return right / len(pairs) if pairs else 0.0


def set_overlap(output: str, expected: str) -> float:
    """Intersection over union of two sets of words, in either case and without "VAR"; 1 when both are empty.

    Words are what whitespace separates: "ABCDE," with its comma is another word than "ABCDE".
    """
    given, wanted = _names(output), _names(expected)
    union = given | wanted
    return len(given & wanted) / len(union) if union else 1.0


def mean_and_variance(scores: Sequence[float]) -> tuple[float, float]:
    """The mean of `scores` and their unbiased variance (divided by n - 1); the variance of one score is 0."""
    if not scores:
        return 0.0, 0.0
    mean = sum(scores) / len(scores)
    if len(scores) == 1:
        return mean, 0.0
    return mean, sum((each - mean) ** 2 for each in scores) / (len(scores) - 1)


def _answer_section(text: str) -> str:
    section = _ANSWER_SECTION.search(text)
    return section[1] if section else text


def _flat(text: str) -> str:
    return " ".join(text.lower().split())


def _names(text: str) -> set[str]:
    return set(_VAR.sub("", _answer_section(text).upper()).split())
