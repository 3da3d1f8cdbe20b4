"""Shared test set-up: one thread per worker, fixed seeds."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton's interpreter runs kernels where there is no GPU; it must be chosen before anything imports triton.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("PYTEST_XDIST_WORKER"):
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Slow claims run in `make claims`, GPU tests where there is a GPU."""
    chosen = config.getoption("-m") or ""
    for item in items:
        if "slow" in item.keywords and "slow" not in chosen and "claim" not in chosen:
            item.add_marker(pytest.mark.skip(reason="longer than ten seconds; runs in `make claims`"))
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
