"""Finding the attention modules of any transformers causal LM, without class names or paths."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import PreTrainedModel
from transformers.utils.output_capturing import OutputRecorder

from foveate.errors import UnsupportedModelError


def text_config(model: PreTrainedModel) -> Any:
    config = model.config
    getter = getattr(config, "get_text_config", None)
    return getter(decoder=True) if getter is not None else config


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The text decoder: the innermost PreTrainedModel that carries the text configuration."""
    config = text_config(model)
    found: nn.Module = model
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.config is config:
            found = module
    return found


def attention_modules(model: PreTrainedModel) -> list[nn.Module]:
    """The decoder's self-attention modules, by layer index, from what the model declares it records."""
    decoder = decoder_of(model)
    classes = _declared(decoder) or _declared(model)
    modules = [
        each
        for each in decoder.modules()
        if isinstance(each, tuple(classes)) and getattr(each, "layer_idx", None) is not None
    ]
    types = getattr(text_config(model), "layer_types", None)
    if types:
        # Some models declare their recurrent layers as attentions too.
        modules = [each for each in modules if types[int(each.layer_idx)] != "linear_attention"]  # type: ignore[arg-type]
    modules = [each for each in modules if not getattr(each, "is_cross_attention", False)]
    if not modules:
        raise UnsupportedModelError(
            f"{type(model).__name__} declares no attention modules with a layer index "
            "(`_can_record_outputs['attentions']`), so foveate does not know where to act"
        )
    return sorted(modules, key=lambda each: int(each.layer_idx))  # type: ignore[arg-type]


def _declared(model: nn.Module) -> list[type]:
    entry = (getattr(model, "_can_record_outputs", None) or {}).get("attentions")
    entries = entry if isinstance(entry, list | tuple) else [entry]
    found = []
    for each in entries:
        if isinstance(each, OutputRecorder):
            each = each.target_class
        if isinstance(each, type):
            found.append(each)
    return found


def check_model(model: Any) -> None:
    """Refuse by name what cannot be served, before anything is touched."""
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no transformers PreTrainedModel; foveate.apply takes a causal language model "
            "from transformers >= 5.4"
        )
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder; foveate serves decoder-only language models")
    check = getattr(model, "_can_set_attn_implementation", None)
    if check is None or not check():
        raise UnsupportedModelError(
            f"{name} does not use transformers' attention interface (AttentionInterface), so its attention cannot be "
            "replaced; use a model class that does (see the transformers documentation, 'attention interface')"
        )


def check_attention(model: PreTrainedModel, modules: list[nn.Module]) -> None:
    """Refuse attention modules that foveate cannot stand in for."""
    name = type(model).__name__
    if any(hasattr(module, "prepare_dynamic_mask") for module in modules):
        raise UnsupportedModelError(
            f"{name} makes a mask of its own from its values in every layer (dynamic mask attention), which foveate "
            "does not serve"
        )
    shared = [int(each.layer_idx) for each in modules if getattr(each, "is_kv_shared_layer", False)]  # type: ignore[arg-type]
    if shared:
        raise UnsupportedModelError(
            f"layers {shared} of {name} read the keys that another layer stored (shared KV), and foveate's methods "
            "change one layer's keys at a time"
        )
