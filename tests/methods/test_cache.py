"""LayerCache: two lengths, holes, ragged storage, growth, and everything that follows a gather."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foveate.attention.scoring import slots_of, top_mask
from foveate.errors import StateError, UnsupportedCacheError
from foveate.methods.budgets import head_budgets, pyramid_budget
from foveate.methods.cache import Drop, DropRagged, Keep, KeepRagged, LayerCache
from foveate.methods.storage import Segments


def filled(n: int, batch: int = 2, heads: int = 2, d: int = 4, pads: list[int] | None = None) -> LayerCache:
    """Key j of every head holds the number j in all features."""
    cache = LayerCache()
    rows = torch.arange(n, dtype=torch.float32)[None, None, :, None].expand(batch, heads, n, d)
    positions = None
    if pads is not None:
        cache.mark_holes()
        at = torch.arange(n)[None] - torch.tensor(pads)[:, None]
        positions = at.clamp_min(-1)
    cache.append(rows, rows * 10, positions)
    return cache


def test_keep_gathers_everything() -> None:
    cache = filled(10)
    cache.set_extra("mass", torch.arange(10.0)[None, None].expand(2, 2, 10))
    cache.apply(Keep(torch.tensor([[[1, 3], [0, 9]], [[2, 4], [5, 6]]])))
    assert cache.seen == 10
    assert cache.stored == 2
    assert cache.keys[0, 1, :, 0].tolist() == [0, 9]
    assert cache.values[1, 0, :, 0].tolist() == [20, 40]
    assert cache.extra("mass")[1, 1].tolist() == [5, 6]
    assert cache.kept_positions(0, 1).tolist() == [0, 9]
    cache.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert cache.kept_positions(0, 1).tolist() == [0, 9, 10]
    assert cache.extra("mass")[0, 0].tolist() == [1, 3, 0]


def test_absent_entries_are_holes() -> None:
    cache = filled(6)
    cache.keep(torch.tensor([[[0, 5, -1], [1, 2, 3]]] * 2))
    assert cache.holes
    assert cache.lengths().tolist() == [[2, 3], [2, 3]]
    cache.keep(torch.tensor([[[0, 1], [0, 1]]] * 2))
    assert not cache.holes


def test_drop_is_in_place_and_keeps_the_set() -> None:
    cache = filled(5)
    cache.apply(Drop(torch.tensor([[[0], [4]], [[2], [1]]])))
    assert cache.kept_positions(0, 0).tolist() == [1, 2, 3, 4]
    assert cache.kept_positions(0, 1).tolist() == [0, 1, 2, 3]
    assert not cache.ordered
    assert sorted(cache.keys[1, 0, :, 0].tolist()) == [0, 1, 3, 4]


def test_ragged_storage_frees_bytes_and_grows() -> None:
    cache = filled(400, d=16)
    before = cache.bytes()
    mask = torch.zeros(2, 2, 400, dtype=torch.bool)
    mask[0, 0, :300], mask[0, 1, :10], mask[1, 0, 7], mask[1, 1, 100:200] = True, True, True, True
    cache.apply(KeepRagged(mask))
    kept = int(mask.sum())
    assert cache.lengths().tolist() == [[300, 10], [1, 100]]
    per_token = 16 * 4 * 2 + 4
    assert cache.bytes() <= 1.05 * kept * per_token + 8 * per_token
    assert cache.bytes() < before / 3
    for step in range(30):
        cache.append(torch.full((2, 2, 1, 16), 1000.0 + step), torch.zeros(2, 2, 1, 16))
    assert cache.lengths().tolist() == [[330, 40], [31, 130]]
    assert cache.kept_positions(1, 0).tolist() == [7, *range(400, 430)]
    with pytest.raises(UnsupportedCacheError, match="different numbers of tokens"):
        _ = cache.keys
    cache.apply(DropRagged(((2, 0),)))
    assert cache.kept_positions(1, 0).tolist() == [*range(400, 430)]
    cache.select_batch(torch.tensor([1, 1, 0]))
    assert cache.lengths().tolist() == [[30, 130], [30, 130], [330, 40]]


def test_padding_never_enters_ragged_storage() -> None:
    cache = filled(8, pads=[3, 0])
    cache.apply(KeepRagged(torch.ones(2, 2, 8, dtype=torch.bool)))
    assert cache.lengths().tolist() == [[5, 5], [8, 8]]
    cache.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert cache.kept_positions(0, 0).tolist() == [0, 1, 2, 3, 4, 5]


def test_positions_follow_padding() -> None:
    cache = filled(6, pads=[2, 0])
    cache.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert cache.kept_positions(0, 0).tolist() == [0, 1, 2, 3, 4]
    assert cache.kept_positions(1, 0).tolist() == [0, 1, 2, 3, 4, 5, 6]


def test_crop_only_while_nothing_was_dropped() -> None:
    cache = filled(6)
    cache.crop(2)
    assert (cache.seen, cache.stored) == (4, 4)
    cache.keep(torch.zeros(2, 2, 1, dtype=torch.int64))
    with pytest.raises(UnsupportedCacheError, match="cannot be taken back"):
        cache.crop(1)


def test_replace_with_weights() -> None:
    cache = filled(6)
    cache.replace(
        torch.ones(2, 2, 3, 4), torch.ones(2, 2, 3, 4), torch.tensor([0, 1, 5]).expand(2, 2, 3), torch.zeros(2, 2, 3)
    )
    assert cache.stored == 3
    assert cache.log_weight is not None
    cache.append(torch.zeros(2, 2, 1, 4), torch.zeros(2, 2, 1, 4))
    assert cache.log_weight.shape[2] == 4


def test_foreign_batches_are_refused() -> None:
    cache = filled(3)
    with pytest.raises(StateError, match="start a new cache"):
        cache.append(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4))
    with pytest.raises(StateError, match="allowed: 3"):
        cache.set_extra("x", torch.zeros(2, 2, 9))
    with pytest.raises(StateError, match="keep: index"):
        cache.keep(torch.zeros(2, 1, 1, dtype=torch.int64))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=12))
def test_growth_is_amortised_and_lossless(steps: list[int]) -> None:
    cache = LayerCache()
    at = 0
    for m in steps:
        rows = torch.arange(at, at + m, dtype=torch.float32)[None, None, :, None].expand(1, 1, m, 2)
        cache.append(rows, rows)
        at += m
    assert cache.keys[0, 0, :, 0].tolist() == list(range(at))
    assert cache.bytes() <= 2 * 2 * 4 * (at + max(16, at // 64) + 64)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 30), st.integers(0, 35), st.integers(0, 5))
def test_top_mask_is_a_stable_sort(n: int, count: int, levels: int) -> None:
    scores = torch.randint(0, levels + 1, (2, 3, n)).float()
    mask = top_mask(scores, count)
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., : min(count, n)]
    expected = torch.zeros_like(mask).scatter(-1, order, True)
    assert torch.equal(mask, expected)
    by_tensor = top_mask(scores, torch.tensor([count, count])[:, None])
    assert torch.equal(by_tensor, expected)
    assert torch.equal(slots_of(mask).sort(-1).values, order.sort(-1).values)


def test_budgets() -> None:
    layers, capacity, window, beta = 8, 96, 16, 20
    total = sum(pyramid_budget(layer, layers, capacity, window, beta, 10**6) for layer in range(layers))
    assert abs(total - layers * (capacity - window)) <= layers * layers
    assert {pyramid_budget(layer, layers, capacity, window, 1, 10**6) for layer in range(layers)} == {80}
    same = torch.arange(50.0).expand(4, 50)
    assert head_budgets(same, 10, 0.2, False).tolist() == [10, 10, 10, 10]
    uneven = torch.zeros(2, 50)
    uneven[0] = torch.rand(50) + 1
    assert head_budgets(uneven, 10, 0.2, False).tolist() == [round(20 * 0.8 + 2), 2]


def test_segments_append_some_of_each() -> None:
    segments = Segments({"x": [torch.zeros(2, 1), torch.zeros(0, 1)]})
    segments.append({"x": torch.ones(2, 3, 1)}, [1, 3])
    assert segments.length == [3, 3]
    assert segments.segment("x", 0)[:, 0].tolist() == [0, 0, 1]
