"""The transformers face of a LayerCache."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.hf.compat import tokens_to_remove
from foveate.methods.cache import LayerCache
from foveate.methods.step import Step

if TYPE_CHECKING:
    from foveate.hf.graph import FlatLayer


class FoveateLayer(CacheLayerMixin):
    """One layer of a transformers Cache whose storage is a LayerCache.

    `get_seq_length` is the logical length (tokens seen), which position ids follow; `get_mask_sizes` says so too,
    because the registered attention function rebuilds masks from stored positions. `update` stores and hands the
    new and old keys back; a packed store hands back only the new ones, and attention reads the store.
    """

    is_compileable = False
    is_sliding = False
    is_croppable = True

    def __init__(self) -> None:
        super().__init__()
        self.store = LayerCache()
        self.handed: tuple[Tensor, Tensor] | None = None
        self.pending: Tensor | None = None
        # The latest step of a prompt that comes in pieces, for methods that decide at its end.
        self.last: Step | None = None
        # False from a forward's entry into this layer until attention has read what was stored and decided what stays.
        self.complete = True
        # While a decode step that can be recorded runs: where it writes and reads instead of the store.
        self.flat: FlatLayer | None = None

    @classmethod
    def taking_over(cls, layer: Any) -> FoveateLayer:
        """From a transformers layer that may hold keys already."""
        made = cls()
        held = getattr(layer, "keys", None)
        if held is not None and held.numel():
            made.update(layer.keys, layer.values)
        return made

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.flat is not None:
            self.flat.update(key_states, value_states)
            self.handed = (key_states, value_states)
            return self.handed
        positions, self.pending = self.pending, None
        if positions is not None and not self.store.holes:
            self.store.mark_holes()
        self.store.append(key_states, value_states, positions)
        self.handed = (key_states, value_states) if self.store.ragged else (self.store.keys, self.store.values)
        return self.handed

    def handed_out(self, key: Tensor, value: Tensor) -> bool:
        """Whether both are what `update` returned, and not something the model made of it."""
        return self.handed is not None and all(
            given is ours or (given.data_ptr() == ours.data_ptr() and given.shape == ours.shape)
            for given, ours in zip((key, value), self.handed)
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.store.seen + int(query_length), 0

    def get_seq_length(self) -> int:
        return self.store.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1

    def reset(self) -> None:
        self.store = LayerCache()
        self.handed, self.pending, self.last = None, None, None
        self.complete = True
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._select(beam_idx)
        self.handed = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.shape[0]:
            self._select(torch.arange(self.store.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def _select(self, index: Tensor) -> None:
        self.store.select_batch(index)
        if self.last is not None:
            rows = {name: getattr(self.last, name) for name in ("q", "q_positions", "hidden")}
            picked = {name: x[index.to(x.device)] for name, x in rows.items() if x is not None}
            self.last = replace(self.last, **picked)

    def crop(self, tokens_to_keep: int) -> None:
        self.store.crop(tokens_to_remove(self.store.seen, tokens_to_keep))

    def activate_past_recording(self) -> None:
        """Nothing to do: the store keeps what `crop` may take back, or refuses."""
