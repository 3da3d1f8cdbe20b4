"""One tiny model and tokenizer for the whole room, and kernels' baselines without a compiler."""

from __future__ import annotations

from typing import Any

import pytest

from foveate.compare import bench_gpu_attention
from tests.compare.small import byte_model, byte_tokenizer


@pytest.fixture(scope="package")
def model() -> Any:
    return byte_model()


@pytest.fixture(scope="package")
def tokenizer() -> Any:
    return byte_tokenizer()


@pytest.fixture
def no_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own paths, and no FlexAttention, which then is a baseline that fails."""
    monkeypatch.setenv("FOVEATE_BACKEND", "torch")

    def no_flex() -> Any:
        raise RuntimeError("no compiler\nhere")

    monkeypatch.setattr(bench_gpu_attention, "compiled_flex", no_flex)
