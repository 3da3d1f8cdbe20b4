"""RetrievalAttention against its definition, written out token by token."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.errors import CompositionError, HostMemoryError, MissingPackageError, StateError
from foveate.hf import apply
from foveate.methods import SingleLayer, create
from foveate.methods.index import AttentionGraph, FlatIndex, Found, UsearchIndex, recall_of
from foveate.methods.select.retrieval_attention import Offloaded, RetrievalAttention
from foveate.methods.step import mean_recall, scanned_share
from tests.methods.driving import check_padded_rows_equal_singles, random_qkv
from tests.models import GREEDY, prompts, tiny

INDEXES = pytest.mark.parametrize("index", ["flat", "usearch", "attention-graph"])


def method(**options: Any) -> RetrievalAttention:
    return RetrievalAttention(**{"sinks": 3, "window": 7, "budget": 5, "index": "flat", "fresh": 4, **options})


def expected(q: Tensor, k: Tensor, v: Tensor, made: RetrievalAttention, prompt: int, t: int) -> Tensor:
    """o [B, Hq, 1, D] of token t: what is hot, and the best of what is cold, in one softmax."""
    out = torch.zeros_like(q[:, :, :1])
    last = t if made.insert else prompt - 1
    hot = [j for j in range(t + 1) if j < made.sinks or j > last - made.window]
    cold = [j for j in range(t + 1) if j not in hot]
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            kv = h * k.shape[1] // q.shape[1]
            scores = k[b, kv, : t + 1] @ q[b, h, t]
            best = sorted(cold, key=lambda j: -float(scores[j]))[: made.budget]
            read = torch.tensor(hot + best)
            weights = (scores[read] / q.shape[-1] ** 0.5).softmax(0)
            out[b, h, 0] = weights @ v[b, kv, read]
    return out


def run(made: RetrievalAttention, qkv: tuple[Tensor, Tensor, Tensor], prompt: int) -> tuple[SingleLayer, Tensor]:
    """The layer after all tokens, and the outputs of those after the prompt."""
    q, k, v = qkv
    layer = SingleLayer(made)
    layer(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])
    steps = [layer(*(x[:, :, t : t + 1] for x in qkv)) for t in range(prompt, q.shape[2])]
    return layer, torch.cat(steps, 2)


@pytest.mark.parametrize("insert", [True, False])
@pytest.mark.parametrize("budget, sinks, window", [(5, 3, 7), (1, 0, 1), (100, 2, 4), (0, 3, 7), (4, 30, 2)])
@pytest.mark.parametrize("Hq, Hkv", [(4, 2), (3, 1), (2, 2)])
def test_every_step_equals_the_definition(
    Hq: int, Hkv: int, budget: int, sinks: int, window: int, insert: bool
) -> None:
    made = method(budget=budget, sinks=sinks, window=window, insert=insert)
    qkv = random_qkv(Hq=Hq, Hkv=Hkv, N=34)
    _, out = run(made, qkv, 26)
    for t in range(26, 34):
        torch.testing.assert_close(out[:, :, t - 26 : t - 25], expected(*qkv, made, 26, t), rtol=1e-6, atol=1e-6)


@INDEXES
def test_any_index_with_a_wide_beam_is_exact(index: str) -> None:
    made, qkv = method(index=index, beam=64, neighbours=8, degree=8), random_qkv(N=60)
    layer, out = run(made, qkv, 40)
    state = layer.cache.states[0]
    assert isinstance(state, Offloaded)
    assert state.tier.length.tolist() == [51, 51]
    for t in range(40, 60):
        torch.testing.assert_close(out[:, :, t - 40 : t - 39], expected(*qkv, made, 40, t), rtol=1e-6, atol=1e-6)


def test_a_graph_is_made_from_the_prompt_and_from_later_queries() -> None:
    layer, _ = run(method(index="attention-graph", beam=16), random_qkv(N=58), 40)
    index = layer.cache.states[0].index
    assert isinstance(index, AttentionGraph)
    # 31 of the prompt; of the 18 that followed, five at a time, more than `fresh`.
    assert index.length.tolist() == [49, 49]
    assert index.linked.tolist() == [46, 46]
    assert bool((index.links >= 0).any())


def test_the_window_and_the_sinks_alone_stay_on_the_device() -> None:
    layer, _ = run(method(), random_qkv(N=34), 26)
    # The window is 7 tokens once the next one has come.
    assert layer.cache.kept_positions(0, 0).tolist() == [0, 1, 2, *range(28, 34)]
    layer, _ = run(method(insert=False), random_qkv(N=34), 26)
    assert layer.cache.kept_positions(0, 0).tolist() == [0, 1, 2, *range(19, 34)]


def test_short_prompts_stay_on_the_device_until_the_window_is_full() -> None:
    made, qkv = method(), random_qkv(N=16)
    layer, out = run(made, qkv, 6)
    for t in range(6, 16):
        torch.testing.assert_close(out[:, :, t - 6 : t - 5], expected(*qkv, made, 6, t), rtol=1e-6, atol=1e-6)
    assert layer.cache.states[0].tier.length.tolist() == [7, 7]
    layer, _ = run(method(insert=False), qkv, 6)
    assert layer.cache.stored == 16
    assert not layer.cache.states


@pytest.mark.parametrize("window_of_model", [None, 9])
def test_later_pieces_of_text_read_everything(window_of_model: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in pieces that split the cold part."""
    monkeypatch.setattr("foveate.methods.select.retrieval_attention.PIECE", 6)
    q, k, v = random_qkv(N=44)
    layer, dense = SingleLayer(method()), SingleLayer(create("full"))
    for span in (slice(0, 24), slice(24, 25), slice(25, 36), slice(36, 44)):
        outs = []
        for each in (layer, dense):
            step = each.step(q[:, :, span], k[:, :, span], v[:, :, span])
            step.window = window_of_model
            outs.append(each.method.attend(step))
            change = each.method.keep(step)
            if change is not None:
                each.cache.apply(change)
        if span.stop - span.start > 1:
            torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)
    assert layer.cache.states[0].tier.length.tolist() == [35, 35]


