"""Feature maps, and non-causal attention by K^T V with its normalisers."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import features
from foveate.attention.linear import kv_matmul_attention
from foveate.errors import OptionError, ShapeError


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("packed", [False, True])
def test_taylor_map_is_the_polynomial(packed):
    q, k = normal(3, 8), normal(3, 8, seed=1)
    s = (q * k).sum(-1) / math.sqrt(8)
    product = (features.taylor2(q, packed=packed) * features.taylor2(k, packed=packed)).sum(-1)
    assert torch.allclose(product, 1 + s + s**2 / 2, atol=1e-12)
    assert features.taylor2(q, packed=packed).shape[-1] == (45 if packed else 73)


def test_hedgehog_maps():
    y = normal(3, 5)
    soft = features.hedgehog_softmax(y)
    assert torch.allclose(soft[..., :5].sum(-1), torch.ones(3).double())
    assert torch.allclose(soft[..., 5:].sum(-1), torch.ones(3).double())
    swapped = features.hedgehog_softmax(-y)
    assert torch.equal(swapped, torch.cat([soft[..., 5:], soft[..., :5]], -1))
    raw = features.hedgehog_exp(y)
    assert torch.allclose(raw[..., :5] / raw[..., :5].sum(-1, keepdim=True), soft[..., :5])
    assert features.hedgehog_softmax(y * 1e6).min() == 1e-12


def test_elementary_maps():
    x = normal(20)
    assert torch.allclose(features.elu_plus_one(x), torch.where(x > 0, x + 1, x.exp()))
    assert torch.equal(features.relu(x), x.clamp(min=0))
    assert torch.allclose(features.l2norm(x, eps=0.0).norm(), torch.tensor(1.0).double())
    assert torch.equal(features.l2norm(torch.zeros(4)), torch.zeros(4))


def test_cosine_reweighting_is_the_cosine_of_the_distance():
    q, k = normal(1, 6, 2, 3).abs(), normal(1, 6, 2, 3, seed=1).abs()
    position = torch.arange(1, 7)
    a, b = (features.cosine_reweighted(x, position, 6) for x in (q, k))
    found = torch.einsum("bihk,bjhk->bhij", a, b)
    decay = torch.cos(math.pi / 12 * (position[:, None] - position).double())
    assert torch.allclose(found, torch.einsum("bihk,bjhk->bhij", q, k) * decay, atol=1e-12)


@pytest.mark.parametrize("orthogonal", [False, True])
def test_positive_features_estimate_exp(orthogonal):
    q, k = (features.l2norm(normal(1, 12, 1, 8, seed=s)) for s in range(2))
    w = features.gaussian_projection(
        4096, 8, orthogonal=orthogonal, dtype=torch.float64, generator=torch.Generator().manual_seed(2)
    )
    a, b = features.positive_random(q, w), features.positive_random(k, w)
    assert torch.allclose((a * b).sum(-1), (q * k).sum(-1).exp(), rtol=0.15)
    shifted = features.positive_random(q, w, shift="features"), features.positive_random(k, w, shift="positions")
    weights = torch.einsum("bihm,bjhm->bhij", *shifted)
    expected = torch.einsum("bihm,bjhm->bhij", a, b)
    assert torch.allclose(weights / weights.sum(-1, keepdim=True), expected / expected.sum(-1, keepdim=True))


def test_orthogonal_projection_has_orthogonal_blocks_and_gaussian_lengths():
    w = features.gaussian_projection(4000, 8, orthogonal=True, generator=torch.Generator().manual_seed(0))
    gram = w[:8] @ w[:8].T
    assert torch.allclose(gram, torch.diag(gram.diagonal()), atol=1e-4)
    assert abs(float(w.square().sum(-1).mean()) - 8) < 0.3
    assert abs(float(w.mean())) < 0.05


def test_features_refuse():
    with pytest.raises(ShapeError, match="K is 4 in x"):
        features.positive_random(torch.zeros(1, 2, 1, 4), torch.zeros(3, 5))
    with pytest.raises(OptionError, match="shift='max', allowed"):
        features.positive_random(torch.zeros(1, 2, 1, 4), torch.zeros(3, 4), shift="max")


B, M, N, H, K, V = 2, 5, 7, 3, 4, 6


def explicit(normalizer: str, q: Tensor, k: Tensor, s: Tensor | float, rotated=None, floor=100.0, eps=1e-6) -> Tensor:
    """The N x N weights [B, H, M, N]."""
    w = torch.einsum("bihk,bjhk->bhij", q, k)
    total = w.sum(-1, keepdim=True)
    n = k.shape[1]
    if normalizer == "none":
        return s * w
    if normalizer == "sum":
        return w / (total + eps)
    if normalizer == "clamp":
        return s * w / total.clamp(min=floor)
    if normalizer == "subtractive":
        return s * w / n - s * total / n / n + 1 / n
    z = s * total / n
    turned = torch.einsum("bihk,bjhk->bhij", *(rotated or (q, k)))
    return (1 + 1 / (z + eps)) * s * turned / n - z / n


@pytest.mark.parametrize("normalizer", ["none", "sum", "subtractive", "affine", "clamp"])
@pytest.mark.parametrize("per_head", [False, True])
def test_kv_matmul_is_the_explicit_form(normalizer, per_head):
    q, k, v = normal(B, M, H, K).abs(), normal(B, N, H, K, seed=1).abs(), normal(B, N, H, V, seed=2)
    scale = torch.rand(H, generator=torch.Generator().manual_seed(3), dtype=torch.float64) if per_head else K**-0.5
    s = scale[:, None, None] if per_head else scale
    o = kv_matmul_attention(q, k, v, normalizer=normalizer, scale=scale, floor=20.0)
    w = explicit(normalizer, q, k, s, floor=20.0)
    assert torch.allclose(o, torch.einsum("bhij,bjhv->bihv", w, v), atol=1e-12)
    if normalizer in ("subtractive", "affine", "sum"):
        assert torch.allclose(w.sum(-1), torch.ones(B, H, M).double(), atol=1e-5)
    kept = torch.tensor([[True] * 4 + [False] * 3, [True] * 7])
    k, v = k.clone(), v.clone()
    k[0, 4:], v[0, 4:] = torch.nan, torch.nan
    masked = kv_matmul_attention(q, k, v, normalizer=normalizer, scale=scale, floor=20.0, mask=kept)
    short = kv_matmul_attention(q[:1], k[:1, :4], v[:1, :4], normalizer=normalizer, scale=scale, floor=20.0)
    assert torch.allclose(masked[0], short[0], atol=1e-12)
    assert torch.allclose(masked[1], o[1], atol=1e-12)


def test_affine_takes_rotated_features_for_the_product_only():
    q, k, v = normal(B, N, H, K).abs(), normal(B, N, H, K, seed=1).abs(), normal(B, N, H, V, seed=2)
    rotated = normal(B, N, H, K, seed=3), normal(B, N, H, K, seed=4)
    o = kv_matmul_attention(q, k, v, normalizer="affine", rotated=rotated)
    w = explicit("affine", q, k, K**-0.5, rotated)
    assert torch.allclose(o, torch.einsum("bhij,bjhv->bihv", w, v), atol=1e-12)


def test_subtractive_tells_q_from_2q_and_clamp_keeps_zero_rows():
    q, k, v = normal(1, 4, 1, K), normal(1, 4, 1, K, seed=1), normal(1, 4, 1, V, seed=2)
    one, two = (kv_matmul_attention(x, k, v, normalizer="subtractive") for x in (q, 2 * q))
    assert (one - two).abs().max() > 0.1
    flat = kv_matmul_attention(0 * q, k, v, normalizer="subtractive")
    assert torch.allclose(flat, v.mean(1, keepdim=True).expand_as(flat))
    assert torch.equal(kv_matmul_attention(0 * q, F.relu(k), v, normalizer="clamp"), torch.zeros_like(v))


@pytest.mark.parametrize("normalizer", ["none", "sum", "subtractive", "affine", "clamp"])
def test_kv_matmul_gradients(normalizer):
    q, k, v = (normal(1, 3, 2, 2, seed=s).abs().requires_grad_() for s in range(3))
    run = lambda q, k, v: kv_matmul_attention(q, k, v, normalizer=normalizer, floor=1.0)  # noqa: E731
    assert torch.autograd.gradcheck(run, (q, k, v))
