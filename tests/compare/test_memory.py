"""Peak memory sees what a request takes at most, and nothing of what was there before."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from foveate.compare import memory
from foveate.compare.memory import PeakMemory, kind_of_peak, quick_collections

MIB = 2**20
ON_LINUX = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")


def _touch(mib: int) -> torch.Tensor:
    return torch.ones(mib * MIB // 4)


@ON_LINUX
def test_a_peak_that_was_freed_again_counts() -> None:
    with PeakMemory(torch.device("cpu")) as peak:
        _touch(96)
        kept = _touch(16)
    assert kept.numel()
    assert peak.bytes is not None
    assert 90 * MIB <= peak.bytes <= 140 * MIB


@ON_LINUX
def test_what_was_there_before_does_not_count() -> None:
    before = _touch(64)
    with PeakMemory(torch.device("cpu")) as peak:
        small = _touch(8)
    assert before.numel() > small.numel()
    assert peak.bytes is not None
    assert peak.bytes < 32 * MIB


@ON_LINUX
def test_without_the_kernels_mark_a_thread_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_can_reset", lambda: False)
    assert "sampled" in kind_of_peak(torch.device("cpu"))
    with PeakMemory(torch.device("cpu")) as peak:
        held = _touch(64)
        for _ in range(8):
            held = held * 1.0
    assert peak.bytes is not None
    assert peak.bytes >= 60 * MIB


def test_a_device_that_cannot_be_measured_says_so() -> None:
    assert kind_of_peak(torch.device("meta")) == "not measured on meta"
    with PeakMemory(torch.device("meta")) as peak:
        pass
    assert peak.bytes is None


def test_quick_collections_leave_the_collector_as_it_was() -> None:
    assert gc.get_freeze_count() == 0
    with quick_collections():
        assert gc.get_freeze_count() > 0
        with quick_collections():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0
