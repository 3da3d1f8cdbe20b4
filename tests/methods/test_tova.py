"""TOVA against its definition, and its relation to SnapKV."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.methods import SingleLayer
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.keep.tova import TOVA, layer_mean
from tests.methods.driving import kept, random_qkv


@pytest.mark.parametrize("force_last", [False, True])
def test_equals_the_definition(force_last: bool) -> None:
    q, k, v = random_qkv(B=1)
    layer = SingleLayer(TOVA(budget=9, force_last=force_last))
    held = list(range(29))
    for span in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 40))):
        layer(q[:, :, span], k[:, :, span], v[:, :, span])
        last = span.stop - 1
        held.append(last)
        mean = dict.fromkeys(held, 0.0)
        for h in range(4):
            exps = {j: math.exp(float(q[0, h, last] @ k[0, h // 2, j]) / math.sqrt(8)) for j in held}
            for j in held:
                mean[j] += exps[j] / sum(exps.values()) / 4
        if force_last:
            mean[last] = 2.0
        held = sorted(sorted(held, key=lambda j: (-mean[j], j))[:9])
        assert kept(layer, 0, 0) == kept(layer, 0, 1) == held


def test_the_newest_key_can_go() -> None:
    """A query that turns away from its own key evicts it at once, unless it is forced to stay."""
    k = torch.zeros(1, 1, 6, 4)
    k[..., 0] = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, -9.0])
    q = torch.ones(1, 2, 6, 4)
    for force_last, expected in ((False, [0, 1, 2, 3]), (True, [0, 1, 2, 5])):
        layer = SingleLayer(TOVA(budget=4, force_last=force_last))
        layer(q[:, :, :5], k[:, :, :5], k[:, :, :5])
        layer(q[:, :, 5:], k[:, :, 5:], k[:, :, 5:])
        assert kept(layer) == expected


@pytest.mark.parametrize("heads", [1, 2])
def test_equals_snapkv_with_a_window_of_one_at_the_prompt(heads: int) -> None:
    q, k, v = random_qkv(Hkv=heads)
    ours = SingleLayer(TOVA(budget=9, force_last=True, per_head=heads > 1))
    theirs = SingleLayer(SnapKV(budget=9, window=1, kernel=1))
    for layer in (ours, theirs):
        layer(q, k, v)
    for row in range(2):
        for head in range(heads):
            assert kept(ours, row, head) == kept(theirs, row, head)


def test_one_choice_per_layer_or_per_head() -> None:
    q, k, v = random_qkv()
    together, apart = SingleLayer(TOVA(budget=9)), SingleLayer(TOVA(budget=9, per_head=True))
    for layer in (together, apart):
        layer(q, k, v)
    assert kept(together, 0, 0) == kept(together, 0, 1)
    assert kept(apart, 0, 0) != kept(apart, 0, 1)


def test_heads_with_different_tokens_score_by_token() -> None:
    q, k, v = random_qkv(B=1, N=12)
    layer = SingleLayer(TOVA(budget=100))
    layer(q, k, v)
    layer.cache.keep(torch.tensor([[[0, 2, 5], [2, 3, 5]]]))
    step = layer.last
    assert step is not None
    weights = torch.tensor([[[0.1, 0.2, 0.7], [0.4, 0.4, 0.2]]], dtype=torch.float64)
    expected = torch.tensor([[[0.05, 0.3, 0.45], [0.3, 0.2, 0.45]]], dtype=torch.float64)
    torch.testing.assert_close(layer_mean(weights, step), expected)
