"""Golden adapters of Landmark Attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.mixers.base import create_mixer
from foveate.mixers.memory.grouped import grouped_attention

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def grouped(config: Config, tensors: Tensors) -> Tensors:
    q, k, v = (tensors[name].requires_grad_() for name in ("q", "k", "v"))
    o = grouped_attention(q, k, v, landmarks=tensors["is_landmark"].bool(), scale=config.get("scale"))
    outputs = {"o": o.detach()}
    if "grad_o" in tensors:
        gradients = torch.autograd.grad(o, (q, k, v), tensors["grad_o"])
        outputs |= dict(zip(("grad_q", "grad_k", "grad_v"), gradients))
    return outputs


def _stream(config: Config, tensors: Tensors, weights: dict[str, Tensor], **options: Any) -> Tensors:
    """The layer fed in the case's chunks, each of which is searched for as one."""
    x = tensors["x"]
    mixer = create_mixer(
        "landmark",
        dim=x.shape[-1],
        heads=config["n_q_heads"],
        kv_heads=config["n_kv_heads"],
        head_dim=config["head_dim"],
        block=config["block_size"],
        retrieve=config["cache_top_k"],
        chunk=None,
        selection=config["selection"],
        rope_base=config.get("rope_base", 10000.0),
        rope_style="interleaved" if config.get("rope_style", "half").startswith("interleaved") else "half",
        **options,
    )
    mixer.load_state_dict({f"{name}_proj.weight": weight for name, weight in weights.items()})
    mixer.to(x.dtype).eval()
    outputs, state = [], None
    with torch.no_grad():
        for piece in x.split(config["chunks"], 1):
            y, state = mixer(piece, state=state)
            outputs.append(y)
    return {"o": torch.cat(outputs, 1)}


def stream(config: Config, tensors: Tensors) -> Tensors:
    return _stream(config, tensors, {name: tensors[f"w{name}"] for name in ("q", "k", "v", "o")})


def stream_lm(config: Config, tensors: Tensors) -> Tensors:
    weights = dict(zip(("q", "k", "v"), tensors["wqkv"].chunk(3)))
    return _stream(
        config,
        tensors,
        {**weights, "o": tensors["wo"]},
        memory=config["memory_blocks"],
        placement="anchored" if config.get("positions", "anchored").startswith("anchored") else "true",
    )


ADAPTERS = {
    "landmark-attention/grouped_attention": grouped,
    "landmark-attention/retrieval_stream": stream,
    "landmark-attention/retrieval_stream_lm": stream_lm,
}
