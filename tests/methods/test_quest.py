"""Quest against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention.plan import Dense
from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.select.quest import Quest


def draw(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, tokens, 16), torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16)


def brute(q: Tensor, k: Tensor, v: Tensor, method: Quest) -> Tensor:
    """The definition, page by page: o [B, Hq, 1, D] of the last query."""
    B, Hq, N = q.shape[0], q.shape[1], k.shape[2]
    count = min(max(method.min_pages, min(N, method.budget) // method.page), -(-N // method.page))
    out = torch.zeros(B, Hq, 1, 16)
    for b in range(B):
        bounds = torch.zeros(Hq, -(-N // method.page))
        for h in range(Hq):
            for p, part in enumerate(k[b, h // 2].split(method.page)):
                bounds[h, p] = torch.maximum(q[b, h, 0] * part.amax(0), q[b, h, 0] * part.amin(0)).sum()
        if not method.per_query_head:
            bounds = bounds.unflatten(0, (2, 2)).amax(1).repeat_interleave(2, 0)
        if method.force_last:
            bounds[:, -1] = torch.inf
        for h in range(Hq):
            pages = bounds[h].argsort(descending=True)[:count]
            keep = (torch.arange(N) // method.page)[:, None].eq(pages).any(1)
            scores = (k[b, h // 2] @ q[b, h, 0] / 4).masked_fill(~keep, -torch.inf)
            out[b, h, 0] = scores.softmax(0) @ v[b, h // 2]
    return out


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("force_last", [False, True])
@pytest.mark.parametrize("page, budget", [(4, 16), (5, 23), (1, 9), (16, 10)])
def test_equals_brute_force_at_every_step(page: int, budget: int, force_last: bool, per_query_head: bool) -> None:
    method = Quest(
        page=page, budget=budget, dense_layers=0, force_last=force_last, per_query_head=per_query_head, min_pages=2
    )
    layer = SingleLayer(method)
    q, k, v = draw(52)
    layer(q[:, :, :40], k[:, :, :40], v[:, :, :40])
    for t in range(40, 52):
        one = slice(t, t + 1)
        o = layer(q[:, :, one], k[:, :, one], v[:, :, one])
        expected = brute(q[:, :, one], k[:, :, : t + 1], v[:, :, : t + 1], method)
        torch.testing.assert_close(o, expected, rtol=1e-4, atol=1e-5)


def test_single_token_pages_are_exact_top_k() -> None:
    method = Quest(page=1, budget=10, dense_layers=0, force_last=False, per_query_head=True)
    layer = SingleLayer(method)
    q, k, v = draw(40, 1)
    layer(q, k, v)
    step = layer.step(*(torch.randn_like(each[:, :, :1]) for each in (q, k, v)))
    chosen = method.choose(step)
    scores = torch.einsum("bhd,bhnd->bhn", step.q[:, :, 0], step.k.repeat_interleave(2, 1))
    assert torch.equal(chosen, scores.topk(10).indices.sort().values)


def test_dense_where_it_should_be() -> None:
    q, k, v = draw(30)
    for options, layer_index in (({"budget": 31}, 5), ({"budget": 8}, 1), ({"budget": 8, "page": 16}, 5)):
        layer = SingleLayer(Quest(**options), layer=layer_index, layers=8)
        layer(q, k, v)
        assert isinstance(layer.method.plan(layer.last), Dense)
        step = layer.step(*(each[:, :, :1] for each in (q, k, v)))
        assert isinstance(layer.method.plan(step), Dense)


def test_ties_go_to_the_earlier_page() -> None:
    method = Quest(page=2, budget=4, dense_layers=0, min_pages=1, force_last=False)
    layer = SingleLayer(method)
    ones = torch.ones(1, 1, 11, 16)
    layer(ones, ones, ones)
    chosen = method.choose(layer.step(ones[:, :, :1], ones[:, :, :1], ones[:, :, :1]))
    assert chosen.tolist() == [[[0, 1]]]


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="page=0, allowed: >= 1"):
        Quest(page=0)
