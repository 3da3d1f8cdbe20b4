"""Golden adapters: clusters, reused outputs, chunks with compact positions, coded caches, elastic spans."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import Positions, Rope, Tokens, attend, merge, subtract
from foveate.attention.quantize import dequantize, quantize
from foveate.methods import SingleLayer
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.kivi import Kivi
from foveate.methods.keep.moa import MoA, cache_sizes
from foveate.methods.keep.spans import block_influence, candidate_rules, densities, influence, masked_loss
from foveate.methods.profile import ModelIdentity
from foveate.methods.select.longheads import LongHeads
from foveate.methods.select.mac import Mac, Summaries
from foveate.methods.select.squeezed import count, lookup, pooled_quantile, weigh

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def squeezed_lookup(config: Config, tensors: Tensors) -> Tensors:
    q, W = tensors["q"][None], config["observation_window"]
    names = ["_l1", ""] if config["hierarchical"] else [""]
    centres = [tensors[f"centroids{name}"][None] for name in names]
    labels = [F.pad(tensors[f"labels{name}"][None] + 1, (0, W)) for name in names]
    thresholds = [torch.tensor([config[f"threshold{name}"]]) for name in names]
    scale = q.shape[-1] ** -0.5
    made = {"keep": lookup(q, centres, labels, thresholds, scale=scale)[0].to(torch.uint8)}
    if config["hierarchical"]:
        coarse = lookup(q, centres[:1], labels[:1], thresholds[:1], scale=scale)
        made["keep_l1"] = coarse[0].to(torch.uint8)
    return made


def squeezed_threshold(config: Config, tensors: Tensors) -> Tensors:
    q, centres = tensors["q"], tensors["centroids"]
    sizes = count(tensors["labels"] + 1, config["n_clusters"])
    weights = weigh(q[:, :, -config["observation_window"] :], centres, sizes, scale=q.shape[-1] ** -0.5)
    layers = [each[None] for each in weights], [each[None] for each in sizes]
    return {"thresholds": torch.cat([pooled_quantile(*layers, share) for share in config["quantiles"]])}


def mac_decode(config: Config, tensors: Tensors) -> Tensors:
    method = Mac(
        memory=config["capacity"],
        margin=config["semantic_pos_ahead"],
        sinks=config["front_sink"],
        threshold=config["tau"],
        start=config["gen_min_limit"],
    )
    layer, t, size = SingleLayer(method), config["past_len"], config["capacity"]
    k, v = (tensors[name].transpose(0, 1)[None] for name in "kv")
    layer.step(tensors["q_post"][None, :, None], k[:, :, :t], v[:, :, :t])
    step = layer.step(tensors["q_post"][None, :, None], k[:, :, t:], v[:, :, t:])
    slot = torch.arange(size)
    at = t - 1 - (t - 1 - slot) % size
    step.state = Summaries(at[None], *(tensors[f"ring_{name}"][None] for name in ("q", "o", "lse")))
    made = method.read(step, tensors["q_pre"][None, :, None])
    return {
        "o": made.o[0, :, 0],
        "lse": made.lse[0, :, 0],
        "match": made.matched[0].int(),
        "ring_o": made.summary_o[0, :, 0],
        "ring_lse": made.summary_lse[0, :, 0],
    }


def mac_merge_subtract(config: Config, tensors: Tensors) -> Tensors:
    q = tensors["q"][None, :, None]
    k, v = (tensors[name].transpose(0, 1)[None] for name in "kv")

    def over(slots: Tensor) -> tuple[Tensor, Tensor]:
        plan = Tokens(slots.expand(1, k.shape[1], -1))
        return attend(q, k, v, plan, positions=Positions(holes=True), return_lse=True)

    ranges = [torch.arange(*ends) for ends in config["ranges"]]
    parts = [over(each if each.numel() else torch.tensor([-1])) for each in ranges]
    both = over(torch.cat(ranges[:2]))
    made = {f"{index}": part for index, part in enumerate(parts)}
    out = {f"o.{name}": o[0, :, 0] for name, (o, _) in made.items()}
    out |= {f"lse.{name}": lse[0, :, 0] for name, (_, lse) in made.items()}
    joined = {
        "merge": merge(*zip(*parts[:2])),
        "merge_empty": merge(*zip(parts[0], parts[2])),
        "subtract": subtract(*both, *parts[1]),
        "subtract_all": subtract(*parts[0], *parts[0]),
    }
    for name, (o, lse) in joined.items():
        out |= {f"{name}_o": o[0, :, 0], f"{name}_lse": lse[0, :, 0]}
    return out


def longheads_stream(config: Config, tensors: Tensors) -> Tensors:
    method = LongHeads(
        chunk=config["window"],
        length=config["attention_length"],
        start=config["selective_start"],
        official_prompt=config["exact_official_prefill"],
        per_query_head=True,
    )
    style = "half" if config["rope_style"].startswith("half") else "interleaved"
    rope = Rope(config["head_dim"], config["rope_base"], style)
    layer, outputs, start = SingleLayer(method, rope=rope), [], 0
    for tokens in (config["prefill"], *[1] * config["decode_steps"]):
        x = tensors["x"][:, start : start + tokens]
        q, k, v = (
            F.linear(x, tensors[name]).unflatten(-1, (-1, config["head_dim"])).transpose(1, 2)
            for name in ("wq", "wk", "wv")
        )
        at = torch.arange(start, start + tokens)[None]
        outputs.append(layer(rope.rotate(q, at), rope.rotate(k, at), v))
        start += tokens
    assert layer.last is not None
    o = F.linear(torch.cat(outputs, 2).transpose(1, 2).flatten(2), tensors["wo"])
    return {"o": o, "chunk_keys": layer.last.state.keys}


def kivi_quantize(config: Config, tensors: Tensors) -> Tensors:
    out = {}
    for name, dim in (("k", 2), ("v", 3)):
        coded = quantize(tensors[name], config["bits"], config["group"], dim)
        out |= {f"{name}_code": coded.code, f"{name}_scale": coded.scale, f"{name}_min": coded.least}
        out[f"{name}_dequant"] = dequantize(coded, config["bits"], config["group"], dim)
    return out


def kivi_stream(config: Config, tensors: Tensors) -> Tensors:
    method = Kivi(
        bits=config["k_bits"], value_bits=config["v_bits"], group=config["group"], residual=config["residual"]
    )
    layer, N = SingleLayer(method), tensors["q"].shape[2]
    sizes = [config["prefill"], *[1] * config["decode_steps"]]
    pieces = zip(*(tensors[name].split(sizes, 2) for name in "qkv"))
    o = torch.cat([layer(*piece) for piece in pieces], 2)
    assert layer.last is not None
    codes = layer.last.state
    return {"o": o, "residual_lengths": torch.stack((N - codes.key_count[0], N - codes.value_count[0])).int()}


def moa_cache_sizes(config: Config, tensors: Tensors) -> Tensors:
    length = config["prompt_length"] + config["max_new_tokens"]
    rounding = {"minimum": config["minimum"], "multiple": config["multiple"]}
    size = cache_sizes(tensors["alpha"], tensors["beta"], length, **rounding)
    return {"cache_size": size.int(), "sink_size": size.clamp_max(config["sink"]).int()}


def moa_circular(config: Config, tensors: Tensors) -> Tensors:
    size = torch.tensor([config["cache_sizes"]], dtype=torch.float64)
    identity = ModelIdentity("golden", 1, config["n_q_heads"], config["n_kv_heads"], tensors["q"].shape[-1], "none")
    method = MoA(
        sinks=config["sink_sizes"][0],
        minimum=min(config["cache_sizes"]),
        multiple=1,
        new_tokens=config["decode_steps"],
        profile=table_profile("moa", identity, alpha=size, beta=torch.zeros_like(size)),
    )
    layer, prompt = SingleLayer(method.for_model(identity)), config["prefill"]
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    layer(torch.zeros_like(k[:, :, :prompt]), k[:, :, :prompt], v[:, :, :prompt])
    lengths, outputs = [layer.cache.lengths()[0]], []
    for t in range(config["decode_steps"]):
        new = slice(prompt + t, prompt + t + 1)
        outputs.append(layer(q[:, :, t : t + 1], k[:, :, new], v[:, :, new]))
        lengths.append(layer.cache.lengths()[0])
    held = [layer.cache.kept_positions(0, head) for head in range(config["n_kv_heads"])]
    return {
        "o": torch.cat(outputs, 2),
        "lengths": torch.stack(lengths).int(),
        "positions_final": torch.cat(held).int(),
    }


def moa_influence(config: Config, tensors: Tensors) -> Tensors:
    made = influence(tensors["q"], tensors["k"], tensors["v"], tensors["grad_o"])
    return {"influence": made, "influence_blocks": block_influence(made, config["block_size"])}


def moa_rules(config: Config, tensors: Tensors) -> Tensors:
    rules = candidate_rules(
        tensors["alpha_grid"],
        tensors["beta_grid"],
        profiled=config["max_profile_length"],
        target=config["max_token_length"],
        least=config["min_token_length"],
    )
    layouts = rules.layouts(config["length"], config["block_size"])
    return {
        "alpha": rules.alpha.float(),
        "beta": rules.beta.float(),
        "layout": layouts.to(torch.uint8),
        "density": densities(layouts).float(),
        "loss": masked_loss(tensors["influence_blocks"], layouts),
    }


ADAPTERS = {
    "moa/cache_sizes": moa_cache_sizes,
    "moa/circular_decode": moa_circular,
    "moa/influence": moa_influence,
    "moa/rule_layouts": moa_rules,
    "kivi/quantize": kivi_quantize,
    "kivi/stream": kivi_stream,
    "longheads/stream": longheads_stream,
    "mac-attention/decode_step": mac_decode,
    "mac-attention/merge_subtract": mac_merge_subtract,
    "squeezed-attention/lookup": squeezed_lookup,
    "squeezed-attention/global_threshold": squeezed_threshold,
}
