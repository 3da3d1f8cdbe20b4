"""MixerState: rows, bytes, merging, and what belongs to one call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from foveate.errors import ShapeError, StateError
from foveate.mixers.base import Mixer, MixerState, create_mixer
from foveate.mixers.state import SeparateStates, merge_states


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
    with pytest.raises(StateError, match=r"merge of states of \['x'\] that differ in what their rows share"):
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


@dataclass(frozen=True, kw_only=True)
class ChunkState(MixerState):
    total: Tensor
    phase: int = 0


class ChunkMean(Mixer):
    """The sum of the tokens since the last chunk of 4 began; all rows of a state are in one phase of a chunk."""

    packs = False

    def __init__(self, *, dim: int) -> None:
        super().__init__(dim=dim)
        self.weight = torch.nn.Parameter(torch.ones(1))

    def start(self, batch: int, like: Tensor) -> ChunkState:
        position = torch.zeros(batch, dtype=torch.int64)
        return ChunkState(owner=self.owner, position=position, total=like.new_zeros(batch, self.dim))

    def mix(self, x, state, positions, cu_seqlens):
        assert cu_seqlens is None
        outputs, total, phase = [], state.total, state.phase
        for token in x.unbind(1):
            total = token + (total if phase else 0)
            phase = (phase + 1) % 4
            outputs.append(total * self.weight)
        return torch.stack(outputs, 1), replace(state, total=total, phase=phase)


def test_rows_in_different_phases_go_on_side_by_side():
    mixer, x = ChunkMean(dim=3), torch.randn(3, 12, 3, generator=torch.Generator().manual_seed(0))
    real = torch.ones(3, 6, dtype=torch.bool)
    real[0, :5] = real[1, :2] = False
    first, state = mixer(x[:, :6], padding=real)
    assert isinstance(state, SeparateStates)
    assert state.position.tolist() == [1, 4, 6]
    assert state.bytes() == mixer.state_bytes(3, 6)
    second, after = mixer(x[:, 6:9], state=state)
    third, _ = mixer(x[:, 9:].flatten(0, 1)[None], state=after, cu_seqlens=torch.tensor([0, 3, 6, 9]))
    found = torch.cat((first, second, third.view(3, 3, 3)), 1)
    for row, pads in enumerate((5, 2, 0)):
        assert torch.allclose(found[row, pads:], mixer(x[row : row + 1, pads:])[0][0])
    assert after.position.tolist() == [4, 7, 9]


def test_separate_rows_move_and_meet_again():
    mixer, x = ChunkMean(dim=3), torch.randn(3, 5, 3)
    _, state = mixer(x, padding=torch.tensor([[True] * 5, [False] + [True] * 4, [True] * 5]))
    moved = state.reorder(torch.tensor([2, 0]))
    assert isinstance(moved, ChunkState)
    assert moved.total.tolist() == [x[2, 4].tolist(), x[0, 4].tolist()]
    parts = state.split([2, 0, 1])
    assert [type(each) for each in parts] == [SeparateStates, ChunkState, ChunkState]
    assert [each.batch for each in parts] == [2, 0, 1]
    again = merge_states([parts[0], parts[2]])
    assert [row.phase for row in again.rows] == [1, 0, 1]
    assert again.map(lambda each: each.clone()).position.tolist() == [5, 4, 5]
    with pytest.raises(StateError, match=r"split\(\[1\]\) of a state of 3 rows"):
        state.split([1])
    with pytest.raises(StateError, match=r"merge of states of \['ChunkMean.*', 'x'\]"):
        merge_states([state, nested()])


def test_a_grid_takes_its_own_number_of_tokens_only():
    mixer = ChunkMean(dim=3)
    mixer.length = 4
    mixer(torch.zeros(2, 4, 3))
    mixer(torch.zeros(1, 8, 3), cu_seqlens=torch.tensor([0, 4, 8]))
    with pytest.raises(ShapeError, match=r"sequences of \[5\] tokens, allowed: 4 each"):
        mixer(torch.zeros(2, 5, 3))
