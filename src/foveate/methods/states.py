"""What a cache does with the states that methods keep on it: dataclasses, lists and tuples of batch-first tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor


def state_bytes(state: Any) -> int:
    """Bytes of every tensor in a state; of a part that lies in the host's memory, what it says as `host_bytes`."""
    own = getattr(state, "host_bytes", None)
    if own is not None:
        return int(own)
    if isinstance(state, Tensor):
        return state.numel() * state.element_size()
    return sum(state_bytes(each) for each in _parts(state))


def host_bytes(state: Any) -> int:
    """The share of `state_bytes` that lies in the host's memory by design, on whatever device the model runs."""
    own = getattr(state, "host_bytes", None)
    return int(own) if own is not None else sum(host_bytes(each) for each in _parts(state))


def _parts(state: Any) -> list[Any]:
    if dataclasses.is_dataclass(state) and not isinstance(state, type):
        return [getattr(state, each.name) for each in dataclasses.fields(state)]
    return list(state) if isinstance(state, list | tuple) else []


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
