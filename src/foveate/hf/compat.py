"""Every branch on the version of transformers, in one place. Floor: 5.4."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

# Renamed from `past_key_values` to `cache`; GPT-NeoX and GPT-BigCode hand it to their layers as `layer_past`.
CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")


def cache_of(named: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a module or the fields of a model's output."""
    # Newer outputs answer to the old name too, with a warning: they are asked for nothing that is not there.
    held = {name: each for name, each in named.items() if each is not None and name in CACHE_NAMES}
    return next((held[name] for name in CACHE_NAMES if name in held), None)


@contextmanager
def implementation(config: Any, name: str) -> Iterator[None]:
    """While it runs, attention modules with this configuration call the attention function `name`."""
    before = config._attn_implementation
    config._attn_implementation = name
    try:
        yield
    finally:
        config._attn_implementation = before


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


# Why foveate leaves a kind of cache layer alone, by its name.
OWN_STORAGE = {
    "DummyLayer": "the layer reads the keys that another layer stored (shared KV), and foveate's methods change one "
    "layer's keys at a time",
    "LinearAttentionAndFullAttentionLayer": "it holds a recurrent state beside its keys",
    "LinearAttentionAndSlidingWindowAttentionLayer": "it holds a recurrent state beside its keys",
    "DynamicIndexedLayer": "it holds keys of an indexer, with which the model selects by itself",
}
ELSEWHERE = (
    "static, quantised and offloaded caches have their own storage; use the default dynamic cache: do not set "
    "cache_implementation"
)


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


def counts(layer: Any) -> bool:
    """Whether a cache layer counts the tokens that it has seen; a recurrent state does not."""
    return isinstance(layer, CacheLayerMixin)


def own_cache(decoder: nn.Module) -> str | None:
    """The name of a cache class that a model makes instead of a transformers `Cache`, None where there is none.

    Hybrid models of older versions have one in their own module (5.4: jamba, lfm2, qwen3_next; 5.12: olmo_hybrid).
    """
    module = type(decoder).__module__
    return next(
        (
            name
            for name, each in vars(sys.modules[module]).items()
            if name.endswith("Cache")
            and getattr(each, "__module__", None) == module
            and hasattr(each, "get_seq_length")
            and not issubclass(each, Cache | CacheLayerMixin)
        ),
        None,
    )


def new_dynamic_cache(config: Any) -> Cache:
    return DynamicCache(config=config)


def tokens_to_remove(layer_length: int, argument: int) -> int:
    """`crop(x)`: x < 0 removes -x tokens; x >= 0 is the final length in versions that allow it."""
    return -argument if argument < 0 else max(0, layer_length - argument) if argument > 0 else 0


def cache_keyword(model: nn.Module) -> str:
    """The name of the cache argument of a model's forward: `past_key_values`, newer `cache`."""
    parameters = inspect.signature(inspect.unwrap(type(model).forward)).parameters
    return next((name for name in CACHE_NAMES if name in parameters), "past_key_values")
