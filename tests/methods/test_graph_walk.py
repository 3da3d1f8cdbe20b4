"""The C++ walk and nearest keys against their definitions in torch, and both against the rule in plain Python."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from foveate.attention.backends import cpp_graph
from foveate.attention.backends.cpp import build
from foveate.errors import ShapeError
from foveate.methods.index import AttentionGraph, FlatIndex, GraphOptions
from foveate.methods.index.attention_graph import EXPAND
from foveate.methods.index.base import Found
from foveate.methods.index.linking import nearest_keys

needs_cpp = pytest.mark.skipif(
    build.why_unavailable() is not None, reason=f"the C++ kernel is not available: {build.why_unavailable()}"
)
SMALL = GraphOptions(neighbours=12, pivots=2, degree=10, sample=64, fresh=8)


def spread(n: int, m: int, B: int, Hkv: int, Hq: int, D: int) -> tuple[Tensor, Tensor]:
    """Keys around 0, queries far from it."""
    return torch.randn(B, Hkv, n, D), torch.randn(B, Hq, m, D) + 1


def clustered(n: int, m: int, B: int, Hkv: int, Hq: int, D: int) -> tuple[Tensor, Tensor]:
    """Keys in eight tight clusters far apart, one key several times over; queries near the clusters' mirror images."""
    centres = 4 * torch.randn(8, D)
    keys = centres[torch.randint(8, (B, Hkv, n))] + 0.3 * torch.randn(B, Hkv, n, D)
    keys[:, :, ::17] = keys[:, :, :1]
    return keys, -centres[torch.randint(8, (B, Hq, m))] + torch.randn(B, Hq, m, D)


DATA = pytest.mark.parametrize("draw", [spread, clustered])


