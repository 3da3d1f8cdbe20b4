"""Squeezed Attention: clusters, thresholds, and lookups against brute force."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import attend
from foveate.attention.summaries import centroids
from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.cache import Keep
from foveate.methods.select.clusters import kmeans
from foveate.methods.select.squeezed import Squeezed, count, lookup, pooled_quantile, weigh
from foveate.methods.single import masked_reference


def draw(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    shapes = ((batch, 4, tokens, 8), (batch, 2, tokens, 8), (batch, 2, tokens, 8))
    q, k, v = (torch.randn(shape, dtype=torch.float64) for shape in shapes)
    return q * 2, k, v


def spans(x: tuple[Tensor, ...], *ends: int) -> list[tuple[Tensor, ...]]:
    return [tuple(each[:, :, start:end] for each in x) for start, end in zip((0, *ends), ends)]


def brute_weights(q: Tensor, centres: Tensor, sizes: Tensor, scale: float) -> Tensor:
    B, H, C, _ = centres.shape
    out = torch.zeros(B, H, C, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            rows = []
            for head in (2 * h, 2 * h + 1):
                for query in q[b, head]:
                    e = torch.exp(query @ centres[b, h].T * scale)
                    rows.append(e / (sizes[b, h] * e).sum())
            out[b, h] = torch.stack(rows).mean(0)
    return out


@pytest.mark.parametrize("levels", [1, 2])
def test_a_step_reads_what_the_definition_says(levels: int) -> None:
    """Threshold from the prompt, then a question of 3 tokens and single ones, all by loops."""
    qkv = draw(60)
    method = Squeezed(window=6, share=0.2, levels=levels, coarse_share=0.08, sparsity=0.6, coarse_sparsity=0.4)
    layer = SingleLayer(method)
    prompt, *later = spans(qkv, 50, 53, 54, 55)
    layer(*prompt)
    scale = 8**-0.5
    state = layer.cache.states[0].levels
    labels = [layer.cache.extra(f"squeezed.labels.{i}")[..., :44].long() for i in range(levels)]
    cuts = []
    for level, own, share in zip(state, labels, (0.4, 0.6) if levels == 2 else (0.6,)):
        C = level.centres.shape[2]
        sizes = torch.stack([(own == c + 1).sum(-1) for c in range(C)], -1)
        S = brute_weights(prompt[0][:, :, -6:], level.centres, sizes, scale)
        cuts.append(torch.quantile(S.gather(2, own - 1).flatten(1), share, dim=1))
    n = 50
    for q, k, v in later:
        n += q.shape[2]
        alive = torch.ones(2, 2, 44, dtype=torch.bool)
        for level, own, cut in zip(state, labels, cuts):
            C = level.centres.shape[2]
            sizes = torch.stack([((own == c + 1) & alive).sum(-1) for c in range(C)], -1)
            S = brute_weights(q, level.centres, sizes, scale).gather(2, own - 1)
            alive = alive & torch.gt(S, cut[:, None, None])
        keep = torch.cat((alive, torch.ones(2, 2, n - 44, dtype=torch.bool)), -1)
        expected = masked_reference(q, qkv[1][:, :, :n], qkv[2][:, :, :n], keep)
        torch.testing.assert_close(layer(q, k, v), expected, rtol=1e-5, atol=1e-6)
        assert 0 < int(alive.sum()) < alive.numel()


def test_weights_sum_to_one_over_keys() -> None:
    q, centres, sizes = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8), torch.randint(0, 5, (2, 2, 7))
    weights = weigh(q, centres, sizes, scale=0.3)
    torch.testing.assert_close((weights * sizes).sum(-1), torch.ones(2, 2))
    assert bool((weights[sizes == 0] == 0).all())


def test_one_cluster_per_key_gives_exact_softmax_weights() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 20, 8)
    labels = torch.arange(1, 21).expand(1, 2, -1)
    weights = weigh(q, k, count(labels, 20), scale=0.5)
    expected = (q @ k.transpose(-1, -2) * 0.5).softmax(-1).mean(2)
    torch.testing.assert_close(weights, expected)


def test_a_cluster_of_equal_keys_is_estimated_exactly() -> None:
    points = torch.randn(1, 1, 4, 8)
    labels = torch.tensor([[[1, 1, 2, 2, 2, 3, 4, 4]]])
    k = points.gather(2, (labels - 1)[..., None].expand(-1, -1, -1, 8))
    q = torch.randn(1, 1, 2, 8)
    weights = weigh(q, points, count(labels, 4), scale=0.5).gather(2, labels - 1)
    torch.testing.assert_close(weights, (q @ k.transpose(-1, -2) * 0.5).softmax(-1).mean(2))


def test_a_coarse_level_that_keeps_all_changes_nothing() -> None:
    q, centres = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8)
    labels = torch.randint(1, 7, (1, 2, 40))
    coarse = (labels - 1) // 3 + 1
    one = lookup(q, [centres], [labels], [torch.tensor([0.02])], scale=0.5)
    two = lookup(
        q, [torch.randn(1, 2, 2, 8), centres], [coarse, labels], [torch.tensor([-1.0]), torch.tensor([0.02])], scale=0.5
    )
    assert torch.equal(one, two)
    assert 0 < int(one.sum()) < one.numel()


def test_threshold_is_pooled_over_layers_and_leaves_the_given_share() -> None:
    """Two layers share one threshold; replaying the observed queries keeps 1 - sparsity of all keys."""
    method = Squeezed(window=10, share=0.5, sparsity=0.75)
    layers = [SingleLayer(method, layer=index, layers=2) for index in range(2)]
    layers[1].run = layers[0].run
    data = [draw(90, 1), draw(90, 1)]
    for layer, (q, k, v) in zip(layers, data):
        layer(q * (1 + layer.layer), k, v)
    state = [layer.cache.states[0].levels[0] for layer in layers]
    assert state[0].pool is state[1].pool
    kept = []
    for layer, level, (q, _, _) in zip(layers, state, data):
        labels = layer.cache.extra("squeezed.labels.0")
        cut = level.pool.cut(0.75)
        q = q[:, :, -10:] * (1 + layer.layer)
        kept.append(lookup(q, [level.centres], [labels], [cut], scale=8**-0.5)[..., :80].double())
    assert abs(float(torch.cat(kept).mean()) - 0.25) < 0.04
    assert abs(float(kept[0].mean()) - float(kept[1].mean())) > 0.01


def test_pooled_quantile_counts_keys() -> None:
    weights, sizes = torch.rand(2, 3, 5), torch.randint(0, 4, (2, 3, 5))
    made = pooled_quantile([weights[:, :2], weights[:, 2:]], [sizes[:, :2], sizes[:, 2:]], 0.37)
    for row in range(2):
        keys = weights[row].flatten().double().repeat_interleave(sizes[row].flatten())
        torch.testing.assert_close(made[row], torch.quantile(keys, 0.37))
    assert pooled_quantile([weights], [sizes * 0], 0.5).isneginf().all()


def test_threshold_below_every_weight_is_dense() -> None:
    qkv = draw(40)
    for levels in (1, 2):
        layer = SingleLayer(Squeezed(window=4, threshold=-1.0, levels=levels))
        out = torch.cat([layer(*part) for part in spans(qkv, 30, 35, 36, 40)], 2)
        torch.testing.assert_close(out, attend(*qkv), rtol=1e-6, atol=1e-7)


def test_padded_rows_equal_single_ones() -> None:
    q, k, v = draw(50, 2)
    at = torch.arange(50)[None] - torch.tensor([[7], [0]])
    method = Squeezed(window=6, share=0.3)
    batch, alone = SingleLayer(method), SingleLayer(method)
    for start, end in ((0, 40), (40, 44), (44, 45), (45, 46)):
        part = slice(start, end)
        both = batch(q[:, :, part], k[:, :, part], v[:, :, part], positions=at[:, part].clamp_min(-1))
        own = slice(7, end) if start == 0 else part
        one = alone(q[:1, :, own], k[:1, :, own], v[:1, :, own])
        torch.testing.assert_close(both[:1, :, -one.shape[2] :], one, rtol=1e-6, atol=1e-7)


def test_a_chunked_prompt_is_clustered_at_its_end() -> None:
    qkv = draw(50)
    whole, pieces = SingleLayer(Squeezed(window=6, share=0.3)), SingleLayer(Squeezed(window=6, share=0.3), chunked=True)
    first, later = spans(qkv, 45, 46)
    whole(*first)
    for part in spans(qkv, 16, 41, 45):
        pieces(*part)
    torch.testing.assert_close(pieces(*later), whole(*later))
    assert pieces.run.readings[-1].read < pieces.run.readings[-1].visible


def test_labels_follow_when_other_methods_evict() -> None:
    qkv = draw(50)
    layer = SingleLayer(Squeezed(window=6, share=0.3))
    first, later = spans(qkv, 49, 50)
    layer(*first)
    before = layer.cache.extra("squeezed.labels.0").clone()
    kept = torch.arange(0, 49, 2).expand(2, 2, -1)
    layer.cache.apply(Keep(kept))
    assert torch.equal(layer.cache.extra("squeezed.labels.0"), before[..., ::2])
    assert torch.isfinite(layer(*later)).all()


def test_kmeans_finds_separate_groups_and_leaves_nothing_to_improve() -> None:
    centres = 10 * torch.eye(4, 8)
    truth = torch.arange(80) % 4
    x = (centres[truth] + torch.randn(80, 8) * 0.1).expand(2, -1, -1).contiguous()
    labels = kmeans(x, 4)
    assert len({(int(a), int(b)) for a, b in zip(truth, labels[0])}) == 4
    y = torch.randn(3, 70, 8)
    labels = kmeans(y, 9)
    distances = torch.cdist(y, centroids(y, labels, 9))
    own = distances.gather(2, labels[..., None])[..., 0]
    assert bool((own <= distances.amin(-1) + 1e-5).all())
    assert torch.equal(kmeans(y[:1], 9), labels[:1])
    assert torch.equal(kmeans(torch.ones(1, 5, 3), 3), torch.zeros(1, 5, dtype=torch.int64))


def test_short_contexts_are_dense() -> None:
    qkv = draw(20)
    layer = SingleLayer(Squeezed(window=18))
    out = torch.cat([layer(*part) for part in spans(qkv, 18, 19, 20)], 2)
    torch.testing.assert_close(out, attend(*qkv))


@pytest.mark.parametrize(
    ("name", "value"), [("share", 0.0), ("sparsity", 1.1), ("levels", 3), ("window", 0), ("iterations", 0)]
)
def test_bad_options(name: str, value: float) -> None:
    with pytest.raises(OptionError, match=name):
        Squeezed(**{name: value})
