"""Python's manual as prose, and files of the user's."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from foveate.errors import DataError
from foveate.tasks.niah import NiahSingle
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.text import paragraphs, sentences
from tests.tasks.tokenizers import tokenizer


def test_the_manual_is_long_clean_prose() -> None:
    manual = paragraphs(None)
    assert len(manual) == len(set(manual)) > 500
    assert sum(map(len, manual)) > 150_000
    for each in manual:
        assert "\n" not in each
        assert "  " not in each
        assert each[-1] in ".!?"
        assert not re.search(r"::=|>>>|\*{4}|={3}|~{3}|[“”‘’—]", each)


def test_known_sentences_are_there_and_code_is_not() -> None:
    text = " ".join(paragraphs(None))
    assert "is defined to have the inverse truth value of" in text
    assert "class C: pass" not in text
    assert "pass_stmt" not in text


def test_sentences_make_up_the_paragraphs() -> None:
    rejoined = " ".join(" ".join(sentences(None)).split())
    assert len(rejoined) == pytest.approx(len(" ".join(paragraphs(None))), rel=0.01)
    assert all(each.strip() == each and each for each in sentences(None))


def test_a_file_is_read_by_paragraphs(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_bytes("\ufeffOne  line,\r\nmore of it. Then more!\r\n\r\n \r\nÜber uns.\n".encode())
    assert paragraphs(str(file)) == ("One line, more of it. Then more!", "Über uns.")
    assert sentences(str(file)) == ("One line, more of it.", "Then more!", "Über uns.")


def test_tasks_use_the_users_text(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"Paragraph {number} tells a story." for number in range(400)))
    tok = tokenizer("byte-level")
    context = tok.decode(NiahSingle(text=str(file)).example(tok, 600, 0).context)
    assert len(re.findall(r"Paragraph \d+ tells a story\.", context)) > 20
    assert tok.decode(Perplexity(text=str(file), target=20).example(tok, 100, 0).context).startswith(
        "Paragraph 0 tells"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"caf\xe9 au lait", "not UTF-8 at byte 3"), (b" \n\n \n", "no text in it")],
)
def test_files_that_are_no_text_are_refused(tmp_path: Path, content: bytes | None, message: str) -> None:
    file = tmp_path / "bad.txt"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.txt: .*{message}"):
        paragraphs(str(file))


def test_a_python_without_manual_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    from foveate.tasks import text

    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    text._manual.cache_clear()
    with pytest.raises(DataError, match="name a text file with text=PATH"):
        paragraphs(None)
