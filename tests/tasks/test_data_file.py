"""A user's JSONL file: what it gives, and every way in which it can be wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from foveate.errors import DataError, OptionError
from foveate.tasks.data_file import DataFile, read_records
from tests.tasks.tokenizers import tokenizer

TOKENIZER = tokenizer("byte-level")
GOOD = {"context": "Ada wrote the first program.", "question": "Who wrote it?", "answers": ["Ada", "Lovelace"]}


def write(tmp_path: Path, *lines: object) -> str:
    file = tmp_path / "own.jsonl"
    file.write_text("\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines) + "\n")
    return str(file)


def test_records_become_examples(tmp_path: Path) -> None:
    second = {**GOOD, "context": "Grace made a compiler.\u2028It ran.", "answers": ["Grace"], "source": "ignored"}
    task = DataFile(path=write(tmp_path, GOOD, "", json.dumps(second, ensure_ascii=False)))
    assert task.examples == 2
    first = task.example(TOKENIZER, 500, 0)
    assert TOKENIZER.decode(first.context) == GOOD["context"]
    assert TOKENIZER.decode(first.turns[0].question) == "\n\nWho wrote it? Answer:"
    assert first.turns[0].answers == ("Ada", "Lovelace")
    assert first.turns[0].max_new_tokens == 32
    assert first.length == len(first.context) + len(first.turns[0].question) < 500
    other = task.example(TOKENIZER, 500, 1)
    assert TOKENIZER.decode(other.context) == second["context"]
    assert other.meta == {"line": 3, "cut": 0, "chat": False}
    assert task.example(TOKENIZER, 500, 2).context == first.context


def test_any_of_the_answers_will_do(tmp_path: Path) -> None:
    task = DataFile(path=write(tmp_path, GOOD))
    example = task.example(TOKENIZER, 500, 0)
    assert task.score(["It was LOVELACE."], example) == 1.0
    assert task.score(["It was Grace."], example) == 0.0


def test_chat(tmp_path: Path) -> None:
    example = DataFile(path=write(tmp_path, GOOD), chat=True).example(TOKENIZER, 500, 0)
    user = f"{GOOD['context']}\n\n{GOOD['question']}"
    assert TOKENIZER.decode(example.context + example.turns[0].question) == (
        f"<|start|>user\n{user}<|end|>\n<|start|>assistant\nAnswer:"
    )


def test_a_record_that_is_too_long_is_refused_or_cut_in_the_middle(tmp_path: Path) -> None:
    path = write(tmp_path, GOOD, {**GOOD, "context": " ".join(f"word{number}" for number in range(200))})
    whole = DataFile(path=path).example(TOKENIZER, 10_000, 1)
    with pytest.raises(OptionError, match=f"line 2: length=200, allowed: >= {whole.length} .* or too_long=cut"):
        DataFile(path=path).example(TOKENIZER, 200, 1)
    cut = DataFile(path=path, too_long="cut").example(TOKENIZER, 200, 1)
    assert len(cut.context) + len(cut.turns[0].question) == cut.length == 200
    assert cut.meta["cut"] == whole.length - 200
    half = len(cut.context) // 2
    assert cut.context[-half:] == whole.context[-half:]
    assert cut.context[: len(cut.context) - half] == whole.context[: len(cut.context) - half]


def test_a_length_without_room_for_any_context_is_refused(tmp_path: Path) -> None:
    task = DataFile(path=write(tmp_path, GOOD), too_long="cut")
    with pytest.raises(OptionError, match=r"line 1: length=3, allowed: >= \d+ for this record$") as caught:
        task.example(TOKENIZER, 3, 0)
    least = int(re.findall(r">= (\d+)", str(caught.value))[0])
    assert len(task.example(TOKENIZER, least, 0).context) == 2


@pytest.mark.parametrize("missing", ["context", "question", "answers"])
def test_a_missing_field_names_file_and_line(tmp_path: Path, missing: str) -> None:
    bad = {name: value for name, value in GOOD.items() if name != missing}
    with pytest.raises(DataError, match=rf"own\.jsonl, line 2: the field '{missing}' is missing"):
        DataFile(path=write(tmp_path, GOOD, bad))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({**GOOD, "context": 7}, "context=7, allowed: a text"),
        ({**GOOD, "context": "  "}, "context='  ', allowed: a text"),
        ({**GOOD, "question": None}, "question=None, allowed: a text"),
        ({**GOOD, "answers": "Ada"}, "answers='Ada', allowed: a list of texts"),
        ({**GOOD, "answers": []}, "answers=[], allowed: a list of texts"),
        ({**GOOD, "answers": ["Ada", 1]}, "answers=['Ada', 1], allowed: a list of texts"),
        ({**GOOD, "answers": [""]}, "answers=[''], allowed: a list of texts"),
        ("[1, 2]", "list, allowed: an object"),
        ('{"context": "a', "not JSON (Unterminated string"),
        ("context,question,answers", "not JSON"),
    ],
)
def test_wrong_lines_name_file_and_line(tmp_path: Path, line: object, message: str) -> None:
    with pytest.raises(DataError, match=rf"own\.jsonl, line 3: {re.escape(message)}"):
        DataFile(path=write(tmp_path, GOOD, "", line, GOOD))


@pytest.mark.parametrize(
    ("content", "message"), [(b"", "empty"), (b"\n \n", "empty"), (b'{"a": "\xff"}', "not UTF-8 at byte 7")]
)
def test_files_without_records_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "own.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"own\.jsonl: {message}"):
        read_records(str(file))


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "gone.jsonl", tmp_path):
        with pytest.raises(DataError, match="cannot be read"):
            DataFile(path=str(path))
