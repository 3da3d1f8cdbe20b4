"""Scores of one query: against matrix products, and against what attention itself weighs."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from foveate.attention import attend
from foveate.attention.scoring import query_scores
from foveate.methods import SingleLayer, create
from foveate.methods.select.scores import last_weights


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_scores_of_strided_keys(dtype: torch.dtype) -> None:
    q, k = torch.randn(2, 6, 16).to(dtype), torch.randn(2, 2, 50, 16).to(dtype)[:, :, 3:40]
    scores = query_scores(q, k)
    expected = torch.einsum("bhd,bhnd->bhn", q.double(), k.double().repeat_interleave(3, 1))
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    error = (scores - expected).norm() / expected.norm()
    assert error < (5e-3 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_are_those_of_attention(padded: bool, window: int | None, softcap: float | None) -> None:
    """The identity as values makes attention return its weights."""
    layer = SingleLayer(create("full"))
    q, k = torch.randn(2, 4, 20, 16), torch.randn(2, 2, 20, 16)
    v = torch.eye(20).expand(2, 2, -1, -1)
    at = (torch.arange(20)[None] - torch.tensor([[5], [0]])).clamp_min(-1) if padded else None
    step = dataclasses.replace(layer.step(q, k, v, positions=at), window=window, softcap=softcap)
    expected = attend(q, k, v, positions=step.positions, window=window, softcap=softcap, backend="reference")
    torch.testing.assert_close(last_weights(step), expected[:, :, -1], rtol=1e-4, atol=1e-6)


def test_weights_of_merged_keys() -> None:
    layer = SingleLayer(create("full"))
    layer.cache.append(torch.randn(1, 2, 6, 16), torch.zeros(1, 2, 6, 16))
    at = torch.arange(6).expand(1, 2, -1)
    log_weight = torch.rand(1, 2, 6)
    layer.cache.replace(layer.cache.keys, torch.eye(6).expand(1, 2, -1, -1).contiguous(), at, log_weight)
    step = layer.step(torch.randn(1, 4, 1, 16), torch.randn(1, 2, 1, 16), torch.zeros(1, 2, 1, 6))
    expected = attend(step.q, step.k, step.v, log_weight=layer.cache.log_weight, backend="reference")
    torch.testing.assert_close(last_weights(step)[..., :6], expected[:, :, 0], rtol=1e-4, atol=1e-6)
