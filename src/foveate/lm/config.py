"""The configuration of a hybrid language model: one mixer per layer, named with its options."""

from __future__ import annotations

from dataclasses import field, fields
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedConfig

from foveate.errors import OptionError, UnknownNameError
from foveate.mixers.base import resolve_mixer
from foveate.options import nearest

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
        self.mixers = [str(spec) for spec in self.mixers]
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

    def _check_names(self, given: dict[str, Any]) -> None:
        own = {each.name for each in fields(self)}
        passed = own | set(GenerationConfig().to_dict()) | _PASSED_BY_TRANSFORMERS
        for name in given:
            if name not in passed and not name.startswith("_"):
                ours = {each.name for each in fields(HybridConfig)} - {each.name for each in fields(PreTrainedConfig)}
                raise UnknownNameError(f"HybridConfig has no option {name!r}{nearest(name, ours)}")

    def _check_values(self) -> None:
        for name, least in (("dim", 1), ("heads", 1), ("vocab_size", 1), ("mlp_ratio", 0), ("mlp_multiple", 1)):
            if getattr(self, name) < least:
                raise OptionError(f"HybridConfig: {name}={getattr(self, name)!r}, allowed: >= {least}")
        for name in ("dropout", "embedding_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise OptionError(f"HybridConfig: {name}={getattr(self, name)!r}, allowed: >= 0 and < 1")
        if not self.mixers:
            raise OptionError("HybridConfig: mixers=[], allowed: at least one layer")
