"""Expected Attention against explicit matrices, Monte Carlo, and ordinary attention."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope
from foveate.errors import OptionError, UnsupportedModelError
from foveate.methods import SingleLayer
from foveate.methods.keep.expected_attention import (
    ExpectedAttention,
    QueryMoments,
    expected_logits,
    mean_rotations,
    moments_of,
)
from tests.methods.driving import (
    check_padded_rows_equal_singles,
    check_steps_equal_masked_dense,
    held_mask,
    kept,
    random_qkv,
)

ROPE = Rope(8)


def rotation(position: int, style: str) -> Tensor:
    """Rotation matrix of width 8, entry by entry."""
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    for pair in range(4):
        angle = position * 10000.0 ** (-2 * pair / 8)
        a, b = (pair, pair + 4) if style == "half" else (2 * pair, 2 * pair + 1)
        matrix[a, a] = matrix[b, b] = math.cos(angle)
        matrix[b, a], matrix[a, b] = math.sin(angle), -math.sin(angle)
    return matrix


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_mean_rotation(style: str) -> None:
    turn = mean_rotations(Rope(8, style=style), torch.tensor([7, 40]), 70, torch.zeros(1, 8, dtype=torch.float64))
    for row, start in enumerate((7, 40)):
        expected = torch.stack([rotation(p, style) for p in range(start, start + 70)]).mean(0)
        torch.testing.assert_close(turn[row], expected)


@pytest.mark.parametrize("covariance", [False, True])
@pytest.mark.parametrize("value_norm", [False, True])
def test_equals_the_definition(covariance: bool, value_norm: bool) -> None:
    q, k, v = random_qkv(B=1, N=30)
    method = ExpectedAttention(
        budget=12, future=16, sinks=3, covariance=covariance, value_norm=value_norm, epsilon=0.01
    )
    scores = method.score(SingleLayer(method, rope=ROPE).step(q, k, v))[0]
    turn = torch.stack([rotation(p, "half") for p in range(30, 46)]).mean(0)
    for head in range(2):
        weights = torch.zeros(27, dtype=torch.float64)
        for h in (2 * head, 2 * head + 1):
            plain = torch.stack([rotation(p, "half").T @ q[0, h, p] for p in range(3, 30)])
            mu = turn @ plain.mean(0)
            e = k[0, head, 3:] @ mu / math.sqrt(8)
            if covariance:
                sigma = turn @ torch.cov(plain.T, correction=0) @ turn.T
                e = e + torch.einsum("ni,ij,nj->n", k[0, head, 3:], sigma, k[0, head, 3:]) / 16
            weights += e.softmax(0) / 2
        expected = (weights + 0.01) * v[0, head, 3:].norm(dim=-1) if value_norm else weights
        torch.testing.assert_close(scores[head, 3:], expected)
    assert bool((scores[:, :3] == scores[:, 3:].max() + 1).all())


def test_constant_queries_give_the_attention_row_of_that_query() -> None:
    """No covariance to speak of, and one future position: the row that such a query would have there."""
    q, k, v = random_qkv(B=1, N=24)
    plain = q[:, :, :1].expand(-1, -1, 24, -1)
    q = ROPE.rotate(plain, torch.arange(24)[None])
    method = ExpectedAttention(budget=10, future=1, sinks=0, value_norm=False)
    scores = method.score(SingleLayer(method, rope=ROPE).step(q, k, v))
    coming = ROPE.rotate(plain[:, :, :1], torch.tensor([[24]]))[:, :, 0]
    row = torch.einsum("bhd,bhnd->bhn", coming, k.repeat_interleave(2, 1)) / math.sqrt(8)
    torch.testing.assert_close(scores, row.softmax(-1).unflatten(1, (2, 2)).mean(2))


def test_logits_are_the_log_of_the_expected_exponential() -> None:
    mean = torch.randn(1, 1, 4, dtype=torch.float64) / 2
    half = torch.randn(4, 4, dtype=torch.float64) / 2
    k = torch.randn(1, 1, 6, 4, dtype=torch.float64)
    samples = mean[0, 0] + torch.randn(400_000, 4, dtype=torch.float64) @ half.T
    expected = torch.exp(samples @ k[0, 0].T * 0.5).mean(0)
    made = expected_logits(k, mean, (half @ half.T)[None, None], 0.5)
    torch.testing.assert_close(made[0, 0].exp(), expected, rtol=0.02, atol=0)


def test_moments_join_to_those_of_all_queries() -> None:
    q, _, _ = random_qkv(N=50)
    at = torch.arange(50).expand(2, -1)
    whole = moments_of(ROPE, q, at, 4)
    parts = [moments_of(ROPE, q[:, :, part], at[:, part], 4) for part in (slice(0, 3), slice(3, 20), slice(20, 50))]
    joined = parts[0].joined(parts[1]).joined(parts[2])
    for name in ("count", "mean", "spread"):
        torch.testing.assert_close(getattr(joined, name), getattr(whole, name))
    assert whole.count.tolist() == [46, 46]


def test_chunked_prompt_keeps_what_one_forward_keeps() -> None:
    q, k, v = random_qkv()
    method = ExpectedAttention(budget=14, future=32)
    whole, pieces = SingleLayer(method, rope=ROPE), SingleLayer(method, rope=ROPE, chunked=True)
    whole(q, k, v)
    for start in range(0, 40, 5):
        piece = slice(start, start + 5)
        pieces(q[:, :, piece], k[:, :, piece], v[:, :, piece])
    assert isinstance(pieces.cache.states[0], QueryMoments)
    pieces.finish_prefill()
    assert torch.equal(held_mask(whole, 40), held_mask(pieces, 40))
    assert not pieces.cache.states


def test_steps_and_padding() -> None:
    def make() -> SingleLayer:
        return SingleLayer(ExpectedAttention(budget=14, future=32), rope=ROPE)

    check_steps_equal_masked_dense(make(), random_qkv(), 30)
    check_padded_rows_equal_singles(make, random_qkv(B=3), 30, [20, 3, 0])
    # A row with nothing but sinks.
    check_padded_rows_equal_singles(make, random_qkv(B=3), 30, [27, 13, 0])


def test_sinks_stay() -> None:
    layer = SingleLayer(ExpectedAttention(ratio=0.8, sinks=6), rope=ROPE)
    layer(*random_qkv())
    assert kept(layer, 1, 1)[:6] == list(range(6))
    # int(40 * (1 - 0.8)) in floating point.
    assert layer.cache.stored == 7


def test_refusals() -> None:
    with pytest.raises(UnsupportedModelError, match="expected-attention needs queries before rotary embedding"):
        SingleLayer(ExpectedAttention(budget=8))(*random_qkv())
    with pytest.raises(OptionError, match=r"future=0, allowed: >= 1"):
        ExpectedAttention(future=0)
    with pytest.raises(OptionError, match=r"epsilon=-1, allowed: >= 0"):
        ExpectedAttention(epsilon=-1)
