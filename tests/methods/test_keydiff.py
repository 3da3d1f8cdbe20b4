"""KeyDiff: the keys furthest from the mean direction stay."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from foveate.methods import SingleLayer
from foveate.methods.keep.keydiff import KeyDiff
from tests.methods.driving import kept, random_qkv


def test_equals_the_definition() -> None:
    q, k, v = random_qkv()
    layer = SingleLayer(KeyDiff(budget=10))
    scores = KeyDiff(budget=10).score(layer.step(q, k, v))
    layer = SingleLayer(KeyDiff(budget=10))
    layer(q, k, v)
    for row in range(2):
        for head in range(2):
            keys = k[row, head]
            anchor = torch.stack([key / key.norm() for key in keys]).mean(0)
            similar = torch.stack([key @ anchor / (key.norm() * anchor.norm()) for key in keys])
            torch.testing.assert_close(scores[row, head], -similar)
            assert kept(layer, row, head) == sorted(similar.topk(10, largest=False).indices.tolist())


def test_an_outlier_stays_whatever_its_length() -> None:
    q, k, v = random_qkv(B=1, Hkv=1, Hq=1)
    k = F.normalize(torch.ones_like(k) + 0.1 * k, dim=-1)
    k[0, 0, 17] = -100 * k[0, 0, 17]
    k[0, 0, 5] = -0.01 * k[0, 0, 5]
    layer = SingleLayer(KeyDiff(budget=2))
    layer(q, k, v)
    assert kept(layer) == [5, 17]


def test_pieces_under_a_fixed_budget() -> None:
    """The paper's setting: every piece of a prompt is read beside at most `budget` older keys."""
    q, k, v = random_qkv()
    layer = SingleLayer(KeyDiff(budget=10, when="always"), chunked=True)
    held: list[int] = []
    for start in range(0, 40, 8):
        piece = slice(start, start + 8)
        layer(q[:, :, piece], k[:, :, piece], v[:, :, piece])
        held += range(start, start + 8)
        keys = F.normalize(k[0, 0, held], dim=-1)
        order = (keys @ F.normalize(keys.mean(0), dim=0)).argsort()
        held = sorted(held[i] for i in order[:10].tolist())
        assert kept(layer) == held
