"""Golden adapters: methods that select what a step reads, and StreamingLLM."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Positions, Rope, Tokens
from foveate.attention.statistics import attention_rows, by_group
from foveate.methods import SingleLayer
from foveate.methods.keep.streaming_llm import StreamingLLM
from foveate.methods.select.delta import Delta, page_scores
from foveate.methods.select.kinetics import Kinetics, KineticsCost, coverage
from foveate.methods.select.quest import Quest
from foveate.methods.select.tokenselect import TokenSelect
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
        q, k, v = (
            F.linear(x, tensors[name]).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2)
            for name in ("wq", "wk", "wv")
        )
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


def delta_pages(config: Config, tensors: Tensors) -> Tensors:
    method = Delta(page=config["page_size"], pages=config["n_pages"], recent_pages=config["recent_pages"])
    q, k, lengths = tensors["q"][:, :, None], tensors["k"], tensors["lengths"].long()
    order = torch.arange(k.shape[2])
    held = torch.where(order < lengths[:, None], order, -1)
    at = Positions(lengths[:, None] - 1, held[:, None], holes=True)
    weights = attention_rows(q, k, scale=q.shape[-1] ** -0.5, positions=at)
    scores = page_scores(weights[:, :, 0].amax(1), method.page)
    chosen = method.choose(scores, lengths)
    ends = chosen.sum(-1).cumsum(0)
    return {
        "page_scores": scores,
        "page_indices": chosen.nonzero()[:, 1].int(),
        "page_indptr": F.pad(ends, (1, 0)).int(),
    }


def tokenselect(config: Config, tensors: Tensors) -> Tensors:
    method = TokenSelect(
        sinks=config["n_init"],
        local=config["n_local"],
        chunk=config["n_local"],
        budget=config["top_k"],
        kernel=max(1, config["kernel"]),
        scale=config["scale"],
        head_map="modulo" if "mod" in config["gqa_map"] else "group",
    )
    q, k = (tensors[name].transpose(0, 1)[None] for name in ("q_pre", "k_pre"))
    return {"indices": method.select(q, k, rope_of(config, q.shape[-1]))[0].int()}


def kinetics_cost(config: Config, tensors: Tensors) -> Tensors:
    model = KineticsCost(
        params=config["params"],
        heads=config["n_q_heads"],
        kv_heads=config["n_kv_heads"],
        width=config["head_dim_times_layers"],
        intensity=config["intensity"],
    )
    given = (config["prompt_length"], tensors["generation_lengths"], config["n_trials"])
    dense = model.dense(*given)
    made = {"dense": dense, "dense_mean": dense.mean(0)}
    if "block_size" in config:
        sizes = {"local": config["local"], "block": config["block_size"], "blocks": config["block_topk"]}
        sparse = model.block_topk(*given, **sizes)
        made |= {"block_topk": sparse, "block_topk_mean": sparse.mean(0)}
    if "topk" in config:
        sparse = model.topk(*given, budget=config["local"] + config["topk"])
        made |= {"topk": sparse, "topk_mean": sparse.mean(0)}
    return made


def kinetics_coverage(config: Config, tensors: Tensors) -> Tensors:
    scores = tensors["scores"].tolist()
    made = [coverage(sum(scores), len(scores), n) for n in tensors["n_samples"].tolist()]
    return {"coverage": torch.tensor(made, dtype=torch.float64)}


def kinetics_select(config: Config, tensors: Tensors) -> Tensors:
    rule = {"topk": "token"}.get(config["kind"], config["kind"])
    sizes = {"sinks": config["sink"], "local": config["local"], "stride": config.get("stride", 8)}
    if rule == "token":
        sizes |= {"blocks": config["topk"], "block": 1}
    elif "topk_block" in config:
        sizes |= {"blocks": config["topk_block"], "block": config["block_size"]}
    logits, tokens = by_group(tensors["logits"], config["n_kv_heads"]), tensors["lengths"].long()[:, None]
    keep = Kinetics(rule=rule, **sizes).choose(logits, tokens)
    return {"keep": keep.repeat_interleave(config["n_q_heads"] // config["n_kv_heads"], 1).to(torch.uint8)}


ADAPTERS = {
    "kinetics/cost": kinetics_cost,
    "kinetics/coverage": kinetics_coverage,
    "kinetics/select": kinetics_select,
    "tokenselect/select": tokenselect,
    "delta/select_pages": delta_pages,
    "quest/decode_attention": quest_decode,
    "streaming-llm/stream_reindexed": stream_reindexed,
    "streaming-llm/model_generate": streaming_generate,
}
