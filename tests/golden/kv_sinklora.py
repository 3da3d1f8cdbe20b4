"""Golden adapters of shifted attention for fine-tuning."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from foveate.mixers.sparse.shifted import S2Attention

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def s2_attention(config: Config, tensors: Tensors) -> Tensors:
    made = S2Attention(group=config["group_size"], variant=config["variant"])
    return {"o": made.attend(tensors["q"], tensors["k"], tensors["v"])}


ADAPTERS = {"sinklora/s2_attention": s2_attention}
