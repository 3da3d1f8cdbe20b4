"""`top_slots` by the Triton kernel against its definition, and that it does not wait for the device."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

pytest.importorskip("triton", reason="the package triton is not installed")

from foveate.attention import Tokens, attend, scoring
from foveate.methods import SingleLayer
from foveate.methods.prompt import PromptKeep
from foveate.methods.select.pages import Pages, best_pages
from tests.kernels.definitions import DEVICE

SCORES = {
    "distinct": lambda: torch.randn(2, 3, 90),
    "level": lambda: torch.randint(0, 3, (2, 3, 90)).float(),
    "bfloat16": lambda: torch.randn(2, 3, 90).bfloat16(),
    "few finite": lambda: torch.randn(2, 3, 90).masked_fill(torch.rand(2, 3, 90) < 0.9, -torch.inf),
    "few finite and level": lambda: torch.randn(2, 3, 90).sign().masked_fill(torch.rand(2, 3, 90) < 0.8, -torch.inf),
    "few finite in float16": lambda: torch.randn(2, 3, 90).half().masked_fill(torch.rand(2, 3, 90) < 0.9, -torch.inf),
    "a row of none": lambda: torch.randn(2, 3, 90).index_fill(1, torch.tensor([1]), -torch.inf),
    "none at all": lambda: torch.full((1, 2, 90), -torch.inf),
    "strided": lambda: torch.randn(90, 3, 2).transpose(0, 2),
}


@pytest.fixture
def _kernel(monkeypatch):
    monkeypatch.setattr(scoring, "_has_topk_kernel", lambda scores: True)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("case", SCORES)
@pytest.mark.parametrize("count", [-1, 0, 1, 20, 89, 90, 100])
def test_the_kernel_finds_the_same_slots(case, count):
    scores = SCORES[case]().to(DEVICE)
    want = scoring.slots_of(scoring.top_mask(scores, count))
    got = scoring.top_slots(scores, count)
    assert got.dtype == torch.int64
    assert got.shape[-1] == max(0, min(count, 90))
    assert torch.equal(got[..., : want.shape[-1]], want)
    assert (got[..., want.shape[-1] :] == -1).all()
    assert torch.equal(scoring.top_slots(scores, count, tight=True), want)


@pytest.mark.usefixtures("_kernel")
def test_counts_of_rows_do_not_go_to_the_kernel(monkeypatch):
    scores, count = torch.randn(2, 3, 90, device=DEVICE), torch.tensor([[3], [7]], device=DEVICE)
    want = scoring.slots_of(scoring.top_mask(scores, count))
    monkeypatch.setattr(scoring, "_top_by_kernel", None)
    assert torch.equal(scoring.top_slots(scores, count), want)


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("count", [0, 20, 100])
def test_the_host_never_looks_at_scores(count):
    with FakeTensorMode():
        # A tensor without data: whoever asks for a number of it raises.
        scores = torch.empty(2, 3, 90, device=DEVICE)
        assert scoring.top_slots(scores, count).shape == (2, 3, min(count, 90))
        if count:
            with pytest.raises(DataDependentOutputException):
                scoring.top_slots(scores, count, tight=True)


@pytest.mark.usefixtures("_kernel")
def test_a_selection_compiles_without_graph_breaks():
    scores = torch.randn(2, 3, 90, device=DEVICE)
    scores[1] = -torch.inf
    compiled = torch.compile(lambda x: scoring.top_slots(x, 20), backend="eager", fullgraph=True)
    assert torch.equal(compiled(scores), scoring.top_slots(scores, 20))


@pytest.mark.usefixtures("_kernel")
def test_absent_slots_are_read_by_nobody():
    q, k, v = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 90, 16), torch.randn(2, 2, 90, 16)
    scores = torch.randn(2, 2, 90).masked_fill(torch.rand(2, 2, 90) < 0.9, -torch.inf)
    loose, tight = (Tokens(scoring.top_slots(scores, 60, tight=tight)) for tight in (False, True))
    assert loose.index.shape[-1] == 60 > tight.index.shape[-1]
    assert loose.density(1, 90) == tight.density(1, 90)
    for backend in ("auto", "torch", "reference"):
        wide = attend(q, k, v, plan=loose, backend=backend)
        torch.testing.assert_close(wide, attend(q, k, v, plan=tight, backend=backend), rtol=1e-5, atol=1e-6)


@dataclass(frozen=True, kw_only=True)
class Some(PromptKeep):
    """Never keeps odd slots, nor anything of the second head but its first slot."""

    def score(self, step):
        scores = torch.randn(*step.cache.shape, step.cache.stored)
        scores[:, :, 1::2] = -torch.inf
        scores[:, 1, 1:] = -torch.inf
        return scores


@pytest.mark.usefixtures("_kernel")
def test_a_cache_has_no_slots_for_what_does_not_exist():
    layer = SingleLayer(Some(budget=20))
    layer(torch.randn(1, 4, 30, 16), *torch.randn(2, 1, 2, 30, 16).unbind())
    assert layer.cache.stored == 15
    assert layer.cache.kept_positions(0, 0).tolist() == list(range(0, 30, 2))
    assert layer.cache.kept_positions(0, 1).tolist() == [0]


@pytest.mark.usefixtures("_kernel")
@pytest.mark.parametrize("skip", [0, 5])
def test_absent_pages_have_no_slots(skip):
    pages = Pages("mean", 4, skip, covered=31)
    scores = torch.full((1, 2, 7), -torch.inf)
    scores[0, 0, 2] = scores[0, 1, 6] = 1.0
    slots = pages.slots(best_pages(scores, 3))
    assert slots.shape == (1, 2, 12)
    held = [row[row >= 0].tolist() for row in slots[0]]
    assert held == [[skip + 8, skip + 9, skip + 10, skip + 11], list(range(skip + 24, min(31, skip + 28)))]


def test_pages_that_end_the_list_are_cut_without_looking():
    # 30 tokens: page 7 lacks two.
    pages, chosen = Pages("mean", 4, covered=30), torch.tensor([[[1, 7]]])
    want = [4, 5, 6, 7, 28, 29]
    assert pages.slots(chosen).tolist() == pages.slots(chosen, ends=True).tolist() == [[want]]
    # On another device than the CPU, where looking means waiting; without data, looking raises.
    chosen = torch.empty(1, 1, 2, dtype=torch.int64, device="meta")
    assert pages.slots(chosen, ends=True).shape[-1] == 6
    assert pages.slots(chosen).shape[-1] == 8


def test_scores_on_cpu_and_in_float64_stay_with_torch():
    assert not scoring._has_topk_kernel(torch.randn(1, 1, 9))
    assert not scoring._has_topk_kernel(torch.randn(1, 1, 9, dtype=torch.float64, device=DEVICE))
