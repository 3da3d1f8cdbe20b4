"""H2O and observed attention against a loop over single keys."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.keep.h2o import H2O, MASS, ObservedAttention
from tests.methods.driving import held_mask, kept, random_qkv


def by_hand(q: Tensor, k: Tensor, group: list[int], head: int, prompt: int, heavy: int, recent: int) -> list[list[int]]:
    """Positions held after the prompt and after every step, from weights of one query and one key at a time."""
    sigma: dict[int, float] = {}
    held: list[list[int]] = []
    for t in range(q.shape[1]):
        sigma[t] = 0.0
        for h in group:
            logits = {j: float(q[h, t] @ k[head, j]) / math.sqrt(q.shape[-1]) for j in sigma}
            total = sum(math.exp(z) for z in logits.values())
            for j, z in logits.items():
                sigma[j] += math.exp(z) / total
        if t >= prompt - 1:
            if len(sigma) > heavy + recent:
                order = sorted(sigma)
                old, new = order[: len(order) - recent], order[len(order) - recent :]
                best = sorted(old, key=lambda j: (-sigma[j], j))[:heavy]
                sigma = {j: sigma[j] for j in sorted(best) + new}
            held.append(sorted(sigma))
    return held


@pytest.mark.parametrize(("heavy", "recent"), [(5, 6), (9, 0), (0, 7), (1, 1)])
def test_equals_the_definition(heavy: int, recent: int) -> None:
    q, k, v = random_qkv(B=1)
    layer = SingleLayer(H2O(budget=heavy + recent, recent=recent))
    for number, span in enumerate([slice(0, 30), *[slice(t, t + 1) for t in range(30, 40)]]):
        layer(q[:, :, span], k[:, :, span], v[:, :, span])
        for head, group in ((0, [0, 1]), (1, [2, 3])):
            assert kept(layer, 0, head) == by_hand(q[0], k[0], group, head, 30, heavy, recent)[number]


def test_sums_count_the_queries_until_something_is_evicted() -> None:
    q, k, v = random_qkv()
    layer = SingleLayer(H2O(budget=100))
    layer(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    layer(q[:, :, 30:31], k[:, :, 30:31], v[:, :, 30:31])
    # 31 queries of 2 heads each in a group, every one with weights that add up to 1.
    torch.testing.assert_close(layer.cache.extra(MASS).sum(-1), torch.full((2, 2), 62.0, dtype=torch.float64))


def test_without_heavy_keys_it_is_a_recency_window() -> None:
    q, k, v = random_qkv()
    layer = SingleLayer(H2O(budget=8, recent=8))
    layer(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    layer(q[:, :, 30:31], k[:, :, 30:31], v[:, :, 30:31])
    assert kept(layer, 1, 1) == list(range(23, 31))


def test_recent_keys_are_half_of_the_budget_unless_given() -> None:
    assert H2O(budget=9).recent_of(9) == 4
    assert H2O(ratio=0.5).recent_of(torch.tensor([9, 6])).tolist() == [4, 3]
    assert H2O(budget=9, recent=2).recent_of(9) == 2


def test_early_keys_lose_their_advantage_when_normalised() -> None:
    """With equal weights everywhere, sums favour early keys and means favour none."""
    q = torch.zeros(1, 1, 20, 4, dtype=torch.float64)
    k = torch.randn(1, 1, 20, 4, dtype=torch.float64)
    step = SingleLayer(H2O(budget=8, recent=0)).step(q, k, k)
    plain = H2O(budget=8, recent=0).score(step)[0, 0]
    mean = H2O(budget=8, recent=0, normalize=True).score(step)[0, 0]
    assert bool((plain.diff() < 0).all())
    expected = [sum(1 / (i + 1) for i in range(j, 20)) / (20 - j) for j in range(20)]
    torch.testing.assert_close(mean, torch.tensor(expected, dtype=torch.float64))


def test_observed_attention_is_the_mean_weight_over_queries_that_saw_the_key() -> None:
    q, k, v = random_qkv(B=1)
    logits = torch.einsum("hid,hjd->hij", q[0], k[0].repeat_interleave(2, 0)) / math.sqrt(8)
    visible = torch.ones(40, 40, dtype=torch.bool).tril()
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    expected = torch.stack([weights[2 * h : 2 * h + 2].sum(1).mean(0) for h in range(2)]) / torch.arange(40, 0, -1)
    layer = SingleLayer(ObservedAttention(budget=10))
    torch.testing.assert_close(ObservedAttention(budget=10).score(layer.step(q, k, v))[0], expected)
    layer = SingleLayer(ObservedAttention(budget=10))
    layer(q, k, v)
    for head in range(2):
        assert kept(layer, 0, head) == sorted(expected[head].topk(10).indices.tolist())


def test_observed_attention_evicts_once() -> None:
    q, k, v = random_qkv()
    layer = SingleLayer(ObservedAttention(budget=10))
    layer(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    before = held_mask(layer, 30)
    layer(q[:, :, 30:31], k[:, :, 30:31], v[:, :, 30:31])
    assert layer.cache.stored == 11
    assert torch.equal(held_mask(layer, 31)[..., :30], before)


def test_more_recent_keys_than_budget_are_refused() -> None:
    with pytest.raises(OptionError, match=r"recent=9, allowed: <= budget=8"):
        H2O(budget=8, recent=9)
