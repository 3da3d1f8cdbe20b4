"""Statistics of attention against full softmax matrices."""

from __future__ import annotations

import pytest
import torch

from foveate.attention import Positions, Rope
from foveate.attention import statistics as stats


@pytest.fixture(params=["aligned", "holes"])
def setting(request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor, Positions, torch.Tensor]:
    q, k = torch.randn(2, 6, 9, 8), torch.randn(2, 2, 30, 8)
    positions = Positions()
    visible = torch.ones(9, 30, dtype=torch.bool).tril(21).expand(2, 1, 9, 30)
    if request.param == "holes":
        at = torch.arange(30).expand(2, 1, 30).clone()
        at[0, :, :4] = -1
        positions = Positions(torch.arange(21, 30).expand(2, 9), at, holes=True)
        visible = visible & (at >= 0)[:, :, None]
    scores = (q @ k.repeat_interleave(3, 1).transpose(-1, -2)) * 0.3
    weights = scores.masked_fill(~visible, -torch.inf).softmax(-1)
    return q, k, positions, weights


def test_all_of_them(setting: tuple[torch.Tensor, torch.Tensor, Positions, torch.Tensor]) -> None:
    q, k, positions, weights = setting
    given = {"scale": 0.3, "positions": positions}
    torch.testing.assert_close(stats.attention_rows(q, k, **given), weights)
    torch.testing.assert_close(stats.column_mass(q, k, **given), weights.sum(2))
    torch.testing.assert_close(
        stats.entropy(q, k, **given), -torch.xlogy(weights, weights).sum(-1), rtol=1e-4, atol=1e-5
    )
    top, slots = stats.top_keys(q, k, 4, **given)
    torch.testing.assert_close(top, weights.topk(4).values)
    torch.testing.assert_close(weights.gather(-1, slots), top)
    blocks = stats.block_mass(q, k, block_m=4, block_n=8, **given)
    torch.testing.assert_close(blocks[:, :, 0, 1], weights[:, :, :4, 8:16].sum(-1).mean(-1))
    torch.testing.assert_close(blocks.sum(-1), torch.ones(2, 6, 3))


def test_pieces_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = torch.randn(1, 2, 40, 8), torch.randn(1, 1, 40, 8)
    whole = stats.column_mass(q, k, scale=0.3)
    monkeypatch.setattr(stats, "PIECE_ENTRIES", 300)
    torch.testing.assert_close(stats.column_mass(q, k, scale=0.3), whole)


def test_by_group() -> None:
    x = torch.randn(1, 6, 5)
    assert torch.equal(stats.by_group(x, 2, "max")[0, 1], x[0, 3:].amax(0))
    with pytest.raises(ValueError, match="allowed"):
        stats.by_group(x, 2, "median")


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotary(style: str) -> None:
    rope = Rope(12, style=style)
    x = torch.randn(2, 3, 7, 16)
    at = torch.randint(0, 500, (2, 7))
    turned = rope.rotate(x, at)
    torch.testing.assert_close(rope.unrotate(turned, at), x, rtol=1e-5, atol=1e-5)
    assert torch.equal(turned[..., 12:], x[..., 12:])
    moved = rope.rotate(x, at + 5)
    torch.testing.assert_close(
        (turned * rope.rotate(x, at)).sum(-1), (moved * rope.rotate(x, at + 5)).sum(-1), rtol=1e-4, atol=1e-4
    )
