"""HybridLM: one shell for all mixers, a transformers causal language model.

    x = E[ids];  per layer: x = x + mixer(RMSNorm(x)), x = x + SwiGLU(RMSNorm(x));  logits = RMSNorm(x) E^T

`generate`, `save_pretrained`, the Auto classes (once `foveate.lm` is imported), the Trainer and gradient checkpointing
work as for any model. Padded batches and packed sequences run as one packed row without the padding, so mixers see
sequences only, and what stands in padding (NaN too) reaches nothing.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from foveate.attention.shapes import match
from foveate.errors import OptionError, ShapeError, UnsupportedCacheError
from foveate.lm.cache import CACHE_NAME, HybridCache
from foveate.lm.config import HybridConfig
from foveate.mixers.base import Initialised, MixerState
from foveate.mixers.linear.spikes import code_linears
from foveate.mixers.parts import RMSNorm

IGNORED = -100


class HybridBlock(GradientCheckpointingLayer):
    """A mixer and a SwiGLU block, each on the norm of what comes in, and added to it."""

    def __init__(self, config: HybridConfig, index: int) -> None:
        super().__init__()
        self.mixer_norm = RMSNorm(config.dim, config.rms_norm_eps)
        self.mixer = config.make_mixer(index)
        self.mlp_norm = RMSNorm(config.dim, config.rms_norm_eps) if config.mlp_width else None
        self.mlp = config.make_mlp(index)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: Tensor,
        state: MixerState | None = None,
        positions: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        keep_state: bool = False,
    ) -> tuple[Tensor, MixerState | None, Tensor | None]:
        """x [B, N, C] -> x, the mixer's state if it is to be kept, the mixer's auxiliary loss if it has one."""
        mixed, after = self.mixer(self.mixer_norm(x), state=state, positions=positions, cu_seqlens=cu_seqlens)
        x = x + self.dropout(mixed)
        if self.mlp is not None and self.mlp_norm is not None:
            x = x + self.dropout(self.mlp(self.mlp_norm(x)))
        return x, after if keep_state else None, after.auxiliary_loss


@dataclass(frozen=True)
class Layout:
    """How the tokens of one call are arranged for the mixers.

    shape: (B, N) of the input.    real: [B, N] bool, tokens that are not padding; None when all are real.
    cu_seqlens: boundaries of sequences in one packed row, on the CPU; None when the rows are the sequences.
    positions: [B, N] or, packed, [1, T]; None: they continue from the states.
    """

    shape: tuple[int, int]
    real: Tensor | None = None
    cu_seqlens: Tensor | None = None
    positions: Tensor | None = None

    def pack(self, x: Tensor) -> Tensor:
        """[B, N, C] as the mixers take it."""
        if self.real is not None:
            return x[self.real][None]
        return x.flatten(0, 1)[None] if self.cu_seqlens is not None else x

    def unpack(self, x: Tensor) -> Tensor:
        """The inverse of `pack`, with zeros for padding."""
        if self.real is not None:
            full = x.new_zeros(*self.shape, x.shape[-1])
            full[self.real] = x[0]
            return full
        return x.unflatten(1, self.shape)[0] if self.cu_seqlens is not None else x

    def targets(self, labels: Tensor) -> Tensor:
        """What each token should predict, [B, N], from labels that are the tokens themselves: the next token of its own
        sequence, or -100."""
        targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
        if self.real is not None:
            return targets.masked_fill(~self.real, IGNORED)
        if self.cu_seqlens is not None:
            last = self.cu_seqlens[1:][self.cu_seqlens.diff() > 0].to(labels.device) - 1
            targets = targets.flatten().index_fill(0, last, IGNORED).view_as(labels)
        return targets


class HybridLM(PreTrainedModel, GenerationMixin):
    """A causal language model of any mixers, see `HybridConfig`."""

    config_class = HybridConfig
    config: HybridConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["HybridBlock"]  # noqa: RUF012

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim)
        self.embedding_dropout = nn.Dropout(config.embedding_dropout)
        self.layers = nn.ModuleList(HybridBlock(config, index) for index in range(len(config.mixers)))
        self.norm = RMSNorm(config.dim, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.dim, config.vocab_size, bias=False)
        if config.spike_k is not None:
            code_linears(self, config.spike_k, config.spike_group)
        self._tied_weights_keys = self._ties()
        self.post_init()

    def _ties(self) -> dict[str, str]:
        """Parameter -> the one it shares: the head's with the embedding, and what layers of one mixer share."""
        ties = {"lm_head.weight": "embed_tokens.weight"} if self.config.tie_embeddings else {}
        first: dict[tuple[str, str, torch.Size], str] = {}
        for index, block in enumerate(self.layers):
            mixer = cast(HybridBlock, block).mixer
            for name in mixer.shared:
                parameter = getattr(mixer, name)
                if parameter is not None:
                    full = f"layers.{index}.mixer.{name}"
                    source = first.setdefault((mixer.name, name, parameter.shape), full)
                    if source != full:
                        ties[full] = source
        return ties

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys)

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        self.embed_tokens = value

    def get_output_embeddings(self) -> nn.Linear:
        return self.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.lm_head = new_embeddings

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Initialised):
            for name, value in module.initial_values().items():
                init.copy_(getattr(module, name), value)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: HybridCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        shift_labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: HybridCache | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits, and the loss where labels are given.

        Args:
            input_ids: [B, N] or inputs_embeds: [B, N, C].
            attention_mask: [B, past + N] or [B, N], 0 for padding, which may stand anywhere.
            position_ids: [B or 1, N]. With nothing cached, a position that does not rise starts a new sequence, as
                transformers' padding-free collator writes them.
            cu_seqlens: [R + 1], boundaries of R sequences packed into B = 1 (also as `cu_seq_lens_q`). A cache then has
                R rows.
            past_key_values, cache: a HybridCache; two names of one argument.
            labels: [B, N], the tokens themselves, -100 where none is asked; shifted here, and never across sequences.
            shift_labels: [B, N], already shifted: what token t should predict stands at t. Wins over labels.
            num_items_in_batch: what the summed loss is divided by (default: the number of labels).
            logits_to_keep: the last so many logits, or those at these indices; 0 for all.
        Returns:
            CausalLMOutputWithPast. The loss has the mixers' auxiliary losses added in training.
        Raises:
            ShapeError, OptionError; StateError for a cache that an interrupted forward left behind. Tokens and labels
            beyond the vocabulary are looked for on the CPU; on a GPU with FOVEATE_CHECK_VALUES=1, as that makes every
            call wait.
        """
        _check_input(input_ids, inputs_embeds, self.config)
        for name, asked in (("labels", labels), ("shift_labels", shift_labels)):
            if asked is not None:
                check_ids(asked, name, self.config.vocab_size, IGNORED)
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = self._cache(past_key_values if cache is None else cache, use_cache)
        given = cu_seqlens if cu_seqlens is not None else kwargs.get("cu_seq_lens_q")
        layout = self._layout(x, attention_mask, position_ids, given, cache)
        x, hidden, auxiliary = self._run_layers(self.embedding_dropout(x), layout, cache, bool(output_hidden_states))
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(x[:, kept])
        loss = None
        if labels is not None or shift_labels is not None:
            targets = shift_labels if shift_labels is not None else layout.targets(cast(Tensor, labels))
            loss = _loss(logits, targets[:, kept], num_items_in_batch)
            if self.training and auxiliary is not None:
                loss = loss + auxiliary
        held: dict[str, Any] = {CACHE_NAME: cache}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, hidden_states=hidden, **held)
        return output if return_dict is not False else output.to_tuple()

    def _run_layers(
        self, x: Tensor, layout: Layout, cache: HybridCache | None, record: bool
    ) -> tuple[Tensor, tuple[Tensor, ...] | None, Tensor | None]:
        """The final norm of [B, N, C], the hidden states before each layer and after the norm, the auxiliary losses."""
        columns = x.shape[1]
        seen: list[Tensor] = []
        auxiliary: Tensor | None = None
        x = layout.pack(x)
        if x.shape[1] > 0:
            for index, block in enumerate(self.layers):
                seen += [layout.unpack(x)] if record else []
                state = None if cache is None else cache.state(index)
                x, after, loss = block(
                    x,
                    state=state,
                    positions=layout.positions,
                    cu_seqlens=layout.cu_seqlens,
                    keep_state=cache is not None,
                )
                if cache is not None:
                    cache.store(index, after, columns)
                if loss is not None:
                    auxiliary = loss if auxiliary is None else auxiliary + loss
        x = layout.unpack(self.norm(x))
        return x, (*seen, x) if record else None, auxiliary

    def _cache(self, given: Any, use_cache: bool | None) -> HybridCache | None:
        if given is not None:
            if not isinstance(given, HybridCache):
                raise UnsupportedCacheError(
                    f"HybridLM was given a {type(given).__name__}, allowed: a foveate.lm.HybridCache, which holds "
                    "states of every kind of mixer (or none: the model makes one)"
                )
            if len(given) != len(self.layers):
                raise UnsupportedCacheError(
                    f"the cache has {len(given)} layers, allowed: {len(self.layers)}, as the model"
                )
            given.check_whole()
            return given
        wanted = self.config.use_cache and not self.training if use_cache is None else use_cache
        # A checkpointed layer runs again in the backward pass, where states must not be made.
        if self.training and any(cast(HybridBlock, block).gradient_checkpointing for block in self.layers):
            wanted = False
        return HybridCache(len(self.layers)) if wanted else None

    def _layout(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cu_seqlens: Tensor | None,
        cache: HybridCache | None,
    ) -> Layout:
        B, N, _ = x.shape
        positions = None if position_ids is None else position_ids.expand(B, -1)
        if positions is not None:
            match(x=(x, "B N C"), position_ids=(positions, "B N"))
        real = None if attention_mask is None else _real_tokens(attention_mask, x)
        if cu_seqlens is not None:
            if real is not None:
                raise ShapeError("cu_seqlens with padding in attention_mask, allowed: one of them")
            if B != 1:
                raise ShapeError(f"cu_seqlens needs packed sequences with B = 1, not B = {B}")
            return Layout((B, N), None, cu_seqlens.cpu(), positions)
        if real is not None:
            lengths = real.sum(1)
            bounds = torch.cat((lengths.new_zeros(1), lengths.cumsum(0))).cpu()
            return Layout((B, N), real, bounds, None if positions is None else positions[real][None])
        if positions is not None and (cache is None or cache.get_seq_length() == 0):
            starts = positions.new_ones(positions.shape, dtype=torch.bool)
            starts[:, 1:] = positions.diff() <= 0
            if bool(starts[:, 1:].any()):
                bounds = F.pad(starts.flatten().nonzero().flatten(), (0, 1), value=B * N).cpu()
                return Layout((B, N), None, bounds, positions.flatten()[None])
        return Layout((B, N), positions=positions)

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], generation_mode: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Give `generate` a HybridCache; anything else that it could be told to use is refused here."""
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            raise UnsupportedCacheError(
                "HybridLM cannot do assisted generation: it rolls the cache back, and recurrent states cannot be; "
                "allowed: greedy search, sampling and beams"
            )
        named = generation_config.cache_implementation
        if named not in (None, "dynamic"):
            raise UnsupportedCacheError(
                f"HybridLM with cache_implementation={named!r}, allowed: None (mixer states live in a HybridCache)"
            )
        if generation_config.use_cache is False:
            return None
        given = model_kwargs.get(CACHE_NAME)
        model_kwargs[CACHE_NAME] = HybridCache(len(self.layers)) if given is None else self._cache(given, True)
        return None

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the cache after `length` tokens of `batch` sequences."""
        return sum(cast(HybridBlock, block).mixer.state_bytes(batch, length) for block in self.layers)


def _check_input(ids: Tensor | None, embeds: Tensor | None, config: HybridConfig) -> None:
    if (ids is None) == (embeds is None):
        raise OptionError("HybridLM takes input_ids or inputs_embeds, allowed: exactly one of them")
    name, given = ("input_ids", ids) if ids is not None else ("inputs_embeds", cast(Tensor, embeds))
    if ids is not None and (ids.dim() != 2 or ids.dtype not in (torch.int64, torch.int32)):
        raise ShapeError(f"HybridLM: input_ids {list(ids.shape)} {ids.dtype}, allowed: [B, N] of int64 or int32")
    if embeds is not None:
        match(inputs_embeds=(embeds, f"B N {config.dim}"))
    if given.shape[1] == 0:
        raise ShapeError(f"HybridLM: {name} {list(given.shape)} has N = 0, allowed: at least one token")
    if ids is not None:
        check_ids(ids, name, config.vocab_size)


def check_ids(ids: Tensor, name: str, vocab: int, ignored: int | None = None) -> None:
    """Raise OptionError for a token outside the vocabulary; of tensors on the CPU only, see `HybridLM.forward`."""
    if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta:
        return
    if ids.device.type != "cpu" and os.environ.get("FOVEATE_CHECK_VALUES") != "1":
        return
    outside = (ids < 0) | (ids >= vocab)
    if ignored is not None:
        outside &= ids != ignored
    if bool(outside.any()):
        also = "" if ignored is None else f", or {ignored} for none"
        raise OptionError(
            f"HybridLM: {name} has {int(ids[outside][0])}, allowed: 0 to {vocab - 1}, the vocabulary's{also}; use the "
            "tokenizer that the model was trained with"
        )


def _real_tokens(attention_mask: Tensor, x: Tensor) -> Tensor | None:
    """[B, N] bool, the last N columns of a 2-D mask; None when nothing is masked."""
    B, N, _ = x.shape
    if attention_mask.dim() != 2 or attention_mask.shape[0] != B or attention_mask.shape[1] < N:
        raise ShapeError(
            f"attention_mask {list(attention_mask.shape)}, allowed: [B, N] or [B, past + N] with B = {B}, N = {N}; "
            "HybridLM takes no 4-D masks"
        )
    real = attention_mask[:, -N:].bool()
    return None if bool(real.all()) else real


def _loss(logits: Tensor, targets: Tensor, count: Tensor | int | None) -> Tensor:
    """Cross entropy in float32 over the targets that are not -100; `count` replaces their number."""
    flat, targets = logits.float().flatten(0, 1), targets.to(logits.device).flatten()
    if count is None:
        return F.cross_entropy(flat, targets, ignore_index=IGNORED)
    total = F.cross_entropy(flat, targets, ignore_index=IGNORED, reduction="sum")
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


AutoConfig.register(HybridConfig.model_type, HybridConfig, exist_ok=True)
AutoModelForCausalLM.register(HybridConfig, HybridLM, exist_ok=True)
