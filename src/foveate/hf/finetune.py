"""Tuning a pretrained model to longer texts: an attention pattern while it trains, LoRA, and the positions' scale.

    model, tokenizer = foveate.load_model()
    interpolate(model, 16384)                       # positions of 16384 tokens squeezed into those it knows
    tuned = lora(model)                             # q, k, v, o by low rank; embeddings and norms as they are
    with finetune(tuned, "sinklora"):               # in train() mode only: eval() attends to everything
        Trainer(tuned, arguments, train_dataset=data).train()
    model = tuned.merge_and_unload()                # a plain model again; save this one
    with foveate.apply(model, "h2o", budget=4096):  # or without any method
        model.generate(**inputs)

LongLoRA's recipe: rank 8, alpha 16, no dropout, AdamW at 2e-5, constant after 20 warm-up steps, no weight decay,
bfloat16, 64 texts a step, 1000 steps. Adapters alone do not hold what else was trained (embeddings, norms): save the
merged model.

Papers: LongLoRA, Chen et al. 2023 (arXiv 2309.12307); position interpolation, Chen et al. 2023 (arXiv 2306.15595);
LoRA, Hu et al. 2021 (arXiv 2106.09685), by the package peft.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from foveate.attention.softmax import attend
from foveate.errors import (
    MissingPackageError,
    OptionError,
    ShapeError,
    UnknownNameError,
    UnsupportedCacheError,
    UnsupportedModelError,
)
from foveate.hf.attention import TUNING
from foveate.hf.masks import columns, padding_mask
from foveate.hf.modules import attention_modules, check_model, decoder_of, text_config
from foveate.registry import card, create

SLOT = "_foveate_tuning"
# What an attention module may pass that would change the scores in ways not served here.
REFUSED = ("position_bias", "block_indices", "indices", "sinks", "sliding_window")


class Layer(Protocol):
    """What stands in for one layer's attention."""

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        """q [B, Hq, M, D], k and v [B, Hkv, N, .], mask bool [B, N] or None -> o [B, Hq, M, Dv]."""
        ...


