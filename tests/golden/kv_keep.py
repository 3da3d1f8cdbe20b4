"""Golden adapters of the kv group: methods that choose which keys stay."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from foveate.attention import Rope
from foveate.methods import Method, SingleLayer
from foveate.methods.keep.adakv import AdaKV
from foveate.methods.keep.expected_attention import ExpectedAttention
from foveate.methods.keep.h2o import H2O, MASS, ObservedAttention
from foveate.methods.keep.keydiff import KeyDiff
from foveate.methods.keep.knorm import KNorm
from foveate.methods.keep.pyramidkv import PyramidKV
from foveate.methods.keep.snapkv import SnapKV
from foveate.methods.keep.tova import TOVA
from tests.golden.kv_models import model_generate

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def budget(config: Config) -> dict[str, Any]:
    """budget or ratio, whichever a case gives."""
    for name in ("capacity", "cache_size", "budget"):
        if name in config:
            return {"budget": config[name]}
    return {"ratio": config["compression_ratio"]}


def votes(config: Config) -> dict[str, Any]:
    names = {"window": "window", "kernel": "kernel", "pooling": "pool", "group_reduce": "reduce"}
    return {ours: config[theirs] for theirs, ours in names.items() if config.get(theirs) is not None}


def snapkv(config: Config) -> SnapKV:
    return SnapKV(**budget(config), **votes(config), per_query_head=config.get("per_query_head", False))


def pyramidkv(config: Config) -> PyramidKV:
    return PyramidKV(**budget(config), **votes(config), beta=config["beta"], variant=config.get("variant", "original"))


def expected(config: Config) -> ExpectedAttention:
    return ExpectedAttention(
        **budget(config),
        future=config["n_future_positions"],
        sinks=config["n_sink"],
        covariance=config["use_covariance"],
        value_norm=config["use_vnorm"],
        epsilon=config["epsilon"],
    )


def adakv(config: Config) -> AdaKV:
    base = config.get("base", "snapkv")
    if base == "expected-attention":
        scorer: Any = expected(config)
    elif base in ("pyramid", "pyramidkv"):
        scorer = PyramidKV(**votes(config), beta=config["beta"], variant=config.get("variant", "original"))
    else:
        scorer = SnapKV(**votes(config))
    return AdaKV(
        **budget(config),
        base=scorer,
        variant=config.get("variant", "original"),
        floor=config["floor_alpha"],
        normalize=config.get("normalize", False),
        skip_layers=config.get("first_layers_uniform", 0),
    )


def tova(config: Config) -> TOVA:
    when = "prompt" if "compression_ratio" in config else "always"
    return TOVA(**budget(config), force_last=config["force_last"], when=when)


MAKE: dict[str, Callable[[Config], Method]] = {
    "ada-kv": adakv,
    "expected-attention": expected,
    "keydiff": lambda config: KeyDiff(**budget(config)),
    "knorm": lambda config: KNorm(**budget(config)),
    "observed-attention": lambda config: ObservedAttention(**budget(config)),
    "pyramidkv": pyramidkv,
    "snapkv": snapkv,
    "tova": tova,
}


def kept(layer: SingleLayer, row: int, head: int) -> Tensor:
    return layer.cache.kept_positions(row, head).int()


def kept_all(layer: SingleLayer) -> Tensor:
    """[B, Hkv, n] int32."""
    B, H = layer.cache.shape
    return torch.stack([torch.stack([kept(layer, b, h) for h in range(H)]) for b in range(B)])


def with_prompt(config: Config, tensors: Tensors, method: Method, index: int = 0) -> SingleLayer:
    v = tensors.get("v", tensors["k"])
    layer = SingleLayer(method, layer=config.get("layer", index), layers=config.get("n_layers", 1))
    layer(tensors["q"], tensors["k"], v)
    return layer


def snapkv_select(config: Config, tensors: Tensors) -> Tensors:
    method = snapkv(config)
    if not method.per_query_head:
        layer = with_prompt(config, tensors, method)
        return {"keep": kept_all(layer), "k": layer.cache.keys, "v": layer.cache.values}
    step = SingleLayer(method).step(tensors["q"], tensors["k"], tensors["v"])
    mask = method.choose_per_query_head(step)
    keep = mask.nonzero()[:, -1].view(*mask.shape[:2], -1)
    gathered = {
        name: tensors[name].repeat_interleave(step.group, 1).take_along_dim(keep[..., None], 2) for name in ("k", "v")
    }
    return {"keep": keep.int(), **gathered}


def pyramidkv_select(config: Config, tensors: Tensors) -> Tensors:
    made, budgets = {}, []
    for index in range(config["n_layers"]):
        made[f"keep.{index}"] = kept_all(with_prompt(config, tensors, pyramidkv(config), index))
        budgets.append(made[f"keep.{index}"].shape[-1] - config["window"])
    return {**made, "layer_budgets": torch.tensor(budgets, dtype=torch.int32)}


def adakv_select(config: Config, tensors: Tensors) -> Tensors:
    layer = with_prompt(config, tensors, adakv(config))
    heads = [kept(layer, 0, head) for head in range(layer.cache.shape[1])]
    return {"head_lens": torch.tensor([each.numel() for each in heads], dtype=torch.int32), "keep": torch.cat(heads)}


def stream(layer: SingleLayer, config: Config, tensors: Tensors) -> Tensors:
    """Prefill, then one token per step: o and kept [B, Hkv, n] after every forward, by number."""
    start, steps = config["prefill"], config["decode_steps"]
    spans = [slice(0, start), *[slice(t, t + 1) for t in range(start, start + steps)]]
    outputs, made = [], {}
    for number, span in enumerate(spans):
        outputs.append(layer(*(tensors[name][:, :, span] for name in ("q", "k", "v"))))
        made[f"keep.{number}"] = kept_all(layer)
    return {**made, "o": torch.cat(outputs, 2)}


def h2o_stream(config: Config, tensors: Tensors) -> Tensors:
    layer = SingleLayer(H2O(budget=config["heavy"] + config["recent"], recent=config["recent"]))
    made = stream(layer, config, tensors)
    sums, at = layer.cache.extra(MASS), layer.cache.positions
    # Dropping in place has changed the order of the slots.
    made["scores"] = sums if at is None else sums.gather(-1, at.long().argsort(-1))
    return {name: each[0] if name != "o" else each for name, each in made.items()}


def tova_stream(config: Config, tensors: Tensors) -> Tensors:
    made = stream(SingleLayer(tova(config)), config, tensors)
    return {name: each[:, 0] if name != "o" else each for name, each in made.items()}


def prompt_scores(make: Callable[[Config], Method]) -> Callable[[Config, Tensors], Tensors]:
    def adapter(config: Config, tensors: Tensors) -> Tensors:
        method: Any = make(config)
        q, k, v = tensors["q"], tensors["k"], tensors["v"]
        style = "interleaved" if config["rope_style"].startswith("interleaved") else "half"
        rope = Rope(q.shape[-1], config["rope_base"], style)
        layers = {"layer": config["layer"], "layers": config["n_layers"], "rope": rope}
        scores = method.score(SingleLayer(method, **layers).step(q, k, v))
        layer = SingleLayer(method, **layers)
        layer(q, k, v)
        mask = torch.zeros(scores.shape, dtype=torch.uint8)
        for b in range(mask.shape[0]):
            for h in range(mask.shape[1]):
                mask[b, h, kept(layer, b, h).long()] = 1
        return {"scores": scores, "keep_mask": mask}

    return adapter


def generate(make: Callable[[Config], Method]) -> Callable[[Config, Tensors], Tensors]:
    return lambda config, tensors: model_generate(config, tensors, make(config))


ADAPTERS = {
    "ada-kv/prompt_select": adakv_select,
    "h2o/stream": h2o_stream,
    "pyramidkv/prompt_select": pyramidkv_select,
    "snapkv/prompt_select": snapkv_select,
    "tova/stream": tova_stream,
    **{f"{system}/prompt_scores": prompt_scores(make) for system, make in MAKE.items()},
    **{f"{system}/model_generate": generate(make) for system, make in MAKE.items()},
}
