"""apply: put a method on a model, and take it off again."""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from foveate.errors import FoveateError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.attention import NAME, TUNING, Runtime, Slot, end_prompt, note_padding, pre_hook, register
from foveate.hf.graph import GraphedForward
from foveate.hf.identity import identify
from foveate.hf.layer import FoveateLayer
from foveate.hf.modules import attention_modules, check_model, decoder_of, text_config
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
        for module in self.modules:
            if getattr(module, "_foveate", None) is not None:
                raise UnsupportedModelError(
                    "a method is already applied to this model; leave it first, or combine methods with '+'"
                )
        self._refuse_windows_only()
        self.runtime = Runtime(self.method, len(self.modules), chunked=chunked)
        self._ropes = [self._rope(module) for module in self.modules]
        self._graphed = (
            GraphedForward(model.forward, self.method, lambda: self.runtime.request, record=True)
            if cuda_graph
            else None
        )
        self._handles: list[Any] = []
        self._before: dict[int, tuple[Any, str | None]] = {}

    def _refuse_windows_only(self) -> None:
        layers = self.new_cache().layers
        if not any(isinstance(layer, FoveateLayer) for layer in layers) and self.method.acts:
            raise UnsupportedModelError(
                f"every attention layer of {type(self.model).__name__} has a sliding window of its own, which foveate "
                f"leaves as it is: there is nothing for {type(self.method).__name__} to act on; use 'full'"
            )

    def _rope(self, module: nn.Module) -> Any:
        rope = find_rope(decoder_of(self.model), module)
        if any("rope" in part.needs for part in self.method.members):
            return check_rope(rope, text_config(self.model), type(self.method).__name__)
        return rope

    def attach(self) -> Run:
        """Put the method on the model."""
        register()
        try:
            self._switch()
            for layer, (module, rope) in enumerate(zip(self.modules, self._ropes)):
                module._foveate = Slot(self.runtime, layer, rope)  # type: ignore[assignment]
                self._handles.append(module.register_forward_pre_hook(_before_attention, with_kwargs=True))
            self._handles.append(self.model.register_forward_pre_hook(self._before_model, with_kwargs=True))
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

    def _before_model(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A decode step ends a chunked prompt."""
        if not self.runtime.chunked:
            return
        ids = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs_embeds"))
        if ids is not None and ids.shape[1] == 1 and self.runtime.request.chunked:
            self.finish_prefill()

    def finish_prefill(self) -> None:
        """Tell prompt-end methods that a chunked prompt is over (the first decode step does so too)."""
        for module in self.modules:
            end_prompt(module._foveate)  # type: ignore[arg-type]
        self.runtime.request.chunked = False

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
        UnknownNameError, OptionError, CompositionError for the method; UnsupportedModelError for the model;
        UnsupportedCacheError (when it runs) for static, quantised, paged caches; ProfileError for calibrations.
    """
    check_model(model)
    return Run(model, create(method, **options), chunked=chunked, cuda_graph=cuda_graph)


__all__ = ["FoveateError", "Run", "UnsupportedCacheError", "apply"]
