"""Page summaries: kept up incrementally they equal a rebuild, whatever happens to the cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.methods.cache import Drop, Keep, LayerCache
from foveate.methods.select.pages import Pages


def keys(tokens: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 2, tokens, 8)


def summaries(pages: Pages, cache: LayerCache) -> list[list[list[Tensor]]]:
    """By the definition: for each row and head, one vector per page."""
    made = []
    held = cache.positions
    for b in range(cache.shape[0]):
        rows = []
        for h in range(cache.shape[1]):
            own = cache.keys[b, h]
            if held is not None:
                own = own[held[b, min(h, held.shape[1] - 1)] >= 0]
            parts = own[pages.skip :].split(pages.size) if len(own) > pages.skip else []
            if pages.kind == "mean":
                rows.append([part.sum(0) for part in parts])
            else:
                rows.append([torch.cat((part.amax(0), part.amin(0))) for part in parts])
        made.append(rows)
    return made


def check(pages: Pages, cache: LayerCache) -> None:
    pages.update(cache)
    assert pages.summary is not None
    for b, rows in enumerate(summaries(pages, cache)):
        for h, own in enumerate(rows):
            for page, expected in enumerate(own):
                torch.testing.assert_close(pages.summary[b, h, page], expected, rtol=1e-5, atol=1e-5)


KINDS = pytest.mark.parametrize("kind, skip", [("bounds", 0), ("mean", 0), ("mean", 3), ("bounds", 5)])


@KINDS
def test_appending(kind: str, skip: int) -> None:
    cache, pages = LayerCache(), Pages(kind, 4, skip)
    for count in (7, 1, 1, 1, 9, 1, 100, 1):
        cache.append(keys(count), keys(count))
        check(pages, cache)


@KINDS
def test_appending_under_padding(kind: str, skip: int) -> None:
    cache, pages = LayerCache(), Pages(kind, 4, skip)
    cache.mark_holes()
    at = torch.arange(12)[None] - torch.tensor([[7], [2], [0]])
    cache.append(keys(12), keys(12), at.clamp_min(-1))
    check(pages, cache)
    for count in (1, 1, 1, 1, 1):
        cache.append(keys(count), keys(count))
        check(pages, cache)
    padded = torch.tensor([[10, 11, 12], [-1, 15, 16], [-1, -1, 17]])
    cache.append(keys(3), keys(3), padded)
    check(pages, cache)
    cache.append(keys(90), keys(90))
    check(pages, cache)


@KINDS
def test_padding_that_comes_later(kind: str, skip: int) -> None:
    cache, pages = LayerCache(), Pages(kind, 4, skip)
    cache.append(keys(10), keys(10))
    check(pages, cache)
    cache.mark_holes()
    cache.append(keys(2), keys(2), torch.tensor([[-1, 10], [10, 11], [10, 11]]))
    check(pages, cache)


@KINDS
def test_slots_that_change(kind: str, skip: int) -> None:
    cache, pages = LayerCache(), Pages(kind, 4, skip)
    cache.append(keys(30), keys(30))
    check(pages, cache)
    cache.apply(Keep(torch.arange(5, 25).expand(3, 2, -1)))
    check(pages, cache)
    cache.apply(Drop(torch.tensor([3, 4]).view(1, 2, 1).expand(3, -1, -1)))
    cache.append(keys(1), keys(1))
    check(pages, cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_bound_every_key_and_are_exact_for_single_tokens(dtype: torch.dtype) -> None:
    cache = LayerCache()
    cache.append(keys(50).to(dtype), keys(50).to(dtype))
    q = torch.randn(3, 4, 8).to(dtype)
    scores = q.float().unflatten(1, (2, 2)) @ cache.keys.float().transpose(-1, -2)
    for size in (1, 5, 16):
        pages = Pages("bounds", size)
        pages.update(cache)
        bounds = pages.upper_bounds(q).unflatten(1, (2, 2))
        best = torch.stack([part.amax(-1) for part in scores.split(size, dim=-1)], -1)
        slip = 1e-5 if dtype == torch.float32 else 0.05
        assert (bounds >= best - slip).all()
        if size == 1:
            torch.testing.assert_close(bounds, scores, rtol=1e-2, atol=slip)


def test_mean_score_is_the_mean_of_scores() -> None:
    cache, pages = LayerCache(), Pages("mean", 8, 4)
    cache.append(keys(44), keys(44))
    pages.update(cache)
    q = torch.randn(3, 4, 8)
    scores = q.unflatten(1, (2, 2)) @ cache.keys[:, :, 4:].transpose(-1, -2)
    expected = scores.unflatten(-1, (5, 8)).mean(-1).flatten(1, 2)
    torch.testing.assert_close(pages.mean_scores(q), expected, rtol=1e-4, atol=1e-5)


def test_slots_skip_padding_and_stop_at_the_end() -> None:
    cache, pages = LayerCache(), Pages("bounds", 4)
    cache.mark_holes()
    cache.append(keys(10, 2), keys(10, 2), (torch.arange(10)[None] - torch.tensor([[3], [0]])).clamp_min(-1))
    pages.update(cache)
    chosen = torch.tensor([[0, 1], [1, 2]])[:, None].expand(-1, 2, -1)
    assert pages.slots(chosen)[0, 0].tolist() == [3, 4, 5, 6, 7, 8, 9, -1]
    assert pages.slots(chosen)[1, 1].tolist() == [4, 5, 6, 7, 8, 9, -1, -1]


def test_the_last_page_of_every_head_is_cut_where_it_ends() -> None:
    cache, pages = LayerCache(), Pages("bounds", 4)
    cache.append(keys(10, 1), keys(10, 1))
    pages.update(cache)
    assert pages.slots(torch.tensor([[[0, 2], [1, 2]]]))[0].tolist() == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7, 8, 9]]
    assert pages.slots(torch.tensor([[[0, 2], [0, 1]]]))[0, 0].tolist() == [0, 1, 2, 3, 8, 9, -1, -1]
