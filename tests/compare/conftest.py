"""One tiny model and tokenizer for the whole room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.compare.small import byte_model, byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog, and the dog does not mind it at all. "


@pytest.fixture(scope="package")
def model() -> Any:
    return byte_model()


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "user-cache"))


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """A short text file, so that perplexity examples are made at once."""
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 12)
    return path
