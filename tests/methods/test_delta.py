"""DELTA over a stack of layers, against the definition."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import attend
from foveate.errors import OptionError
from foveate.hf import apply
from foveate.methods import SingleLayer
from foveate.methods.select.delta import Delta, page_scores
from tests.models import tiny


class Stack:
    """Layers that share what layers of one request share."""

    def __init__(self, method: Delta, layers: int) -> None:
        self.layers = [SingleLayer(method, layer=index, layers=layers) for index in range(layers)]
        for layer in self.layers[1:]:
            layer.run = self.layers[0].run

    def __call__(self, qkv: list[tuple[Tensor, ...]], span: slice) -> list[Tensor]:
        return [layer(*(each[:, :, span] for each in own)) for layer, own in zip(self.layers, qkv)]


def draw(layers: int, tokens: int, batch: int = 2) -> list[tuple[Tensor, ...]]:
    return [tuple(torch.randn(batch, heads, tokens, 16) for heads in (4, 2, 2)) for _ in range(layers)]


def brute(qkv: list[tuple[Tensor, ...]], t: int, full: set[int], method: Delta) -> list[Tensor]:
    """Outputs of all layers for token t."""
    N, P = t + 1, method.page
    pages = -(-N // P)
    outputs: list[Tensor] = []
    chosen: list[list[int]] = []
    for index, (q, k, v) in enumerate(qkv):
        out = torch.zeros_like(q[:, :, :1])
        for b in range(q.shape[0]):
            keys = k[b, :, :N].repeat_interleave(2, 0)
            scores = torch.einsum("hd,hnd->hn", q[b, :, t], keys) / 4
            if index in full:
                read = list(range(N))
                if index + 1 < len(qkv) and index + 1 not in full:
                    token = scores.softmax(-1).amax(0)
                    page = torch.stack([part.sum() for part in token.split(P)])
                    page -= 1e-7 * torch.arange(pages)
                    page[max(0, pages - method.recent_pages) :] = torch.inf
                    best = page.topk(min(method.pages, pages)).indices.sort().values.tolist()
                    chosen = [*chosen[:b], best, *chosen[b + 1 :]]
            else:
                read = [j for j in range(N) if j // P in chosen[b]]
            weights = scores[:, read].softmax(-1)
            out[b, :, 0] = torch.einsum("hn,hnd->hd", weights, v[b, :, read].repeat_interleave(2, 0))
        outputs.append(out)
    return outputs


@pytest.mark.parametrize("page, pages, recent", [(4, 5, 2), (3, 4, 4), (16, 2, 1)])
def test_layers_read_what_their_planner_chose_in_the_same_step(page: int, pages: int, recent: int) -> None:
    method = Delta(full_layers="0/1/4", page=page, pages=pages, recent_pages=recent)
    qkv = draw(7, 50)
    stack = Stack(method, 7)
    stack(qkv, slice(0, 43))
    for t in range(43, 50):
        for out, expected in zip(stack(qkv, slice(t, t + 1)), brute(qkv, t, {0, 1, 4}, method)):
            torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_enough_pages_or_all_layers_full_is_dense() -> None:
    qkv = draw(3, 40)
    for options in ({"full_layers": 0, "pages": 10}, {"full_layers": "all", "pages": 2, "recent_pages": 1}):
        stack = Stack(Delta(page=4, **{"recent_pages": 8, **options}), 3)
        stack(qkv, slice(0, 39))
        for out, own in zip(stack(qkv, slice(39, 40)), qkv):
            torch.testing.assert_close(out, attend(*own)[:, :, 39:], rtol=1e-4, atol=1e-5)


def test_both_ways_to_score_pages_agree_and_sum_to_at_least_one() -> None:
    q, k, _ = draw(1, 37)[0]
    z = q[:, :, -1:] @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    fused = (z - torch.logsumexp(z, -1, keepdim=True)).exp()
    scores = [page_scores(weights[:, :, 0].amax(1), 8) for weights in (z.softmax(-1), fused)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-6)
    assert scores[0].shape == (2, 5)
    assert (scores[0].sum(-1) >= 1).all()
    assert (scores[0].sum(-1) <= 4).all()


def test_ties_go_to_the_earlier_page_and_rows_differ_in_length() -> None:
    method = Delta(page=4, pages=3, recent_pages=1)
    chosen = method.choose(torch.full((3, 6), 0.5), torch.tensor([24, 18, 9]))
    assert [row.nonzero()[:, 0].tolist() for row in chosen] == [[0, 1, 5], [0, 1, 4], [0, 1, 2]]
    lazy = Delta(page=4, pages=3, recent_pages=1, least_gain=1.8)
    assert lazy.choose(torch.full((2, 6), 0.5), torch.tensor([24, 18])).sum(-1).tolist() == [3, 5]


def test_a_planner_that_is_not_served_is_replaced() -> None:
    """Layer 0 keeps to a window of the model's own and never comes here: layer 1 chooses."""
    method = Delta(full_layers="0", page=4, pages=3, recent_pages=1)
    qkv = draw(3, 30)
    stack = Stack(method, 3)
    stack.layers, qkv = stack.layers[1:], qkv[1:]
    stack(qkv, slice(0, 29))
    outputs = stack(qkv, slice(29, 30))
    torch.testing.assert_close(outputs[0], attend(*qkv[0])[:, :, 29:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(outputs[1], brute(qkv, 29, {0}, method)[1], rtol=1e-4, atol=1e-5)


def test_the_default_list_is_scaled() -> None:
    assert Delta().full(28) == {0, 1, 2, 14, 22}
    assert Delta().full(30) == {0, 1, 2, 15, 23}
    assert Delta().full(2) == {0, 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"full_layers": "1/2"}, "a sparse layer needs a full one before it"),
        ({"full_layers": "0,5"}, "layer numbers as '0/1/2/14/22'"),
        ({"recent_pages": 9, "pages": 8}, "recent_pages=9, allowed: <= pages=8"),
        ({"least_gain": 0.5}, "least_gain=0.5, allowed: >= 1"),
    ],
)
def test_bad_options(options: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Delta(**options)  # type: ignore[arg-type]


def test_a_list_for_a_deeper_model_is_refused() -> None:
    with pytest.raises(OptionError, match="names layer 14, allowed: 0 to 2"):
        apply(tiny("llama"), "delta:full_layers=0/14")
