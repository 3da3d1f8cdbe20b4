"""Golden adapters of methods that treat heads differently: DuoAttention, CompressKV."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Rope
from foveate.methods.budgets import layer_budgets, sparsify_heads
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.compresskv import CompressKV
from foveate.methods.keep.duo import Duo, gated_mix, streaming_attention, streaming_plan
from foveate.methods.profile import ModelIdentity
from foveate.methods.single import SingleLayer
from foveate.probes.retrieval_heads import semantic_hits
from tests.golden.kv_models import model_generate, tiny_llama


def sparsify(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"full_heads": sparsify_heads(tensors["alpha"], config["sparsity"]).double()}


def streaming_mask(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    N = config["seq_len"]
    return {"mask": streaming_plan(config["sink"], config["recent"]).to_mask(N, N)[0, 0].to(torch.uint8)}


def _heads(config: dict[str, Any], tensors: dict[str, Tensor], x: Tensor, start: int = 0) -> tuple[Tensor, ...]:
    """Rotated q, k and v [B, H, M, D] of x [B, M, E]."""
    style = "half" if config["rope_style"].startswith("half") else "interleaved"
    rope = Rope(config["head_dim"], config["rope_base"], style)
    at = torch.arange(start, start + x.shape[1])[None]
    q, k, v = (
        F.linear(x, tensors[f"w{name}"]).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2) for name in "qkv"
    )
    return rope.rotate(q, at), rope.rotate(k, at), v


def _out(o: Tensor, tensors: dict[str, Tensor]) -> Tensor:
    return F.linear(o.transpose(1, 2).flatten(2), tensors["wo"])


def gated_two_way(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    alpha = tensors["alpha"].clone().requires_grad_()
    full = streaming_attention(*_heads(config, tensors, tensors["x_full"]), sinks=0, window=tensors["x_full"].shape[1])
    stream = streaming_attention(
        *_heads(config, tensors, tensors["x_stream"]), sinks=config["sink"], window=config["recent"]
    )
    o_full, o_stream = _out(full, tensors), _out(gated_mix(full, stream, alpha), tensors)
    (grad,) = torch.autograd.grad(F.mse_loss(o_stream, o_full), alpha)
    return {"o_full": o_full, "o_stream": o_stream.detach(), "grad_alpha": grad}


def deploy_stream(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    full, x = tensors["full_heads"], tensors["x"]
    identity = ModelIdentity("golden", 1, config["n_q_heads"], full.numel(), config["head_dim"], "none")
    method = Duo(
        sinks=config["sink"],
        window=config["recent"],
        sparsity=1 - float(full.mean()),
        profile=table_profile("duo", identity, alpha=full[None]),
    )
    layer = SingleLayer(method.for_model(identity))
    outputs, start = [], 0
    for M in config["chunks"]:
        outputs.append(layer(*_heads(config, tensors, x[:, start : start + M], start)))
        start += M
    made = {"o": _out(torch.cat(outputs, 2), tensors)}
    for head in (full == 0).nonzero()[:1, 0].tolist():
        made["streaming_positions"] = layer.cache.kept_positions(0, head).int()
    return made


def duo_model(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    from foveate.hf.identity import identify

    identity = identify(tiny_llama(config, tensors))
    method = Duo(
        sinks=config["sink"],
        window=config["recent"],
        sparsity=config["head_compression_ratio"],
        variant="kvpress",
        profile=table_profile("duo", identity, alpha=tensors["gates"]),
    )
    return model_generate(config, tensors, method)


def budget_allocation(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    budgets = layer_budgets(
        tensors["layer_error"].tolist(), config["mean_budget"], config["min_tokens"], config["max_tokens"]
    )
    return {"budgets": torch.tensor(budgets, dtype=torch.int32)}


def prompt_select(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    ranking = tensors["head_ranking"].long()
    layers, Hq = ranking.shape
    identity = ModelIdentity("golden", layers, Hq, config["n_kv_heads"], tensors["k"].shape[-1], "none")
    scores = torch.zeros(layers, Hq).scatter_(1, ranking, torch.arange(Hq, 0, -1.0).expand(layers, -1))
    profile = table_profile("compresskv", identity, semantic=scores, error=torch.full((layers,), 1 / layers))
    made = {}
    for layer, budget in enumerate(config["layer_budgets"]):
        method = CompressKV(
            profile=profile,
            budget=budget,
            window=config["window"],
            kernel=config["kernel"],
            pool=config["pooling"],
            first_k=config["first_k"],
            allocate=False,
        )
        single = SingleLayer(method.for_model(identity), layer=layer, layers=layers)
        q, k = tensors["q"][layer], tensors["k"][layer]
        single(q, k, k)
        kept = [single.cache.kept_positions(row, 0) for row in range(q.shape[0])]
        made[f"keep.{layer}"] = torch.stack(kept).int()
    return made


def semantic_head_score(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    span = config["needle_start"], config["needle_end"]
    ids = tensors["prompt_ids"]
    steps = zip(tensors["attention"], tensors["generated"].tolist())
    scores = torch.stack([semantic_hits(rows, ids, *span, token) for rows, token in steps]).sum(0)
    return {"scores": scores, "ranking": scores.argsort(dim=1, descending=True, stable=True).int()}


ADAPTERS = {
    "compresskv/budget_allocation": budget_allocation,
    "compresskv/prompt_select": prompt_select,
    "compresskv/semantic_head_score": semantic_head_score,
    "duo-attention/sparsify_heads": sparsify,
    "duo-attention/streaming_mask": streaming_mask,
    "duo-attention/gated_two_way": gated_two_way,
    "duo-attention/deploy_stream": deploy_stream,
    "duo-attention/model_generate": duo_model,
}
