"""Ada-KV's shared budgets against their definition, written out per key."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.attention import Rope
from foveate.errors import OptionError
from foveate.methods import SingleLayer, create
from foveate.methods.budgets import falling_budget, prune_lowest
from foveate.methods.full import Full
from foveate.methods.keep.adakv import AdaKV
from foveate.methods.keep.expected_attention import ExpectedAttention
from foveate.methods.keep.h2o import ObservedAttention
from foveate.methods.keep.knorm import KNorm
from foveate.methods.keep.pyramidkv import PyramidKV
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.prompt import PromptKeep
from tests.methods.driving import (
    check_padded_rows_equal_singles,
    check_steps_equal_masked_dense,
    held_mask,
    kept,
    random_qkv,
)

ROPE = Rope(8)


def lengths(method: AdaKV, qkv: tuple[Tensor, ...], layer: int = 0, layers: int = 1) -> list[int]:
    made = SingleLayer(method, layer=layer, layers=layers, rope=ROPE)
    made(*qkv)
    return made.cache.lengths()[0].tolist()


def shared_by_hand(scores: Tensor, base: int, floor: float) -> list[set[int]]:
    """What each head keeps of scores [H, n], beside its window."""
    H, n = scores.shape
    order = sorted(((float(scores[h, j]), h, j) for h in range(H) for j in range(n)), key=lambda e: (-e[0], e[2], e[1]))
    counts = [sum(h == head for _, h, _ in order[: base * H]) for head in range(H)]
    budgets = [round(count * (1 - floor) + int(floor * base)) for count in counts]
    return [set(sorted(range(n), key=lambda j: (-float(scores[h, j]), j))[: budgets[h]]) for h in range(H)]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.5, 1.0])
def test_original_equals_the_definition(floor: float) -> None:
    qkv = random_qkv(B=1, Hq=8, Hkv=4)
    method = AdaKV(budget=14, window=4, floor=floor)
    layer = SingleLayer(method)
    votes = method.scorer.votes(layer.step(*qkv))[0]  # type: ignore[attr-defined]
    layer = SingleLayer(method)
    layer(*qkv)
    for head, front in enumerate(shared_by_hand(votes, 10, floor)):
        assert kept(layer, 0, head) == sorted(front | {36, 37, 38, 39})
    if floor == 1.0:
        assert layer.cache.lengths().tolist() == [[14] * 4]


@pytest.mark.parametrize("floor", [0.0, 0.2, 1.0])
def test_kvpress_equals_the_definition(floor: float) -> None:
    scores = torch.randn(3, 20, dtype=torch.float64)
    safe = [
        set(scores[h].topk(max(1, int(8 * floor)) if floor else 0).indices.tolist())  # kvpress: never less than one
        for h in range(3)
    ]
    free = [(float(scores[h, j]), h, j) for h in range(3) for j in range(20) if j not in safe[h]]
    gone = {(h, j) for _, h, j in sorted(free)[: 3 * 12]}
    expected = torch.tensor([[(h, j) not in gone for j in range(20)] for h in range(3)])
    assert torch.equal(prune_lowest(scores, 8, floor), expected)


def test_totals_and_floor() -> None:
    qkv = random_qkv(B=1, Hq=8, Hkv=8, N=100)
    for floor in (0.2, 0.5):
        held = lengths(AdaKV(budget=30, window=10, floor=floor), qkv)
        assert abs(sum(held) - 8 * 30) <= 8
        assert min(held) >= 10 + int(floor * 20)
        assert len(set(held)) > 1
    assert sum(lengths(AdaKV(budget=30, window=10, variant="kvpress"), qkv)) == 8 * 30


@pytest.mark.parametrize("variant", ["original", "kvpress"])
def test_equal_heads_get_equal_budgets(variant: str) -> None:
    q, k, v = random_qkv(B=1, Hq=1, Hkv=1)
    qkv = tuple(x.expand(-1, 4, -1, -1) for x in (q, k, v))
    assert lengths(AdaKV(budget=14, window=4, floor=0.0, variant=variant), qkv) == [14] * 4


def test_normalising_gives_more_to_concentrated_heads() -> None:
    q, k, v = random_qkv(B=1, Hq=2, Hkv=2, N=60)
    q = q * torch.tensor([4.0, 0.5], dtype=torch.float64)[None, :, None, None]
    plain = lengths(AdaKV(budget=20, window=4), (q, k, v))
    weighed = lengths(AdaKV(budget=20, window=4, normalize=True), (q, k, v))
    assert weighed[0] >= plain[0]
    assert sum(weighed) == sum(plain)


@pytest.mark.parametrize("variant", ["original", "kvpress"])
def test_first_layers_share_evenly(variant: str) -> None:
    qkv = random_qkv(B=1)
    method = AdaKV(budget=14, window=4, skip_layers=2, variant=variant)
    assert lengths(method, qkv, layer=1, layers=4) == [14, 14]
    assert sum(lengths(method, qkv, layer=2, layers=4)) == pytest.approx(28, abs=2)


def test_nothing_goes_only_when_the_budget_is_above_the_prompt() -> None:
    """The original compares b > N - window: at equality the floor's rounding may take a key."""
    qkv = random_qkv(B=1)
    assert lengths(AdaKV(budget=41, window=4), qkv) == [40, 40]
    # c = b = 36: round(36 * 0.8 + int(7.2)) = round(35.8).
    assert lengths(AdaKV(budget=40, window=4), qkv) == [40, 40]
    # b = 37 of 37: round(29.6 + 7) = 37; with floor 0.5: round(18.5 + 18) = 36.
    assert lengths(AdaKV(budget=40, window=3, floor=0.5), qkv) == [39, 39]
    assert lengths(AdaKV(ratio=0.0, window=3, floor=0.5), qkv) == [40, 40]


