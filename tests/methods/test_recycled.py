"""Recycled attention: schedules, the remembered set, and the training pattern."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.errors import OptionError
from foveate.methods import SingleLayer
from foveate.methods.cache import Keep
from foveate.methods.select.recycled import Recycled, training_plan
from foveate.methods.select.reuse import EveryStride, WhenDissimilar, similarity


def draw(tokens: int, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(batch, 4, tokens, 16), torch.randn(batch, 2, tokens, 16), torch.randn(batch, 2, tokens, 16)


def run(method: Recycled, qkv: tuple[Tensor, ...], prompt: int, **options: Any) -> tuple[Tensor, SingleLayer]:
    layer = SingleLayer(method, **options)
    spans = [slice(0, prompt), *(slice(t, t + 1) for t in range(prompt, qkv[0].shape[2]))]
    return torch.cat([layer(*(each[:, :, span] for each in qkv)) for span in spans], 2), layer


def brute(qkv: tuple[Tensor, ...], prompt: int, budget: int, full: set[int], reduce: str, strict: bool) -> Tensor:
    """The definition with lists and sets; `full` holds the numbers of the full decode steps."""
    q, k, v = qkv
    B, T = q.shape[0], q.shape[2]
    out = torch.zeros_like(q)
    for b in range(B):
        for g in range(2):
            best: list[int] = []
            anchor = prompt - 1
            for t in range(T):
                rows = q[b, 2 * g : 2 * g + 2, t]
                scores = rows @ k[b, g, : t + 1].T / 4
                number = t - prompt + 1
                if number <= 0 or number in full:
                    read = list(range(t + 1))
                else:
                    recent = list(range(anchor, t + 1))
                    old = [j for j in best if j not in recent]
                    read = (old[: max(0, len(best) - len(recent))] if strict else old) + recent
                weights = scores[:, read].softmax(-1)
                out[b, 2 * g : 2 * g + 2, t] = weights @ v[b, g, read]
                if number == 0 or number in full:
                    rank = scores.softmax(-1)
                    rank = rank.amax(0) if reduce == "max" else rank.mean(0)
                    best, anchor = rank.argsort(descending=True)[:budget].tolist(), t
    return out


@pytest.mark.parametrize("reduce", ["max", "mean"])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_stride_schedule_equals_brute_force(stride: int, strict: bool, reduce: str) -> None:
    qkv = draw(50)
    method = Recycled(budget=9, stride=stride, reduce=reduce, strict=strict)
    full = {t for t in range(1, 40) if t % stride == 0}
    expected = brute(qkv, 30, 9, full, reduce, strict)
    torch.testing.assert_close(run(method, qkv, 30)[0], expected, rtol=1e-4, atol=1e-5)


def test_every_step_full_or_every_key_remembered_is_dense() -> None:
    qkv = draw(40)
    dense = attend(*qkv)
    for options in ({"stride": 1, "budget": 3}, {"budget": 40, "stride": 7}, {"budget": 25, "stride": 20}):
        torch.testing.assert_close(run(Recycled(**options), qkv, 25)[0], dense, rtol=1e-4, atol=1e-5)


def test_remembered_keys_are_the_best_of_the_group() -> None:
    qkv = draw(33)
    q, k, _ = qkv
    weights = (q[:, :, 32:] @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).softmax(-1)[:, :, 0]
    expected = weights.unflatten(1, (2, 2)).amax(2).topk(6).indices
    for strict in (False, True):
        _, layer = run(Recycled(budget=6, stride=3, strict=strict), qkv, 30)
        state = layer.cache.states[0]
        assert torch.equal(state.index, expected if strict else expected.sort().values)
        assert state.since.tolist() == [32, 32]


def test_similarity_thresholds() -> None:
    """Above 1 every comparison brings a full step, at -1 none does."""
    qkv = draw(50)
    for threshold, full in ((1.1, {4, 8, 12, 16, 20}), (-1.0, set())):
        method = Recycled(budget=7, schedule="similarity", threshold=threshold, interval=4)
        expected = brute(qkv, 30, 7, full, "max", False)
        torch.testing.assert_close(run(method, qkv, 30)[0], expected, rtol=1e-4, atol=1e-5)


def test_similarity_is_to_the_last_full_step_and_each_row_decides() -> None:
    qkv = draw(50, batch=3)
    method = Recycled(budget=7, schedule="similarity", threshold=0.05, interval=1)
    batch, _ = run(method, qkv, 30)
    outcomes = set()
    for b in range(3):
        own = tuple(each[b : b + 1] for each in qkv)
        reference, full = own[0][:, :, 29], set()
        for t in range(30, 50):
            if similarity(own[0][:, :, t], reference) < 0.05:
                reference = own[0][:, :, t]
                full.add(t - 29)
        outcomes.add(frozenset(full))
        torch.testing.assert_close(batch[b : b + 1], brute(own, 30, 7, full, "max", False), rtol=1e-4, atol=1e-5)
    assert len(outcomes) == 3


def test_queries_are_compared_before_rotation_when_asked() -> None:
    """Equal unrotated queries never differ; rotated far apart they do."""
    rope = Rope(16)
    q, k, v = draw(60, 1)
    q = rope.rotate(q[:, :, :1].expand(-1, -1, 60, -1), torch.arange(60)[None])
    for compare, full in (("unrotated", 0), ("rotated", 1)):
        method = Recycled(budget=4, schedule="similarity", threshold=0.99, interval=1, compare=compare)
        _, layer = run(method, (q, k, v), 30, rope=rope)
        dense = [each for each in layer.run.readings[1:] if each.read == each.visible]
        assert (len(dense) > 0) == bool(full)


def test_more_text_ranks_anew_and_counts_anew() -> None:
    qkv = draw(40)
    layer = SingleLayer(Recycled(budget=5, stride=4))
    for span in (slice(0, 20), slice(20, 21), slice(21, 22), slice(22, 30)):
        layer(*(each[:, :, span] for each in qkv))
    assert layer.cache.states[0].number == 0
    assert layer.cache.states[0].since.tolist() == [29, 29]


def test_changed_slots_bring_a_full_step() -> None:
    qkv = draw(40)
    _, layer = run(Recycled(budget=5, stride=100), qkv, 38)
    layer.cache.apply(Keep(torch.arange(10, 40).expand(2, 2, -1)))
    q, k, v = draw(1)
    out = layer(q, k, v)
    torch.testing.assert_close(out, attend(q, layer.cache.keys, layer.cache.values), rtol=1e-4, atol=1e-5)


def test_observation_window_and_pooling() -> None:
    q, k, v = draw(30, 1)
    layer = SingleLayer(Recycled(budget=6, observe=4, kernel=3))
    layer(q, k, v)
    scores = q[:, :, -4:] @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4
    seen = torch.arange(30) <= torch.arange(26, 30)[:, None]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).mean(2).unflatten(1, (2, 2)).amax(2)
    pooled = torch.nn.functional.pad(weights, (1, 1)).unfold(-1, 3, 1).mean(-1)
    assert torch.equal(layer.cache.states[0].index, pooled.topk(6).indices.sort().values)


@pytest.mark.parametrize("stride, budget", [(4, 3), (7, 5), (1, 2), (50, 4), (5, 100)])
def test_training_pattern_equals_decoding_token_by_token(stride: int, budget: int) -> None:
    q, k, v = draw(33)
    plan = training_plan(q, k, budget=budget, stride=stride)
    parallel = attend(q, k, v, plan)
    stepwise, _ = run(Recycled(budget=budget, stride=stride), (q, k, v), 1)
    torch.testing.assert_close(parallel, stepwise, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(parallel, attend(q, k, v, plan, backend="reference"), rtol=1e-4, atol=1e-5)


def test_gradients_flow_through_the_keys_that_are_read() -> None:
    q, k, v = (each.requires_grad_() for each in draw(24, 1))
    plan = training_plan(q, k, budget=2, stride=6)
    attend(q, k, v, plan)[:, :, 11].square().sum().backward()
    read = plan.to_mask(24, 24)[0, :, 11]
    assert k.grad is not None
    assert torch.equal(k.grad[0].abs().sum(-1) > 0, read)
    assert q.grad is not None
    assert q.grad[0, :, 11].abs().sum() > 0


def test_policies() -> None:
    q = torch.randn(2, 4, 8)
    assert [EveryStride(3).due(t, q, q).tolist() for t in (1, 2, 3)] == [[False] * 2, [False] * 2, [True] * 2]
    policy = WhenDissimilar(0.5, interval=2)
    assert policy.due(1, q, -q).tolist() == [False, False]
    assert policy.due(2, q, -q).tolist() == [True, True]
    assert policy.due(2, q, 3 * q).tolist() == [False, False]
    torch.testing.assert_close(similarity(q, q, flat=True), torch.ones(2))
    assert WhenDissimilar(1.01).due(1, q, q).all()
    assert not WhenDissimilar(-1.0).due(1, q, -q).any()


def test_bad_options() -> None:
    with pytest.raises(OptionError, match="kernel=2, allowed: an odd number"):
        Recycled(kernel=2)
    with pytest.raises(OptionError, match="stride=0, allowed: >= 1"):
        Recycled(stride=0)
    with pytest.raises(OptionError, match="budget=0"):
        training_plan(*draw(4)[:2], budget=0, stride=3)
