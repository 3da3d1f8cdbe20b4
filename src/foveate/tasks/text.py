"""Text for tasks: the English prose of Python's own manual, or a text file of the user's.

`paragraphs(None)` reads `pydoc_data.topics`, which ships with Python: headings, grammar, signatures, code and
repeated paragraphs are left out, emphasis marks are removed, each paragraph becomes one line. The manual differs a
little between Python versions, so texts are the same for one Python version, not for all.

A user's file is UTF-8; blank lines separate its paragraphs.

Errors: a file that is missing, unreadable, not UTF-8 or without words raises DataError.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

from foveate.errors import DataError

_FEWEST_WORDS = 10
_LETTERS = 0.85
_NOT_PROSE = re.compile(r"::=|>>>|-->|--\+|==|^(Changed|New|Added) in version|^Deprecated")
_EMPHASIS = re.compile(r"(?<![\w*%])\*{1,2}(?=\w)([^*]+?)(?<=\w)\*{1,2}(?!\w)")
_LIST_MARK = re.compile(r"^(\*|\d+\.|\[\d+\]) ")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')]*\s+(?=[\"'(]*[A-Z])")
_PLAIN = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "…": "..."})


def paragraphs(path: str | None) -> tuple[str, ...]:
    """Paragraphs of the file at `path`, or of Python's manual when `path` is None; each one line, none empty."""
    if path is None:
        return _manual()
    return _of_file(str(Path(path).expanduser()))


@functools.cache
def sentences(path: str | None) -> tuple[str, ...]:
    """The sentences of `paragraphs(path)`, in order."""
    return tuple(sentence for paragraph in paragraphs(path) for sentence in _SENTENCE_END.split(paragraph) if sentence)


@functools.cache
def _manual() -> tuple[str, ...]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError(
            "this Python has no manual text (pydoc_data.topics); name a text file with text=PATH"
        ) from error
    kept: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            line = _one_line(block)
            if _is_prose(line):
                kept[line] = None
    return tuple(kept)


def _one_line(block: str) -> str:
    unwrapped = re.sub(r"(?<=\w-)\n\s*(?=\w)", "", block.translate(_PLAIN))
    line = " ".join(unwrapped.split())
    return _EMPHASIS.sub(r"\1", _LIST_MARK.sub("", line))


def _is_prose(line: str) -> bool:
    if len(line.split()) < _FEWEST_WORDS or line[-1] not in ".!?" or _NOT_PROSE.search(line):
        return False
    if not (line[0].isupper() or line[0] in "\"('"):
        return False
    return sum(each.isalpha() or each in " .,'" for each in line) >= _LETTERS * len(line)


@functools.cache
def _of_file(path: str) -> tuple[str, ...]:
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8 text") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a UTF-8 text file") from error
    found = tuple(" ".join(block.split()) for block in re.split(r"\n\s*\n", text) if block.strip())
    if not found:
        raise DataError(f"{path}: there is no text in it; name a UTF-8 text file with words")
    return found
