"""States of all kinds of mixers through one transformers cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveate.errors import StateError, UnsupportedCacheError
from foveate.mixers.base import MixerState

# The argument and output that holds the cache: `past_key_values`, in newer versions `cache`.
CACHE_NAME = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class StateLayer(CacheLayerMixin):
    """One layer's mixer state. `seen` counts columns of input, padding included, as transformers counts them."""

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.state: MixerState | None = None
        self.seen = 0

    def store(self, state: MixerState, columns: int) -> None:
        """Keep the state after `columns` more columns of input."""
        self.state, self.seen, self.is_initialized = state, self.seen + columns, True

    def bytes(self) -> int:
        return 0 if self.state is None else self.state.bytes()

    def reset(self) -> None:
        self.state, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._move(lambda state: state.reorder(beam_idx))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._move(lambda state: state.reorder(torch.arange(state.batch).repeat_interleave(repeats)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._move(lambda state: state.reorder(torch.arange(state.batch, device=indices.device)[indices]))

    def _move(self, change: Callable[[MixerState], MixerState]) -> None:
        if self.state is not None:
            self.state = change(self.state)

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    def crop(self, *_: int) -> None:
        """Refused unless nothing is stored: a recurrent state cannot forget its last tokens."""
        if self.seen:
            raise UnsupportedCacheError(
                f"crop of a HybridCache that has read {self.seen} tokens: recurrent states cannot be rolled back; "
                "allowed: an empty cache. Start again from the tokens (assisted generation needs crop, and is refused)"
            )

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def offload(self) -> None:
        self._unsupported("offload")

    def prefetch(self) -> None:
        self._unsupported("prefetch")

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        self._unsupported("lazy_initialization")

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        self._unsupported("update")

    def _unsupported(self, call: str) -> NoReturn:
        raise UnsupportedCacheError(
            f"a HybridCache has no {call}: it stores mixer states, not keys and values; use it with a HybridLM"
        )


class HybridCache(Cache):
    """The states of a HybridLM's layers between calls; made by the model, or by `HybridCache(layers)`."""

    def __init__(self, layers: int) -> None:
        super().__init__(layers=[StateLayer() for _ in range(layers)])

    @property
    def held(self) -> list[StateLayer]:
        """The layers, by their own type."""
        return cast(list[StateLayer], self.layers)

    def state(self, layer: int) -> MixerState | None:
        """What layer `layer` knows; None before the first token."""
        return self.held[layer].state

    def store(self, layer: int, state: MixerState, columns: int) -> None:
        self.held[layer].store(state, columns)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns of input read so far, padding included."""
        return self.held[layer_idx].seen

    def check_whole(self) -> None:
        """Raise StateError unless every layer has read the same tokens."""
        seen = [layer.seen for layer in self.held]
        if len(set(seen)) > 1:
            raise StateError(
                f"a forward was interrupted: the cache's first layers have read {max(seen)} tokens and the others "
                f"{min(seen)}, allowed: as many in all layers; start a new cache from the first token"
            )

    def bytes(self) -> int:
        """Bytes of all states."""
        return sum(layer.bytes() for layer in self.held)

    def crop(self, *args: int) -> None:
        for layer in self.held:
            layer.crop(*args)
