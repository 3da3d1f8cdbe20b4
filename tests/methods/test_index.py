"""Indexes over keys against brute force."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from torch import Tensor

from foveate.errors import MissingPackageError, OptionError, ShapeError, StateError
from foveate.methods.cache import LayerCache
from foveate.methods.index import AttentionGraph, FlatIndex, GraphOptions, KeyIndex, UsearchIndex
from foveate.methods.index.attention_graph import thinned
from foveate.methods.index.hnsw import check_installed
from foveate.methods.index.linking import TREE, connect, nearest_keys, prune, reachable

SMALL = GraphOptions(neighbours=8, pivots=2, degree=10, sample=64, fresh=8)


def draw(n: int = 120, m: int = 60, B: int = 2, Hkv: int = 2, Hq: int = 4, D: int = 8) -> tuple[Tensor, Tensor]:
    """Keys around 0, queries around a point far from it."""
    return torch.randn(B, Hkv, n, D), torch.randn(B, Hq, m, D) * torch.linspace(1, 0.1, D) + 2


def make(kind: str, keys: Tensor, length: Tensor, queries: Tensor, options: GraphOptions = SMALL) -> KeyIndex:
    if kind == "flat":
        return FlatIndex.build(keys, length)
    if kind == "usearch":
        return UsearchIndex.build(keys, length)
    return AttentionGraph.build(keys, length, queries, options)


def brute(q: Tensor, keys: Tensor, length: Tensor, count: int) -> list[list[list[int]]]:
    """The best rows per sequence and query head, best first."""
    group = q.shape[1] // keys.shape[1]
    return [
        [
            (keys[b, h // group, : int(length[b])] @ q[b, h]).argsort(descending=True)[:count].tolist()
            for h in range(q.shape[1])
        ]
        for b in range(q.shape[0])
    ]


def found(index: Tensor) -> list[list[list[int]]]:
    return [[[row for row in head if row >= 0] for head in sequence] for sequence in index.tolist()]


KINDS = pytest.mark.parametrize("kind", ["flat", "usearch", "attention-graph"])


@KINDS
@pytest.mark.parametrize("lengths", [(120, 120), (120, 37), (5, 0)])
def test_a_search_as_wide_as_the_keys_is_exact(kind: str, lengths: tuple[int, int]) -> None:
    keys, queries = draw()
    length, q = torch.tensor(lengths), torch.randn(2, 4, 8)
    result = make(kind, keys, length, queries).search(q, keys, length, count=10, beam=200)
    assert found(result.index) == brute(q, keys, length, 10)
    # usearch counts distances of its upper levels too.
    most = length[:, None] * (2 if kind == "usearch" else 1)
    assert bool((result.scanned <= most).all())


@pytest.mark.parametrize("per_query_head", [False, True])
@pytest.mark.parametrize("Hkv, Hq", [(1, 3), (2, 8), (3, 3)])
def test_graphs_serve_groups_of_query_heads(Hkv: int, Hq: int, per_query_head: bool) -> None:
    keys, queries = draw(Hkv=Hkv, Hq=Hq)
    length, q = torch.tensor([120, 90]), torch.randn(2, Hq, 8)
    options = GraphOptions(**{**vars(SMALL), "per_query_head": per_query_head})
    graph = AttentionGraph.build(keys, length, queries, options)
    assert graph.links.shape[1] == (Hq if per_query_head else Hkv)
    assert found(graph.search(q, keys, length, count=9, beam=120).index) == brute(q, keys, length, 9)


@KINDS
def test_new_keys_can_be_found_at_once(kind: str) -> None:
    keys, queries = draw(n=90)
    length = torch.tensor([40, 25])
    index = make(kind, keys, length, queries)
    for t in range(45):
        length = length + 1
        index.append(keys, length, queries[:, :, t : t + 1])
        q = torch.randn(2, 4, 8)
        assert found(index.search(q, keys, length, count=5, beam=90).index) == brute(q, keys, length, 5)
    if isinstance(index, AttentionGraph):
        assert bool((length - index.linked <= SMALL.fresh).all())


def test_a_graph_without_queries_is_still_connected() -> None:
    keys, queries = draw()
    length, q = torch.tensor([120, 120]), torch.randn(2, 4, 8)
    graph = AttentionGraph.build(keys, length, queries[:, :, :0], SMALL)
    assert found(graph.search(q, keys, length, count=10, beam=120).index) == brute(q, keys, length, 10)


def test_padding_queries_change_nothing() -> None:
    keys, queries = draw(B=1)
    length = torch.tensor([120])
    plain = AttentionGraph.build(keys, length, queries, SMALL)
    padded = torch.cat((torch.full((1, 4, 9, 8), 50.0), queries), 2)
    real = torch.arange(69)[None] >= 9
    other = AttentionGraph.build(keys, length, padded, SMALL, real=real)
    assert torch.equal(plain.links, other.links)
    assert torch.equal(plain.entries, other.entries)


def test_queries_are_thinned_evenly_per_sequence() -> None:
    queries = torch.arange(12.0).view(1, 1, 12, 1).repeat(2, 3, 1, 2)
    real = torch.arange(12) >= torch.tensor([[0], [9]])
    few, there = thinned(queries, real, 4)
    assert few[0, 2, :, 0].tolist() == [0, 3, 7, 11]
    assert few[1, 0, there[1], 1].tolist() == [9, 10, 11]
    every, there = thinned(queries, real, None)
    assert torch.equal(every[0], queries[0])
    assert there.sum(1).tolist() == [12, 3]


def test_a_row_of_a_batch_has_the_graph_it_has_alone() -> None:
    keys, queries = draw(n=700)
    length = torch.tensor([700, 300])
    both = AttentionGraph.build(keys, length, queries, SMALL)
    alone = AttentionGraph.build(keys[1:], length[1:], queries[1:], SMALL)
    assert torch.equal(both.links[1, :, :300], alone.links[0, :, :300])
    assert torch.equal(both.entries[1, :, :2], alone.entries[0])
    assert bool((both.entries[1, :, 2:] == -1).all())
    q = torch.randn(2, 4, 8)
    a, b = both.search(q, keys, length, count=6, beam=12), alone.search(q[1:], keys[1:], length[1:], count=6, beam=12)
    assert torch.equal(a.index[1], b.index[0])
    assert torch.equal(a.scanned[1], b.scanned[0])


def test_no_key_is_scored_twice_and_the_beam_bounds_the_work() -> None:
    keys, queries = draw(n=600, m=200)
    length, q = torch.tensor([600, 600]), queries[:, :, 0]
    graph = AttentionGraph.build(keys, length, queries, GraphOptions(neighbours=20, degree=16, fresh=8))
    narrow, wide = (graph.search(q, keys, length, count=5, beam=beam) for beam in (10, 600))
    assert bool((wide.scanned == 600).all())
    assert float(narrow.scanned.float().mean()) < 300
    assert all(len(set(head)) == 5 for sequence in found(narrow.index) for head in sequence)


def test_links_from_queries_recall_more_than_links_from_keys() -> None:
    """The paper's setting: queries far from the keys. At equal beam, fewer keys scanned and more of the best found."""
    keys, queries = draw(n=2000, m=700, B=1, Hkv=1, Hq=1, D=32)
    queries = queries * 2
    length, options = torch.tensor([2000]), GraphOptions(neighbours=50, fresh=8)
    graphs = {"queries": queries[:, :, 40:], "keys": keys[:, :, :660]}
    exact, recall, scanned = FlatIndex.build(keys, length), {}, {}
    for name, made_from in graphs.items():
        graph = AttentionGraph.build(keys, length, made_from, options)
        hits, work = 0.0, 0.0
        for t in range(40):
            best = exact.search(queries[:, :, t], keys, length, count=20).index[0, 0]
            got = graph.search(queries[:, :, t], keys, length, count=20, beam=20)
            hits += float(torch.isin(best, got.index).float().mean()) / 40
            work += float(got.scanned.double().mean()) / 2000 / 40
        recall[name], scanned[name] = hits, work
    assert 1 - recall["queries"] < 0.5 * (1 - recall["keys"])
    assert scanned["queries"] < scanned["keys"]


