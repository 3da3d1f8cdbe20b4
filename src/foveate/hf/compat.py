"""Every branch on the version of transformers, in one place. Floor: 5.4."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

CACHE_NAMES = ("cache", "past_key_values", "past_key_value")


def cache_of(kwargs: dict[str, Any]) -> Any:
    """The cache among an attention module's keyword arguments (renamed from `past_key_values` to `cache`)."""
    for name in CACHE_NAMES:
        if name in kwargs:
            return kwargs[name]
    return None


_signatures: dict[type, inspect.Signature] = {}


def bind(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of an attention module's forward by name; keywords only (the usual case) cost nothing."""
    if not args:
        return kwargs
    signature = _signatures.get(type(module))
    if signature is None:
        forward: Callable[..., Any] = inspect.unwrap(type(module).forward)
        signature = _signatures[type(module)] = inspect.signature(forward)
    try:
        bound = signature.bind_partial(module, *args, **kwargs).arguments
    except TypeError:
        return {"hidden_states": args[0], **kwargs}
    return {**bound.pop("kwargs", {}), **bound, **{k: v for k, v in kwargs.items() if k not in bound}}


def grow(cache: Any, layer: int) -> None:
    """Lazily made caches append their layers; make sure `layer` exists."""
    replicate = getattr(cache, "layer_class_to_replicate", None)
    while len(cache.layers) <= layer and replicate is not None:
        cache.layers.append(replicate())


def is_plain(layer: Any) -> bool:
    """A growing full-attention layer that foveate may take over."""
    return type(layer) is DynamicLayer


def is_sliding(layer: Any) -> bool:
    return isinstance(layer, DynamicSlidingWindowLayer) or bool(getattr(layer, "is_sliding", False))


def new_dynamic_cache(config: Any) -> Cache:
    return DynamicCache(config=config)


def tokens_to_remove(layer_length: int, argument: int) -> int:
    """`crop(x)`: x < 0 removes -x tokens; x >= 0 is the final length in versions that allow it."""
    return -argument if argument < 0 else max(0, layer_length - argument) if argument > 0 else 0


def cache_keyword(model: nn.Module) -> str:
    """The name of the cache argument of a model's forward: `past_key_values`, newer `cache`."""
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")
