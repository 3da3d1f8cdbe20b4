"""apply: put a method on a model, and take it off again."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import compat, guard
from foveate.hf.attention import NAME, TUNING, Runtime, Slot, end_prompt, note_padding, pre_hook, register, request_of
from foveate.hf.graph import GraphedForward
from foveate.hf.identity import identify
from foveate.hf.layer import FoveateLayer
from foveate.hf.modules import attention_modules, check_attention, check_model, decoder_of, text_config
from foveate.hf.rope import check_rope, find_rope
from foveate.hf.stats import Stats
from foveate.methods.base import Method, create


class Run:
    """A method on a model: a context manager, or `attach()` and `detach()`.

    stats: figures of the latest request. After leaving, the model is as it was; caches stay readable.
    """

    def __init__(
        self, model: PreTrainedModel, method: Method, *, chunked: bool = False, cuda_graph: bool = False
    ) -> None:
        check_model(model)
        self.model = model
        self.method = method.for_model(identify(model))
        self.modules = attention_modules(model)
        self._refuse_applied()
        check_attention(model, self.modules)
        guard.check_cache_class(model)
        layers = self.new_cache().layers
        indices = [int(module.layer_idx) for module in self.modules]  # type: ignore[arg-type]
        guard.check_layers(model, layers, indices)
        self.runtime = Runtime(self.method, indices, chunked=chunked)
        self._refuse_idle(layers)
        self._ropes = [self._rope(module, layers[index : index + 1]) for module, index in zip(self.modules, indices)]
        self._graphed = (
            GraphedForward(model.forward, self.method, lambda: self.runtime.request, record=True)
            if cuda_graph
            else None
        )
        self._handles: list[Any] = []
        self._before: dict[int, tuple[Any, str | None]] = {}

    def _refuse_applied(self) -> None:
        if any(getattr(module, "_foveate", None) is not None for module in self.modules):
            raise UnsupportedModelError(
                "a method is already applied to this model; leave it first, or combine methods with '+'"
            )

    def _refuse_idle(self, layers: list[Any]) -> None:
        own = [layers[index] for index in self.runtime.indices if index < len(layers)]
        if not self.method.acts or any(isinstance(layer, FoveateLayer) for layer in own):
            return
        kinds = ", ".join(sorted({type(layer).__name__ for layer in own}))
        raise UnsupportedModelError(
            f"every attention layer of {type(self.model).__name__} has a sliding window or chunk of its own ({kinds}), "
            f"which foveate leaves as it is: there is nothing for {type(self.method).__name__} to act on"
        )

    def _rope(self, module: nn.Module, own: list[Any]) -> Any:
        rope = find_rope(decoder_of(self.model), module)
        if any(isinstance(layer, FoveateLayer) for layer in own) and any(
            "rope" in part.needs for part in self.method.members
        ):
            return check_rope(rope, text_config(self.model), type(self.method).__name__)
        return rope

    def attach(self) -> Run:
        """Put the method on the model. Raises UnsupportedModelError where one is on it already."""
        self._refuse_applied()
        register()
        try:
            self._switch()
            for layer, (module, rope) in enumerate(zip(self.modules, self._ropes)):
                module._foveate = Slot(self.runtime, layer, rope)  # type: ignore[assignment]
                self._handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
            # The decoder may be called by itself; a recorded decode step calls the whole model only.
            for part in {id(each): each for each in (self.model, decoder_of(self.model))}.values():
                self._handles.append(part.register_forward_pre_hook(self._before_model, with_kwargs=True))
                after = part.register_forward_hook(self._after_model, with_kwargs=True, always_call=True)
                self._handles.append(after)
            if self._graphed is not None:
                self.model.forward = self._graphed
        except BaseException:
            self.detach()
            raise
        return self

    def _switch(self) -> None:
        config = text_config(self.model)
        for module in self.model.modules():
            own = getattr(module, "config", None)
            if own is config and id(own) not in self._before:
                self._before[id(own)] = (own, own._attn_implementation)
        if id(config) not in self._before:
            self._before[id(config)] = (config, config._attn_implementation)
        for own, _ in self._before.values():
            own._attn_implementation = NAME
        if any(before == TUNING for _, before in self._before.values()):
            raise UnsupportedModelError("a fine-tuning pattern is on this model; leave its context first")
        if config._attn_implementation != NAME:
            raise UnsupportedModelError(f"{type(self.model).__name__} does not let its attention be replaced")

    def detach(self) -> None:
        """Take the method off the model; twice does no harm."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._graphed is not None:
            self._graphed.recording = None
            if self.model.__dict__.get("forward") is self._graphed:
                del self.model.forward
        for module in self.modules:
            if getattr(module, "_foveate", None) is not None and module._foveate.runtime is self.runtime:  # type: ignore[union-attr]
                del module._foveate
        for config, implementation in self._before.values():
            config._attn_implementation = implementation
        self._before.clear()
        self.runtime.owner.clear()

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuse inputs that do not fit; a decode step ends the chunked prompt of its request."""
        guard.enter(self.runtime.owner)
        given = compat.bind(model, args, kwargs)
        cache = compat.cache_of(given)
        inputs = guard.check_inputs(given, cache, self.runtime.indices[0])
        request = request_of(cache) if cache is not None else None
        if request is not None and request.chunked and inputs is not None and inputs.shape[1] == 1:
            end_prompt(self.runtime, cache)

    def _after_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if not guard.leave(self.runtime.owner):
            return
        # Caches and hidden states of a request live no longer than it does.
        for module in self.modules:
            slot: Slot | None = getattr(module, "_foveate", None)  # type: ignore[assignment]
            if slot is not None:
                slot.cache_layer, slot.hidden = None, None
        # None: the forward raised.
        if output is not None:
            cache = compat.cache_of(compat.bind(model, args, kwargs))
            if cache is None and isinstance(output, Mapping):
                cache = compat.cache_of(output)
            guard.check_served(cache, type(self.model).__name__)

    def finish_prefill(self, cache: Any = None) -> None:
        """Tell prompt-end methods that a chunked prompt is over (its first decode step does so too).

        cache: the request's; default: the latest request's.
        """
        cache = self.runtime.cache if cache is None else cache
        if cache is not None:
            end_prompt(self.runtime, cache)

    def new_cache(self) -> Any:
        """An empty transformers Cache whose full-attention layers are foveate's."""
        cache = compat.new_dynamic_cache(text_config(self.model))
        for module in self.modules:
            compat.grow(cache, int(module.layer_idx))  # type: ignore[arg-type]
        for index, layer in enumerate(cache.layers):
            if compat.is_plain(layer):
                cache.layers[index] = FoveateLayer()
        return cache

    @property
    def stats(self) -> Stats:
        cache = self.runtime.cache
        if cache is None:
            return Stats()
        stores = [layer.store for layer in cache.layers if isinstance(layer, FoveateLayer)]
        other = sum(
            tensor.numel() * tensor.element_size()
            for layer in cache.layers
            if not isinstance(layer, FoveateLayer)
            for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
            if tensor is not None
        )
        return Stats(stores, self.runtime.request.readings, other)

    def reset_stats(self) -> None:
        self.runtime.request.readings.clear()

    def __enter__(self) -> Run:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _before_attention(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    pre_hook(module, args, kwargs)
    given = compat.bind(module, args, kwargs)
    mask, hidden = given.get("attention_mask"), given.get("hidden_states")
    if mask is not None and mask.dim() == 2 and hidden is not None:
        note_padding(module, mask, hidden.shape[1])


def apply(
    model: Any, method: str | Method = "full", *, chunked: bool = False, cuda_graph: bool = False, **options: Any
) -> Run:
    """Put a training-free method on a transformers causal LM.

        with foveate.apply(model, "snapkv", budget=1024) as run:
            text = model.generate(**inputs)
        print(run.stats)

    Args:
        model: any decoder-only transformers (>= 5.4) model that uses the attention interface.
        method: a name, a spec ("snapkv:budget=1024"), a composition ("flexprefill+snapkv:budget=512"), or a Method.
        chunked: the prompt will come in several forwards (`prefill_chunk_size`); methods that decide once at the end
            of the prompt wait for the first decode step or `run.finish_prefill()`. Without it they decide after the
            first forward, and what is fed later (a question after its context) stays whole.
        cuda_graph: record a decode step once and replay it (a GPU, unpadded batches, methods that decide at the end of
            the prompt); what cannot be recorded runs eagerly, with one warning that says why.
        **options: options of a single method.
    Returns:
        a Run, to be used as a context manager or by `attach()` and `detach()`.
    Raises:
        UnknownNameError, OptionError, CompositionError for the method (TypeError for what is none);
        UnsupportedModelError for the model; ProfileError for calibrations. When it runs: UnsupportedCacheError for
        static, quantised, paged caches; ShapeError for inputs; StateError for a cache whose forward was interrupted
        and for a second thread.
    """
    check_model(model)
    if not isinstance(method, str | Method):
        raise TypeError(
            f"method={method!r} is a {type(method).__name__}, allowed: a name or spec such as 'snapkv:budget=1024', or "
            "a foveate.methods.Method"
        )
    return Run(model, create(method, **options), chunked=chunked, cuda_graph=cuda_graph)


__all__ = ["FoveateError", "Run", "UnsupportedCacheError", "apply"]
