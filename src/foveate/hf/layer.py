"""The transformers face of a LayerCache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from foveate.hf.compat import tokens_to_remove
from foveate.methods.cache import LayerCache

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

    def handed_out(self, key: Tensor) -> bool:
        """Whether `key` is what `update` returned, and not something the model made of it."""
        return self.handed is not None and (
            key is self.handed[0] or (key.data_ptr() == self.handed[0].data_ptr() and key.shape == self.handed[0].shape)
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
        self.handed = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.store.select_batch(beam_idx)
        self.handed = None

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.store.shape[0]:
            self.store.select_batch(torch.arange(self.store.shape[0]).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.store.select_batch(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_keep: int) -> None:
        self.store.crop(tokens_to_remove(self.store.seen, tokens_to_keep))

    def activate_past_recording(self) -> None:
        """Nothing to do: the store keeps what `crop` may take back, or refuses."""
