"""Pretrained Llama-like models as HybridLM: the same weights, every layer a "softmax" mixer, and other mixers in the
place of some.

HybridLM's blocks are Llama's, so the weights move over by name, biases of q, k and v (Qwen2) too. What is not Llama's
(other biases, other activations, scaled
rotary angles, sliding windows) is refused: by name where the weights or the configuration show it, and by comparing
logits.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from foveate import registry
from foveate.errors import OptionError, UnsupportedModelError
from foveate.hf.modules import check_model, text_config
from foveate.lm.config import HybridConfig
from foveate.lm.model import HybridBlock, HybridLM
from foveate.mixers.base import Mixer
from foveate.mixers.softmax.rotary import SoftmaxMixer
from foveate.options import format_spec, parse_spec

# Largest relative error of logits in float32: a wide margin over rounding through some tens of layers.
SAME = 1e-3
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")

_NAMES = (
    (r"model\.(embed_tokens|norm)\.weight", r"\1.weight"),
    (r"lm_head\.weight", "lm_head.weight"),
    (r"model\.layers\.(\d+)\.input_layernorm\.weight", r"layers.\1.mixer_norm.weight"),
    (r"model\.layers\.(\d+)\.post_attention_layernorm\.weight", r"layers.\1.mlp_norm.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkvo]_proj|[qk]_norm)\.weight", r"layers.\1.mixer.\2.weight"),
    (r"model\.layers\.(\d+)\.self_attn\.([qkv]_proj)\.bias", r"layers.\1.mixer.\2.bias"),
    (r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.weight", r"layers.\1.mlp.\2_proj.weight"),
)


def mixer_at(model: HybridLM, layer: int) -> Mixer:
    """The mixer of one layer."""
    return cast(Mixer, cast(HybridBlock, model.layers[layer]).mixer)


def as_hybrid(model: Any) -> HybridLM:
    """A HybridLM that computes what a Llama-like causal LM does.

    Args:
        model: a transformers causal LM of Llama's layout (Llama, SmolLM2, Qwen2, Qwen3, ...); it is left as it is.
    Returns:
        the HybridLM in evaluation mode, on the model's device, with copies of its weights in float32.
    Raises:
        UnsupportedModelError for a model of another layout, or whose logits come out differently.
    """
    check_model(model)
    settings = text_config(model)
    _check_config(model, settings)
    # Compared in float32, where a wrong activation cannot hide in rounding; the copy's tensors become the hybrid's.
    source = copy.deepcopy(model).float().eval()
    state = {_our_name(name, model): each.detach() for name, each in source.state_dict().items()}
    made = built(_config_of(settings, state), state)
    made.generation_config = copy.deepcopy(model.generation_config)
    _check_logits(source, made)
    return made


def _our_name(name: str, model: Any) -> str:
    for theirs, ours in _NAMES:
        if re.fullmatch(theirs, name):
            return re.sub(theirs, ours, name)
    raise UnsupportedModelError(
        f"{type(model).__name__} has weights {name!r} that Llama's layout lacks, so its layers cannot be replaced; "
        "allowed: models of Llama's layout (Llama, SmolLM2, Qwen2, Qwen3, ...)"
    )


def _check_config(model: Any, settings: Any) -> None:
    rope = getattr(settings, "rope_parameters", None) or {}
    if rope.get("rope_type", "default") != "default" or "rope_theta" not in rope:
        raise UnsupportedModelError(
            f"{type(model).__name__} has rotary parameters {rope}, allowed for conversion: rope_type 'default' "
            "with one rope_theta"
        )
    kinds = set(getattr(settings, "layer_types", None) or [])
    # Some configurations carry a window that no layer uses, with layer_types to say so.
    if kinds - {"full_attention"} or (getattr(settings, "sliding_window", None) is not None and not kinds):
        raise UnsupportedModelError(
            f"{type(model).__name__} has layers with a sliding window, allowed for conversion: models whose layers all "
            "read everything"
        )


def _config_of(settings: Any, state: dict[str, Tensor]) -> HybridConfig:
    heads = settings.num_attention_heads
    options = {
        "kv_heads": getattr(settings, "num_key_value_heads", None) or heads,
        "head_dim": getattr(settings, "head_dim", None) or settings.hidden_size // heads,
        "rope_base": float(settings.rope_parameters["rope_theta"]),
        "qk_norm": "layers.0.mixer.q_norm.weight" in state,
    }
    if "layers.0.mixer.q_proj.bias" in state:
        options["bias"] = True
    return HybridConfig(
        mixers=[format_spec("softmax", options)] * settings.num_hidden_layers,
        dim=settings.hidden_size,
        heads=heads,
        vocab_size=settings.vocab_size,
        tie_embeddings=settings.tie_word_embeddings,
        # Rounded up to the multiple, the SwiGLU is exactly as wide as the model's.
        mlp_ratio=settings.intermediate_size / settings.hidden_size,
        mlp_multiple=settings.intermediate_size,
        rms_norm_eps=settings.rms_norm_eps,
        initializer_range=settings.initializer_range,
        bos_token_id=settings.bos_token_id,
        eos_token_id=settings.eos_token_id,
        pad_token_id=settings.pad_token_id,
    )


def built(config: HybridConfig, state: dict[str, Tensor], mixers: dict[int, Mixer] | None = None) -> HybridLM:
    """A HybridLM that holds these very tensors, and these mixers in place of its own."""
    # No weights are made only to be thrown away.
    with torch.device("meta"):
        made = HybridLM(config)
    for index, mixer in (mixers or {}).items():
        cast(HybridBlock, made.layers[index]).mixer = mixer
    kept = tuple(f"layers.{index}.mixer." for index in mixers or {})
    rest = {name: each for name, each in state.items() if not name.startswith(kept)} if kept else state
    made.load_state_dict(rest, strict=False, assign=True)
    made.tie_weights()
    missing = [name for name, each in made.named_parameters() if each.is_meta]
    if missing:
        raise UnsupportedModelError(f"the model lacks weights of Llama's layout: {missing[:4]}")
    return made.eval()


@torch.no_grad()
def _check_logits(model: Any, made: HybridLM) -> None:
    ids = torch.arange(3, 67, device=model.device)[None] % made.config.vocab_size
    theirs = model(input_ids=ids, use_cache=False).logits
    ours = made(ids, use_cache=False).logits
    error = float((ours - theirs).norm() / theirs.norm())
    if not error <= SAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} has Llama's weights and computes something else with them: its logits differ by "
            f"{error:.2g} of their norm, allowed: {SAME:g}. (A model cast to half precision by .to() has rounded "
            "rotary frequencies too: load it with dtype=... instead)"
        )


def replace_layers(teacher: HybridLM, layers: Sequence[int], to: str | Sequence[str], seed: int = 0) -> HybridLM:
    """A model like `teacher` with other mixers in some layers, which start from the projections of the old ones.

    Args:
        teacher: from `as_hybrid`. The new model holds its very tensors, except in the replaced layers.
        layers: which ones.    to: a mixer's spec, or several: layer i takes number i modulo their count. Options that
            the layer decides (kv_heads, head_dim, rope_base, qk_norm, bias, expand_k, expand_v) are filled in where the
            mixer has them.    seed: of its other weights.
    Raises:
        OptionError for a mixer whose projections do not have the layer's shape, or that is not causal.
    """
    old = {index: cast(SoftmaxMixer, mixer_at(teacher, index)) for index in layers}
    specs = list(teacher.config.mixers)
    cycle = (to,) if isinstance(to, str) else tuple(to)
    for index, mixer in old.items():
        specs[index] = _spec_like(mixer, cycle[index % len(cycle)])
    settings = {**teacher.config.to_dict(), "mixers": specs}
    config = HybridConfig.from_dict(settings)
    like = teacher.embed_tokens.weight
    cuda = [like.device] if like.device.type == "cuda" else []
    with torch.random.fork_rng(cuda), torch.device(like.device):
        torch.manual_seed(seed)
        made = {index: config.make_mixer(index).to(like.dtype) for index in layers}
    for index, mixer in made.items():
        adopt(mixer, old[index])
    model = built(config, teacher.state_dict(), made)
    model.generation_config = copy.deepcopy(teacher.generation_config)
    return model


def _spec_like(mixer: SoftmaxMixer, to: str) -> str:
    name, given = parse_spec(to)
    known = {option.name for option in registry.card(name).options}
    assert mixer.rope is not None
    layer = {
        "heads": mixer.heads,
        "kv_heads": mixer.kv_heads,
        "head_dim": mixer.head_dim,
        "rope_base": mixer.rope.base,
        "qk_norm": mixer.q_norm is not None,
        "bias": mixer.q_proj.bias is not None,
        "expand_k": mixer.heads * mixer.head_dim / mixer.dim,
        "expand_v": mixer.heads * mixer.head_dim / mixer.dim,
    }
    filled = {option: value for option, value in layer.items() if option in known}
    return format_spec(name, {**filled, **given})


@torch.no_grad()
def adopt(mixer: Mixer, old: SoftmaxMixer) -> None:
    """Copy the projections (and norms of q and k) of a softmax layer into a new mixer; k and v are repeated where the
    new one has a head for every query head. Raises OptionError where they do not fit."""
    mixer.require("causal-self" in mixer.patterns and mixer.causal, "is not causal, allowed: causal mixers")
    own, theirs = dict(mixer.named_parameters()), dict(old.named_parameters())
    for each in PROJECTIONS:
        mixer.require(f"{each}.weight" in own, f"has no {each}, allowed: mixers with {', '.join(PROJECTIONS)}")
        mixer.require(
            f"{each}.bias" in own or f"{each}.bias" not in theirs,
            f"{each} has no bias and the replaced layer's has one, allowed: mixers with an option bias (softmax, "
            "hedgehog, spikingbrain, spikingbrain-window)",
        )
    for name, source in theirs.items():
        if name not in own:
            continue
        if name.startswith(("k_proj", "v_proj")) and own[name].shape != source.shape:
            per_head = source.unflatten(0, (old.kv_heads, old.head_dim))
            source = per_head.repeat_interleave(old.heads // old.kv_heads, 0).flatten(0, 1)
        if own[name].shape != source.shape:
            raise OptionError(
                f"{mixer.name}: {name} is {list(own[name].shape)}, allowed: {list(source.shape)}, the replaced "
                "layer's; give options that make it so"
            )
        own[name].copy_(source)
