"""A model's own rotary embedding, for methods that need vectors before it or at other positions."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from foveate.errors import UnsupportedModelError
from foveate.hf.compat import implementation

# These change their frequencies with the length, so a position alone does not say the rotation.
LENGTH_DEPENDENT = ("dynamic", "longrope")
LISTENING = "foveate-listening"
# Where two tokens stand while a layer is measured.
PLACES = (3, 11)


class ModelRope:
    """`rotate` and `unrotate` through the model's own functions, whatever their layout.

    Rotation by -theta is the same map with -sin, so it is right for half-split, interleaved and partial layouts;
    the scale of YaRN-like embeddings (cos^2 + sin^2) is divided out. Before its first use the layer itself is asked:
    some layers of some models are handed tables and do not use them.
    """

    def __init__(
        self, rotary: Any, apply: Any, layer_type: str | None, attention: nn.Module, turns: bool | None = None
    ) -> None:
        self.rotary, self.apply, self.layer_type, self.attention = rotary, apply, layer_type, attention
        # None: not measured yet. False: the layer has no rotary embedding, positions do not matter to its vectors.
        self.turns = turns
        self._whole: dict[tuple[int, int], bool] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> ModelRope:
        """Copies of a cache share the model."""
        return self

    def tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer_type is None:
            cos, sin = self.rotary(x, positions)
        else:
            cos, sin = self.rotary(x, positions, self.layer_type)
        return cos, sin

    def _turn(self, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        if self.turns is None:
            self.measure("this method")
        if not self.turns:
            return x
        shape = x.shape
        if positions.dim() == 3:
            positions = positions.expand(shape[0], shape[1], -1).reshape(shape[0] * shape[1], -1)
            x = x.reshape(shape[0] * shape[1], 1, *shape[2:])
        cos, sin = self.tables(x, positions)
        turned = self._applied(x, cos, -sin if back else sin)
        if back:
            scale = float(cos.flatten()[0].double() ** 2 + sin.flatten()[0].double() ** 2)
            if abs(scale - 1.0) > 1e-3:
                # Partial rotary: the rest of the features was never scaled.
                rest = self._applied(torch.ones_like(x[:1, :1]), torch.zeros_like(cos[:1]), torch.zeros_like(sin[:1]))
                turned = torch.where(rest == 0, turned / scale, turned)
        return turned.view(shape)

    def _applied(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """The model's function on whole heads, or on the first features where its layers split them off themselves."""
        width = cos.shape[-1]
        if self._takes_whole(x, cos, sin):
            turned: Tensor = self.apply(x, x, cos, sin)[0]
            return turned
        turned = self.apply(x[..., :width], x[..., :width], cos, sin)[0]
        return torch.cat((turned, x[..., width:]), dim=-1)

    def _takes_whole(self, x: Tensor, cos: Tensor, sin: Tensor) -> bool:
        key = (x.shape[-1], cos.shape[-1])
        if key not in self._whole:
            one = x[:1, :1, :1]
            try:
                self.apply(one, one, cos[:1, :1], sin[:1, :1])
                self._whole[key] = True
            except RuntimeError:
                # Its shapes do not fit: tables of fewer features than a head has.
                self._whole[key] = False
        return self._whole[key]

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x, positions, back=False)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x, positions, back=True)

    @torch.no_grad()
    def measure(self, who: str) -> None:
        """Ask the layer for its keys of two tokens, turned and not, and compare.

        Raises:
            UnsupportedModelError: `rotate` does not make the one of the other.
        """
        like, at = _two_tokens(self.attention)
        try:
            cos, sin = self.tables(like, at)
            turned = heard_key(self.attention, like, at, (cos, sin))
            bare = heard_key(self.attention, like, at, (torch.ones_like(cos), torch.zeros_like(sin)))
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise UnsupportedModelError(
                f"{who} needs vectors before rotary embedding, and {type(self.attention).__name__} could not be asked "
                f"for its keys of two tokens ({type(error).__name__}: {str(error)[:200]}); use a "
                "method that keeps true positions"
            ) from error
        self.turns = not _close(turned, bare)
        if self.turns and not _close(self.rotate(bare, at), turned):
            self.turns = None
            raise UnsupportedModelError(
                f"{who} needs vectors before rotary embedding, and {type(self.attention).__name__} does not turn its "
                "keys by `apply_rotary_pos_emb` alone (measured on two tokens: a norm after it, or only a part of a "
                "compressed key); use a method that keeps true positions"
            )


