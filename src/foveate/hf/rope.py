"""A model's own rotary embedding, for methods that need vectors before it or at other positions."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import UnsupportedModelError

# These change their frequencies with the length, so a position alone does not say the rotation.
LENGTH_DEPENDENT = ("dynamic", "longrope")


class ModelRope:
    """`rotate` and `unrotate` through the model's own functions, whatever their layout.

    Rotation by -theta is the same map with -sin, so it is right for half-split, interleaved and partial layouts;
    the scale of YaRN-like embeddings (cos^2 + sin^2) is divided out.
    """

    def __init__(self, rotary: nn.Module, apply: Any, layer_type: str | None) -> None:
        self.rotary, self.apply, self.layer_type = rotary, apply, layer_type

    def _tables(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self.layer_type is None:
            cos, sin = self.rotary(x, positions)
        else:
            cos, sin = self.rotary(x, positions, self.layer_type)
        return cos, sin

    def _turn(self, x: Tensor, positions: Tensor, back: bool) -> Tensor:
        shape = x.shape
        if positions.dim() == 3:
            positions = positions.expand(shape[0], shape[1], -1).reshape(shape[0] * shape[1], -1)
            x = x.reshape(shape[0] * shape[1], 1, *shape[2:])
        cos, sin = self._tables(x, positions)
        turned, _ = self.apply(x, x, cos, -sin if back else sin)
        if back:
            scale = float(cos.flatten()[0].double() ** 2 + sin.flatten()[0].double() ** 2)
            if abs(scale - 1.0) > 1e-3:
                # Partial rotary: the rest of the features was never scaled.
                width = min(x.shape[-1], cos.shape[-1] if cos.shape[-1] * 2 != x.shape[-1] else x.shape[-1])
                turned = torch.cat((turned[..., :width] / scale, turned[..., width:]), dim=-1)
        return turned.view(shape)

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x, positions, back=False)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        return self._turn(x, positions, back=True)


def find_rope(decoder: nn.Module, attention: nn.Module) -> ModelRope | None:
    """The rotary embedding that serves an attention module, None where it is of a kind not known here."""
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
    return ModelRope(rotary, apply, layer_type)


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
    return rope
