"""Task-KV against its definition, written out per head and key."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from foveate.errors import CompositionError, OptionError
from foveate.methods import SingleLayer, create
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.keep.task_kv import TaskKV, farthest, semantic_vectors
from tests.methods.driving import (
    check_padded_rows_equal_singles,
    check_steps_equal_masked_dense,
    kept,
    random_qkv,
)

SMALL = {"sinks": 2, "recent": 6, "window": 5, "top": 7, "kernel": 3}


def mean_weights(q: Tensor, k: Tensor, window: int) -> Tensor:
    """C [N] of one head: q, k [N, D]."""
    N = q.shape[0]
    rows = []
    for i in range(max(0, N - window), N):
        weights = (k[: i + 1] @ q[i] * q.shape[1] ** -0.5).softmax(0)
        rows.append(torch.cat((weights, torch.zeros(N - i - 1, dtype=q.dtype))))
    return torch.stack(rows).mean(0)


def by_hand(method: TaskKV, q: Tensor, k: Tensor, v: Tensor, layer: int = 0, layers: int = 1) -> list[list[int]]:
    """What every KV head keeps of q [Hq, N, D], k, v [H, N, D]."""
    Hq, N, _ = q.shape
    H = k.shape[0]
    G = Hq // H
    weights = [mean_weights(q[h], k[h // G], method.window) for h in range(Hq)]
    said = []
    for h in range(Hq):
        order = sorted(range(N), key=lambda j: (-float(weights[h][j]), j))[: method.top]
        vector = sum(weights[h][j] * v[h // G, j] for j in order)
        said.append(vector / vector.norm() if method.normalise else vector)
    centre = sum(said) / Hq
    groups = [range(g * G, g * G + G) for g in range(H)]
    if method.group == "mean":
        far = [float((sum(said[h] for h in group) / G - centre).norm()) for group in groups]
    else:
        far = [max(float((said[h] - centre).norm()) for h in group) for group in groups]
    first = H * method.beta
    f = math.floor(first - (first - method.least) * (layer / (layers - 1) if layers > 1 else 0) + 0.5)
    f = min(max(f, 1), H)
    budget = method.budget * H

    def middle(f: int) -> float:
        return math.floor((budget - N * f) / (H - f)) - method.sinks - method.recent if f < H else -1

    while middle(f) < 0:
        f -= 1
    order = sorted(range(H), key=lambda h: (-far[h], h))
    whole = order[:f]
    if method.central and f >= 2:
        whole = order[: f - 1] + [min(set(range(H)) - set(order[: f - 1]), key=lambda h: (far[h], h))]
    made = []
    for g, group in enumerate(groups):
        mean = sum(weights[h] for h in group) / G
        half = method.kernel // 2
        pooled = [float(mean[max(0, j - half) : j + half + 1].sum()) / method.kernel for j in range(N)]
        inner = sorted(range(method.sinks, N - method.recent), key=lambda j: (-pooled[j], j))[: int(middle(f))]
        few = sorted([*range(method.sinks), *inner, *range(N - method.recent, N)])
        made.append(list(range(N)) if g in whole else few)
    return made


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 16},
        {"budget": 20, "beta": 0.75},
        {"budget": 24, "beta": 0.5, "central": False},
        {"budget": 20, "beta": 0.5, "least": 2, "group": "max"},
        {"budget": 30, "beta": 1.0, "normalise": True},
        {"budget": 9, "beta": 1.0, "least": 4},
        {"budget": 20, "top": 100, "group": "max", "normalise": True},
    ],
)
def test_choice_equals_the_definition(options: dict[str, object]) -> None:
    qkv = random_qkv(B=2, Hq=8, Hkv=4)
    method = TaskKV(**{**SMALL, **options})  # type: ignore[arg-type]
    for layer, layers in ((0, 1), (0, 4), (2, 4), (3, 4)):
        driven = SingleLayer(method, layer=layer, layers=layers)
        driven(*qkv)
        for row in range(2):
            expected = by_hand(method, *(x[row] for x in qkv), layer, layers)
            assert [kept(driven, row, head) for head in range(4)] == expected


@pytest.mark.parametrize("beta", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("budget", [8, 13, 20, 35, 39])
def test_a_layer_holds_its_budget_to_within_a_key_per_head(budget: int, beta: float) -> None:
    driven = SingleLayer(TaskKV(budget=budget, beta=beta, least=2, **SMALL))
    driven(*random_qkv(B=1, Hq=8, Hkv=4))
    held = int(driven.cache.lengths().sum())
    assert 4 * budget - 4 < held <= 4 * budget


def test_with_no_whole_head_it_is_snapkv_with_sinks() -> None:
    qkv = random_qkv(B=1)
    driven = SingleLayer(TaskKV(budget=14, beta=0.0, least=0, **SMALL))
    driven(*qkv)
    # SnapKV's votes, with sinks and recent keys forced by hand; its window is what pooling must not reach.
    step = SingleLayer(SnapKV()).step(*qkv)
    votes = SnapKV(budget=14, window=5, kernel=3).head_votes(step)[0].unflatten(0, (2, 2)).mean(1)
    for head in range(2):
        inner = sorted(range(2, 34), key=lambda j: -float(votes[head, j]))[:6]
        assert kept(driven, 0, head) == sorted([0, 1, *inner, *range(34, 40)])


def test_the_outlying_head_is_kept_whole() -> None:
    torch.manual_seed(1)
    q, k, v = (x.repeat(1, 6, 1, 1) for x in random_qkv(B=1, Hq=1, Hkv=1))
    v[:, 4] *= -1
    driven = SingleLayer(TaskKV(budget=20, beta=0.0, least=1, **SMALL))
    driven(q, k, v)
    assert [kept(driven, 0, head) == list(range(40)) for head in range(6)] == [False] * 4 + [True, False]


def test_equal_heads_are_kept_by_index() -> None:
    qkv = (x.repeat(1, 4, 1, 1) for x in random_qkv(B=1, Hq=1, Hkv=1))
    driven = SingleLayer(TaskKV(budget=30, beta=0.5, **SMALL))
    driven(*qkv)
    assert driven.cache.lengths().tolist() == [[40, 40, 20, 20]]
    assert farthest(torch.ones(4), 3, central=True).tolist() == [True, True, True, False]
    assert farthest(torch.tensor([1.0, 3.0, 0.5, 2.0]), 2, central=True).tolist() == [False, True, True, False]


def test_with_all_keys_a_vector_is_the_windows_mean_output() -> None:
    q, k, v = random_qkv(B=1, Hq=4, Hkv=2)
    mask = torch.ones(40, 40, dtype=torch.bool).tril()
    keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
    weights = (q @ keys.mT * 8**-0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    output = (weights @ values)[:, :, -5:].mean(2)
    torch.testing.assert_close(semantic_vectors(weights[:, :, -5:].mean(2), v, 1000), output)


def test_decoding_reads_what_is_held_and_later_tokens_stay() -> None:
    method = TaskKV(budget=18, beta=0.5, **SMALL)
    layer = SingleLayer(method)
    check_steps_equal_masked_dense(layer, random_qkv(N=44), prompt=40)
    before = layer.cache.lengths()
    layer(*random_qkv(N=3))
    assert torch.equal(layer.cache.lengths(), before + 3)


def test_left_padding() -> None:
    def make() -> SingleLayer:
        return SingleLayer(TaskKV(budget=15, beta=0.5, **SMALL))

    check_padded_rows_equal_singles(make, random_qkv(B=3, N=43), 40, [0, 7, 30])


def test_a_chunked_prompt_is_decided_at_its_end() -> None:
    q, k, v = random_qkv()
    whole, pieces = (SingleLayer(TaskKV(budget=15, **SMALL), chunked=chunked) for chunked in (False, True))
    whole(q, k, v)
    for part in (slice(0, 20), slice(20, 37), slice(37, 40)):
        pieces(q[:, :, part], k[:, :, part], v[:, :, part])
    pieces.finish_prefill()
    assert [kept(pieces, b, h) for b in range(2) for h in range(2)] == [
        kept(whole, b, h) for b in range(2) for h in range(2)
    ]


def test_number_of_whole_heads() -> None:
    llama = TaskKV(beta=0.25, least=4)
    assert [llama.whole_count(layer, 32, 32) for layer in (0, 15, 16, 31)] == [8, 6, 6, 4]
    # nb = 2.4, m = 1: 2.4, 1.7, 1.0.
    assert [TaskKV().whole_count(layer, 3, 8) for layer in range(3)] == [2, 2, 1]
    assert TaskKV(beta=0.0, least=0).whole_count(0, 3, 8) == 0
    assert TaskKV(beta=0.1, least=0).whole_count(2, 3, 8) == 1
    assert TaskKV(least=9).whole_count(2, 3, 8) == 8


def test_a_share_of_a_short_prompt_never_takes_sinks_and_recent_keys() -> None:
    driven = SingleLayer(TaskKV(ratio=0.9, **SMALL))
    driven(*random_qkv(B=1))
    assert kept(driven) == [0, 1, *range(34, 40)]
    short = SingleLayer(TaskKV(ratio=0.9, **SMALL))
    short(*random_qkv(B=1, N=8))
    assert kept(short) == list(range(8))


def test_bad_input() -> None:
    with pytest.raises(OptionError, match=r"budget=100, allowed: >= sinks \+ recent = 272"):
        create("task-kv", budget=100)
    with pytest.raises(OptionError, match="kernel=4, allowed: an odd number"):
        create("task-kv", kernel=4)
    with pytest.raises(OptionError, match=r"beta=1\.5"):
        create("task-kv", beta=1.5)
    with pytest.raises(CompositionError, match="TaskKV"):
        create("task-kv+quest")