def _two_tokens(attention: nn.Module) -> tuple[Tensor, Tensor]:
    """Hidden states [1, 2, C] for an attention module, and positions [1, 2]."""
    floats = [each for each in attention.parameters() if each.is_floating_point()]
    hook = getattr(attention, "_hf_hook", None)
    device = getattr(hook, "execution_device", None) or next(attention.parameters()).device
    width = int(attention.config.hidden_size)  # type: ignore[union-attr, arg-type]
    wave = torch.arange(2 * width, dtype=torch.float32).mul(0.7).sin().view(1, 2, width)
    dtype = floats[0].dtype if floats else torch.get_default_dtype()
    return wave.to(device, dtype), torch.tensor([PLACES], device=device)


def _close(a: Tensor, b: Tensor) -> bool:
    tolerance = 1e-4 if a.dtype in (torch.float32, torch.float64) else 3e-2
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1e-6))


def heard_key(attention: nn.Module, hidden: Tensor, at: Tensor, embeddings: Any) -> Tensor:
    """The key [B, Hkv, M, D] that an attention module makes of hidden [B, M, C], without a cache.

    Its hooks are left out, so that a method that is on the model does not see it.
    """
    parameters = inspect.signature(inspect.unwrap(type(attention).forward)).parameters
    given = {"hidden_states": hidden, "position_embeddings": embeddings, "position_ids": at}
    unknown = [
        name
        for name, each in parameters.items()
        if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) and name != "self"
    ]
    given = {**dict.fromkeys(unknown), **{name: each for name, each in given.items() if name in parameters}}
    AttentionInterface.register(LISTENING, _listen)
    heard: list[Tensor] = []
    attention._foveate_heard = heard  # type: ignore[assignment]
    try:
        with implementation(attention.config, LISTENING):
            attention.forward(**given)  # type: ignore[operator]
    finally:
        del attention._foveate_heard
    return heard[0]


def _listen(module: Any, query: Tensor, key: Tensor, value: Tensor, *mask: Any, **given: Any) -> tuple[Tensor, None]:
    module._foveate_heard.append(key)
    return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[-1]), None


def find_rope(decoder: nn.Module, attention: nn.Module) -> ModelRope | None:
    """The rotary embedding that serves an attention module, None where it is of a kind not known here."""
    if not getattr(attention, "use_rope", True):
        return ModelRope(None, None, None, attention, turns=False)
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    rotary = getattr(decoder, "rotary_emb", None)
    if apply is None or rotary is None:
        return None
    if list(inspect.signature(apply).parameters)[:4] != ["q", "k", "cos", "sin"]:
        return None
    wants_type = "layer_type" in inspect.signature(rotary.forward).parameters
    layer_type = None
    if wants_type:
        types = getattr(getattr(attention, "config", None), "layer_types", None)
        layer_type = getattr(attention, "layer_type", None) or (types and types[attention.layer_idx])
    return ModelRope(rotary, apply, layer_type, attention)


def check_rope(rope: ModelRope | None, config: Any, who: str) -> ModelRope:
    """Raise UnsupportedModelError unless the rotary embedding can be undone and redone."""
    if rope is None:
        raise UnsupportedModelError(
            f"{who} needs queries before rotary embedding; this model has none that foveate knows "
            "(a module `rotary_emb` on the decoder and `apply_rotary_pos_emb(q, k, cos, sin)`)"
        )
    parameters = getattr(config, "rope_parameters", None) or {}
    kinds = {parameters.get("rope_type")} | {
        each.get("rope_type") for each in parameters.values() if isinstance(each, dict)
    }
    bad = kinds & set(LENGTH_DEPENDENT)
    if bad:
        raise UnsupportedModelError(
            f"{who} re-rotates vectors, and this model's rotary embedding ({', '.join(map(str, bad))}) changes with "
            "the length; use a method that keeps true positions"
        )
    if rope.turns is None:
        rope.measure(who)
    return rope
