"""Short causal convolutions, Toeplitz products and attention with a relative bias."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.convolutions import causal_conv, conv_step, toeplitz_attention, toeplitz_matmul
from foveate.errors import OptionError, ShapeError, StateError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("T", [1, 2, 3, 20])
@pytest.mark.parametrize("W", [1, 3, 4])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_conv_is_conv1d(T, W, activation):
    x, w, b = normal(2, T, 5), normal(5, W, seed=1), normal(5, seed=2)
    y, cache = causal_conv(x, w[:, None], b, activation=activation)
    expected = F.conv1d(F.pad(x.mT, [W - 1, 0]), w[:, None], b, groups=5).mT
    assert torch.allclose(y, F.silu(expected) if activation else expected, atol=1e-12)
    assert torch.equal(cache, F.pad(x, [0, 0, W - 1, 0])[:, T:])


@pytest.mark.parametrize("cut", [1, 2, 3, 9])
def test_conv_streams(cut):
    x, w = normal(2, 12, 5), normal(5, 4, seed=1)
    y, cache = causal_conv(x, w)
    first, state = causal_conv(x[:, :cut], w)
    outputs = [first]
    for t in range(cut, 12):
        one, state = conv_step(x[:, t : t + 1], w, cache=state)
        outputs.append(one)
    assert torch.allclose(torch.cat(outputs, 1), y, atol=1e-12)
    assert torch.equal(state, cache)


@pytest.mark.parametrize("W", [1, 4])
def test_conv_packed_is_a_loop(W):
    lengths = [1, 0, 2, 7]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    x, w, cache = normal(1, 10, 3), normal(3, W, seed=1), normal(4, W - 1, 3, seed=2)
    y, after = causal_conv(x, w, cache=cache, cu_seqlens=bounds)
    for n, length in enumerate(lengths):
        tokens = slice(int(bounds[n]), int(bounds[n + 1]))
        if length == 0:
            assert torch.equal(after[n], cache[n])
            continue
        expected, state = causal_conv(x[:, tokens], w, cache=cache[n : n + 1])
        assert torch.allclose(y[:, tokens], expected, atol=1e-12)
        assert torch.equal(after[n : n + 1], state)
    x[:, 1:3] = torch.nan
    assert causal_conv(x, w, cache=cache, cu_seqlens=bounds)[0][:, 3:].isfinite().all()


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("packed", [False, True])
def test_conv_gradients_for_short_segments(T, packed):
    x, w, b = (each.requires_grad_() for each in (normal(1, T, 2), normal(2, 4, seed=1), normal(2, seed=2)))
    bounds = torch.tensor([0, 1, T]) if packed else None
    cache = normal(2 if packed else 1, 3, 2, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b, c: causal_conv(x, w, b, activation="silu", cache=c, cu_seqlens=bounds), (x, w, b, cache)
    )


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"activation": "gelu"}, OptionError, "activation='gelu', allowed: None, 'silu'"),
        ({"w": torch.zeros(4, 3)}, ShapeError, "C is 2 in x"),
        ({"cache": torch.zeros(1, 3, 2)}, StateError, r"\[1, 2, 2\] of floats"),
        ({"x": torch.zeros(1, 0, 2)}, ShapeError, "T = 0"),
    ],
)
def test_conv_refuses(change, error, message):
    with pytest.raises(error, match=message):
        causal_conv(**{"x": torch.zeros(1, 4, 2), "w": torch.zeros(2, 3), **change})


def test_conv_step_takes_one_token():
    with pytest.raises(ShapeError, match="one token; use causal_conv"):
        conv_step(torch.zeros(1, 2, 2), torch.zeros(2, 3))


def toeplitz(t: Tensor, T: int, causal: bool) -> Tensor:
    i = torch.arange(T)
    matrix = t[:, i - i[:, None] + T - 1]
    return matrix.tril() if causal else matrix


@pytest.mark.parametrize("T", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_is_the_matrix(T, causal):
    t, x = normal(3, 2 * T - 1).requires_grad_(), normal(2, T, 3, 2, seed=1).requires_grad_()
    y = toeplitz_matmul(t, x, causal=causal)
    expected = torch.einsum("hij,bjhc->bihc", toeplitz(t, T, causal), x)
    assert torch.allclose(y, expected, atol=1e-10)
    cotangent = normal(*y.shape, seed=2)
    found = torch.autograd.grad(y, [t, x], cotangent)
    wanted = torch.autograd.grad(expected, [t, x], cotangent)
    for a, b in zip(found, wanted):
        assert torch.allclose(a, b, atol=1e-10)
    if causal:
        assert torch.allclose(toeplitz_matmul(t[:, :T], x, causal=True), expected, atol=1e-10)


@pytest.mark.parametrize("method", ["fft", "direct"])
@pytest.mark.parametrize("causal", [False, True])
def test_toeplitz_attention_is_the_definition(method, causal):
    T = 21
    q, k, v = normal(2, T, 3, 5).exp(), normal(2, T, 3, 5, seed=1).exp(), normal(2, T, 3, 4, seed=2)
    bias = normal(3, 2 * T - 1, seed=3)
    for options in (
        bias,
        torch.zeros_like(bias),
        bias.masked_fill((torch.arange(2 * T - 1) - T + 1).abs() > 4, -torch.inf),
    ):
        w = torch.einsum("bihm,bjhm->bhij", q, k) * toeplitz(options.exp(), T, causal)
        expected = torch.einsum("bhij,bjhv->bihv", w / w.sum(-1, keepdim=True), v)
        o = toeplitz_attention(q, k, v, options, causal=causal, method=method, block=2)
        assert torch.allclose(o, expected, atol=1e-10)


def test_toeplitz_attention_gradients():
    T = 5
    q, k = (normal(1, T, 2, 3, seed=s).exp().requires_grad_() for s in (0, 1))
    v, bias = normal(1, T, 2, 2, seed=2).requires_grad_(), normal(2, 2 * T - 1, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: toeplitz_attention(*x, causal=True, method="fft", block=2), (q, k, v, bias)
    )


def test_wide_biases_take_the_direct_path_and_say_so():
    T = 30
    q, k, v = (normal(1, T, 1, 4, seed=s).exp().float() for s in range(3))
    bias = torch.linspace(0, 40, 2 * T - 1)[None]
    with pytest.warns(UserWarning, match=r"ran the quadratic 'direct' \(biases span 40.0 nats"):
        o = toeplitz_attention(q, k, v, bias)
    assert torch.equal(o, toeplitz_attention(q, k, v, bias, method="direct"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        toeplitz_attention(q, k, v, bias / 10)


def test_toeplitz_refuses():
    x = torch.zeros(1, 4, 2, 3)
    with pytest.raises(ShapeError, match=r"allowed: \[\(2, 7\)\]"):
        toeplitz_matmul(torch.zeros(2, 4), x)
    with pytest.raises(ShapeError, match=r"bias \[2, 4\] does not fit"):
        toeplitz_attention(x, x, x, torch.zeros(2, 4))
    with pytest.raises(OptionError, match="method='slow', allowed"):
        toeplitz_attention(x, x, x, torch.zeros(2, 7), method="slow")
