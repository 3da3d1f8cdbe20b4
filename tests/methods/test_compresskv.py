"""CompressKV: which heads vote, what stays, and how layers share a budget."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.errors import OptionError, ProfileError
from foveate.methods import SingleLayer, create
from foveate.methods.budgets import layer_budgets
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.compresskv import CompressKV
from foveate.methods.profile import ModelIdentity
from foveate.methods.single import masked_reference

IDENTITY = ModelIdentity("toy", 2, 4, 2, 8, "none")
SCORES = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.4, 0.4, 0.5, 0.0]])
ERROR = torch.tensor([0.75, 0.25], dtype=torch.float64)


def bound(scores: Tensor = SCORES, **options: object) -> CompressKV:
    profile = table_profile("compresskv", IDENTITY, semantic=scores, error=ERROR)
    made = CompressKV(profile=profile, **{"window": 4, "allocate": False, **options})  # type: ignore[arg-type]
    return made.for_model(IDENTITY)


def qkv(N: int, B: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(B, 4, N, 8), torch.randn(B, 2, N, 8), torch.randn(B, 2, N, 8)


def votes_by_hand(q: Tensor, k: Tensor, heads: list[int], window: int) -> Tensor:
    """[N - window], loop by loop: sum of the window's weights, average of five neighbours, mean of the heads."""
    N = q.shape[1]
    total = torch.zeros(N - window)
    for h in heads:
        mass = torch.zeros(N - window)
        for i in range(N - window, N):
            row = (k[h // 2, : i + 1] @ q[h, i] * q.shape[-1] ** -0.5).softmax(0)
            mass += row[: N - window]
        for j in range(N - window):
            total[j] += sum(mass[n] for n in range(max(0, j - 2), min(N - window, j + 3))) / 5
    return total / len(heads)


@pytest.mark.parametrize(
    ("layer", "first_k", "heads"), [(0, 1, [1]), (0, 2, [1, 2]), (1, 2, [2, 0]), (1, 9, [0, 1, 2, 3])]
)
def test_only_the_best_heads_vote_and_all_kv_heads_keep_the_same(layer: int, first_k: int, heads: list[int]) -> None:
    q, k, v = qkv(40)
    single = SingleLayer(bound(budget=14, first_k=first_k), layer=layer, layers=2)
    single(q, k, v)
    best = votes_by_hand(q[0], k[0], heads, 4).topk(10).indices.sort().values
    expected = [*best.tolist(), 36, 37, 38, 39]
    assert single.cache.kept_positions(0, 0).tolist() == expected
    assert single.cache.kept_positions(0, 1).tolist() == expected


def test_decoding_equals_attention_over_what_was_kept() -> None:
    q, k, v = qkv(45)
    single = SingleLayer(bound(budget=14), layers=2)
    single(*(each[:, :, :40] for each in (q, k, v)))
    keep = torch.zeros(1, 2, 45, dtype=torch.bool)
    keep[:, :, single.cache.kept_positions(0, 0)] = True
    keep[:, :, 40:] = True
    out = torch.cat([single(*(each[:, :, t : t + 1] for each in (q, k, v))) for t in range(40, 45)], 2)
    expected = masked_reference(q, k, v, keep)[:, :, 40:]
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    assert single.cache.stored == 19


def test_all_heads_and_equal_budgets_are_snapkv_with_one_shared_choice() -> None:
    q, k, v = qkv(50)
    snap = SingleLayer(create("snapkv:budget=20,window=4"), layers=2)
    ours = SingleLayer(bound(budget=20, first_k=4), layers=2)
    # With one KV head per layer, the mean over its group is the mean over all heads.
    snap(q[:, :2], k[:, :1], v[:, :1])
    shared = q.clone()
    shared[:, 2:], k[:, 1:] = q[:, :2], k[:, :1]
    ours(shared, k, v)
    assert ours.cache.kept_positions(0, 1).tolist() == snap.cache.kept_positions(0, 0).tolist()


def test_layers_share_the_budget_and_short_prompts_keep_everything() -> None:
    method = bound(budget=20, allocate=True, least=6)
    assert [method.layer_count(layer, 20) for layer in range(2)] == layer_budgets([0.75, 0.25], 20, 6, 60) == [27, 13]
    q, k, v = qkv(25)
    held = []
    for layer in range(2):
        single = SingleLayer(method, layer=layer, layers=2)
        single(q, k, v)
        held.append(single.cache.stored)
    assert held == [25, 13]


def test_left_padded_rows_choose_as_they_would_alone() -> None:
    q, k, v = qkv(40, B=2)
    positions = torch.stack((torch.arange(40), torch.arange(40) - 17)).clamp_min(-1)
    for options in ({"budget": 14}, {"ratio": 0.5}, {"ratio": 0.5, "allocate": True, "least": 5}):
        both = SingleLayer(bound(**options), layers=2)
        both(q, k, v, positions=positions)
        alone = SingleLayer(bound(**options), layers=2)
        alone(q[1:, :, 17:], k[1:, :, 17:], v[1:, :, 17:])
        assert both.cache.kept_positions(1, 0).tolist() == alone.cache.kept_positions(0, 0).tolist()


def test_a_chunked_prompt_is_decided_at_its_end() -> None:
    q, k, v = qkv(40)
    whole, pieces = (SingleLayer(bound(budget=14), layers=2, chunked=chunked) for chunked in (False, True))
    whole(q, k, v)
    for part in (slice(0, 20), slice(20, 38), slice(38, 40)):
        pieces(q[:, :, part], k[:, :, part], v[:, :, part])
    pieces.finish_prefill()
    assert pieces.cache.kept_positions(0, 0).tolist() == whole.cache.kept_positions(0, 0).tolist()


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda each: sum(each) > 1e-6),
    st.integers(1, 50),
    st.integers(0, 300),
)
def test_budgets_sum_exactly_and_keep_their_bounds(weights: list[float], least: int, more: int) -> None:
    error = [each / sum(weights) for each in weights]
    mean = least + more
    budgets = layer_budgets(error, mean, least, 3 * mean)
    assert sum(budgets) == mean * len(error)
    assert all(least <= each <= 3 * mean for each in budgets)


def test_bad_input() -> None:
    with pytest.raises(OptionError, match="budget=8, allowed: > window=8"):
        create("compresskv", budget=8)
    with pytest.raises(OptionError, match="least=8, allowed: > window=8"):
        create("compresskv", least=8)
    with pytest.raises(OptionError, match="kernel=4, allowed: an odd number"):
        create("compresskv", kernel=4)
    with pytest.raises(OptionError, match="mean=3, allowed: between least=4"):
        layer_budgets([1.0], 3, 4, 9)
    with pytest.raises(ProfileError, match="foveate calibrate compresskv"):
        SingleLayer(CompressKV(budget=10))(*qkv(20))
    with pytest.raises(ProfileError, match="'error' is missing"):
        CompressKV(profile=table_profile("compresskv", IDENTITY, semantic=SCORES)).for_model(IDENTITY)
