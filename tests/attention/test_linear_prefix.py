"""Elementwise, semiring and softmax prefix scans against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from foveate.attention.scans import elementwise_scan, prefix_softmax, semiring_scan, softmax_merge
from foveate.errors import OptionError, ShapeError, StateError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loop(x: Tensor, g: Tensor, h: Tensor, reset_every: int | None = None, offset: int = 0) -> tuple[Tensor, Tensor]:
    outputs = []
    for t in range(x.shape[1]):
        position = offset + t
        if reset_every and position and position % reset_every == 0:
            h = torch.zeros_like(h)
        h = g[:, t].exp() * h + x[:, t]
        outputs.append(h)
    return torch.stack(outputs, 1), h


@pytest.mark.parametrize("T", [1, 3, 63, 64, 65, 200])
def test_elementwise_is_the_loop(T):
    x, g, h0 = normal(2, T, 3, 2), -normal(2, T, 3, 2, seed=1).abs(), normal(2, 3, 2, seed=2)
    g[:, T // 2, 0] = -torch.inf
    h, last = elementwise_scan(x, g, initial_state=h0)
    expected, final = loop(x, g, h0)
    assert torch.allclose(h, expected, atol=1e-12, rtol=0)
    assert torch.allclose(last, final, atol=1e-12, rtol=0)


@settings(deadline=None, max_examples=40)
@given(T=st.integers(1, 60), every=st.integers(1, 25), offset=st.integers(0, 50), cut=st.integers(0, 60))
def test_elementwise_resets_and_streams(T, every, offset, cut):
    x, g, h0 = normal(2, T, 3), -normal(2, T, 3, seed=1).abs(), normal(2, 3, seed=2)
    options = {"reset_every": every}
    h, last = elementwise_scan(x, g, initial_state=h0, offset=offset, **options)
    expected, final = loop(x, g, h0, every, offset)
    assert torch.allclose(h, expected, atol=1e-12, rtol=0)
    assert torch.allclose(last, final, atol=1e-12, rtol=0)
    if 0 < cut < T:
        first, state = elementwise_scan(x[:, :cut], g[:, :cut], initial_state=h0, offset=offset, **options)
        rest, end = elementwise_scan(x[:, cut:], g[:, cut:], initial_state=state, offset=offset + cut, **options)
        assert torch.allclose(torch.cat([first, rest], 1), h, atol=1e-12, rtol=0)
        assert torch.allclose(end, last, atol=1e-12, rtol=0)


@pytest.mark.parametrize("reset_every", [None, 4])
def test_elementwise_packed_is_a_loop_over_sequences(reset_every):
    lengths = [5, 0, 70, 1]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    T = sum(lengths)
    x, g, h0 = normal(1, T, 3), -normal(1, T, 3, seed=1).abs(), normal(4, 3, seed=2)
    h, last = elementwise_scan(x, g, initial_state=h0, cu_seqlens=bounds, reset_every=reset_every)
    for n, length in enumerate(lengths):
        tokens = slice(int(bounds[n]), int(bounds[n + 1]))
        expected, final = (
            loop(x[:, tokens], g[:, tokens], h0[n : n + 1], reset_every) if length else (None, h0[n : n + 1])
        )
        assert torch.allclose(last[n : n + 1], final, atol=1e-12, rtol=0)
        if length:
            assert torch.allclose(h[:, tokens], expected, atol=1e-12, rtol=0)


def test_elementwise_nan_stays_in_its_sequence():
    x, g = normal(1, 30, 2), -normal(1, 30, 2, seed=1).abs()
    dirty = x.clone()
    dirty[:, 10:20] = torch.nan
    dirty.requires_grad_()
    g.requires_grad_()
    bounds = torch.tensor([0, 10, 20, 30])
    h, last = elementwise_scan(dirty, g, cu_seqlens=bounds)
    clean, _ = elementwise_scan(x, g, cu_seqlens=bounds)
    assert torch.equal(h[:, :10], clean[:, :10])
    assert torch.equal(h[:, 20:], clean[:, 20:])
    assert last[[0, 2]].isfinite().all()
    (h[:, :10].sum() + h[:, 20:].sum()).backward()
    assert g.grad[:, :10].isfinite().all()
    assert g.grad[:, 20:].isfinite().all()


def test_elementwise_gradcheck():
    x, h0 = normal(1, 6, 2).requires_grad_(), normal(1, 2, seed=2).requires_grad_()
    g = (-normal(1, 6, 2, seed=1).abs()).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, g, h: elementwise_scan(x, g, initial_state=h, reset_every=4), (x, g, h0))


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"g": torch.zeros(1, 4, 3)}, ShapeError, "allowed: one shape"),
        ({"g": torch.full((1, 4, 2), 0.5)}, OptionError, "g has the value 0.5, allowed: <= 0"),
        ({"reset_every": 0}, OptionError, "reset_every=0"),
        ({"offset": -1}, OptionError, "offset=-1"),
        ({"initial_state": torch.zeros(2, 2)}, StateError, r"\[1, 2\] of floats"),
        ({"x": torch.zeros(1, 0, 2), "g": torch.zeros(1, 0, 2)}, ShapeError, "T = 0"),
    ],
)
def test_elementwise_refuses(change, error, message):
    with pytest.raises(error, match=message):
        elementwise_scan(**{"x": torch.zeros(1, 4, 2), "g": torch.zeros(1, 4, 2), **change})


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 13, 64])
@pytest.mark.parametrize("dim", [0, -1])
def test_semiring_scan_keeps_the_order(n, dim):
    """2 x 2 matrix products do not commute: max-plus affine maps and a running maximum neither mix up."""
    a, b = normal(n, n), normal(n, n, seed=1)

    def max_plus(first, second):
        return first[0] + second[0], torch.maximum(first[1] + second[0], second[1])

    total, best = semiring_scan((a, b), max_plus, (0.0, -torch.inf), dim)
    a, b, total, best = (x.movedim(dim, 0) for x in (a, b, total, best))
    h = torch.full_like(b[0], -torch.inf)
    for t in range(n):
        h = torch.maximum(h + a[t], b[t])
        assert torch.allclose(best[t], h, atol=1e-12)
    assert torch.allclose(total, a.cumsum(0), atol=1e-12)


def test_semiring_scan_refuses():
    with pytest.raises(OptionError, match="identity has 2 numbers for 1 leaves"):
        semiring_scan((torch.zeros(3),), lambda a, b: a, (0.0, 0.0), 0)
    with pytest.raises(ShapeError, match=r"lengths \[3, 4\]"):
        semiring_scan((torch.zeros(3), torch.zeros(4)), lambda a, b: a, (0.0, 0.0), 0)


@pytest.mark.parametrize("T", [1, 5, 64, 130])
@pytest.mark.parametrize("size", [1.0, 1e3])
def test_prefix_softmax_is_softmax_of_every_prefix(T, size):
    scores, v = normal(2, T, 3) * size, normal(2, T, 3, 4, seed=1)
    scores[0, ::3] = -torch.inf
    o, (m, u, _) = prefix_softmax(scores, v)
    for t in range(T):
        weights = scores[:, : t + 1].softmax(1).nan_to_num(0)
        expected = torch.einsum("bth,bthv->bhv", weights, v[:, : t + 1])
        assert torch.allclose(o[:, t], expected, atol=1e-12)
    assert torch.allclose(m + u.log(), scores.logsumexp(1), atol=1e-9)


def test_prefix_softmax_streams_and_packs():
    scores, v = normal(1, 90, 2) * 300 - 1000, normal(1, 90, 2, 4, seed=1)
    o, state = prefix_softmax(scores, v)
    first, middle = prefix_softmax(scores[:, :37], v[:, :37])
    second, last = prefix_softmax(scores[:, 37:], v[:, 37:], initial_state=middle)
    assert torch.allclose(torch.cat([first, second], 1), o, atol=1e-12)
    assert all(torch.allclose(a, b) for a, b in zip(last, state))
    packed, states = prefix_softmax(scores, v, cu_seqlens=torch.tensor([0, 37, 37, 90]))
    assert torch.allclose(packed[:, :37], first, atol=1e-12)
    assert torch.allclose(packed[:, 37:], prefix_softmax(scores[:, 37:], v[:, 37:])[0], atol=1e-12)
    assert (states[0][1] == -torch.inf).all()
    assert (states[1][1] == 0).all()


def test_prefix_softmax_gradients():
    scores, v = normal(1, 9, 2).requires_grad_(), normal(1, 9, 2, 3, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda s, v: prefix_softmax(s, v)[0], (scores, v))
    hidden = scores.detach().clone()
    hidden[:, :4] = -torch.inf
    hidden.requires_grad_()
    prefix_softmax(hidden, v)[0].sum().backward()
    assert hidden.grad.isfinite().all()
    assert v.grad.isfinite().all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), hide=st.lists(st.booleans(), min_size=3, max_size=3))
def test_softmax_merge_is_associative(seed, hide):
    leaves = []
    for n, hidden in enumerate(hide):
        score = normal(4, seed=seed + n) * 100
        leaves.append(
            (
                score.masked_fill(torch.tensor(hidden), -torch.inf),
                torch.ones(4).double(),
                normal(4, 2, seed=seed + 9 + n),
            )
        )
    a, b, c = leaves
    left, right = softmax_merge(softmax_merge(a, b), c), softmax_merge(a, softmax_merge(b, c))
    for x, y in zip(left, right):
        assert torch.allclose(x, y, atol=1e-12)