def whole(keys: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
    """Small whole numbers: sums are exact in any order, and there are many ties."""
    return keys.round().clamp(-6, 6), queries.round().clamp(-6, 6)


@contextmanager
def threads(count: int) -> Iterator[None]:
    held = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(held)


def same(a: Found, b: Found) -> bool:
    return torch.equal(a.index, b.index) and torch.equal(a.scanned, b.scanned)


def by_rule(graph: AttentionGraph, q: Tensor, keys: Tensor, count: int, beam: int) -> Found:
    """The module's text, one key at a time."""
    B, Hq, _ = q.shape
    heads, index = graph.links.shape[1], torch.full((B, Hq, min(count, int(graph.length.max()))), -1)
    scanned = torch.zeros(B, Hq, dtype=torch.int64)
    for b in range(B):
        length, linked = int(graph.length[b]), int(graph.linked[b])
        for h in range(Hq):
            g, own = h * heads // Hq, keys[b, h * keys.shape[1] // Hq]
            scores: dict[int, float] = {}
            expanded: set[int] = set()
            offered = [*graph.entries[b, g].tolist(), *range(linked, length)]
            while True:
                for j in offered:
                    if j >= 0 and j not in scores:
                        scores[j] = float(own[j].double() @ q[b, h].double())
                # Sorting is stable, and a dict keeps the order of scoring.
                best = sorted(scores, key=lambda j: -scores[j])[:beam]
                some = [j for j in best if j not in expanded][:EXPAND]
                if not some:
                    break
                expanded.update(some)
                offered = [x for j in some if j < linked for x in graph.links[b, g, j].tolist()]
            index[b, h, : len(best[:count])] = torch.tensor(best[:count], dtype=torch.int64)
            scanned[b, h] = len(scores)
    return Found(index, scanned)


@DATA
@pytest.mark.parametrize("lengths, later", [((300, 300), (300, 300)), ((300, 41), (307, 44)), ((9, 0), (15, 3))])
def test_a_walk_follows_the_rule(
    draw: Callable[..., tuple[Tensor, Tensor]], lengths: tuple[int, int], later: tuple[int, int]
) -> None:
    keys, queries = whole(*draw(320, 60, 2, 2, 4, 16))
    graph = AttentionGraph.build(keys, torch.tensor(lengths), queries, SMALL)
    graph.append(keys, torch.tensor(later))
    q = queries[:, :, 7]
    for count, beam in ((5, 6), (20, 20), (400, 400)):
        expected = by_rule(graph, q, keys, count, beam)
        assert same(graph.walk(q, keys, min(count, max(later)), beam), expected)
        assert same(graph.search(q, keys, torch.tensor(later), count=count, beam=beam), expected)


@needs_cpp
@DATA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("Hkv, Hq, per_query_head", [(1, 3, False), (2, 4, True), (3, 3, False)])
def test_both_walks_are_one(
    draw: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype, Hkv: int, Hq: int, per_query_head: bool
) -> None:
    keys, queries = (each.to(dtype) for each in whole(*draw(900, 80, 2, Hkv, Hq, 32)))
    length = torch.tensor([900, 500])
    options = GraphOptions(**{**vars(SMALL), "per_query_head": per_query_head})
    graph = AttentionGraph.build(keys, length, queries, options)
    # Keys as they may lie in storage: tokens before heads, in a wider buffer.
    apart = torch.zeros(2, 950, Hkv, 32, dtype=dtype).transpose(1, 2)
    apart[:, :, :900] = keys
    assert cpp_graph.why_not(queries[:, :, 0], apart) is None
    for t, beam in ((0, 10), (1, 40), (2, 333)):
        q, expected = queries[:, :, t], graph.walk(queries[:, :, t], keys, 10, beam)
        for many in (1, 2):
            with threads(many):
                assert same(graph.search(q, apart, length, count=10, beam=beam), expected)


@needs_cpp
@DATA
def test_both_walks_find_as_much(draw: Callable[..., tuple[Tensor, Tensor]]) -> None:
    """Products that round differently may swap near equals, and no more."""
    keys, queries = draw(2000, 300, 1, 1, 2, 64)
    length, hits, work = torch.tensor([2000]), [0.0, 0.0], [0, 0]
    graph, exact = AttentionGraph.build(keys, length, queries[:, :, 20:], SMALL), FlatIndex.build(keys, length)
    for t in range(20):
        q = queries[:, :, t]
        best = exact.search(q, keys, length, count=20).index
        for i, found in enumerate((graph.search(q, keys, length, count=20, beam=40), graph.walk(q, keys, 20, 40))):
            hits[i] += float((found.index[..., None] == best[..., None, :]).any(-1).float().mean()) / 20
            work[i] += int(found.scanned.sum())
            products = torch.einsum("hd,hkd->hk", q[0].double(), keys[0, 0].double()[found.index[0]])
            assert bool((products.diff(dim=-1) <= 1e-4).all())
    assert abs(hits[0] - hits[1]) < 0.005
    assert abs(work[0] - work[1]) <= 0.01 * work[1]
    assert hits[0] > 0.5


@needs_cpp
def test_what_is_no_number_is_never_found() -> None:
    keys, queries = whole(*spread(200, 40, 1, 1, 2, 16))
    length, q = torch.tensor([200]), queries[:, :, 0].abs() + 1
    graph = AttentionGraph.build(keys, length, queries, SMALL)
    keys[0, 0, 10:20], keys[0, 0, 30:40], keys[0, 0, 50] = torch.nan, -torch.inf, torch.inf
    expected = graph.walk(q, keys, 200, 200)
    assert same(graph.search(q, keys, length, count=200), expected)
    assert expected.index[0, :, 0].tolist() == [50, 50]
    found = set(expected.index.flatten().tolist())
    assert not found & {*range(10, 20), *range(30, 40)}
    nothing = graph.search(q * torch.nan, keys, length, count=4)
    assert bool((nothing.index == -1).all())


@needs_cpp
def test_a_copied_graph_walks_alike() -> None:
    keys, queries = whole(*spread(300, 40, 2, 1, 2, 16))
    length, q = torch.tensor([300, 200]), queries[:, :, 0]
    graph = AttentionGraph.build(keys, length, queries, SMALL)
    assert same(copy.deepcopy(graph).search(q, keys, length, count=9), graph.search(q, keys, length, count=9))


def test_what_the_walk_does_not_serve_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    q, keys = torch.zeros(1, 2, 32), torch.zeros(1, 1, 5, 32)
    for a, b in (
        (q.double(), keys.double()),
        (q, keys.bfloat16()),
        (q[..., :8], keys[..., :8]),
        (q.half(), keys.half()),
    ):
        assert "float32 or bfloat16" in str(cpp_graph.why_not(a, b))
    assert "at least one token" in str(cpp_graph.why_not(q, keys[:, :, :0]))
    assert "unit last stride" in str(cpp_graph.why_not(q, torch.zeros(1, 1, 32, 5).transpose(2, 3)))
    assert "float32 on CPU" in str(cpp_graph.why_not_nearest(q[0].double(), keys[0, 0].double()))
    assert "a query and a key" in str(cpp_graph.why_not_nearest(q[0, :0], keys[0, 0]))
    monkeypatch.setenv("FOVEATE_CPP", "0")
    assert "FOVEATE_CPP=0" in str(cpp_graph.why_not(q, keys))
    assert "FOVEATE_CPP=0" in str(cpp_graph.why_not_nearest(q[0], keys[0, 0]))


def test_searching_without_the_kernel_is_the_walk_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = whole(*spread(300, 40, 1, 1, 2, 16))
    length, q = torch.tensor([300]), queries[:, :, 0]
    graph = AttentionGraph.build(keys, length, queries, SMALL)
    before = graph.search(q, keys, length, count=9, beam=30)
    monkeypatch.setenv("FOVEATE_CPP", "0")
    monkeypatch.setattr(cpp_graph, "walk", None)
    assert same(graph.search(q, keys, length, count=9, beam=30), before)


@needs_cpp
@pytest.mark.parametrize("D", [1, 8, 64, 80])
@pytest.mark.parametrize("m, n", [(1, 1), (31, 7), (33, 64), (300, 501)])
def test_nearest_keys_in_order(m: int, n: int, D: int) -> None:
    """Whole numbers: exact products, and ties, which go to the lower key."""
    queries, keys = torch.randint(-3, 4, (m, D)).float(), torch.randint(-3, 4, (n, D)).float()
    for bias in (None, torch.randint(-9, 9, (n,)).float()):
        scores = queries.double() @ keys.double().T + (0 if bias is None else bias.double())
        expected = scores.argsort(dim=1, descending=True, stable=True)
        for count in {1, min(5, n), n}:
            for many in (1, 2):
                with threads(many):
                    assert torch.equal(cpp_graph.nearest(queries, keys, count, bias), expected[:, :count])


@needs_cpp
def test_nearest_keys_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    queries, keys, bias = torch.randn(40, 32), torch.randn(600, 32).T.contiguous().T, torch.randn(600)
    fast = [nearest_keys(queries, keys, count, bias) for count in (1, 30)]
    monkeypatch.setenv("FOVEATE_CPP", "0")
    # In blocks of five queries.
    monkeypatch.setattr("foveate.methods.index.linking.BLOCK_ENTRIES", 3000)
    for made in fast:
        assert torch.equal(nearest_keys(queries, keys, made.shape[1], bias), made)


@needs_cpp
def test_nearest_keys_that_are_no_numbers_come_last() -> None:
    queries, keys = torch.rand(5, 8) + 1, torch.rand(40, 8)
    keys[::2] = torch.nan
    made = cpp_graph.nearest(queries, keys, 40)
    assert bool((made[:, :20] % 2 == 1).all())
    assert torch.equal(made.sort(dim=1).values, torch.arange(40).expand(5, 40))


@needs_cpp
@pytest.mark.parametrize("width, count, biases", [(7, 2, 9), (8, 0, 9), (8, 10, 9), (8, 2, 8)])
def test_nearest_keys_of_other_shapes_are_refused(width: int, count: int, biases: int) -> None:
    with pytest.raises(ShapeError, match=r"keys \[9, 8\], count=\d+, allowed: one width, 1 <= count <= keys"):
        cpp_graph.nearest(torch.zeros(3, width), torch.zeros(9, 8), count, torch.zeros(biases))
