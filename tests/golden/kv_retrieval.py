"""Golden adapters: RetrievalAttention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.methods import SingleLayer
from foveate.methods.select.retrieval_attention import RetrievalAttention


def decode_stream(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    method = RetrievalAttention(
        sinks=config["start"],
        window=config["recent"],
        budget=config["top_k"],
        insert=config["insert_db"],
        index=config["index"],
    )
    layer, prompt = SingleLayer(method), k.shape[2] - q.shape[2]
    layer(q[:, :, :1].expand(-1, -1, prompt, -1), k[:, :, :prompt], v[:, :, :prompt])
    steps = [
        layer(q[:, :, t : t + 1], k[:, :, prompt + t : prompt + t + 1], v[:, :, prompt + t : prompt + t + 1])
        for t in range(q.shape[2])
    ]
    return {"o": torch.cat(steps, 2)}


ADAPTERS = {"retrieval-attention/decode_stream": decode_stream}
