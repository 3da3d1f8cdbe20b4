"""Kinetics: rules against brute force, and the cost model against explicit sums."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from foveate import registry
from foveate.attention import attend
from foveate.attention.plan import Tokens
from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.select.kinetics import Kinetics, KineticsCost, coverage, frontier

SMALL = {"blocks": 3, "block": 4, "sinks": 2, "local": 5, "dense_layers": 0}


def draw(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, tokens, 16), torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16)


def read_by(z: Tensor, method: Kinetics) -> list[int]:
    """What one KV head reads, from group-mean scores z [N]: the rules in plain lists."""
    N, S, w, s, k = z.shape[0], method.sinks, method.local, method.block, method.blocks
    everything, sinks = list(range(N)), list(range(min(S, N)))
    if method.rule == "block":
        if math.ceil((S + w + k * s) / s) * s >= N:
            return everything
        count = (N - w - S) // s
        means = torch.stack([z[S + i * s : S + i * s + s].mean() for i in range(count)])
        best = means.argsort(descending=True, stable=True)[:k].tolist()
        picked = [S + i * s + j for i in best for j in range(s)]
        return sorted([*sinks, *picked, *range(S + count * s, N)])
    if method.rule == "strided":
        starts = [i for i in range(S, N, method.stride) if i + s <= N - w]
        if not starts:
            return everything
        means = torch.stack([z[i : i + s].mean() for i in starts])
        best = means.argsort(descending=True, stable=True)[: 2 * k].tolist()
        picked = sorted({starts[i] + j for i in best for j in range(s)})[: k * s]
        return sorted([*sinks, *picked, *range(N - w, N)])
    if method.rule == "token":
        if k * s + S + w >= N:
            return everything
        return sorted([*sinks, *(z[S : N - w].topk(k * s).indices + S).tolist(), *range(N - w, N)])
    return everything if S + w >= N else [*sinks, *range(N - w, N)]


@pytest.mark.parametrize("rule", ["block", "strided", "token", "local"])
@pytest.mark.parametrize("start", [3, 18, 40])
def test_rules_equal_brute_force_while_the_text_grows(rule: str, start: int) -> None:
    method = Kinetics(**SMALL, rule=rule, stride=3)
    q, k, v = draw(start + 9)
    layer = SingleLayer(method)
    layer(q[:, :, :start], k[:, :, :start], v[:, :, :start])
    for t in range(start, start + 9):
        one, N = slice(t, t + 1), t + 1
        out = layer(q[:, :, one], k[:, :, one], v[:, :, one])
        keep = torch.zeros(2, 2, N, dtype=torch.bool)
        for b in range(2):
            for g in range(2):
                z = (q[b, 2 * g : 2 * g + 2, t] @ k[b, g, :N].T).mean(0)
                keep[b, g, read_by(z, method)] = True
        plan = Tokens(torch.where(keep, torch.arange(N), -1))
        expected = attend(q[:, :, one], k[:, :, :N], v[:, :, :N], plan, backend="reference")
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rule", ["block", "strided", "token", "local"])
def test_padded_rows_equal_single_ones(rule: str) -> None:
    method = Kinetics(**SMALL, rule=rule)
    pads = torch.tensor([0, 6, 25, 37])
    qkv = draw(48, batch=4)
    at = (torch.arange(48)[None] - pads[:, None]).clamp_min(-1)
    spans = [slice(0, 40), *(slice(t, t + 1) for t in range(40, 48))]
    layer = SingleLayer(method)
    batch = torch.cat([layer(*(each[:, :, s] for each in qkv), positions=at[:, s]) for s in spans], 2)
    for row, pad in enumerate(pads.tolist()):
        alone = SingleLayer(method)
        own = [each[row : row + 1, :, pad:] for each in qkv]
        parts = [slice(0, 40 - pad), *(slice(t - pad, t - pad + 1) for t in range(40, 48))]
        expected = torch.cat([alone(*(each[:, :, s] for each in own)) for s in parts], 2)
        torch.testing.assert_close(batch[row : row + 1, :, pad:], expected, rtol=1e-4, atol=1e-5)


def test_blocks_of_one_token_are_token_top_k() -> None:
    """Up to where the rest begins: single-token blocks leave none."""
    options = {"blocks": 7, "block": 1, "sinks": 2, "local": 5}
    logits, tokens = torch.randn(2, 2, 40), torch.tensor([[40]])
    kept = [Kinetics(**options, rule=rule).choose(logits, tokens) for rule in ("block", "token")]
    assert torch.equal(*kept)
    assert kept[0].sum(-1).eq(14).all()


def test_enough_blocks_are_dense() -> None:
    q, k, v = draw(50)
    layer = SingleLayer(Kinetics(**{**SMALL, "blocks": 11}))
    outputs = [layer(*(each[:, :, s] for each in (q, k, v))) for s in (slice(0, 49), slice(49, 50))]
    torch.testing.assert_close(torch.cat(outputs, 2), attend(q, k, v), rtol=1e-4, atol=1e-5)


def test_random_keys_are_as_many_and_reproducible() -> None:
    method = Kinetics(**SMALL, rule="random")
    q, k, v = draw(60)
    layers = [SingleLayer(method) for _ in range(2)]
    outputs = []
    for layer in layers:
        layer(q[:, :, :59], k[:, :, :59], v[:, :, :59])
        plan = method.plan(layer.step(q[:, :, 59:], k[:, :, 59:], v[:, :, 59:]))
        outputs.append(plan.index)
    assert torch.equal(*outputs)
    assert outputs[0].shape == (2, 2, 19)
    assert not torch.equal(outputs[0][0, 0], outputs[0][1, 1])


def test_corrected_random_keys_estimate_the_whole() -> None:
    """Equal keys: with the correction, drawn keys weigh as much as all they stand for."""
    q, _, v = draw(100, 1)
    k = torch.zeros(1, 2, 100, 16)
    layer = SingleLayer(Kinetics(**SMALL, rule="random", correct=True))
    v[:, :, 2:95] = 1.0
    layer(q[:, :, :99], k[:, :, :99], v[:, :, :99])
    out = layer(q[:, :, 99:], k[:, :, 99:], v[:, :, 99:])
    expected = v.mean(2, keepdim=True).repeat_interleave(2, 1)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)


def test_oracle_draws_average_to_attention() -> None:
    q, k, v = draw(30, 1)
    layer = SingleLayer(Kinetics(**{**SMALL, "blocks": 20000}, rule="oracle"))
    layer(q[:, :, :29], k[:, :, :29], v[:, :, :29])
    out = layer(q[:, :, 29:], k[:, :, 29:], v[:, :, 29:])
    torch.testing.assert_close(out, attend(q, k, v)[:, :, 29:], rtol=0.05, atol=0.03)


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="it needs rule='random'"):
        Kinetics(correct=True)


MODEL = KineticsCost(params=8.19e9, heads=32, kv_heads=8, width=4608)


def test_the_cost_model_is_registered() -> None:
    card = registry.card("kinetics-cost")
    assert card.kind == "model"
    assert registry.create("kinetics-cost", params=1e9, heads=8, kv_heads=8, width=64).intensity == 562.5


def test_read_tokens_are_the_sum_over_steps() -> None:
    """In continuous form: half a token per step below the budget is the difference to the exact sum."""
    prompt, out, budget = 100, 900, 400
    exact = sum(min(prompt + t, budget) for t in range(1, out + 1))
    memory = float(MODEL.topk(prompt, out, budget=budget)[1]) / (562.5 * 4 * 8 * 4608 * 1e-12)
    assert abs(memory - (exact - (budget - prompt) / 2)) < 1e-6 * memory


def test_a_budget_of_everything_costs_what_dense_costs() -> None:
    """At one trial, up to the half token per step that the continuous forms count apart."""
    sparse, dense = MODEL.topk(256, 5000, budget=5256), MODEL.dense(256, 5000)
    torch.testing.assert_close(sparse, dense, rtol=1e-12, atol=0)


def test_costs_rise_with_trials_length_and_budget_and_memory_takes_over() -> None:
    lengths = torch.tensor([1000.0, 2000, 4000, 8000, 16000])
    dense = MODEL.dense(256, lengths)
    assert (dense.diff(dim=0) > 0).all()
    share = dense[:, 1] / dense.sum(-1)
    assert (share.diff() > 0).all()
    assert (MODEL.dense(256, lengths, 8) > dense).all()
    costs = [MODEL.topk(256, 8000, budget=b) for b in (128, 512, 2048)]
    assert all((a < b).all() for a, b in itertools.pairwise(costs))
    searched = MODEL.block_topk(256, 8000, local=64, block=16, blocks=28)
    assert (searched > MODEL.topk(256, 8000, budget=512)).all()
    assert searched.sum() < MODEL.dense(256, 8000).sum()


def test_coverage() -> None:
    assert coverage(0, 32, 32) == 0.0
    assert coverage(1, 32, 32) == 1.0
    assert coverage(5, 32, 1) == pytest.approx(5 / 32)
    with pytest.raises(OptionError, match="correct=9, samples=8"):
        coverage(9, 8, 1)


def test_frontier() -> None:
    assert frontier([3.0, 1.0, 2.0, 2.0, 5.0], [0.5, 0.2, 0.4, 0.3, 0.5]) == [1, 2, 0]
    with pytest.raises(OptionError, match="1 costs and 2 scores"):
        frontier([1.0], [0.0, 1.0])


def test_bad_costs() -> None:
    with pytest.raises(OptionError, match="a multiple of kv_heads=3"):
        KineticsCost(params=1.0, heads=8, kv_heads=3, width=64)
    with pytest.raises(OptionError, match="trials=0"):
        MODEL.dense(1, 1, 0)
    with pytest.raises(OptionError, match="params=0, allowed: > 0"):
        KineticsCost(params=0, heads=8, kv_heads=8, width=64)
