"""Students of EchoAtt: a transformers model whose followers have no query and key projections and no key cache.

`share_attention(teacher, groups)` copies a pretrained model and, in every group of neighbouring layers, replaces the
attention of all but the first by `EchoAttention`, which keeps the layer's value and output projections and weighs its
values with the leader's weights (see foveate.methods.select.echoatt, arXiv 2409.14595). Leaders keep their own module:
the attention function that transformers calls for them leaves q, k and the mask for the followers.

    several queries   softmax attention over the leader's q and k and the follower's values, one fused call each, O(N)
                      memory; the leader's q and k take the gradients of the whole group. With `materialise`, one
                      matrix A [B, Hq, M, N] per group instead.
    one query         the leader's row A, float32, then one product with the values per layer
    cache             keys and values in leaders and layers outside of groups, values alone in followers

Attention dropout is drawn by each layer for itself, on the clean weights. Saved per follower: W_q, W_k, half of its
cache, and the scores and softmax of every decode step. `generate` works as before, with beams and left padding.
Training works without gradient checkpointing, which would run layers apart from their leaders.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from foveate.attention.scoring import query_scores
from foveate.errors import DataError, OptionError, UnsupportedCacheError, UnsupportedModelError
from foveate.hf import compat
from foveate.hf.modules import attention_modules, check_model, text_config
from foveate.methods.select.echoatt import Groups, weigh

NAME = "foveate-echo"
NEEDED = ("q_proj", "k_proj", "v_proj", "o_proj")
# What only turns q and k, and goes with them.
TURNING = ("q_norm", "k_norm", "rotary_emb", "rotary_fn")


@dataclass
class Lead:
    """What a leader leaves for its followers within one forward pass.

    Either weights A [B, Hq, M, N] float32, or rotated q [B, Hq, M, D] and all keys k [B, Hkv, N, D] with their mask.
    """

    q: Tensor
    k: Tensor
    mask: Tensor | None
    scale: float
    weights: Tensor | None


@dataclass
class Group:
    """What the layers of one group share. last: the layer after which nobody needs the lead."""

    last: int
    materialise: bool
    lead: Lead | None = field(default=None, repr=False)


class ValueLayer(DynamicLayer):
    """A cache layer of values alone; its keys have no width."""

    def get_seq_length(self) -> int:
        return 0 if self.values is None else self.values.shape[-2]


class EchoAttention(nn.Module):
    """A follower: the values and output projections of `own`, under the weights of the group's leader."""

    def __init__(self, own: nn.Module, group: Group) -> None:
        super().__init__()
        attributes: Any = own
        self.config = attributes.config
        self.layer_idx = int(attributes.layer_idx)
        self.head_dim = int(attributes.head_dim)
        self.num_key_value_groups = int(attributes.num_key_value_groups)
        self.attention_dropout = float(getattr(attributes, "attention_dropout", 0.0))
        self.is_causal = True
        self.v_proj, self.o_proj = attributes.v_proj, attributes.o_proj
        self.group = group

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """x [B, M, C] -> o [B, M, C], after the leader has run in the same forward pass."""
        lead = self.group.lead
        if lead is None:
            raise UnsupportedModelError(
                f"layer {self.layer_idx} finds no weights of its leader: a student of EchoAtt runs with its own "
                f"attention ({NAME!r}), whole and without gradient checkpointing; do not apply a method to it, change "
                "its attn_implementation or call its layers alone"
            )
        values = self.v_proj(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
        cache = compat.cache_of(kwargs)
        if cache is not None:
            no_keys = values.new_empty(*values.shape[:3], 0)
            _, values = self._cache_layer(cache).update(no_keys, values)
        dropout = self.attention_dropout if self.training else 0.0
        if lead.weights is not None:
            made = weigh(F.dropout(lead.weights, dropout, self.training), values).transpose(1, 2)
        else:
            made, _ = sdpa_attention_forward(
                self, lead.q, lead.k, values, lead.mask, dropout=dropout, scaling=lead.scale
            )
        if self.layer_idx == self.group.last:
            self.group.lead = None
        return self.o_proj(made.flatten(2)), None

    def _cache_layer(self, cache: Any) -> ValueLayer:
        compat.grow(cache, self.layer_idx)
        held = cache.layers[self.layer_idx]
        if compat.is_plain(held) and not held.is_initialized:
            held = cache.layers[self.layer_idx] = ValueLayer()
        if not isinstance(held, ValueLayer):
            raise UnsupportedCacheError(
                f"layer {self.layer_idx} keeps values alone, which a {type(held).__name__} cannot; use the default "
                "dynamic cache: do not set cache_implementation"
            )
        return held


def echo_attention(
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
    """What leaders and layers outside of groups call: q [B, Hq, M, D], k and v with the cache -> [B, M, Hq, Dv]."""
    group: Group | None = getattr(module, "_echo_group", None)
    if group is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **given
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    keeps = group.materialise or (query.shape[2] == 1 and not torch.is_grad_enabled())
    weights = weights_of(query, key, attention_mask, scale) if keeps else None
    group.lead = Lead(query, key, attention_mask, scale, weights)
    if weights is not None:
        return weigh(F.dropout(weights, dropout, dropout > 0), value).transpose(1, 2), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scale, **given)


def weights_of(q: Tensor, k: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """A: [B, Hq, M, N] float32 (float64 for float64) of q [B, Hq, M, D] over k [B, Hkv, N, D].

    mask: bool or additive, broadcastable to A; None: the queries are the last M of the keys. A query that may see
    nothing (padding) has no weights.
    """
    B, Hq, M, D = q.shape
    H, N = k.shape[1], k.shape[2]
    if M == 1:
        scores = query_scores(q[:, :, 0], k)[:, :, None] * scale
    else:
        exact = torch.float64 if q.dtype == torch.float64 else torch.float32
        rows = q.reshape(B, H, Hq // H * M, D)
        scores = (rows @ k.transpose(-1, -2)).to(exact).view(B, Hq, M, N) * scale
    if mask is None and M > 1:
        mask = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M)
    if mask is None:
        return scores.softmax(-1)
    if mask.dtype != torch.bool:
        return (scores + mask[..., :N]).softmax(-1)
    mask = mask[..., :N]
    return scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0.0)


def share_attention(model: Any, groups: Sequence[Sequence[int]], *, materialise: bool = False) -> Any:
    """A copy of a causal LM whose layers share attention weights in groups.

    Args:
        model: a transformers causal LM with q, k, v and o projections (Llama, Mistral, Qwen, SmolLM, ...); it is left
            as it is.
        groups: layers by number, neighbours in order, the leader first; see `methods.select.echoatt.sharing_groups`.
        materialise: keep A as a matrix for several queries (the paper's way).
    Returns:
        the student, in the model's class, dtype and device, with the teacher's weights and without its followers' q
        and k projections. Its config names the groups; `save_pretrained` and `load_student` bring it back.
    Raises:
        OptionError for groups that do not fit; UnsupportedModelError for a model of another kind.
    """
    check_model(model)
    modules = attention_modules(model)
    chosen = check_groups(groups, len(modules))
    for group in chosen:
        for layer in group:
            _check_module(model, modules[layer], layer)
    student = copy.deepcopy(model)
    _share(student, chosen, materialise)
    return student


def _share(model: Any, groups: Groups, materialise: bool) -> None:
    """Make a model a student, in place."""
    AttentionInterface.register(NAME, echo_attention)
    AttentionMaskInterface.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    places = {id(each): (owner, name) for owner in model.modules() for name, each in owner.named_children()}
    own = attention_modules(model)
    for group in groups:
        shared = Group(int(own[group[-1]].layer_idx), materialise)  # type: ignore[arg-type]
        own[group[0]]._echo_group = shared  # type: ignore[assignment]
        for layer in group[1:]:
            owner, name = places[id(own[layer])]
            setattr(owner, name, EchoAttention(own[layer], shared))
    config = text_config(model)
    config._attn_implementation = NAME
    config.echoatt_groups = [list(group) for group in groups]
    # It would run layers apart from their leaders; transformers refuses where this is False.
    for each in model.modules():
        if hasattr(type(each), "supports_gradient_checkpointing"):
            each.supports_gradient_checkpointing = False  # type: ignore[assignment]


def check_groups(groups: Sequence[Sequence[int]], layers: int) -> Groups:
    """Groups as tuples; OptionError unless each is two or more neighbouring layers and no layer is in two."""
    chosen = tuple(tuple(group) for group in groups)
    named = [layer for group in chosen for layer in group]
    runs = all(len(group) > 1 and list(group) == list(range(group[0], group[-1] + 1)) for group in chosen)
    if not chosen or not runs or len(set(named)) < len(named) or min(named) < 0 or max(named) >= layers:
        raise OptionError(
            f"share_attention: groups={[list(group) for group in chosen]}, allowed: at least one, each of two or more "
            f"neighbouring layers from 0 to {layers - 1} in order, no layer in two"
        )
    return chosen


def _check_module(model: Any, module: nn.Module, layer: int) -> None:
    kinds = getattr(text_config(model), "layer_types", None)
    if (kinds is not None and kinds[layer] != "full_attention") or getattr(module, "sliding_window", None):
        raise UnsupportedModelError(
            f"layer {layer} of {type(model).__name__} has a sliding window, so it cannot share attention; choose "
            "groups without it"
        )
    parts = {name for name, _ in module.named_children()}
    if not parts.issuperset(NEEDED) or parts - {*NEEDED, *TURNING} or getattr(module, "sinks", None) is not None:
        raise UnsupportedModelError(
            f"{type(module).__name__} has the parts {sorted(parts)}, allowed for sharing attention: q, k, v and o "
            "projections and norms of q and k, without learned sinks"
        )


def load_student(folder: str | os.PathLike[str], *, materialise: bool = False) -> Any:
    """A student that `save_pretrained` wrote, in evaluation mode and the dtype of its file.

    Raises DataError for a folder that holds no student; plain `from_pretrained` would give its followers random
    projections.
    """
    from safetensors.torch import load_file

    place = Path(folder).expanduser()
    files = sorted(place.glob("*.safetensors"))
    if not (place / "config.json").exists() or not files:
        raise DataError(f"{place} holds no student of EchoAtt (config.json and *.safetensors); name another folder")
    config = AutoConfig.from_pretrained(place)
    groups = getattr(config, "echoatt_groups", None)
    if groups is None:
        raise DataError(f"{place}/config.json names no groups of layers (echoatt_groups); load it with from_pretrained")
    tensors = {name: each for file in files for name, each in load_file(file).items()}
    student = AutoModelForCausalLM.from_config(config, dtype=next(iter(tensors.values())).dtype)
    _share(student, check_groups(groups, len(attention_modules(student))), materialise)
    missing, unexpected = student.load_state_dict(tensors, strict=False)
    # Tied weights stand in the file once.
    filled = {each.data_ptr() for name, each in student.state_dict().items() if name in tensors}
    missing = [name for name in missing if student.state_dict()[name].data_ptr() not in filled]
    if missing or unexpected:
        raise DataError(f"{place} does not hold the student's weights: missing {missing}, unexpected {unexpected}")
    return student.eval()