def test_pyramid_base_takes_its_layer_budgets() -> None:
    qkv = random_qkv(B=1)
    for layer in range(3):
        method = AdaKV(budget=14, window=4, base="pyramid", beta=5, floor=1.0)
        expected = 4 + falling_budget(layer, 3, 10, 36, 5)
        assert lengths(method, qkv, layer=layer, layers=3) == [expected, expected]
    method = AdaKV(budget=16, window=4, base="pyramid", beta=2, variant="kvpress")
    counts = [PyramidKV(budget=16, window=4, beta=2, variant="kvpress").layer_count(i, 3, 40) for i in range(3)]
    assert counts == [24, 16, 8]
    assert [sum(lengths(method, qkv, layer=i, layers=3)) for i in range(3)] == [2 * count for count in counts]


BASES = ["snapkv", "pyramid", "expected-attention", ObservedAttention(), ExpectedAttention(future=32, sinks=2)]


@pytest.mark.parametrize("variant", ["original", "kvpress"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base if isinstance(base, str) else type(base).__name__)
def test_every_base_decodes_as_masked_dense_attention(base: str | PromptKeep, variant: str) -> None:
    method = AdaKV(budget=14, window=4, base=base, variant=variant)
    check_steps_equal_masked_dense(SingleLayer(method, rope=ROPE), random_qkv(), 30)


@pytest.mark.parametrize("variant", ["original", "kvpress"])
@pytest.mark.parametrize("base", BASES, ids=lambda base: base if isinstance(base, str) else type(base).__name__)
@pytest.mark.parametrize("share", [{"budget": 14}, {"ratio": 0.6}], ids=str)
def test_padded_rows_equal_single_runs(base: str | PromptKeep, variant: str, share: dict[str, float]) -> None:
    method = AdaKV(window=4, base=base, variant=variant, **share)  # type: ignore[arg-type]
    check_padded_rows_equal_singles(lambda: SingleLayer(method, rope=ROPE), random_qkv(B=3), 30, [18, 3, 0])


@pytest.mark.parametrize("base", BASES, ids=lambda base: base if isinstance(base, str) else type(base).__name__)
def test_chunked_prompt_keeps_what_one_forward_keeps(base: str | PromptKeep) -> None:
    q, k, v = random_qkv()
    method = AdaKV(budget=14, window=4, base=base)
    whole, pieces = SingleLayer(method, rope=ROPE), SingleLayer(method, rope=ROPE, chunked=True)
    whole(q, k, v)
    for start in range(0, 40, 8):
        piece = slice(start, start + 8)
        pieces(q[:, :, piece], k[:, :, piece], v[:, :, piece])
    pieces.finish_prefill()
    assert torch.equal(held_mask(whole, 40), held_mask(pieces, 40))


def test_the_bytes_go_away() -> None:
    qkv = random_qkv(B=1, N=600)
    ragged, whole = SingleLayer(AdaKV(budget=60, window=8)), SingleLayer(Full())
    for layer in (ragged, whole):
        layer(*qkv)
    assert ragged.cache.bytes() < whole.cache.bytes() / 8


def test_refusals() -> None:
    with pytest.raises(OptionError, match=r"base='nothing', allowed: \('snapkv', 'pyramid', 'expected-attention'\)"):
        create("adakv:base=nothing")
    with pytest.raises(OptionError, match=r"allowed: a method with scores of its own"):
        AdaKV(base=AdaKV())
    with pytest.raises(OptionError, match=r"allowed: SnapKV with one score per KV head"):
        AdaKV(base=SnapKV(per_query_head=True))
    with pytest.raises(OptionError, match=r"normalize=True, allowed: only with a base whose scores are shares"):
        lengths(AdaKV(budget=14, base=KNorm(), normalize=True), random_qkv())
    with pytest.raises(OptionError, match=r"budget=32, allowed: > window=32"):
        AdaKV(budget=32)
    with pytest.raises(OptionError, match=r"floor=1.5, allowed: >= 0 and <= 1"):
        AdaKV(floor=1.5)
    with pytest.raises(OptionError, match=r"budget=5, allowed: > window=6"):
        AdaKV(budget=5, base=SnapKV(window=6))


def test_only_expected_attention_needs_the_rotary_embedding() -> None:
    assert AdaKV().needs == frozenset()
    assert AdaKV(base="expected-attention").needs == {"rope"}