@KINDS
def test_a_stale_index_is_refused(kind: str) -> None:
    keys, queries = draw(n=50)
    index = make(kind, keys, torch.tensor([40, 30]), queries)
    with pytest.raises(StateError, match=r"stale index: it holds \[40, 30\] keys per sequence, and \[41, 30\]"):
        index.search(torch.randn(2, 4, 8), keys, torch.tensor([41, 30]), count=3)
    with pytest.raises(StateError, match="cannot go back to .39, 30.; build a new one"):
        index.append(keys, torch.tensor([39, 30]))
    with pytest.raises(StateError, match="stale index"):
        index.search(torch.randn(1, 4, 8), keys[:1], torch.tensor([40]), count=3)


def test_queries_of_another_shape_are_refused() -> None:
    keys, _ = draw(n=20)
    length = torch.tensor([20, 20])
    for shape in ((2, 4, 7), (1, 4, 8), (2, 3, 8)):
        with pytest.raises(ShapeError, match="does not fit keys"):
            FlatIndex.build(keys, length).search(torch.zeros(shape), keys, length, count=2)


@KINDS
def test_an_index_in_a_layers_state_follows_the_batch(kind: str) -> None:
    keys, queries = draw(n=60)
    length = torch.tensor([50, 30])
    cache = LayerCache()
    cache.append(keys, keys)
    cache.states[0] = make(kind, keys, length, queries)
    kept = copy.deepcopy(cache)
    order = torch.tensor([1, 0, 1])
    cache.select_batch(order)
    index, keys, length = cache.states[0], keys[order].clone(), length[order]
    q = torch.randn(3, 4, 8)
    assert found(index.search(q, keys, length, count=5, beam=60).index) == brute(q, keys, length, 5)
    # Copies of one sequence go their own ways.
    keys[2, :, 30] = 100.0
    index.append(keys, length + 1)
    assert found(index.search(q, keys, length + 1, count=5, beam=60).index) == brute(q, keys, length + 1, 5)
    assert kept.states[0].length.tolist() == [50, 30]


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    with pytest.raises(MissingPackageError, match=r"'usearch'.*pip install 'foveate\[ann\]'"):
        check_installed()


