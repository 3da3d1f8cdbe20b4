"""`top_slots` by the Triton kernel against its definition."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import scoring
from tests.kernels.definitions import DEVICE

SCORES = {
    "distinct": lambda: torch.randn(2, 3, 90),
    "level": lambda: torch.randint(0, 3, (2, 3, 90)).float(),
    "bfloat16": lambda: torch.randn(2, 3, 90).bfloat16(),
    "few finite": lambda: torch.randn(2, 3, 90).masked_fill(torch.rand(2, 3, 90) < 0.9, -torch.inf),
    "a row of none": lambda: torch.randn(2, 3, 90).index_fill(1, torch.tensor([1]), -torch.inf),
    "none at all": lambda: torch.full((1, 2, 90), -torch.inf),
    "strided": lambda: torch.randn(90, 3, 2).transpose(0, 2),
}


@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("count", [1, 20, 89])
def test_the_kernel_finds_the_same_slots(monkeypatch, case, count):
    scores = SCORES[case]().to(DEVICE)
    want = scoring.slots_of(scoring.top_mask(scores, count))
    monkeypatch.setattr(scoring, "_has_topk_kernel", lambda scores: True)
    got = scoring.top_slots(scores, count)
    assert got.dtype == torch.int64
    assert torch.equal(got, want)


@pytest.mark.parametrize("count", [0, 90, 100, torch.tensor([[3], [7]])])
def test_other_counts_do_not_go_to_the_kernel(monkeypatch, count):
    scores = torch.randn(2, 3, 90, device=DEVICE)
    want = scoring.slots_of(scoring.top_mask(scores, count))
    monkeypatch.setattr(scoring, "_has_topk_kernel", lambda scores: True)
    monkeypatch.setattr(scoring, "_top_by_kernel", None)
    assert torch.equal(scoring.top_slots(scores, count), want)


def test_scores_on_cpu_and_in_float64_stay_with_torch():
    assert not scoring._has_topk_kernel(torch.randn(1, 1, 9))
    assert not scoring._has_topk_kernel(torch.randn(1, 1, 9, dtype=torch.float64, device=DEVICE))
