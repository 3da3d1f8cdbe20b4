"""The C++ decode kernel against the reference in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.attention import Tokens, attend, explain
from foveate.attention.backends import cpp_scoring
from foveate.attention.backends.cpp import build
from foveate.attention.ragged import attend_ragged
from foveate.attention.scoring import query_scores, slots_of, top_mask, top_slots
from foveate.errors import BackendError

pytestmark = pytest.mark.skipif(
    build.why_unavailable() is not None, reason=f"the C++ kernel is not available: {build.why_unavailable()}"
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("d", [32, 64, 80, 128, 256])
@pytest.mark.parametrize("group", [1, 3, 4, 8, 16])
def test_against_reference(group: int, d: int, dtype: torch.dtype) -> None:
    for n in (1, 15, 63, 65, 127, 1000):
        q = (torch.randn(2, 2 * group, 1, d) * 3).to(dtype)
        k, v = torch.randn(2, 2, n, d).to(dtype), torch.randn(2, 2, n, d).to(dtype)
        lists = torch.stack([torch.randperm(n)[:37] - 1 for _ in range(4)]).view(2, 2, -1)
        for plan in (None, Tokens(lists), Tokens(lists, torch.tensor([[1, 0], [5, 20]]))):
            o, lse = attend(q, k, v, plan, backend="cpp", return_lse=True)
            ref, ref_lse = attend(q.double(), k.double(), v.double(), plan, backend="reference", return_lse=True)
            gate = 1e-5 if dtype == torch.float32 else 5e-3
            assert (o - ref).norm() <= gate * ref.norm()
            finite = ref_lse > -torch.inf
            assert torch.equal(lse > -torch.inf, finite)
            torch.testing.assert_close(lse[finite].double(), ref_lse[finite], rtol=0, atol=2e-4)


def test_large_logits_strides_and_sinks() -> None:
    q = torch.randn(1, 4, 1, 64) * 60
    k, v = (torch.randn(1, 300, 2, 64).transpose(1, 2)[:, :, 7:] for _ in range(2))
    sink = torch.randn(4)
    o = attend(q, k, v, sink=sink, backend="cpp")
    ref = attend(q.double(), k.double(), v.double(), sink=sink.double(), backend="reference")
    assert (o - ref).norm() <= 1e-5 * ref.norm()


def test_packed_segments() -> None:
    k, v, q = torch.randn(100, 32), torch.randn(100, 32), torch.randn(1, 6, 1, 32)
    start, length = [0, 40], [33, 0]
    o, lse = attend_ragged(q, k, v, start, length, return_lse=True)
    ref = attend(q[:, :3].double(), k[None, None, :33].double(), v[None, None, :33].double(), backend="reference")
    torch.testing.assert_close(o[:, :3].double(), ref, rtol=1e-5, atol=1e-6)
    assert bool((o[:, 3:] == 0).all())
    assert bool((lse[:, 3:] == -torch.inf).all())


def test_what_it_does_not_serve_is_said() -> None:
    q, k = torch.randn(1, 2, 4, 32), torch.randn(1, 1, 9, 32)
    with pytest.raises(BackendError, match="one query per head"):
        attend(q, k, k, backend="cpp")
    with pytest.raises(BackendError, match="windows, padding"):
        attend(q[:, :, :1], k, k, window=3, backend="cpp")
    assert explain(q, k, k).passed_over[0][0] == "cpp"


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOVEATE_CPP", "0")
    q, k = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 9, 32)
    assert explain(q, k, k).name == "torch"


def test_without_a_compiler_it_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    q, k = torch.randn(1, 2, 1, 32), torch.randn(1, 1, 9, 32)
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "compiler", lambda: None)
    monkeypatch.setattr(build, "_library", build._library.__wrapped__)
    assert "no C++ compiler" in str(explain(q, k, k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [16, 64, 80])
def test_scores_of_a_query(dtype: torch.dtype, size: int) -> None:
    torch.manual_seed(0)
    q, k = torch.randn(2, 6, size).to(dtype), torch.randn(2, 2, 40, size).to(dtype)[:, :, 3:]
    exact = torch.einsum("bhgd,bhnd->bhgn", q.double().view(2, 2, 3, size), k.double()).flatten(1, 2)
    assert cpp_scoring.why_not(q.view(2, 2, 3, size), k) is None
    made = query_scores(q, k)
    assert made.dtype == torch.float32
    assert torch.allclose(made.double(), exact, rtol=1e-5, atol=1e-4)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 70), st.booleans())
def test_the_best_slots_are_those_of_the_mask(seed: int, tokens: int, per_row: bool) -> None:
    made = torch.Generator().manual_seed(seed)
    # Few values, so that many are equal.
    scores = torch.randint(-3, 3, (2, 3, tokens), generator=made).float() * -1.0
    scores[torch.rand(scores.shape, generator=made) < 0.2] = -torch.inf
    counts = torch.randint(0, tokens + 2, (2, 3), generator=made)
    count = counts if per_row else int(counts[0, 0])
    assert cpp_scoring.why_not_top(scores) is None
    found, mask = top_slots(scores, count), top_mask(scores, count)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOVEATE_CPP", "0")
        assert torch.equal(top_mask(scores, count), mask)
    assert torch.equal(found, slots_of(mask))