@pytest.mark.parametrize(
    "name, value", [("neighbours", 1), ("pivots", 0), ("degree", TREE), ("sample", 0), ("fresh", 0)]
)
def test_graph_options_are_checked(name: str, value: int) -> None:
    with pytest.raises(OptionError, match=f"{name}={value}, allowed: >="):
        GraphOptions(**{name: value})


def test_bytes_of_a_graph_are_those_of_its_links() -> None:
    keys, queries = draw(n=400, m=50)
    graph = AttentionGraph.build(keys, torch.tensor([400, 400]), queries, SMALL)
    links = 2 * 2 * 400 * SMALL.degree * 4
    assert links <= graph.nbytes <= links * 1.1 + 4096
    assert FlatIndex.build(keys, torch.tensor([400, 400])).nbytes == 0
    assert UsearchIndex.build(keys, torch.tensor([400, 400])).nbytes > 2 * 2 * 400 * 8 * 4


def test_nearest_keys_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    keys, queries = torch.randn(50, 8), torch.randn(31, 8)
    monkeypatch.setattr("foveate.methods.index.linking.BLOCK_ENTRIES", 300)
    assert torch.equal(nearest_keys(queries, keys, 6), (queries @ keys.T).topk(6).indices)


def test_pruning_is_the_rule_applied_one_by_one() -> None:
    keys = torch.randn(80, 3, dtype=torch.float64)
    centre = torch.arange(20)
    around = torch.cdist(keys[centre], keys).argsort(1)[:, 1:25]
    around[3, 5:] = -1
    made = prune(keys, centre, around, 6)
    for p in range(20):
        kept: list[int] = []
        candidates = [c for c in around[p].tolist() if c >= 0]
        for c in candidates:
            own = (keys[c] - keys[p]).norm()
            if len(kept) < 6 and all(own < (keys[c] - keys[other]).norm() for other in kept):
                kept.append(c)
        kept += [c for c in candidates if c not in kept][: 6 - len(kept)]
        assert [c for c in made[p].tolist() if c >= 0] == kept


@pytest.mark.parametrize("n, degree", [(300, TREE + 1), (300, 12), (2, 8), (1, 8)])
def test_every_key_becomes_reachable(n: int, degree: int) -> None:
    keys = torch.randn(n, 4)
    links = torch.full((n, degree), -1, dtype=torch.int32)
    entries = torch.zeros(1, dtype=torch.int64)
    connect(links, keys, entries)
    assert bool(reachable(links, entries).all())
    # The trees hang by their own columns, each key below one other.
    below = links[links >= 0]
    assert below.numel() == below.unique().numel() == n - 1
    assert not bool((links[:, : degree - TREE] >= 0).any())
