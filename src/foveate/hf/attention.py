"""The one attention function registered with transformers, and the hooks that tell it about its layer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from foveate.attention.softmax import attend
from foveate.errors import StateError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.layer import FoveateLayer
from foveate.hf.masks import columns, padding_mask, positions_of
from foveate.hf.rope import ModelRope
from foveate.methods.base import Method, execute, finish_prompt
from foveate.methods.cache import LayerCache
from foveate.methods.step import RunState, Step

if TYPE_CHECKING:
    from foveate.hf.graph import FlatLayer

NAME = "foveate"
TUNING = "foveate-tuning"


@dataclass
class Runtime:
    """What the layers of one model share while a method is applied."""

    method: Method
    # Where each attention layer's keys are among the cache's layers.
    indices: list[int]
    chunked: bool = False
    stores: list[LayerCache] = field(default_factory=list)
    cache: Any = None
    request: RunState = field(default_factory=RunState)
    # Shared by the layers of one forward without a cache.
    loose: RunState = field(default_factory=RunState)
    mask_seen: tuple[Tensor, int, Tensor] | None = None
    # Which thread's forward is in progress, under the key "forward".
    owner: dict[str, int] = field(default_factory=dict)

    def positions(self, mask: Tensor | None, m: int) -> Tensor | None:
        """Positions of the new tokens under a padding mask, computed once per forward."""
        if mask is None:
            return None
        if self.mask_seen is None or self.mask_seen[0] is not mask or self.mask_seen[1] != m:
            self.mask_seen = (mask, m, positions_of(mask.bool(), m))
        return self.mask_seen[2]


@dataclass
class Slot:
    """What the pre-hook of one attention module noted for the coming call."""

    runtime: Runtime
    layer: int
    rope: ModelRope | None = None
    cache_layer: FoveateLayer | None = None
    sliding: bool = False
    seen: int = 0
    hidden: Tensor | None = None


def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Before a layer's projections: take its cache layer over, and note the hidden states when asked for."""
    slot: Slot | None = getattr(module, "_foveate", None)
    if slot is None:
        return
    given = compat.bind(module, args, kwargs)
    runtime = slot.runtime
    slot.hidden = given.get("hidden_states") if "hidden" in _needs(runtime.method) else None
    cache = compat.cache_of(given)
    slot.cache_layer, slot.sliding, slot.seen = None, False, 0
    if cache is None:
        return
    if type(cache).__name__ == "PagedAttentionCache" or not hasattr(cache, "layers"):
        raise UnsupportedCacheError(
            f"{type(cache).__name__} (continuous batching or a foreign cache) is not served; call generate() or the "
            "model itself with a dynamic cache"
        )
    if slot.layer == 0:
        _refuse_interrupted(cache, runtime.indices)
    index = int(module.layer_idx)  # type: ignore[arg-type]
    compat.grow(cache, index)
    layer = cache.layers[index]
    if compat.is_plain(layer):
        layer = cache.layers[index] = FoveateLayer.taking_over(layer)
    if isinstance(layer, FoveateLayer):
        slot.cache_layer, slot.seen = layer, layer.store.seen
        layer.complete = False
        _enter_request(runtime, cache, slot, layer)
    elif compat.is_sliding(layer):
        slot.sliding = True
        slot.seen = int(layer.get_seq_length())
    else:
        kind = type(layer).__name__
        raise UnsupportedCacheError(f"a {kind} cannot be served: {compat.OWN_STORAGE.get(kind, compat.ELSEWHERE)}")


def _refuse_interrupted(cache: Any, indices: list[int]) -> None:
    """Layers that hold different numbers of tokens, or one that stored and did not attend: a forward broke off."""
    layers = [cache.layers[index] if index < len(cache.layers) else None for index in indices]
    seen = {
        int(layer.get_seq_length()) if layer is not None else 0
        for layer in layers
        if layer is None or isinstance(layer, FoveateLayer) or compat.is_plain(layer)
    }
    if len(seen) > 1 or any(isinstance(layer, FoveateLayer) and not layer.complete for layer in layers):
        raise StateError(
            f"a forward with this cache was interrupted (its layers hold {sorted(seen)} tokens), so it can neither go "
            "on nor start again; start a new cache"
        )


def _needs(method: Method) -> frozenset[str]:
    return frozenset().union(*(part.needs for part in method.members))


def _enter_request(runtime: Runtime, cache: Any, slot: Slot, layer: FoveateLayer) -> None:
    """One RunState per cache object; the statistics follow the cache used last."""
    request = request_of(cache)
    if request is None:
        request = RunState(chunked=runtime.chunked)
        cache._foveate_request = request
    if runtime.cache is not cache:
        runtime.cache, runtime.request = cache, request
    if layer.store.seen == 0 and slot.layer == 0:
        request.readings.clear()
        request.shared.clear()
        request.chunked = runtime.chunked


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, Tensor | None]:
    """Called by every attention module: q [B, Hq, M, D], k and v with the cache, -> [B, M, Hq, Dv]."""
    slot: Slot | None = getattr(module, "_foveate", None)
    if slot is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} runs with attn_implementation='foveate' outside foveate.apply; call "
            "model.set_attn_implementation('sdpa'), or use `with foveate.apply(model, ...)`"
        )
    _refuse(module, slot, given, attention_mask, dropout)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    options = {"scale": scale, "softcap": given.get("softcap"), "sink": given.get("s_aux")}
    # A model that passes None says that this layer has no window, whatever its module has.
    width = given["sliding_window"] if "sliding_window" in given else getattr(module, "sliding_window", None)
    window = None if width is None else int(width) - 1
    layer = slot.cache_layer
    if slot.sliding or (layer is None and window is not None):
        return _sliding(query, key, value, attention_mask, window, options), None
    if layer is not None and not layer.handed_out(key, value):
        out = _expanded(module, slot, query, key, value, attention_mask, window, options)
    elif layer is not None and layer.flat is not None:
        out = _flat(module, layer.flat, query, window, options)
    else:
        step = _step(slot, query, key, value, attention_mask, window, options)
        out = execute(slot.runtime.method, step).transpose(1, 2).contiguous()
        if layer is not None:
            layer.last = step if slot.runtime.chunked and step.phase != "decode" else None
    if layer is not None:
        layer.complete = True
    return out, None


