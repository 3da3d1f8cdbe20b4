"""Budgets: what they say is what the methods that use them hold after a prompt."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from foveate.methods import Method, SingleLayer
from foveate.methods.budgets import (
    ByError,
    ByScore,
    LayerBudget,
    Pyramid,
    TwoClass,
    Uniform,
    affordable,
    head_budgets,
    layer_budgets,
)
from foveate.methods.keep.adakv import AdaKV
from foveate.methods.keep.compresskv import CompressKV
from foveate.methods.keep.duo import Duo
from foveate.methods.keep.pyramidkv import PyramidKV
from foveate.methods.keep.razor import Razor
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.keep.task_kv import TaskKV
from foveate.methods.profile import ModelIdentity

MODEL = ModelIdentity("toy", 3, 4, 2, 16, "none")
N = 64


def calibrated(kind: type, **options: float) -> Method:
    return kind(**options, profile=kind.example_profile(MODEL)).for_model(MODEL)  # type: ignore[attr-defined]


def held(method: Method, layer: int) -> tuple[SingleLayer, list[int]]:
    """A layer after a prompt of N tokens, and how many keys each KV head holds."""
    single = SingleLayer(method, layer=layer, layers=3)
    torch.manual_seed(layer)
    single(*(torch.randn(1, heads, N, 16) for heads in (4, 2, 2)))
    return single, single.cache.lengths()[0].tolist()


CASES: dict[str, tuple[Method, LayerBudget]] = {
    "snapkv": (SnapKV(budget=24, window=8), Uniform(24)),
    "snapkv, more than all": (SnapKV(budget=99, window=8), Uniform(99)),
    "pyramidkv": (PyramidKV(budget=24, window=8, beta=4), Pyramid(3, 24, 8, 4)),
    "pyramidkv, a share": (PyramidKV(ratio=0.5, window=8, beta=4), Pyramid(3, 32, 8, 4)),
    "pyramidkv, little": (PyramidKV(ratio=0.9, window=8, beta=4), Pyramid(3, 6, 8, 4)),
    "pyramidkv, kvpress": (
        PyramidKV(ratio=0.6, window=8, beta=4, variant="kvpress"),
        Pyramid(3, N * (1.0 - 0.6), 8, 4, real=True),
    ),
    "compresskv": (
        calibrated(CompressKV, budget=24, window=8, least=12),
        ByError((1 / 6, 2 / 6, 3 / 6), mean=24, least=12, most=72),
    ),
}


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize("case", CASES)
def test_heads_of_a_layer_hold_what_its_budget_says(case: str, layer: int) -> None:
    method, budget = CASES[case]
    _, lengths = held(method, layer)
    assert budget.counts(layer, torch.rand(2, N)).tolist() == lengths
    assert [budget.of_layer(layer, N)] * 2 == lengths


@pytest.mark.parametrize("layer", range(3))
@pytest.mark.parametrize(
    "method",
    [calibrated(Duo, sinks=2, window=9), calibrated(Razor, induction=0.34, least=8, compression=5.5)],
    ids=["duo", "razor"],
)
def test_two_classes_of_calibrated_heads(method: Duo | Razor, layer: int) -> None:
    _, lengths = held(method, layer)
    assert method.classes.counts(layer, torch.rand(2, N)).tolist() == lengths
    assert [head for head, count in enumerate(lengths) if count < N] == method.classes.others[layer]
    assert method.classes.counts(layer, torch.rand(2, 6)).tolist() == [6, 6]


@pytest.mark.parametrize("layer", range(3))
def test_two_classes_of_heads_found_in_the_prompt(layer: int) -> None:
    method = TaskKV(budget=44, sinks=2, recent=8, window=8, top=16)
    single, lengths = held(method, layer)
    assert single.last is not None
    torch.manual_seed(layer)
    q, k, v = (torch.randn(1, heads, N, 16) for heads in (4, 2, 2))
    mass = (q[:, :, -8:] @ k.repeat_interleave(2, 1).transpose(-1, -2) / 4).masked_fill(
        torch.ones(8, N).triu(N - 7).bool(), -torch.inf
    )
    distance = method.distances(mass.softmax(-1).mean(2), v)[0]
    budget = method.classes(distance, N, layer, 3)
    assert budget.counts(layer, torch.rand(2, N)).tolist() == lengths
    assert sum(lengths) <= 2 * 44
    assert N in lengths


@pytest.mark.parametrize("normalize", [False, True])
def test_keys_of_a_layer_go_to_the_heads_with_the_best_scores(normalize: bool) -> None:
    method = AdaKV(budget=24, window=8, normalize=normalize)
    scores = torch.rand(2, N) ** torch.tensor([[1.0], [9.0]])
    scores = F.pad(scores[:, :-8], (0, 8), value=2.0)
    budget = ByScore(Uniform(16), floor=0.2, normalize=normalize)
    counts = budget.counts(1, scores[:, :-8])
    assert method.chosen(scores, 1, 3).sum(1).tolist() == (counts + 8).tolist()
    assert torch.equal(counts, head_budgets(scores[:, :-8], 16, 0.2, normalize))
    assert int(counts[0]) > int(counts[1]) >= 3
    assert int(counts.sum()) == pytest.approx(32, abs=1)


def test_layers_that_do_not_share_have_the_mean() -> None:
    budget = ByError((0.25, float("nan"), 0.75), mean=20, least=6, most=60)
    assert budget.keys == [layer_budgets([0.25, 0.75], 20, 6, 60)[0], 20, layer_budgets([0.25, 0.75], 20, 6, 60)[1]]
    assert budget.of_layer(2, 9) == 9


def test_one_row_of_classes_serves_all_layers() -> None:
    budget = TwoClass(torch.tensor([[True, False, True]]), lambda tokens: tokens // 4)
    for layer in range(4):
        assert budget.counts(layer, torch.rand(3, 40)).tolist() == [40, 10, 40]
    assert budget.others == [[1]]


@pytest.mark.parametrize("total", range(0, 170, 13))
@pytest.mark.parametrize("least", [0, 10])
def test_two_classes_within_a_total(total: int, least: int) -> None:
    heads, tokens, most = 4, 40, 3
    whole, rest = affordable(total, tokens, heads, most, least)
    fits = [n for n in range(most + 1) if n * tokens + (heads - n) * least <= total]
    if not fits:
        assert (whole, rest) == (0, least)
        return
    assert whole == max(fits)
    spent = whole * tokens + (heads - whole) * rest
    assert total - (heads - whole) < spent <= total
