"""TCA-Attention against its definition, written out per head, block and token; its calibration on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.errors import CompositionError, OptionError, ProfileError
from foveate.hf import apply
from foveate.hf.calibrate import calibrate
from foveate.methods import SingleLayer, create
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.tca import (
    TCA,
    TCAState,
    block_counts,
    choose_configurations,
    configurations,
    densities,
    importance,
    pairs_read,
    prompt_plan,
    select_tokens,
)
from foveate.methods.profile import ModelIdentity
from foveate.methods.single import masked_reference
from tests.methods.driving import check_padded_rows_equal_singles, held_mask, kept, random_qkv
from tests.models import tiny
from tests.toy_tokenizer import ToyTokenizer

IDENTITY = ModelIdentity("toy", 1, 4, 2, 8, "none")
# Blocks of 4: the share of blocks that keep 1, 2 and 4 tokens; the second is dense.
MIX = [[0.5, 0.25, 0.25], [0.0, 0.0, 1.0]]


def bound(mix: list[list[float]] | None = None, heads: tuple[int, int] = (0, 0), **options: Any) -> TCA:
    """Two KV heads with the configurations `heads` of `mix`; prompts of 5 blocks and more are cut."""
    proportions = torch.tensor(mix or MIX, dtype=torch.float64)
    loss = torch.ones(1, 2, len(proportions), dtype=torch.float64)
    for head, index in enumerate(heads):
        loss[0, head, index] = 0.0
    profile = table_profile("tca", IDENTITY, proportions=proportions, loss=loss)
    return TCA(profile=profile, **{"least_blocks": 5, "recent_blocks": 2, **options}).for_model(IDENTITY)


def weights_of(q: Tensor, k: Tensor) -> Tensor:
    """a [N] of one KV head: its last queries q [G, w, D], keys k [N, D]."""
    N = k.shape[0]
    rows = []
    for head in q:
        seen = [N - len(head) + i + 1 for i in range(len(head))]
        own = [(k[:n] @ row * k.shape[1] ** -0.5).softmax(0) for n, row in zip(seen, head)]
        rows.append(sum(torch.cat((w, w.new_zeros(N - len(w)))) for w in own) / len(head))
    a = torch.stack(rows).max(0).values
    return a / a.sum()


def by_hand(
    a: Tensor, k: Tensor, mix: list[float], rank: str, forced: tuple[int, ...] = ()
) -> tuple[set[int], list[Any]]:
    """Kept tokens of the whole blocks, and (rank of the block, tokens it keeps) in descending order."""
    b = 2 ** (len(mix) - 1)
    n = a.shape[0] // b
    ranks = []
    for i in range(n):
        if rank == "mass":
            ranks.append(float(a[i * b : i * b + b].sum()))
        else:
            keys = k[i * b : i * b + b]
            mean = keys.mean(0)
            ranks.append(-sum(float(row @ mean / row.norm() / mean.norm()) for row in keys) / b)
    order = sorted(range(n), key=lambda i: (-ranks[i], i))
    tokens: set[int] = set()
    ladder = []
    done, share, count = 0, 0.0, b
    for p in reversed(mix):
        share += p
        upto = n if count == 1 else math.floor(share * n + 0.5)
        for i in order[done:upto]:
            inside = sorted(range(i * b, i * b + b), key=lambda j: (-float(a[j]), j))
            tokens |= set(range(i * b, i * b + b)) if i in forced else set(inside[:count])
            ladder.append((ranks[i], count))
        done, count = max(done, upto), count // 2
    return tokens, ladder


@pytest.mark.parametrize("window", [1, 3])
@pytest.mark.parametrize("rank", ["mass", "key"])
@pytest.mark.parametrize("N", [40, 43])
def test_a_prompt_keeps_what_the_definition_says(N: int, rank: str, window: int) -> None:
    q, k, v = random_qkv(N=N)
    method = bound(rank=rank, window=window)
    layer = SingleLayer(method)
    layer(q, k, v)
    for row in range(2):
        for head in range(2):
            a = weights_of(q[row, 2 * head : 2 * head + 2, N - window :], k[row, head])
            tokens, _ = by_hand(a, k[row, head], MIX[0], rank, forced=(0, N // 4 - 2, N // 4 - 1))
            assert kept(layer, row, head) == sorted(tokens | set(range(N // 4 * 4, N)))


@pytest.mark.parametrize("heads", [(0, 0), (0, 1)])
def test_prompt_queries_read_kept_tokens_and_their_own_stretch(heads: tuple[int, int]) -> None:
    q, k, v = random_qkv(N=43)
    layer = SingleLayer(bound(heads=heads))
    out = layer(q, k, v)
    mask = held_mask(layer, 43)
    for t in range(43):
        local = mask.clone()
        local[..., max(0, t // 4 - 1) * 4 :] = True
        one = slice(t, t + 1)
        expected = masked_reference(q[:, :, one], k[:, :, : t + 1], v[:, :, : t + 1], local[..., : t + 1])
        torch.testing.assert_close(out[:, :, one], expected, rtol=1e-6, atol=1e-6)
    read = pairs_read(mask, 4)
    plan = prompt_plan(mask, 4).to_mask(43, 43)
    assert read == plan.sum().item() / 2
    assert layer.run.readings[0].read == pytest.approx(read / 2)


def test_steps_read_what_is_held_and_blocks_close_by_their_rank() -> None:
    q, k, v = random_qkv(N=64)
    layer = SingleLayer(bound())
    layer(q[:, :, :41], k[:, :, :41], v[:, :, :41])
    ladders = {}
    for row in range(2):
        for head in range(2):
            a = weights_of(q[row, 2 * head : 2 * head + 2, 40:41], k[row, head, :41])
            ladders[row, head] = by_hand(a, k[row, head], MIX[0], "mass")[1]
    for t in range(41, 64):
        before = held_mask(layer, t + 1)
        before[..., t] = True
        one = slice(t, t + 1)
        out = layer(q[:, :, one], k[:, :, one], v[:, :, one])
        expected = masked_reference(q[:, :, one], k[:, :, : t + 1], v[:, :, : t + 1], before)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)
        for (row, head), ladder in ladders.items():
            held = before[row, head].nonzero()[:, 0].tolist()
            if (t + 1) % 4 == 0:
                block = (t + 1) // 4 - 3
                a = weights_of(q[row, 2 * head : 2 * head + 2, one], k[row, head, held])
                weight = dict(zip(held, a.tolist()))
                tokens = range(4 * block, 4 * block + 4)
                rank = sum(weight[j] for j in tokens)
                count = max((count for least, count in ladder if rank >= least), default=1)
                gone = sorted(tokens, key=lambda j: (-weight[j], j))[count:]
                held = [j for j in held if j not in gone]
            assert kept(layer, row, head) == held
    assert int(layer.cache.lengths().max()) < 64


def test_later_turns_close_several_blocks_at_once() -> None:
    q, k, v = random_qkv(N=80)
    layer = SingleLayer(bound())
    layer(q[:, :, :40], k[:, :, :40], v[:, :, :40])
    layer(q[:, :, 40:79], k[:, :, 40:79], v[:, :, 40:79])
    assert layer.last is not None
    assert isinstance(layer.last.state, TCAState)
    assert layer.last.state.closed.tolist() == [17, 17]
    # Every block keeps something, and the recent ones all.
    mask = held_mask(layer, 79)
    assert bool(mask[..., :76].unflatten(-1, (19, 4)).any(-1).all())
    assert bool(mask[..., 68:].all())
    assert not bool(mask[..., 40:68].all())
    before = held_mask(layer, 80)
    before[..., 79] = True
    out = layer(q[:, :, 79:], k[:, :, 79:], v[:, :, 79:])
    torch.testing.assert_close(out, masked_reference(q[:, :, 79:], k, v, before), rtol=1e-6, atol=1e-6)


def test_dense_heads_and_short_prompts_keep_everything_for_good() -> None:
    for heads, prompt in (((1, 1), 40), ((0, 0), 19)):
        q, k, v = random_qkv(N=prompt + 30)
        layer = SingleLayer(bound(heads=heads))
        out = [layer(q[:, :, :prompt], k[:, :, :prompt], v[:, :, :prompt])]
        out += [layer(*(x[:, :, t : t + 1] for x in (q, k, v))) for t in range(prompt, prompt + 30)]
        everything = torch.ones(2, 2, prompt + 30, dtype=torch.bool)
        torch.testing.assert_close(torch.cat(out, 2), masked_reference(q, k, v, everything), rtol=1e-6, atol=1e-6)
        assert not layer.cache.ragged
    layer = SingleLayer(bound(heads=(0, 1)))
    q, k, v = random_qkv(N=60)
    for part in (slice(0, 40), slice(40, 59), slice(59, 60)):
        layer(q[:, :, part], k[:, :, part], v[:, :, part])
    assert layer.cache.lengths()[:, 1].tolist() == [60, 60]
    assert int(layer.cache.lengths()[:, 0].max()) < 40


def test_left_padding() -> None:
    def make() -> SingleLayer:
        return SingleLayer(bound())

    check_padded_rows_equal_singles(make, random_qkv(B=3, N=60), 43, [0, 6, 25])


def test_a_chunked_prompt_is_cut_at_its_end() -> None:
    q, k, v = random_qkv(N=43)
    whole, pieces = (SingleLayer(bound(window=2), chunked=chunked) for chunked in (False, True))
    whole(q, k, v)
    for part in (slice(0, 20), slice(20, 41), slice(41, 43)):
        pieces(q[:, :, part], k[:, :, part], v[:, :, part])
    assert not pieces.cache.ragged
    pieces.finish_prefill()
    assert torch.equal(held_mask(pieces, 43), held_mask(whole, 43))


def test_what_is_lost_is_bounded_by_twice_the_lost_weight() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        q, k, v = random_qkv(B=1, Hq=2, Hkv=2, N=40)
        a = importance(q[:, :, -1:], k, 8**-0.5)
        mask, _ = select_tokens(a, k, torch.tensor([MIX[0]] * 2, dtype=torch.float64), "mass")
        lost = (a * ~mask).sum(-1)
        exact, less = ((a[..., None] * v).sum(2), masked_reference(q[:, :, -1:], k, v, mask)[:, :, 0])
        assert bool(((less - exact).norm(dim=-1) <= 2 * lost * v.norm(dim=-1).amax(-1)).all())
        assert float(lost.min()) > 0


def test_configurations() -> None:
    made = configurations(64)
    assert made.shape == (7 * 3 + 1, 7)
    torch.testing.assert_close(made.sum(-1), torch.ones(22, dtype=torch.float64))
    # mu = 1, sigma = 1/2: 1, e^-2 at distance 1 and so on.
    raw = [math.exp(-2 * (x - 1) ** 2) for x in range(7)]
    torch.testing.assert_close(made[3], torch.tensor(raw, dtype=torch.float64) / sum(raw))
    assert made[-1].tolist() == [0, 0, 0, 0, 0, 0, 1]
    assert densities(torch.tensor([[0.5, 0.25, 0.25], [0, 0, 1]])).tolist() == [0.5, 1.0]
    with pytest.raises(OptionError, match="block=48, allowed: a power of two"):
        configurations(48)


@pytest.mark.parametrize("blocks", [1, 2, 7, 16, 100])
def test_counts_of_blocks_follow_the_shares(blocks: int) -> None:
    made = configurations(16)
    counts = block_counts(made, blocks)
    assert counts.shape == (len(made), blocks)
    assert bool((counts.diff(dim=-1) <= 0).all())
    assert int(counts.min()) >= 1
    assert counts[-1].tolist() == [16] * blocks
    # Each cumulative share is rounded to half a block, so at most half of what neighbouring counts differ by is lost.
    assert bool(((counts.double().mean(-1) / 16 - densities(made)).abs() * blocks <= 0.5).all())


def test_the_choice_is_the_least_dense_within_tau() -> None:
    proportions = torch.tensor([[0.0, 1, 0], [1, 0, 0], [0, 0, 1]])
    loss = torch.tensor([[0.03, 0.2, 0.0], [0.03, 0.04, 0.0], [0.3, 0.2, 0.01], [torch.nan] * 3])
    assert choose_configurations(loss, proportions, 0.05).tolist() == [0, 1, 2, 2]
    assert choose_configurations(loss, proportions, 0.0).tolist() == [2, 2, 2, 2]


def test_uniform_heads_become_dense_and_peaked_ones_sparse() -> None:
    a = torch.ones(1, 2, 256) / 256
    a[0, 1] = 1e-6
    a[0, 1, 100] = 1.0
    proportions = configurations(16)
    losses = torch.stack(
        [
            1 - (a * select_tokens(a, a[..., None], p.expand(2, -1), "mass")[0]).sum(-1)[0] / a.sum(-1)[0]
            for p in proportions
        ],
        -1,
    )
    density = densities(proportions)[choose_configurations(losses, proportions, 1e-3)]
    assert density[0] == 1.0
    assert density[1] == densities(proportions).min()


def test_calibration_measures_what_configurations_lose(tmp_path: Path) -> None:
    model = tiny("llama")
    settings = {"block": 8, "length": 200, "depths": 2, "needles": 2, "progress": False}
    profile = calibrate("tca", model, ToyTokenizer(), out=tmp_path / "tca", **settings)
    loss, proportions = profile.tensors["loss"], profile.tensors["proportions"]
    assert loss.shape == (3, 2, len(configurations(8)))
    assert torch.equal(proportions, configurations(8))
    assert bool((loss[..., -1].abs() < 1e-6).all())
    assert bool((loss[..., :-1] > 0).all())
    # A tiny random model attends nearly evenly: what is lost is nearly what is left out.
    wide = densities(proportions) < 0.3
    assert bool((loss[..., wide] > 0.2).all())
    with apply(model, "tca", profile=str(tmp_path / "tca"), tau=0.3, least_blocks=4) as run, torch.no_grad():
        model.generate(torch.randint(3, 128, (1, 100)), max_new_tokens=3, do_sample=False)
        assert min(min(row) for row in run.stats.lengths) < 90
    with pytest.raises(OptionError, match="block=12, allowed"):
        calibrate("tca", model, ToyTokenizer(), out=tmp_path / "no", block=12)


def test_bad_input() -> None:
    with pytest.raises(OptionError, match=r"tau=1\.0, allowed: >= 0 and < 1"):
        create("tca", tau=1.0)
    with pytest.raises(ProfileError, match="foveate calibrate tca"):
        SingleLayer(TCA())(*random_qkv())
    with pytest.raises(ProfileError, match="'proportions' is no"):
        TCA(profile=table_profile("tca", IDENTITY, loss=torch.zeros(1, 2, 2))).for_model(IDENTITY)
    sparse_only = table_profile("tca", IDENTITY, loss=torch.zeros(1, 2, 1), proportions=torch.tensor(MIX[:1]))
    with pytest.raises(ProfileError, match="no configuration is dense"):
        TCA(profile=sparse_only).for_model(IDENTITY)
    with pytest.raises(CompositionError, match="TCA"):
        create("tca+quest")
