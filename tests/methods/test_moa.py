"""MoA: spans, the circular cache against masked dense attention, influence, rules and their allocation."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from foveate.attention import attend
from foveate.errors import CompositionError, OptionError, ProfileError, ShapeError
from foveate.methods import SingleLayer, create
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.moa import MoA, cache_sizes
from foveate.methods.keep.spans import (
    Rules,
    allocate,
    block_influence,
    candidate_rules,
    default_grid,
    densities,
    influence,
    masked_loss,
)
from foveate.methods.profile import ModelIdentity
from tests.methods.driving import held_mask, random_qkv

IDENTITY = ModelIdentity("toy", 1, 4, 2, 8, "none")


def bound(alpha: list[float], beta: list[float], **options: int) -> MoA:
    tables = {"alpha": torch.tensor([alpha], dtype=torch.float64), "beta": torch.tensor([beta], dtype=torch.float64)}
    given = {"sinks": 3, "minimum": 6, "multiple": 1, "new_tokens": 10, **options}
    return MoA(profile=table_profile("moa", IDENTITY, **tables), **given).for_model(IDENTITY)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """mask: bool [B, Hkv, M, N]."""
    k, v, mask = (each.repeat_interleave(q.shape[1] // k.shape[1], 1) for each in (k, v, mask))
    scores = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1) @ v


def span_mask(N: int, sizes: list[int], sinks: int) -> Tensor:
    i, j = torch.arange(N)[:, None], torch.arange(N)
    return torch.stack([(j <= i) & ((i - j < c - sinks) | (j < sinks)) for c in sizes])[None]


@pytest.mark.parametrize("prompt", [4, 20, 33])
def test_prompt_and_steps_equal_masked_attention(prompt: int) -> None:
    """Every query, in the prompt or later, sees the first 3 keys and the last c - 3, itself included."""
    q, k, v = random_qkv(N=45)
    layer = SingleLayer(bound([11, 4], [0, 0.5], new_tokens=45 - prompt))
    # N = 45 for both, whatever part of it is prompt.
    expected = dense(q, k, v, span_mask(45, [11, 26], 3))
    spans = [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, 45))]
    for span in spans:
        out = layer(*(x[:, :, span] for x in (q, k, v)))
        torch.testing.assert_close(out, expected[:, :, span], rtol=1e-6, atol=1e-6)
    assert layer.cache.lengths().tolist() == [[11, 26]] * 2
    assert layer.cache.kept_positions(0, 0).tolist() == [0, 1, 2, *range(37, 45)]


def test_beta_one_is_dense_within_the_expected_tokens() -> None:
    q, k, v = random_qkv(N=40)
    layer = SingleLayer(bound([0, 0], [1, 1]))
    out = [
        layer(*(x[:, :, span] for x in (q, k, v))) for span in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 40)))
    ]
    torch.testing.assert_close(torch.cat(out, 2), attend(q, k, v), rtol=1e-6, atol=1e-6)
    assert not layer.cache.ragged


def test_padded_rows_equal_single_ones() -> None:
    q, k, v = random_qkv(N=50)
    at = (torch.arange(50)[None] - torch.tensor([[12], [0]])).clamp_min(-1)
    method = bound([11, 0], [0, 0.5])
    batch, singles = SingleLayer(method), [SingleLayer(method) for _ in range(2)]
    for span in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 40)), slice(40, 45), slice(45, 46), slice(46, 47)):
        out = batch(*(x[:, :, span] for x in (q, k, v)), positions=at[:, span])
        for row, pad in enumerate((12, 0)):
            own = slice(max(pad, span.start), span.stop)
            alone = singles[row](*(x[row : row + 1, :, own] for x in (q, k, v)))
            torch.testing.assert_close(out[row : row + 1, :, -alone.shape[2] :], alone, rtol=1e-6, atol=1e-6)
            for head in range(2):
                held = batch.cache.kept_positions(row, head)
                assert torch.equal(held, singles[row].cache.kept_positions(0, head))
    assert batch.cache.lengths().tolist() == [[11, 14], [11, 20]]


def test_a_later_piece_reads_what_is_held_and_is_cut_again() -> None:
    q, k, v = random_qkv(N=50)
    layer = SingleLayer(bound([11, 15], [0, 0]))
    for span in (slice(0, 30), *(slice(t, t + 1) for t in range(30, 40))):
        layer(*(x[:, :, span] for x in (q, k, v)))
    mask = held_mask(layer, 47)[:, :, None].expand(-1, -1, 7, -1).clone()
    mask[..., 40:] = torch.ones(7, 7, dtype=torch.bool).tril()
    part = slice(40, 47)
    out = layer(*(x[:, :, part] for x in (q, k, v)))
    torch.testing.assert_close(out, dense(q[:, :, part], k[:, :, :47], v[:, :, :47], mask), rtol=1e-6, atol=1e-6)
    last = slice(47, 48)
    layer(*(x[:, :, last] for x in (q, k, v)))
    assert layer.cache.kept_positions(1, 0).tolist() == [0, 1, 2, *range(40, 48)]


def test_a_chunked_prompt_is_cut_at_its_end() -> None:
    q, k, v = random_qkv(N=31)
    layer = SingleLayer(bound([11, 0], [0, 0.5]), chunked=True)
    for span in (slice(0, 12), slice(12, 30)):
        out = layer(*(x[:, :, span] for x in (q, k, v)))
    torch.testing.assert_close(out, attend(q[:, :, 12:30], k[:, :, :30], v[:, :, :30]), rtol=1e-6, atol=1e-6)
    layer(*(x[:, :, 30:] for x in (q, k, v)))
    assert layer.cache.lengths().tolist() == [[11, 20]] * 2


def test_cache_sizes() -> None:
    alpha = torch.tensor([-100.0, 0, 1000, 3000, 64.9], dtype=torch.float64)
    beta = torch.tensor([0.5, 0.03, 0, 1, 0], dtype=torch.float64)
    made = cache_sizes(alpha, beta, 2000, minimum=128, multiple=64)
    assert made.tolist() == [960, 128, 1024, 2048, 128]


def test_influence_is_the_change_of_a_loss_that_is_linear_in_the_weights() -> None:
    q, k, v = (torch.randn(1, 2, 6, 4, dtype=torch.float64) for _ in range(3))
    grad = torch.randn(1, 2, 6, 4, dtype=torch.float64)
    made = influence(q, k, v, grad)

    def loss(i: int, j: int | None) -> Tensor:
        scores = torch.einsum("bhd,bhnd->bhn", q[:, :, i], k[:, :, : i + 1]) / 2
        if j is not None:
            scores[..., j] = -torch.inf
        weights = scores.softmax(-1)
        return torch.einsum("bhn,bhnd,bhd->bh", weights, v[:, :, : i + 1], grad[:, :, i])

    for i in range(1, 6):
        for j in range(i + 1):
            torch.testing.assert_close(made[:, :, i, j], loss(i, j) - loss(i, None), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(made[:, :, 0, 0], -loss(0, None))
    assert bool((made.triu(1) == 0).all())


def test_group_query_heads_share_their_keys_in_influence() -> None:
    q, k, v, grad = torch.randn(1, 4, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 2, 8, 4), torch.randn(1, 4, 8, 4)
    wide = influence(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), grad)
    assert torch.equal(influence(q, k, v, grad), wide)
    blocks = block_influence(wide, 4)
    torch.testing.assert_close(blocks[0, 1, 1, 0], wide[0, 1, 4:, :4].abs().sum())
    with pytest.raises(ShapeError, match="blocks of 3"):
        block_influence(wide, 3)


def test_rules_and_layouts() -> None:
    rules = candidate_rules(*default_grid(profiled=8192, least=1024), profiled=8192, target=16384, least=1024)
    span = rules.alpha + rules.beta * 16384
    assert bool((span.diff() >= 0).all())
    assert bool((rules.alpha + rules.beta * 8192 <= 8192).all())
    assert bool((rules.alpha + rules.beta * 1024 > 0).all())
    one = Rules(torch.tensor([-1.0, 128.0]), torch.tensor([0.5, 0.0]))
    assert one.blocks(512, 64).tolist() == [3, 2]
    layout = one.layouts(512, 64)[1]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    for i in range(8):
        for j in range(i + 1):
            expected[i, j] = j in (0, i, i - 1)
    assert torch.equal(layout, expected)
    assert densities(layout[None]).tolist() == [3 / 8]
    blocks = torch.rand(3, 8, 8).tril()
    torch.testing.assert_close(masked_loss(blocks, layout[None])[:, 0], (blocks * ~expected).sum((-1, -2)))


def test_allocation_is_the_best_of_all_and_grows_with_the_budget() -> None:
    loss, sizes = torch.rand(3, 4), torch.tensor([1, 2, 4, 7])
    before = float("inf")
    for budget in range(3, 22):
        chosen = allocate(loss, sizes, budget)
        assert int(sizes[chosen].sum()) <= budget
        best = min(
            float(sum(loss[h, r] for h, r in enumerate(pick)))
            for pick in itertools.product(range(4), repeat=3)
            if sum(int(sizes[r]) for r in pick) <= budget
        )
        reached = float(loss.gather(1, chosen[:, None]).sum())
        assert reached == pytest.approx(best)
        assert reached <= before + 1e-9
        before = reached
    with pytest.raises(OptionError, match="budget=2, allowed: >= 3"):
        allocate(loss, sizes, 2)


def test_what_is_refused() -> None:
    with pytest.raises(OptionError, match="minimum=64, allowed: > sinks=64"):
        MoA(minimum=64)
    with pytest.raises(CompositionError, match="MoA"):
        create("moa+snapkv")
    bad = table_profile("moa", IDENTITY, alpha=torch.zeros(1, 2))
    with pytest.raises(ProfileError, match="'beta' is missing"):
        MoA(profile=bad).for_model(IDENTITY)
