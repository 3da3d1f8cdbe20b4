"""Golden adapters: methods that select what a step reads, and StreamingLLM."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Rope, Tokens
from foveate.methods import SingleLayer
from foveate.methods.keep.streaming_llm import StreamingLLM
from foveate.methods.select.quest import Quest
from tests.golden.kv_models import model_generate

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def rope_of(config: Config, dim: int) -> Rope:
    style = "interleaved" if config.get("rope_style", "half").startswith("interleaved") else "half"
    return Rope(dim, config.get("rope_base", 10000.0), style)


def stream_reindexed(config: Config, tensors: Tensors) -> Tensors:
    rope = rope_of(config, config["head_dim"])
    method = StreamingLLM(sinks=config["sink"], window=config["recent"], schedule=config["evict"])
    layer = SingleLayer(method, rope=rope)
    outputs, lengths, start = [], [], 0
    for count in config["chunks"]:
        x = tensors["x"][:, start : start + count]
        q, k, v = (F.linear(x, tensors[name]).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2) for name in ("wq", "wk", "wv"))
        at = torch.arange(start, start + count)[None]
        o = layer(rope.rotate(q, at), rope.rotate(k, at), v)
        outputs.append(F.linear(o.transpose(1, 2).flatten(2), tensors["wo"]))
        lengths.append(layer.cache.stored)
        start += count
    return {
        "o": torch.cat(outputs, 1),
        "cache_len": torch.tensor(lengths, dtype=torch.int32),
        "final_positions": layer.cache.kept_positions(0, 0).int(),
    }


def streaming_generate(config: Config, tensors: Tensors) -> Tensors:
    method = StreamingLLM(
        sinks=config["n_sink"], ratio=config["compression_ratio"], reindex=config["reindex"], schedule="prompt"
    )
    made = model_generate(config, tensors, method)
    if config["reindex"]:
        # A method that moves positions is used alone, so its scores are heard from its twin.
        twin = model_generate(config, tensors, dataclasses.replace(method, reindex=False))
        made |= {name: each for name, each in twin.items() if name.startswith("scores.")}
    return made


def quest_decode(config: Config, tensors: Tensors) -> Tensors:
    method = Quest(
        budget=config["token_budget"],
        page=config["page_size"],
        min_pages=config["min_pages"],
        force_last=config["force_last_page"],
        per_query_head=config["per_query_head"],
        dense_layers=0,
    )
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    layer = SingleLayer(method)
    layer(torch.zeros_like(q).expand(-1, -1, k.shape[2] - 1, -1), k[:, :, :-1], v[:, :, :-1])
    step = layer.step(q, k[:, :, -1:], v[:, :, -1:])
    pages = method.choose(step)
    if pages is None:
        pages = torch.arange(-(-k.shape[2] // method.page)).expand(*q.shape[:2], -1)
    return {"o": step.attend(Tokens(step.state.slots(pages))), "pages": pages.int()}


ADAPTERS = {
    "quest/decode_attention": quest_decode,
    "streaming-llm/stream_reindexed": stream_reindexed,
    "streaming-llm/model_generate": streaming_generate,
}
