"""A user's own questions, from a JSONL file: one object per line.

    {"context": "a long text ...", "question": "Who ...?", "answers": ["Ada Lovelace", "Lovelace"]}

`context` and `question` are non-empty strings, `answers` a non-empty list of non-empty strings. Other fields are left
alone, empty lines skipped. The whole file is checked when the task is made. Seed s is the s-th record, modulo
their number. An output is right (1) when any of the answers occurs in it, in either case.

Records keep their own size: `length` is the most that context and question may take. A longer record is refused, or
with `too_long="cut"` loses the middle of its context (which may hold the answer; meta["cut"] counts the lost tokens).
`Example.length` is the true number of tokens.

Errors: DataError with file and line for a missing field, a wrong type or broken JSON; for a file that is
missing, empty or not UTF-8. OptionError for a record that does not fit. Cost: linear in the record.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from foveate.errors import DataError, OptionError
from foveate.options import option
from foveate.registry import register
from foveate.tasks.base import Example, Task, Turn, check_length
from foveate.tasks.prompt import Question, beginning, encode, encode_question, frame
from foveate.tasks.scoring import any_found


@dataclass(frozen=True)
class Record:
    """One line of the file."""

    line: int
    context: str
    question: str
    answers: tuple[str, ...]


@register(
    "data-file",
    kind="task",
    paper="a user's own data",
    year=2026,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class DataFile(Task):
    """Questions about texts of the user's own, from a JSONL file."""

    path: str = option(..., "JSONL file with the fields context, question and answers")
    chat: bool = option(False, "put the prompt into the tokenizer's chat template (the cue opens the reply)")
    cue: str = option("Answer:", "what the model's answer begins with")
    max_new_tokens: int = option(32, "tokens an answer may take", at_least=1)
    too_long: str = option("refuse", "what happens to a record above the length", one_of=("refuse", "cut"))

    def check(self) -> None:
        # Read now, so that a bad file is refused before any work.
        _ = self.records

    @functools.cached_property
    def records(self) -> tuple[Record, ...]:
        """The file's records, read once."""
        return read_records(self.path)

    @property
    def examples(self) -> int:
        return len(self.records)

    def match(self, output: str, answers: Sequence[str]) -> float:
        return any_found(output, answers)

    def example(self, tokenizer: Any, length: int, seed: int) -> Example:
        check_length(self, length)
        record = self.records[seed % len(self.records)]
        framed = frame("data-file", tokenizer, self.chat)
        asked = Question(record.question, self.cue, record.answers, max_new_tokens=self.max_new_tokens)
        question, new_tokens = encode_question(tokenizer, framed, asked, follows_answer=False)
        start = beginning(tokenizer) if framed.special_tokens else []
        context = start + encode(tokenizer, framed.opening + record.context)
        lost = len(context) + len(question) - length
        if lost > 0:
            context = self._cut(context, lost, record, length)
        turn = Turn(question, record.answers, new_tokens)
        meta = {"line": record.line, "cut": max(lost, 0), "chat": self.chat}
        return Example(tuple(context), (turn,), len(context) + len(question), seed, None, meta)

    def _cut(self, context: list[int], lost: int, record: Record, length: int) -> list[int]:
        kept = len(context) - lost
        if self.too_long == "refuse" or kept < 2:
            least = length + lost if self.too_long == "refuse" else length + 2 - kept
            advice = ", or too_long=cut" if self.too_long == "refuse" else ""
            raise OptionError(
                f"{self.path}, line {record.line}: length={length}, allowed: >= {least} for this record{advice}"
            )
        head = kept - kept // 2
        return context[:head] + context[len(context) - kept // 2 :]


def read_records(path: str) -> tuple[Record, ...]:
    """The records of a JSONL file; DataError names file and line of the first one that is not as documented."""
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 at byte {error.start}; save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); name a JSONL file") from error
    # Not splitlines(): it also splits at characters that JSON allows inside strings.
    lines = enumerate(text.split("\n"), 1)
    records = tuple(_record(path, number, line) for number, line in lines if line.strip())
    if not records:
        raise DataError(f'{path}: empty; write one {{"context": ..., "question": ..., "answers": [...]}} per line')
    return records


def _record(path: str, number: int, line: str) -> Record:
    where = f"{path}, line {number}"
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); write one object per line"
        ) from error
    if not isinstance(fields, dict):
        raise DataError(f"{where}: {type(fields).__name__}, allowed: an object with context, question and answers")
    answers = _field(where, fields, "answers")
    if not isinstance(answers, list) or not answers or not all(map(_is_text, answers)):
        raise DataError(f'{where}: answers={_short(answers)}, allowed: a list of texts such as ["Paris"]')
    texts = []
    for name in ("context", "question"):
        value = _field(where, fields, name)
        if not _is_text(value):
            raise DataError(f"{where}: {name}={_short(value)}, allowed: a text that is not empty")
        texts.append(value)
    return Record(number, texts[0], texts[1], tuple(answers))


def _field(where: str, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise DataError(f"{where}: the field {name!r} is missing; write context, question and answers")
    return fields[name]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