def test_softcap_and_learned_sinks_are_honoured() -> None:
    q, k, v = random_qkv(N=30)
    layer, dense = SingleLayer(method(budget=100)), SingleLayer(create("full"))
    for span in (slice(0, 24), *(slice(t, t + 1) for t in range(24, 30))):
        outs = []
        for each in (layer, dense):
            step = each.step(q[:, :, span], k[:, :, span], v[:, :, span])
            step.softcap, step.sink = 3.0, torch.tensor([1.0, -1.0, 0.5, 2.0], dtype=torch.float64)
            outs.append(each.method.attend(step))
            change = each.method.keep(step)
            if change is not None:
                each.cache.apply(change)
        torch.testing.assert_close(*outs, rtol=1e-6, atol=1e-6)


@INDEXES
def test_left_padded_rows_equal_single_runs(index: str) -> None:
    """One row is so short that nothing of it is cold for a while."""
    options = {"index": index, "beam": 6, "neighbours": 8, "degree": 8}
    check_padded_rows_equal_singles(lambda: SingleLayer(method(**options)), random_qkv(B=3, N=50), 30, [0, 11, 25])


@INDEXES
def test_reordered_rows_decode_as_they_did(index: str) -> None:
    """Beams: rows are repeated and swapped, then go their own ways."""
    made = method(index=index, beam=8, neighbours=8, degree=8)
    q, k, v = random_qkv(B=3, N=46)
    layer = SingleLayer(made)
    layer(q[:2, :, :30], k[:2, :, :30], v[:2, :, :30])
    singles = []
    for row in (1, 0, 1):
        single = SingleLayer(made)
        single(*(x[row : row + 1, :, :30] for x in (q, k, v)))
        singles.append(single)
    layer.cache.select_batch(torch.tensor([1, 0, 1]))
    for t in range(30, 46):
        out = layer(*(x[:, :, t : t + 1] for x in (q, k, v)))
        for row, single in enumerate(singles):
            alone = single(*(x[row : row + 1, :, t : t + 1] for x in (q, k, v)))
            torch.testing.assert_close(out[row : row + 1], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sample", [None, 3])
def test_a_chunked_prompt_ends_as_a_whole_one(sample: int | None) -> None:
    q, k, v = random_qkv(N=40)
    made = method(index="attention-graph", sample=sample, beam=64, neighbours=8, degree=8)
    whole, chunked = SingleLayer(made), SingleLayer(made, chunked=True)
    whole(q[:, :, :32], k[:, :, :32], v[:, :, :32])
    for start in range(0, 32, 8):
        chunked(*(x[:, :, start : start + 8] for x in (q, k, v)))
        assert chunked.cache.stored == start + 8
        if sample is not None:
            assert chunked.cache.states[0].q.shape[2] <= 2 * sample
    for t in range(32, 40):
        a, b = (each(*(x[:, :, t : t + 1] for x in (q, k, v))) for each in (whole, chunked))
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
    if sample is None:
        index = [each.cache.states[0].index for each in (whole, chunked)]
        assert torch.equal(index[0].links, index[1].links)


def test_what_was_read_is_recorded() -> None:
    layer, _ = run(method(), random_qkv(N=34), 26)
    last = layer.run.readings[-1]
    # Sinks, window and budget, of 34 tokens.
    assert (last.phase, last.read, last.visible) == ("decode", 3 + 7 + 5, 34)


@INDEXES
def test_a_search_tells_what_it_scanned_and_found(index: str) -> None:
    """Against all scores, and off by default."""
    made, (q, k, v) = method(index=index, beam=5, neighbours=4, pivots=1, degree=5, recall=3), random_qkv(N=60)
    layer, _ = run(made, (q, k, v), 40)
    assert [each.recall is not None for each in layer.run.readings] == [n % 3 == 0 for n in (40, *range(41, 61))]
    readings = [each for each in layer.run.readings if each.phase == "decode"]
    assert [each.indexed for each in readings] == [float(n - 3 - 7) for n in range(41, 61)]
    assert all(each.scanned is not None and 0 < each.scanned <= each.indexed for each in readings)
    share = sum(each.scanned for each in readings) / sum(each.indexed for each in readings)
    assert scanned_share(layer.run.readings) == pytest.approx(share)
    measured = [each.recall for each in readings if each.recall is not None]
    assert mean_recall(layer.run.readings) == pytest.approx(sum(measured) / len(measured))
    if index == "flat":
        assert (share, set(measured)) == (1.0, {1.0})
    layer, _ = run(method(index=index), random_qkv(N=60), 40)
    assert mean_recall(layer.run.readings) is None


def test_recall_against_brute_force() -> None:
    (q, k, v), made = (
        random_qkv(N=60),
        method(index="attention-graph", beam=5, neighbours=4, pivots=1, degree=5, recall=1),
    )
    layer = SingleLayer(made)
    layer(*(x[:, :, :50] for x in (q, k, v)))
    state = layer.cache.states[0]
    found = state.index.search(q[:, :, 50], state.tier.keys, state.tier.length, count=5, beam=5)
    shares = []
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            scores = k[b, h * k.shape[1] // q.shape[1], 3:44] @ q[b, h, 50]
            best = set(scores.topk(5).indices.tolist())
            shares.append(len(best & set(found.index[b, h].tolist())) / 5)
    best = FlatIndex.build(state.tier.keys, state.tier.length).search(
        q[:, :, 50], state.tier.keys, state.tier.length, count=5
    )
    assert 0 < sum(shares) < len(shares)
    assert recall_of(found, best) == pytest.approx(sum(shares) / len(shares))


def test_recall_of_short_and_empty_rows() -> None:
    none = torch.zeros(1, dtype=torch.int64)
    found = Found(torch.tensor([[[4, -1, -1], [1, 0, 2]], [[-1, -1, -1], [-1, -1, -1]]]), none)
    best = Found(torch.tensor([[[4, 2, -1], [2, 1, -1]], [[-1, -1, -1], [-1, -1, -1]]]), none)
    assert recall_of(found, best) == 0.75
    empty = Found(torch.full((1, 1, 0), -1), none)
    assert recall_of(empty, empty) is None


def test_nothing_is_measured_where_nothing_is_recorded() -> None:
    layer = SingleLayer(method(recall=1))
    layer.run.record = False
    for x in (slice(0, 26), slice(26, 27)):
        layer(*(each[:, :, x] for each in random_qkv(N=27)))
    assert layer.run.readings == []
    assert scanned_share([]) is None
    assert mean_recall([]) is None


@INDEXES
def test_the_cache_tells_host_and_device_apart(index: str) -> None:
    layer, _ = run(method(index=index), random_qkv(N=34), 26)
    state, cache = layer.cache.states[0], layer.cache
    assert cache.host_bytes() == state.tier.bytes().cold + state.tier.length.nbytes + state.index.nbytes
    held = [cache.keys, cache.values, cache.positions]
    assert cache.bytes() - cache.host_bytes() == sum(each.untyped_storage().nbytes() for each in held)
    dense = SingleLayer(create("snapkv:budget=8,window=4"))
    dense(*random_qkv(N=34))
    assert dense.cache.host_bytes() == 0


def test_memory_is_told_apart() -> None:
    layer, _ = run(method(), random_qkv(N=34), 26)
    memory = RetrievalAttention.memory(layer.cache)
    per_token = 2 * 2 * 16 * 8
    assert memory.cold >= 24 * per_token
    assert memory.hot >= 9 * per_token
    assert layer.cache.bytes() >= memory.cold
    state = layer.cache.states[0]
    assert memory.cold == state.tier.bytes().cold + state.index.nbytes


def test_a_full_host_is_refused_and_the_cache_stays_whole() -> None:
    q, k, v = random_qkv(N=30)
    layer = SingleLayer(method(host_limit=1000), layers=2)
    with pytest.raises(HostMemoryError, match="allowed: 500; raise the limit"):
        layer(q, k, v)
    assert layer.cache.stored == layer.cache.seen == 30
    assert not layer.cache.states


def test_a_cache_without_its_tier_is_refused() -> None:
    qkv = random_qkv(N=34)
    layer, _ = run(method(), qkv, 26)
    layer.cache.states.clear()
    with pytest.raises(StateError, match="layer 0: this cache has dropped tokens and holds no host tier and no index"):
        layer(*(x[:, :, :1] for x in qkv))
    other = SingleLayer(create("streaming-llm", window=8, sinks=2, reindex=False))
    other(*(x[:, :, :26] for x in qkv))
    other.method = method()
    with pytest.raises(StateError, match="continue it with the method that filled it"):
        other(*(x[:, :, 26:27] for x in qkv))


def test_a_stale_tier_or_index_is_refused() -> None:
    qkv = random_qkv(N=34)
    layer, _ = run(method(), qkv, 26)
    broken = copy.deepcopy(layer)
    state = layer.cache.states[0]
    state.tier.append(*(x[:, :, :1] for x in qkv[1:]))
    with pytest.raises(StateError, match=r"stale host tier: it holds \[26, 26\] tokens per sequence, and \[25, 25\]"):
        layer(*(x[:, :, :1] for x in qkv))
    broken.cache.states[0].index.length -= 1
    with pytest.raises(StateError, match="stale index"):
        broken(*(x[:, :, :1] for x in qkv))


def test_the_host_is_free_when_the_request_ends_or_is_cancelled() -> None:
    model, (ids, _) = tiny("llama"), prompts(rows=2, pads=(0, 0))
    tiers = []
    options: dict[str, Any] = {"sinks": 2, "window": 8, "budget": 6, "index": "flat"}

    def cancel(module: Any, args: Any, output: Any) -> None:
        if output.shape[1] == 1:
            raise KeyboardInterrupt

    with apply(model, "retrieval-attention", **options) as run_, torch.no_grad():
        model.generate(ids, **{**GREEDY, "max_new_tokens": 3})
        tiers += [weakref.ref(store.states[0].tier) for store in run_.stats.stores]
        hook = model.model.embed_tokens.register_forward_hook(cancel)
        with pytest.raises(KeyboardInterrupt):
            model.generate(ids, **{**GREEDY, "max_new_tokens": 3})
        hook.remove()
        gc.collect()
        assert all(tier() is None for tier in tiers)
        tiers = [weakref.ref(store.states[0].tier) for store in run_.stats.stores]
        assert all(tier() is not None for tier in tiers)
        # The next request takes the cancelled one's place.
        model.generate(ids, **{**GREEDY, "max_new_tokens": 1})
        gc.collect()
        assert all(tier() is None for tier in tiers)


def test_a_whole_model_generates_with_usearch() -> None:
    model, (ids, mask) = tiny("llama"), prompts()
    options: dict[str, Any] = {"sinks": 2, "window": 8, "budget": 6, "beam": 64}
    outs = []
    for index in ("usearch", "flat"):
        with apply(model, "retrieval-attention", index=index, **options) as run_, torch.no_grad():
            outs.append(model.generate(ids, attention_mask=mask, **GREEDY))
            kinds = [type(store.states[0].index) for store in run_.stats.stores]
        assert (kinds == [UsearchIndex] * 3) == (index == "usearch")
    assert torch.equal(*outs)


def test_dense_layers_stay_whole() -> None:
    layer, _ = run(method(dense_layers=1), random_qkv(N=34), 26)
    assert layer.cache.stored == 34
    assert not layer.cache.states


def test_it_is_alone() -> None:
    with pytest.raises(CompositionError, match="RetrievalAttention stores or reads keys in its own way"):
        create("snapkv:budget=16,window=8+retrieval-attention")


def test_a_missing_package_is_named_at_construction(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch.index", None)
    with pytest.raises(MissingPackageError, match="the index 'usearch' needs the package 'usearch'"):
        create("retrieval-attention", index="usearch")


@pytest.mark.gpu
@INDEXES
def test_on_a_gpu_as_on_the_cpu(index: str) -> None:
    qkv = random_qkv(N=60)
    made = method(index=index, beam=64, neighbours=8, degree=8)
    layer, out = run(made, (qkv[0].cuda(), qkv[1].cuda(), qkv[2].cuda()), 40)
    torch.testing.assert_close(out.cpu(), run(made, qkv, 40)[1], rtol=1e-6, atol=1e-6)
    assert layer.cache.states[0].tier.keys.is_pinned()
    assert layer.cache.keys.is_cuda
