"""What a cache does with the states that methods keep on it: dataclasses, lists and tuples of batch-first tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def state_bytes(state: Any) -> int:
    """Bytes of every tensor in a state."""
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    if dataclasses.is_dataclass(state):
        return sum(state_bytes(getattr(state, each.name)) for each in dataclasses.fields(state))
    if isinstance(state, list | tuple):
        return sum(state_bytes(each) for each in state)
    return 0


def state_batch(state: Any, index: Tensor, batch: int) -> Any:
    """Select sequences in every batch-first tensor of a state; a state that knows better has `reorder(index)`."""
    if hasattr(state, "reorder"):
        return state.reorder(index)
    if isinstance(state, Tensor):
        return state.index_select(0, index.to(state.device)) if state.dim() and state.shape[0] == batch else state
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        changed = {
            each.name: state_batch(getattr(state, each.name), index, batch) for each in dataclasses.fields(state)
        }
        return dataclasses.replace(state, **changed)
    if isinstance(state, list | tuple):
        return type(state)(state_batch(each, index, batch) for each in state)
    return state
