"""The configuration of a hybrid language model: one mixer per layer, named with its options."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from foveate.errors import OptionError, UnknownNameError
from foveate.lm.mlp import SwiGLU, UpcycledMLP
from foveate.mixers.base import resolve_mixer
from foveate.options import Bounds, Option, nearest


def _option(
    name: str,
    *accepts: type,
    at_least: float | None = None,
    above: float | None = None,
    below: float | None = None,
) -> Option:
    kinds = " | ".join(each.__name__ for each in accepts)
    return Option(name, kinds, None, "", Bounds(at_least=at_least, above=above, below=below), accepts)


_OPTIONS = (
    _option("dim", int, at_least=1),
    _option("heads", int, at_least=1),
    _option("vocab_size", int, at_least=1),
    _option("tie_embeddings", bool),
    _option("mlp_ratio", float, at_least=0),
    _option("mlp_multiple", int, at_least=1),
    _option("rms_norm_eps", float, above=0),
    _option("initializer_range", float, at_least=0),
    _option("dropout", float, at_least=0, below=1),
    _option("embedding_dropout", float, at_least=0, below=1),
    _option("experts", int, at_least=0),
    _option("top_experts", int, at_least=1),
    _option("shared_experts", int, at_least=0),
    _option("router_noise", float, at_least=0),
    _option("spike_k", float, type(None), above=0),
    _option("spike_group", int, at_least=1),
    _option("use_cache", bool),
    _option("bos_token_id", int, type(None)),
    _option("eos_token_id", int, list, type(None)),
    _option("pad_token_id", int, type(None)),
)
# What transformers passes besides its own fields, in versions 5.4 to 5.24.
_PASSED_BY_TRANSFORMERS = frozenset(
    {
        "attn_implementation",
        "auto_map",
        "experts_implementation",
        "model_type",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "per_layer_config",
        "torch_dtype",
    }
)


class HybridConfig(PreTrainedConfig):
    """Options of `HybridLM`.

    mixers: a spec per layer, such as "lightning" or "softmax:window=256"; a mixer's options are its own, and `dim`,
        `heads`, `layer` and `layers` are filled in (heads may be given in a spec).
    dim: channels.    heads: heads of every mixer that is not told otherwise.
    vocab_size: default, that of the bundled model's tokenizer.    tie_embeddings: one matrix for input and output.
    mlp_ratio: width of the SwiGLU block over dim as if it had two matrices: 2/3 mlp_ratio dim, rounded up to a
        multiple of mlp_multiple; 0 for no such block.
    experts: routed copies of the SwiGLU block, see `foveate.lm.mlp.UpcycledMLP`; 0 for one dense block.
    top_experts: that a token is sent to.    shared_experts: that every token reads besides.    router_noise: std of
        normal noise on the router's logits in training.    dense_layers: layers with one dense block all the same.
    spike_k: linear layers are coded as spikes with this k, see `foveate.lm.spikes.spike_coded`; None for no coding.
    spike_group: inputs that share a scale of the 8-bit weights, at most.
    rms_norm_eps: of the shell's norms.    initializer_range: std of Linear and embedding weights.
    dropout: of what a block adds; embedding_dropout: of embeddings.

    Raises UnknownNameError for an unknown mixer, mixer option or option of this class; OptionError for a value that is
    not allowed.
    """

    model_type = "foveate_hybrid"
    attribute_map = {  # noqa: RUF012
        "hidden_size": "dim",
        "num_attention_heads": "heads",
        "tie_word_embeddings": "tie_embeddings",
    }
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012

    mixers: list[str] = field(default_factory=lambda: ["lightning", "lightning", "lightning", "softmax"] * 3)
    dim: int = 512
    heads: int = 8
    vocab_size: int = 49152
    tie_embeddings: bool = True
    mlp_ratio: float = 4.0
    mlp_multiple: int = 256
    experts: int = 0
    top_experts: int = 1
    shared_experts: int = 1
    router_noise: float = 0.0
    dense_layers: list[int] = field(default_factory=list)
    spike_k: float | None = None
    spike_group: int = 128
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    dropout: float = 0.0
    embedding_dropout: float = 0.0
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for ours, theirs in (("tie_embeddings", "tie_word_embeddings"), ("dim", "hidden_size")):
            if theirs in kwargs:
                setattr(self, ours, kwargs.pop(theirs))
        self._check_names(kwargs)
        self._check_values()
        super().__post_init__(**kwargs)
        for index in range(len(self.mixers)):
            # On the meta device this makes no weights, and checks every value.
            with torch.device("meta"):
                self.make_mixer(index)

    @property
    def num_hidden_layers(self) -> int:
        return len(self.mixers)

    @property
    def mlp_width(self) -> int:
        """Hidden width of the SwiGLU block; 0 for none."""
        width = int(2 * self.mlp_ratio * self.dim / 3)
        return -(-width // self.mlp_multiple) * self.mlp_multiple

    def make_mixer(self, index: int) -> Any:
        """The mixer of one layer."""
        # An option in the spec wins over the model's.
        target, options = resolve_mixer(
            self.mixers[index], dim=self.dim, layer=index, layers=len(self.mixers), heads=self.heads
        )
        return target(**options)

    def make_mlp(self, index: int) -> SwiGLU | UpcycledMLP | None:
        """The channel block of one layer; None without one."""
        width = self.mlp_width
        if not width:
            return None
        if not self.experts or index in self.dense_layers:
            return SwiGLU(self.dim, width)
        return UpcycledMLP(
            self.dim,
            width,
            experts=self.experts,
            top=self.top_experts,
            shared=self.shared_experts,
            noise=self.router_noise,
        )

    def _check_names(self, given: dict[str, Any]) -> None:
        own = {each.name for each in fields(self)}
        passed = own | set(GenerationConfig().to_dict()) | _PASSED_BY_TRANSFORMERS
        for name in given:
            if name not in passed and not name.startswith("_"):
                ours = {each.name for each in fields(HybridConfig)} - {each.name for each in fields(PreTrainedConfig)}
                raise UnknownNameError(f"HybridConfig has no option {name!r}{nearest(name, ours)}")

    def _check_values(self) -> None:
        for each in _OPTIONS:
            setattr(self, each.name, each.check("HybridConfig", getattr(self, each.name)))
        self.mixers = _list("mixers", self.mixers, str, "a list of specs, such as ['softmax', 'gla']")
        self.dense_layers = _list("dense_layers", self.dense_layers, int, "a list of layers' numbers")
        if not self.mixers:
            raise OptionError("HybridConfig: mixers=[], allowed: at least one layer")
        if any(not 0 <= layer < len(self.mixers) for layer in self.dense_layers):
            raise OptionError(
                f"HybridConfig: dense_layers={self.dense_layers}, allowed: layers from 0 to {len(self.mixers) - 1}"
            )
        if self.experts and self.top_experts > self.experts:
            raise OptionError(f"HybridConfig: top_experts={self.top_experts}, allowed: <= experts = {self.experts}")
        if self.experts and not self.mlp_width:
            raise OptionError(f"HybridConfig: experts={self.experts} with mlp_ratio=0, allowed: experts=0")


def _list(name: str, given: Any, kind: type, allowed: str) -> list[Any]:
    """A list or tuple of one type; text is not read letter by letter."""
    fits = isinstance(given, list | tuple) and all(
        isinstance(each, kind) and not isinstance(each, bool) for each in given
    )
    if not fits:
        raise OptionError(f"HybridConfig: {name}={given!r}, allowed: {allowed}")
    return list(given)
