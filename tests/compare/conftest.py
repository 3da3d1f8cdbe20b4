"""One tiny model and tokenizer for the whole room."""

from __future__ import annotations

from typing import Any

import pytest

from tests.compare.small import byte_model, byte_tokenizer


@pytest.fixture(scope="package")
def model() -> Any:
    return byte_model()


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return byte_tokenizer()