class Installed:
    """Attention of ours in every layer of a model: a context manager, or `attach()` and `detach()`."""

    def __init__(self, model: Any, make: Callable[[int], Layer]) -> None:
        self.model = base_model(model)
        check_model(self.model)
        self.layers = [make(index) for index in range(len(attention_modules(self.model)))]
        self._before: str | None = None

    def attach(self) -> Installed:
        """Put the attention on the model. Raises UnsupportedModelError where foveate is on it already."""
        config = text_config(self.model)
        if str(config._attn_implementation).startswith("foveate"):
            raise UnsupportedModelError("foveate's attention is already on this model; leave it first")
        AttentionInterface.register(TUNING, _attention)
        AttentionMaskInterface.register(TUNING, padding_mask)
        self._before = config._attn_implementation
        config._attn_implementation = TUNING
        for module, layer in zip(attention_modules(self.model), self.layers):
            # Not an attribute of the module's own kind: a layer may be a module, and would become a child.
            object.__setattr__(module, SLOT, layer)
        return self

    def detach(self) -> None:
        """Take it off; twice does no harm."""
        if self._before is None:
            return
        text_config(self.model)._attn_implementation = self._before
        self._before = None
        for module in attention_modules(self.model):
            object.__delattr__(module, SLOT)

    def __enter__(self) -> Installed:
        return self.attach()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def base_model(model: Any) -> PreTrainedModel:
    """The transformers model within a peft model, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    found: PreTrainedModel = inner() if inner is not None else model
    return found


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **given: Any,
) -> tuple[Tensor, None]:
    """Called by every attention module: q [B, Hq, M, D], k and v with the cache, -> [B, M, Hq, Dv]."""
    who = type(module).__name__
    layer: Layer | None = getattr(module, SLOT, None)
    if layer is None:
        raise UnsupportedModelError(f"{who} runs with attn_implementation={TUNING!r} outside its context manager")
    found = [name for name in REFUSED if given.get(name) is not None]
    if found or given.get("is_causal") is False or given.get("output_attentions"):
        raise UnsupportedModelError(
            f"{who} asks for {found or 'attention in both directions or for its weights'}, allowed while tuning: plain "
            "causal attention in every layer"
        )
    if attention_mask is not None and attention_mask.dim() != 2:
        raise UnsupportedCacheError(
            f"{who} was called with a {attention_mask.dim()}-D mask, allowed: a 2-D padding mask"
        )
    if dropout:
        raise UnsupportedModelError(
            f"{who} has attention dropout {dropout}, allowed: 0; set config.attention_dropout = 0"
        )
    options = {"scale": scaling, "softcap": given.get("softcap"), "sink": given.get("s_aux")}
    out = layer(module, query, key, value, attention_mask, options)
    return out.transpose(1, 2).contiguous(), None


class Patterned:
    """A fine-tuning pattern in one layer: while the module trains; else dense attention."""

    def __init__(self, pattern: Any, index: int) -> None:
        self.pattern, self.index = pattern, index

    def __call__(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> Tensor:
        if not module.training:
            o: Tensor = attend(q, k, v, positions=columns(mask, q.shape[2], k.shape[2]), **options)
            return o
        if q.shape[2] != k.shape[2]:
            raise UnsupportedCacheError(
                f"{k.shape[2]} keys for {q.shape[2]} queries while training, allowed: whole texts without a cache; "
                "call the model with use_cache=False, or eval() it first"
            )
        if mask is not None and bool((mask[:, 1:] & ~mask[:, :-1]).any()):
            raise ShapeError(
                "a text is padded on its left or within, allowed while training: padding on the right, which groups of "
                "causal attention never read; set tokenizer.padding_side = 'right'"
            )
        found: Tensor = self.pattern.attend(q, k, v, layer=self.index, **options)
        return found


def finetune(model: Any, pattern: Any = "sinklora", **options: Any) -> Installed:
    """Put a fine-tuning pattern on a transformers causal LM, or on a peft model of one, while it trains.

    Args:
        model: decoder-only, on transformers' attention interface, causal attention without windows in every layer.
        pattern: a registered name of kind "finetune" or a spec ("sinklora:group=2048"), or such an object.
        **options: the pattern's own.
    Returns:
        a context manager. Within it, `train()` mode attends by the pattern, `eval()` mode to everything.
    Raises:
        UnknownNameError, OptionError for the pattern; UnsupportedModelError for the model; when it runs,
        UnsupportedCacheError for cached keys in training, ShapeError for left padding in training.
    """
    if isinstance(pattern, str):
        kind = card(pattern.split(":")[0].strip()).kind
        if kind != "finetune":
            raise UnknownNameError(f"{pattern!r} is of kind {kind!r}, allowed: kind 'finetune'; see foveate.names()")
        pattern = create(pattern, **options)
    elif options:
        raise OptionError(f"finetune: options {sorted(options)} beside a made pattern, allowed: with its name only")
    return Installed(model, lambda index: Patterned(pattern, index))


def lora(
    model: Any, *, rank: int = 8, alpha: int = 16, trainable: Sequence[str] = ("embed", "norm"), seed: int = 0
) -> Any:
    """A peft model: low-rank updates of every projection of attention, and what else long texts need.

    Args:
        model: a transformers causal LM; its weights are frozen, except:
        trainable: parameters with one of these in their names, which train as they are (LongLoRA's "embed,norm").
        rank, alpha: of the updates, which are multiplied by alpha / rank.    seed: of their first values.
    Raises:
        MissingPackageError without peft; OptionError; UnsupportedModelError for a model without linear projections.
    """
    if importlib.util.find_spec("peft") is None:
        raise MissingPackageError("peft", "fine-tuning with LoRA", "pip install 'foveate[train]'")
    if rank < 1 or alpha <= 0:
        raise OptionError(f"lora: rank={rank}, alpha={alpha}, allowed: both >= 1")
    check_model(model)
    from peft import LoraConfig, get_peft_model

    attentions = {id(each) for each in attention_modules(model)}
    targets = [
        f"{name}.{child}"
        for name, module in model.named_modules()
        if id(module) in attentions
        for child, each in module.named_children()
        if isinstance(each, nn.Linear)
    ]
    if not targets:
        raise UnsupportedModelError(f"{type(model).__name__} has no nn.Linear in its attention for LoRA to update")
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=0.0, bias="none")
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        made = get_peft_model(model, settings)
    for name, parameter in made.named_parameters():
        if any(each in name for each in trainable):
            parameter.requires_grad_(True)
    return made


def interpolate(model: Any, length: int) -> int:
    """Divide a model's positions by ceil(length / the length it was trained on), for good; returns that factor.

    The factor goes into the configuration, so that a saved model keeps it.

    Raises:
        OptionError for a length below 1; UnsupportedModelError for models without rotary embedding or with one that is
        scaled already.
    """
    if length < 1:
        raise OptionError(f"interpolate: length={length}, allowed: >= 1")
    model = base_model(model)
    config, decoder = text_config(model), decoder_of(model)
    rotary = getattr(decoder, "rotary_emb", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    if rotary is None or parameters.get("rope_type") != "default":
        raise UnsupportedModelError(
            f"{type(model).__name__} has rotary embedding {parameters or None}, allowed: of type 'default' in a module "
            "`rotary_emb` of the decoder"
        )
    known = int(config.max_position_embeddings)
    factor = math.ceil(length / known)
    if factor == 1:
        return 1
    config.rope_parameters = {**parameters, "rope_type": "linear", "factor": float(factor)}
    config.max_position_embeddings = known * factor
    decoder.rotary_emb = type(rotary)(config).to(rotary.inv_freq.device)  # type: ignore[arg-type, union-attr, operator]
    return factor
