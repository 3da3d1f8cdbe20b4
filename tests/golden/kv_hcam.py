"""Golden adapters of HCAM: the authors' memory read and lucidrains' form of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.mixers.memory.hcam import MemoryRead, cut_into_chunks

Config = dict[str, Any]
Tensors = dict[str, Tensor]

THEIRS = {
    "summary_q": "w_query",
    "summary_k": "w_key",
    "q_proj": "mha_query",
    "k_proj": "mha_key",
    "v_proj": "mha_value",
    "o_proj": "mha_linear",
}


def read(config: Config, tensors: Tensors) -> Tensors:
    x, keys, contents = tensors["x"].requires_grad_(), tensors["keys"], tensors["contents"]
    layer = MemoryRead(
        query_dim=x.shape[-1],
        memory_dim=keys.shape[-1],
        features=config["feature_size"],
        heads=config["n_heads"],
        retrieve=config["k"],
        positional=config["memory_position_encoding"],
    )
    loaded = {}
    for ours, theirs in THEIRS.items():
        matrix = theirs if theirs in tensors else f"{theirs}_w"
        loaded[f"{ours}.weight"] = tensors[matrix].T
        if f"{theirs}_b" in tensors:
            loaded[f"{ours}.bias"] = tensors[f"{theirs}_b"]
    layer.load_state_dict(loaded)
    visible = tensors["mask"].bool() if "mask" in tensors else None
    o = layer(x, keys, contents, visible=visible)
    outputs = {"o": o.detach()}
    if "grad_o" in tensors:
        wanted = (x, layer.summary_q.weight, layer.summary_k.weight)
        gradients = torch.autograd.grad(o, wanted, tensors["grad_o"])
        outputs |= {"grad_x": gradients[0], "grad_w_query": gradients[1].T, "grad_w_key": gradients[2].T}
    return outputs


def read_reimplementation(config: Config, tensors: Tensors) -> Tensors:
    x, memories, block = tensors["x"], tensors["memories"], config.get("block", False)
    given = {name.removeprefix("attn.") if block else name: each for name, each in tensors.items()}
    layer = MemoryRead(
        query_dim=x.shape[-1],
        memory_dim=memories.shape[-1],
        features=config["dim"],
        heads=config["n_heads"],
        head_dim=config["head_dim"],
        retrieve=config["k"],
        positional=config.get("memory_position_encoding", True),
        bias=False,
        summary_bias=True,
    )
    key, value = given["attn.to_kv.weight"].chunk(2)
    layer.load_state_dict(
        {
            "summary_q.weight": given["to_summary_queries.weight"],
            "summary_q.bias": given["to_summary_queries.bias"],
            "summary_k.weight": given["to_summary_keys.weight"],
            "summary_k.bias": given["to_summary_keys.bias"],
            "q_proj.weight": given["attn.to_q.weight"],
            "k_proj.weight": key,
            "v_proj.weight": value,
            "o_proj.weight": given["attn.to_out.weight"],
            "o_proj.bias": given["attn.to_out.bias"],
        }
    )
    if block:
        x = F.layer_norm(x, x.shape[-1:], given["norm.weight"], given["norm.bias"])
    mask = tensors["mask"].bool() if "mask" in tensors else None
    summaries, contents, steps = cut_into_chunks(memories, config["chunk"], mask)
    visible = None if steps is None else steps.any(2)[:, None]
    o = layer(x, summaries, contents, visible=visible, steps=steps).detach()
    return {"o": o + x if block else o}


ADAPTERS = {
    "hcam/memory_read": read,
    "hcam/memory_read_reimplementation": read_reimplementation,
}
