"""What all evicting methods share: order of ties, budgets, padding, chunks, and equality with a masked dense layer."""

from __future__ import annotations

import pytest
import torch

from foveate.errors import OptionError
from foveate.methods import SingleLayer, create
from foveate.methods.keep.eviction import best, force, worst
from tests.methods.driving import (
    check_padded_rows_equal_singles,
    check_steps_equal_masked_dense,
    held_mask,
    kept,
    random_qkv,
)

STEPWISE = [
    "h2o:budget=12,recent=5",
    "h2o:budget=12,recent=0,normalize=true",
    "observed-attention:budget=12,when=always",
    "tova:budget=12",
    "tova:budget=12,per_head=true,force_last=true",
    "knorm:budget=12,when=always",
    "keydiff:budget=12,when=always",
    "snapkv:budget=16,window=4+tova:budget=12",
    "snapkv:budget=16,window=4+h2o:budget=12",
]
ONCE = [
    "h2o:budget=12,when=prompt",
    "observed-attention:ratio=0.6",
    "tova:budget=12,when=prompt",
    "knorm:budget=12",
    "keydiff:ratio=0.7",
]


def layer(spec: str, **options: object) -> SingleLayer:
    return SingleLayer(create(spec), **options)  # type: ignore[arg-type]


def test_of_equal_scores_the_latest_position_goes() -> None:
    scores = torch.tensor([[[1.0, 0.0, 0.0, 2.0]]])
    assert worst(scores, torch.tensor([[[0, 9, 4, 2]]])).tolist() == [[[1]]]
    assert worst(scores, torch.tensor([[[0, 4, 9, 2]]])).tolist() == [[[2]]]


def test_of_equal_scores_the_earliest_positions_stay() -> None:
    scores = torch.tensor([[[1.0, 1.0, 1.0, 2.0]]])
    at = torch.tensor([[[7, 3, 5, 1]]])
    assert best(scores, at, 2, ordered=False).tolist() == [[[False, True, False, True]]]
    assert best(scores, at, 3, ordered=False).tolist() == [[[False, True, True, True]]]
    assert best(scores, at.sort(-1).values, 2, ordered=True).tolist() == [[[True, False, False, True]]]


def test_forced_slots_get_the_highest_plus_one() -> None:
    assert force(torch.tensor([3.0, 5.0, 1.0]), torch.tensor([False, False, True])).tolist() == [3.0, 5.0, 6.0]


@pytest.mark.parametrize("spec", STEPWISE + ONCE)
def test_steps_equal_masked_dense_attention(spec: str) -> None:
    check_steps_equal_masked_dense(layer(spec), random_qkv(), prompt=30)


@pytest.mark.parametrize("spec", [*STEPWISE[:7], *ONCE, "h2o:ratio=0.6", "tova:ratio=0.6", "tova:budget=34"])
@pytest.mark.parametrize("pads", [[20, 3, 0], [29, 26, 25]])
def test_padded_rows_equal_single_runs(spec: str, pads: list[int]) -> None:
    check_padded_rows_equal_singles(lambda: layer(spec), random_qkv(B=3), 30, pads)


@pytest.mark.parametrize("spec", STEPWISE)
def test_a_step_adds_one_token_and_takes_one_away(spec: str) -> None:
    q, k, v = random_qkv()
    made = layer(spec)
    made(q[:, :, :30], k[:, :, :30], v[:, :, :30])
    for t in range(30, 40):
        before = held_mask(made, 40)
        made(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
        after = held_mask(made, 40)
        assert made.cache.stored == 12
        assert (before & ~after).sum(-1).max() <= 1
        assert (after & ~before).nonzero()[:, -1].tolist() in ([], [t] * int((after & ~before).sum()))


@pytest.mark.parametrize("spec", STEPWISE[:7])
def test_the_budget_holds_after_every_piece_of_a_chunked_prompt(spec: str) -> None:
    q, k, v = random_qkv()
    made = layer(spec, chunked=True)
    for start in range(0, 32, 8):
        piece = slice(start, start + 8)
        made(q[:, :, piece], k[:, :, piece], v[:, :, piece])
        assert made.cache.stored <= 12
    assert made.cache.seen == 32
    made(q[:, :, 32:33], k[:, :, 32:33], v[:, :, 32:33])
    assert made.cache.stored == 12


@pytest.mark.parametrize("spec", ONCE)
def test_chunked_prompt_keeps_what_one_forward_keeps(spec: str) -> None:
    q, k, v = random_qkv()
    whole, pieces = layer(spec), layer(spec, chunked=True)
    whole(q[:, :, :32], k[:, :, :32], v[:, :, :32])
    for start in range(0, 32, 8):
        piece = slice(start, start + 8)
        pieces(q[:, :, piece], k[:, :, piece], v[:, :, piece])
        assert pieces.cache.stored == start + 8
    pieces.finish_prefill()
    assert torch.equal(held_mask(whole, 32), held_mask(pieces, 32))


@pytest.mark.parametrize("spec", ["h2o:ratio=0.75", "tova:ratio=0.75", "keydiff:ratio=0.75,when=always"])
@pytest.mark.parametrize("chunk", [8, 32])
def test_a_ratio_is_taken_of_the_prompt_and_stays(spec: str, chunk: int) -> None:
    q, k, v = random_qkv()
    made = layer(spec, chunked=chunk < 32)
    for start in range(0, 32, chunk):
        piece = slice(start, start + chunk)
        made(q[:, :, piece], k[:, :, piece], v[:, :, piece])
    assert made.cache.stored == 8
    for t in range(32, 40):
        made(q[:, :, t : t + 1], k[:, :, t : t + 1], v[:, :, t : t + 1])
    assert made.cache.stored == 8


@pytest.mark.parametrize("spec", STEPWISE[:7])
def test_several_tokens_after_steps_are_cut_back_too(spec: str) -> None:
    """A second turn: slots are no longer in order of position when many keys must go."""
    q, k, v = random_qkv(N=60)
    made = layer(spec)
    for span in (slice(0, 30), slice(30, 31), slice(31, 32), slice(32, 50)):
        made(q[:, :, span], k[:, :, span], v[:, :, span])
        assert made.cache.stored == 12
        assert len(set(kept(made))) == 12


@pytest.mark.parametrize("spec", ["h2o", "tova", "knorm", "keydiff", "observed-attention"])
@pytest.mark.parametrize("bad", [{"budget": 0}, {"ratio": 1.0}, {"when": "never"}])
def test_bad_options_are_refused(spec: str, bad: dict[str, object]) -> None:
    (name,) = bad
    with pytest.raises(OptionError, match=rf"{name}=.*allowed"):
        create(spec, **bad)


@pytest.mark.parametrize("name", ["h2o", "observed-attention", "tova", "knorm", "keydiff"])
def test_what_evicts_in_every_step_is_not_recorded(name: str) -> None:
    assert create(f"{name}:budget=24,when=prompt").steady
    assert not create(f"{name}:budget=24,when=always").steady
