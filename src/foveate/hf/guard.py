"""Before and after a model's forward: are its inputs whole, is it one thread's, and was its cache served?"""

from __future__ import annotations

import threading
from typing import Any

from torch import Tensor

from foveate.errors import ShapeError, StateError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.layer import FoveateLayer

FORWARD = "forward"


def enter(owner: dict[str, int]) -> None:
    """Note that this thread's forward is in progress. Raises StateError where another thread's is."""
    me = threading.get_ident()
    if owner.setdefault(FORWARD, me) != me:
        raise StateError(
            "another thread runs a forward of this model under the same apply; one applied model serves one thread at "
            "a time: take turns (a lock), or give each thread a model of its own"
        )


def leave(owner: dict[str, int]) -> bool:
    """Whether a forward of this thread was in progress, which is over now; another thread's is left alone."""
    mine = owner.get(FORWARD) == threading.get_ident()
    if mine:
        del owner[FORWARD]
    return mine


def check_inputs(given: dict[str, Any], cache: Any, index: int) -> Tensor | None:
    """The ids [B, M] or embeddings [B, M, C] of a forward; `index` is where its first attention layer stores.

    Raises:
        ShapeError: there are none of them; a 2-D attention mask that is not [B, tokens in the cache + M].
    """
    inputs = given.get("input_ids")
    inputs = given.get("inputs_embeds") if inputs is None else inputs
    if not isinstance(inputs, Tensor):
        return None
    B, M = inputs.shape[:2]
    if M == 0:
        raise ShapeError(f"the input has shape {list(inputs.shape)}: no token; give at least one")
    mask = given.get("attention_mask")
    past = seen(cache, index)
    if isinstance(mask, Tensor) and mask.dim() == 2 and past is not None and tuple(mask.shape) != (B, past + M):
        raise ShapeError(
            f"attention_mask has shape {list(mask.shape)}, allowed: [{B}, {past + M}], for {past} tokens in the "
            f"cache and {M} of the input"
        )
    return inputs


def seen(cache: Any, index: int) -> int | None:
    """Tokens that a layer of a cache has seen, None where it does not count them."""
    layers = getattr(cache, "layers", None)
    if cache is not None and layers is None:
        return None
    if not layers or index >= len(layers):
        return 0
    return int(layers[index].get_seq_length()) if compat.counts(layers[index]) else None


def check_served(cache: Any, model: str) -> None:
    """After a forward: raise UnsupportedModelError where a layer filled its cache and foveate did not attend."""
    layers = getattr(cache, "layers", None)
    if layers is None:
        return
    for index, layer in enumerate(layers):
        passed_by = compat.is_plain(layer) and layer.get_seq_length() > 0
        if passed_by or (isinstance(layer, FoveateLayer) and not layer.complete):
            raise UnsupportedModelError(
                f"layer {index} of {model} stored keys and did not attend to them through foveate: its attention takes "
                "its cache under a name that foveate does not know, or does not call transformers' attention "
                "interface; no method can be put on it"
            )
