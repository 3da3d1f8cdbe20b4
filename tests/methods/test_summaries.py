"""Summaries of chunks against loops over their rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope
from foveate.attention.summaries import attended, bounds, centroids, in_chunks, mean, total
from foveate.methods.select.longheads import LongHeads


def runs(x: Tensor, size: int) -> list[Tensor]:
    return list(x.split(size, -2))


@pytest.mark.parametrize(("n", "size"), [(12, 4), (13, 4), (3, 8), (1, 1)])
def test_means_totals_and_bounds_of_runs(n: int, size: int) -> None:
    x = torch.randn(2, 3, n, 5, dtype=torch.float64)
    chunks, real = in_chunks(x, size)
    expected = [(run.sum(-2), run.mean(-2), run.amax(-2), run.amin(-2)) for run in runs(x, size)]
    sums, means, greatest, least = (torch.stack(each, -2) for each in zip(*expected))
    torch.testing.assert_close(total(chunks, real), sums)
    torch.testing.assert_close(mean(chunks, real), means)
    assert torch.equal(bounds(chunks, real), torch.cat((greatest, least), -1))


def test_rows_that_are_not_real_count_for_nothing() -> None:
    chunks = torch.randn(2, 3, 4, 5)
    real = torch.rand(2, 3, 4) < 0.5
    real[0, 0], real[1, 1] = False, True
    means, limits = mean(chunks, real), bounds(chunks, real)
    for b in range(2):
        for c in range(3):
            rows = chunks[b, c][real[b, c]]
            if not len(rows):
                assert means[b, c].tolist() == [0.0] * 5
                assert limits[b, c].tolist() == [-torch.inf] * 5 + [torch.inf] * 5
                continue
            torch.testing.assert_close(means[b, c], rows.mean(0))
            assert torch.equal(limits[b, c], torch.cat((rows.amax(0), rows.amin(0))))
    assert total(chunks.bfloat16(), real, dtype=torch.float32).dtype == torch.float32


def test_a_bound_is_above_every_score() -> None:
    chunks, q = torch.randn(3, 8, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    greatest, least = bounds(chunks).chunk(2, -1)
    assert bool((torch.maximum(q * greatest, q * least).sum(-1) >= (chunks @ q).amax(-1)).all())


@pytest.mark.parametrize("per_query_head", [False, True])
def test_attended_chunks_by_softmax_written_out(per_query_head: bool) -> None:
    q = torch.randn(2, 4, 3, 5, 8, dtype=torch.float64)
    k, v = (torch.randn(2, 2, 3, 5, 8, dtype=torch.float64) for _ in range(2))
    made = attended(q, k, v, scale=0.3, per_query_head=per_query_head)
    for b in range(2):
        for c in range(3):
            asked = [(((q[b, h, c] @ k[b, h // 2, c].T) * 0.3).softmax(-1) @ v[b, h // 2, c]).mean(0) for h in range(4)]
            if not per_query_head:
                asked = [(asked[2 * h] + asked[2 * h + 1]) / 2 for h in range(2)]
            for h, u in enumerate(asked):
                own = k[b, h // 2 if per_query_head else h, c]
                torch.testing.assert_close(made[b, h, c], ((u @ own.T) * 0.3).softmax(-1) @ own)


@pytest.mark.parametrize("per_query_head", [False, True])
def test_longheads_represents_chunks_so(per_query_head: bool) -> None:
    """The chunk keys of its definition, from vectors before rotation: each chunk's stand at places 0 to w - 1."""
    D, w, scale, rope = 16, 4, 0.25, Rope(16)
    q, k, v = (torch.randn(1, heads, 12, D, dtype=torch.float64) for heads in (4, 2, 2))
    at = torch.arange(12)[None]
    method = LongHeads(chunk=w, length=12, start=12, per_query_head=per_query_head)
    made = method.chunk_keys(rope.rotate(q, at), rope.rotate(k, at), v, rope, scale)
    assert made.shape == (1, 4 if per_query_head else 2, 3, D)
    for chunk in range(3):
        own = slice(chunk * w, chunk * w + w)
        turned_q, turned_k = (rope.rotate(x[:, :, own], torch.arange(w)[None])[0] for x in (q, k))
        asked = []
        for head in range(4):
            rows = []
            for row in range(w):
                weights = torch.stack([turned_q[head, row] @ key * scale for key in turned_k[head // 2]]).exp()
                rows.append((weights / weights.sum()) @ v[0, head // 2, own])
            asked.append(sum(rows) / w)
        if not per_query_head:
            asked = [(asked[0] + asked[1]) / 2, (asked[2] + asked[3]) / 2]
        for head, u in enumerate(asked):
            keys = turned_k[head // 2 if per_query_head else head]
            weights = torch.stack([u @ key * scale for key in keys]).exp()
            torch.testing.assert_close(made[0, head, chunk], (weights / weights.sum()) @ keys, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_centroids_are_means_of_clusters(lead: tuple[int, ...]) -> None:
    x, labels = torch.randn(*lead, 20, 4), torch.randint(0, 5, (*lead, 20))
    labels[labels == 3] = 0
    made = centroids(x, labels, 5).view(-1, 5, 4)
    for own, rows, names in zip(made, x.view(-1, 20, 4), labels.view(-1, 20)):
        for cluster in range(5):
            members = rows[names == cluster]
            expected = members.mean(0) if len(members) else torch.zeros(4)
            torch.testing.assert_close(own[cluster], expected)
    assert centroids(x.bfloat16(), labels, 5).dtype == torch.bfloat16