def _step(
    slot: Slot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    options: dict[str, Any],
) -> Step:
    M = query.shape[2]
    runtime = slot.runtime
    positions = runtime.positions(mask, M)
    request = runtime.request
    if slot.cache_layer is None:
        store = LayerCache()
        if positions is not None:
            store.mark_holes()
        store.append(key, value, positions)
        if slot.layer == 0:
            runtime.loose = RunState()
        request = runtime.loose
    else:
        store = slot.cache_layer.store
    return Step(
        layer=slot.layer,
        layers=len(runtime.indices),
        phase="prefill" if slot.seen == 0 else ("decode" if M == 1 else "extend"),
        q=query,
        cache=store,
        run=request,
        q_positions=positions,
        window=window,
        rope=slot.rope,
        hidden=slot.hidden,
        **options,
    )


def _flat(module: nn.Module, flat: FlatLayer, query: Tensor, window: int | None, options: dict[str, Any]) -> Tensor:
    """One token over a cache that counts on the device."""
    if window is not None or options["softcap"] is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has a window or a softcap of its own, which cuda_graph=True does not serve; "
            "leave cuda_graph out"
        )
    return flat.attend(query, options["scale"], options["sink"]).transpose(1, 2).contiguous()


def _sliding(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, window: int | None, options: dict[str, Any]
) -> Tensor:
    """A layer with the model's own sliding window and cache: exact attention over what it handed us."""
    positions = columns(mask, query.shape[2], key.shape[2])
    out = attend(query, key, value, positions=positions, window=window, **options)
    return out.transpose(1, 2).contiguous()


def _expanded(
    module: nn.Module,
    slot: Slot,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """A model that makes its keys or values from what it stores: dense only, by methods that read and keep all."""
    method = slot.runtime.method
    if method.acts or not method.steady:
        raise UnsupportedModelError(
            f"{type(module).__name__} attends to other keys or values than it stores (made of a compressed latent, as "
            "in multi-head latent attention, or used twice, as in differential attention); only the method 'full' "
            f"serves it, not {type(method).__name__}"
        )
    return _sliding(query, key, value, mask, window, options)


_REFUSED = {
    "position_bias": "adds a position bias to its scores",
    "block_indices": "selects blocks by itself",
    "indices": "selects keys by itself",
    "sinks": "has sinks of its own kind",
}


def _refuse(module: nn.Module, slot: Slot, given: dict[str, Any], mask: Tensor | None, dropout: float) -> None:
    who = type(module).__name__
    for name, what in _REFUSED.items():
        if given.get(name) is not None:
            raise UnsupportedModelError(f"{who} {what} ({name}), which foveate does not serve")
    if given.get("is_causal") is False or getattr(module, "is_causal", True) is False:
        raise UnsupportedModelError(f"{who} attends in both directions; foveate serves causal self-attention")
    if mask is not None and mask.dim() != 2:
        raise UnsupportedCacheError(
            f"{who} was called with a {mask.dim()}-D mask (a static cache, assisted decoding or a mask of the user's); "
            "foveate takes the 2-D padding mask [batch, tokens]"
        )
    if given.get("output_attentions"):
        raise UnsupportedModelError(
            "output_attentions=True needs all N x N weights; foveate's probes measure attention without them"
        )
    if dropout:
        raise UnsupportedModelError(f"attention dropout {dropout} is for training; call model.eval()")


def note_padding(module: nn.Module, mask: Tensor | None, m: int) -> None:
    """Hand the positions of padded new tokens to the cache layer before it stores them."""
    slot: Slot = module._foveate  # type: ignore[assignment]
    if slot.cache_layer is not None and mask is not None:
        slot.cache_layer.pending = slot.runtime.positions(mask, m)


def end_prompt(runtime: Runtime, cache: Any) -> None:
    """The chunked prompt of the request with this cache is over."""
    for layer in cache.layers:
        if isinstance(layer, FoveateLayer) and layer.last is not None:
            finish_prompt(runtime.method, layer.last)
            layer.last = None
    request = request_of(cache)
    if request is not None:
        request.chunked = False


def request_of(cache: Any) -> RunState | None:
    """What the layers of the request with this cache share; None before its first forward."""
    found: RunState | None = getattr(cache, "_foveate_request", None)
    return found


def register() -> None:
    """Register the attention and mask functions under one name, in both interfaces."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
