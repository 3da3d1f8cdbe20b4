"""What a mixer knows between calls: states whose rows can be moved, split and merged."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Self

import torch
from torch import Tensor

from foveate.errors import StateError


@dataclass(frozen=True, kw_only=True)
class MixerState:
    """What one mixer knows of the tokens it has read. Opaque to the shell; row b belongs to sequence b.

    Fields of subclasses hold batch-first tensors, tuples and dataclasses of such, or plain values that all rows share.

    owner: the mixer it belongs to, see `Mixer.owner`.
    position: [B] int64, the position of each row's next token.
    auxiliary_loss: a scalar that training adds to the loss, of the call that returned this state; None for most
        mixers. It belongs to no row: it has no bytes, and whatever moves rows drops it.
    """

    owner: str
    position: Tensor
    auxiliary_loss: Tensor | None = field(default=None, metadata={"per_call": True})

    @property
    def batch(self) -> int:
        return self.position.shape[0]

    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(each.numel() * each.element_size() for each in _tensors(self))

    def reorder(self, index: Tensor) -> Self:
        """Rows by index [B'] int64, which may repeat or leave out rows (beam search)."""
        return self.map(lambda each: each.index_select(0, index.to(each.device)))

    def split(self, sizes: Sequence[int]) -> list[Self]:
        """States of consecutive groups of rows; `merge` is the inverse."""
        if sum(sizes) != self.batch or any(size < 0 for size in sizes):
            raise StateError(f"split({list(sizes)}) of a state of {self.batch} rows, allowed: sizes that sum to it")
        bounds = [0]
        for size in sizes:
            bounds.append(bounds[-1] + size)
        return [self.map(lambda each, a=a, b=b: each[a:b]) for a, b in pairwise(bounds)]  # type: ignore[misc]

    @classmethod
    def merge(cls, states: Sequence[Self]) -> Self:
        """One state with the rows of all, in order; see `merge_states` for rows that share too little.

        Raises StateError where what rows share differs: the mixer, or how far a chunk has come.
        """
        if not states:
            raise StateError("merge of no states, allowed: at least one")
        if not cls.mergeable(states):
            raise StateError(
                f"merge of states of {sorted({each.owner for each in states})} that differ in what their rows share, "
                "allowed: states of one mixer in one phase; merge_states keeps others side by side"
            )
        merged: Self = _concatenate(states)
        return merged

    @classmethod
    def mergeable(cls, states: Sequence[Self]) -> bool:
        """Whether all that rows share is equal: plain values, and the sizes of tensors beside the batch."""
        return all(_shared(each) == _shared(states[0]) for each in states[1:])

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        """The same state with every tensor changed."""
        changed: Self = _mapped(self, change)
        return changed

    def check(self, owner: str, batch: int) -> None:
        """Raise StateError unless the state is `owner`'s and has `batch` rows."""
        if self.owner != owner:
            raise StateError(f"the state is of {self.owner}, allowed: a state of {owner}")
        if self.batch != batch:
            raise StateError(
                f"the state of {owner} has {self.batch} rows, allowed: {batch}, one for each sequence; "
                "reorder, split or merge it first"
            )


def _fields(value: Any) -> dict[str, Any]:
    """What a dataclass holds by name; what belongs to one call is None."""
    found = dataclasses.fields(value)
    return {each.name: None if each.metadata.get("per_call") else getattr(value, each.name) for each in found}


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value):
        yield from _tensors(tuple(_fields(value).values()))
    elif isinstance(value, tuple):
        for each in value:
            yield from _tensors(each)


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{name: _mapped(each, change) for name, each in _fields(value).items()})
    if isinstance(value, tuple):
        return tuple(_mapped(each, change) for each in value)
    return value


def _concatenate(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(list(values))
    if dataclasses.is_dataclass(first) and not isinstance(first, type):
        held = [_fields(each) for each in values]
        return dataclasses.replace(first, **{name: _concatenate([each[name] for each in held]) for name in held[0]})
    if isinstance(first, tuple):
        return tuple(_concatenate(each) for each in zip(*values, strict=True))
    return first


def _shared(value: Any) -> Any:
    """A value with its tensors' sizes beside the batch in place of the tensors."""
    if isinstance(value, Tensor):
        return tuple(value.shape[1:])
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return type(value), tuple(_shared(each) for each in _fields(value).values())
    if isinstance(value, tuple):
        return tuple(_shared(each) for each in value)
    return value


@dataclass(frozen=True, kw_only=True)
class SeparateStates(MixerState):
    """Rows that cannot stand in one state, because they share too little: each its own, run one by one.

    rows: states of one row each. Comes of padded or packed sequences of different lengths in a mixer whose rows move
    through chunks together.
    """

    rows: tuple[MixerState, ...]

    def bytes(self) -> int:
        return sum(row.bytes() for row in self.rows)

    def reorder(self, index: Tensor) -> MixerState:  # type: ignore[override]
        return merge_states([self.rows[n] for n in index.tolist()])

    def split(self, sizes: Sequence[int]) -> list[MixerState]:  # type: ignore[override]
        if sum(sizes) != self.batch or any(size < 0 for size in sizes):
            raise StateError(f"split({list(sizes)}) of a state of {self.batch} rows, allowed: sizes that sum to it")
        rows = iter(self.rows)
        return [merge_states([next(rows) for _ in range(size)]) if size else self._none() for size in sizes]

    def _none(self) -> MixerState:
        return self.rows[0].split([0, 1])[0]

    def map(self, change: Callable[[Tensor], Tensor]) -> Self:
        return dataclasses.replace(
            self, position=change(self.position), rows=tuple(row.map(change) for row in self.rows)
        )

    @classmethod
    def merge(cls, states: Sequence[MixerState]) -> MixerState:  # type: ignore[override]
        return merge_states(states)


def single_rows(state: MixerState) -> list[MixerState]:
    """States of one row each."""
    return list(state.rows) if isinstance(state, SeparateStates) else list(state.split([1] * state.batch))


def merge_states(states: Sequence[MixerState]) -> MixerState:
    """One state with the rows of all, in order: a merged one where the rows allow it, else `SeparateStates`."""
    if not states:
        raise StateError("merge of no states, allowed: at least one")
    owners = sorted({each.owner for each in states})
    if len(owners) > 1:
        raise StateError(f"merge of states of {owners}, allowed: states of one mixer")
    if not any(isinstance(each, SeparateStates) for each in states) and type(states[0]).mergeable(states):
        return type(states[0]).merge(states)
    rows = tuple(row for each in states for row in single_rows(each))
    if type(rows[0]).mergeable(rows):
        return type(rows[0]).merge(rows)
    return SeparateStates(owner=owners[0], position=torch.cat([row.position for row in rows]), rows=rows)
