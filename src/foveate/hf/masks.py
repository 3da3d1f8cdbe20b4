"""The mask function registered beside our attention function: the 2-D padding mask as it comes.

Causality, windows and padding are rebuilt per layer from stored positions, because layers hold different keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.attention.positions import Positions
from foveate.errors import UnsupportedModelError

_SERVED = ("causal_mask_function", "sliding_window_overlay", "and_masks")


def padding_mask(
    *, attention_mask: Tensor | None = None, mask_function: Callable[..., Any] | None = None, **unused: Any
) -> Tensor | None:
    """Bool [B, tokens seen], or None when nothing is padding. Raises for masks that are not causal or sliding."""
    if mask_function is not None:
        _refuse_overlays(mask_function)
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise UnsupportedModelError(
            f"attention_mask has shape {list(attention_mask.shape)}; foveate takes the 2-D padding mask "
            "[batch, tokens] and builds causal and sliding masks itself"
        )
    return None if bool(attention_mask.all()) else attention_mask.bool()


def _refuse_overlays(function: Callable[..., Any]) -> None:
    for part in _parts(function):
        if part.split(".")[0] not in _SERVED:
            raise UnsupportedModelError(
                f"the model asks for the mask {part!r} (packed sequences, image blocks or another overlay), which "
                "foveate does not serve; leave `apply` for such inputs"
            )


def _parts(function: Callable[..., Any]) -> list[str]:
    """Qualified names of a composed mask function and of what it closes over."""
    found = [getattr(function, "__qualname__", type(function).__name__)]
    for cell in getattr(function, "__closure__", None) or ():
        inner = cell.cell_contents
        for each in inner if isinstance(inner, tuple | list) else (inner,):
            if callable(each):
                found += _parts(each)
    return found


def columns(mask: Tensor | None, m: int, n: int) -> Positions:
    """Positions of m queries, the last of n keys, under a padding mask [B, n]."""
    if mask is None:
        return Positions()
    at = torch.arange(mask.shape[1], device=mask.device)[None].expand_as(mask).masked_fill(~mask, -1)
    return Positions(at[:, -m:], at[:, None, -n:], holes=True)


def positions_of(mask: Tensor, m: int) -> Tensor:
    """Positions [B, m] int64 of the last m columns of a padding mask; -1 for padding."""
    new = mask[:, -m:]
    before = mask.sum(1, keepdim=True) - new.sum(1, keepdim=True)
    at = before + new.long().cumsum(1) - 1
    return torch.where(new, at, -1)
