"""MixerState: rows, bytes, merging, and what belongs to one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from foveate.errors import StateError
from foveate.mixers.base import MixerState, create_mixer


@dataclass(frozen=True)
class Inner:
    weights: tuple[Tensor, Tensor]
    phase: int


@dataclass(frozen=True, kw_only=True)
class NestedState(MixerState):
    inner: Inner
    extra: Tensor | None = None


def nested(rows: int = 3, phase: int = 1) -> NestedState:
    weights = (torch.arange(rows * 2.0).view(rows, 2), torch.arange(rows * 4).view(rows, 2, 2))
    return NestedState(owner="x", position=torch.arange(rows), inner=Inner(weights, phase))


def test_tensors_inside_tuples_and_dataclasses_move_and_count():
    state = nested()
    assert state.bytes() == 3 * 8 + 3 * 2 * 4 + 3 * 4 * 8
    moved = state.reorder(torch.tensor([2, 2]))
    assert moved.batch == 2
    assert moved.inner.weights[0].tolist() == [[4, 5], [4, 5]]
    assert moved.inner.phase == 1
    back = NestedState.merge(state.split([2, 0, 1]))
    assert torch.equal(back.inner.weights[1], state.inner.weights[1])


def test_states_of_different_phases_cannot_be_merged():
    with pytest.raises(StateError, match="merge of states with 1 and"):
        NestedState.merge([nested(phase=1), nested(phase=2)])
    with pytest.raises(StateError, match="merge of no states"):
        NestedState.merge([])


def test_a_split_must_cover_all_rows():
    with pytest.raises(StateError, match=r"split\(\[1, 1\]\) of a state of 3 rows"):
        nested().split([1, 1])


def test_the_loss_of_a_call_has_no_rows():
    state = replace(nested(), auxiliary_loss=torch.tensor(2.0))
    assert state.bytes() == nested().bytes()
    assert state.reorder(torch.tensor([0])).auxiliary_loss is None


def test_states_of_other_layers_and_sizes_are_refused():
    x = torch.zeros(1, 2, 16)
    first = create_mixer("gla", dim=16, heads=2, layer=0, layers=2)
    second = create_mixer("gla", dim=16, heads=2, layer=1, layers=2)
    _, state = first(x)
    with pytest.raises(StateError, match=r"of gla\(dim=16, heads=2, layer=0\), allowed: a state of .*layer=1"):
        second(x, state=state)


def test_windowed_rows_of_different_lengths_merge():
    mixer = create_mixer("softmax:window=4", dim=8, heads=2).eval()
    torch.manual_seed(0)
    x = torch.randn(3, 9, 8)
    states = [mixer(x[row : row + 1, :n])[1] for row, n in enumerate((1, 3, 9))]
    merged = type(states[0]).merge(states)
    assert merged.keys.shape[2] == 4
    assert merged.length.tolist() == [1, 3, 4]
    more = torch.randn(3, 2, 8)
    together, _ = mixer(more, state=merged)
    for row, n in enumerate((1, 3, 9)):
        alone, _ = mixer(torch.cat((x[row : row + 1, :n], more[row : row + 1]), 1))
        assert torch.allclose(together[row], alone[0, n:], atol=1e-6)
