"""Is a model's cache one that foveate serves? Before and after its forward: are its inputs whole, is it one thread's,
and was its cache served?"""

from __future__ import annotations

import threading
from typing import Any

import transformers
from torch import Tensor
from transformers import PreTrainedModel

from foveate.errors import ShapeError, StateError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.layer import FoveateLayer
from foveate.hf.modules import decoder_of

FORWARD = "forward"
SERVED = (
    "allowed: decoders whose attention layers keep keys and values alone, all of them or those of a sliding window of "
    "their own; recurrent layers may stand between these"
)


def check_cache_class(model: PreTrainedModel) -> None:
    """Raise UnsupportedModelError where the model makes a cache of a class of its own."""
    own = compat.own_cache(decoder_of(model))
    if own is not None:
        raise UnsupportedModelError(
            f"{_called(model)} keeps its text in a {own} in transformers {transformers.__version__}, a cache of its "
            f"own, which foveate cannot take over; {SERVED}; newer versions have fewer such caches"
        )


def check_layers(model: PreTrainedModel, layers: list[Any], indices: list[int]) -> None:
    """Raise UnsupportedModelError where the layers of a new cache that attention modules store in (`indices`) are
    neither foveate's nor the model's own sliding windows."""
    strange = [
        index
        for index in indices
        if index < len(layers) and not (isinstance(layers[index], FoveateLayer) or compat.is_sliding(layers[index]))
    ]
    if strange:
        kind = type(layers[strange[0]]).__name__
        where = "every attention layer" if len(strange) == len(indices) else f"each of the layers {strange}"
        why = f": {compat.OWN_STORAGE[kind]}" if kind in compat.OWN_STORAGE else ""
        raise UnsupportedModelError(
            f"{where} of {_called(model)} keeps its keys in a {kind}, which foveate cannot take over{why}; {SERVED}"
        )


def _called(model: PreTrainedModel) -> str:
    return f"{model.config.model_type} ({type(model).__name__})"


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
