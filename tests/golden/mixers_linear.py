"""Golden adapters of the linear mixers, Zoology's layers and its data; they call the public API only.

Widths are read off the parameters' shapes, so that any option value of a system fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention import Rope, attend
from foveate.attention.linear import head_decay, linear_scan
from foveate.lm.synthetic import lay_out_recall, mqar
from foveate.mixers.base import Mixer, create_mixer
from foveate.mixers.linear.hgrn import forget_lower_bounds

Config = dict[str, Any]
Tensors = dict[str, Tensor]

# Their parameter names -> ours.
RENAMED = {
    "g_norm_swish_gate.": "o_norm.",
    "g_norm.": "o_norm.",
    "gk_proj.": "decay_proj.",
    "q_conv1d.": "q_conv.",
    "k_conv1d.": "k_conv.",
    "v_conv1d.": "v_conv.",
    "output_gate.": "gate_proj.",
    "norm.": "o_norm.",
    "out_proj.": "o_proj.",
    "proj_q.": "q_proj.",
    "proj_k.": "k_proj.",
    "proj_v.": "v_proj.",
    "conv.conv.": "short.",
    "conv.mlp.": "long.filter.",
    "conv.filter": "long.taps",
    "Wqkv.": "qkv_proj.",
    "selecting.": "select.",
}


def _ours(name: str) -> str:
    for theirs, ours in RENAMED.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _loaded(spec: str, tensors: Tensors, **options: Any) -> Mixer:
    """The mixer in evaluation mode with the parameters of the case; tensors that are no parameter are left."""
    mixer = create_mixer(spec, **options)
    own = dict(mixer.named_parameters())
    given = {_ours(name): tensor for name, tensor in tensors.items()}
    mixer.load_state_dict({name: given[name].reshape(own[name].shape) for name in own})
    return mixer.to(tensors["x"].dtype).eval()


def _set_eps(mixer: Any, config: Config) -> Mixer:
    mixer.o_norm.eps = config.get("norm_eps", config.get("layernorm_eps", mixer.o_norm.eps))
    return mixer


def _widths(tensors: Tensors, dim: int) -> dict[str, float]:
    return {
        "expand_k": tensors["k_proj.weight"].shape[0] / dim,
        "expand_v": tensors["v_proj.weight"].shape[0] / dim,
    }


def _layer(mixer: Mixer, tensors: Tensors) -> Tensors:
    return {"y": mixer(tensors["x"])[0]}


def _retnet(config: Config, tensors: Tensors) -> Tensors:
    dim = config["hidden_size"]
    mixer = _loaded("retnet", tensors, dim=dim, heads=config["num_heads"], **_widths(tensors, dim))
    return _layer(_set_eps(mixer, config), tensors)


def _gla(config: Config, tensors: Tensors) -> Tensors:
    dim = config["hidden_size"]
    mixer = _loaded(
        "gla",
        tensors,
        dim=dim,
        heads=config["num_heads"],
        gate_rank=tensors["gk_proj.0.weight"].shape[0],
        temperature=float(config.get("gate_logit_normalizer", 16)),
        least_decay=config.get("clamp_min"),
        **_widths(tensors, dim),
    )
    return _layer(_set_eps(mixer, config), tensors)


def _deltanet(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded(
        "deltanet",
        tensors,
        dim=config["hidden_size"],
        heads=config["num_heads"],
        kernel=tensors["q_conv1d.weight"].shape[-1],
        gate="g_proj.weight" in tensors,
        negative_eigenvalues=bool(config.get("allow_neg_eigval", False)),
    )
    return _layer(_set_eps(mixer, config), tensors)


def _gated_deltanet(config: Config, tensors: Tensors) -> Tensors:
    heads, head_dim = config["num_heads"], config["head_dim"]
    mixer = _loaded(
        "gated-deltanet",
        tensors,
        dim=config["hidden_size"],
        heads=heads,
        head_dim=head_dim,
        value_heads=tensors["A_log"].shape[0],
        expand_v=tensors["v_proj.weight"].shape[0] / (tensors["A_log"].shape[0] * head_dim),
        kernel=tensors["q_conv1d.weight"].shape[-1],
        negative_eigenvalues=bool(config.get("allow_neg_eigval", False)),
    )
    return _layer(_set_eps(mixer, config), tensors)


def _bounded(spec: str, config: Config, tensors: Tensors, **options: Any) -> Tensors:
    table = tensors["lower_bound_params"]
    given = {**tensors, "lower_bounds": table}
    mixer = _loaded(spec, given, dim=config["hidden_size"], layer=config["layer_idx"], layers=table.shape[0], **options)
    return {**_layer(_set_eps(mixer, config), tensors), "lower_bounds": forget_lower_bounds(table)}


def _hgrn(config: Config, tensors: Tensors) -> Tensors:
    return _bounded("hgrn", config, tensors, expand=tensors["i_proj.weight"].shape[0] / config["hidden_size"])


def _hgrn2(config: Config, tensors: Tensors) -> Tensors:
    return _bounded("hgrn2", config, tensors, heads=config["hidden_size"] // config["expand_ratio"])


def _retention(config: Config, tensors: Tensors) -> Tensors:
    q, k, v = (tensors[name].transpose(1, 2) for name in ("q", "k", "v"))
    o, _ = linear_scan(q, k, v, g=head_decay(q.shape[2], "retnet"), scale=config.get("scale"))
    return {"o": o.transpose(1, 2)}


def _tnl(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded(
        "lightning",
        tensors,
        dim=config["embed_dim"],
        heads=config["heads"],
        layer=config.get("layer_index") or 0,
        layers=config.get("num_layers") or 1,
        gate_rank=tensors["output_gate.0.weight"].shape[0],
    )
    return _layer(_set_eps(mixer, config), tensors)


def _based(config: Config, tensors: Tensors) -> Tensors:
    heads = config["heads"]
    mixer = _loaded(
        "based",
        tensors,
        dim=config["d_model"],
        heads=heads,
        feature_dim=config["feature_dim"],
        packed=False,
        eps=config.get("eps", 1e-12),
    )
    x, prompt = tensors["x"], config.get("prefill_tokens", tensors["x"].shape[1])
    before, state = mixer(x[:, :prompt])
    memory = state.memory.transpose(-1, -2)
    steps = []
    for token in x[:, prompt:].split(1, 1):
        y, state = mixer(token, state=state)
        steps.append(y)
    outputs = {**_layer(mixer, tensors), "y_prefill": before}
    outputs |= {"kv_state": memory[:, :, None, :-1], "k_state": memory[:, :, None, -1:]}
    return outputs | ({"y_decode": torch.cat(steps, 1)} if steps else {})


def _based_window(config: Config, tensors: Tensors) -> Tensors:
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    rope = Rope(q.shape[-1], float(config.get("rotary_base", 10000)))
    at = torch.arange(q.shape[2])[None]
    left = config.get("left_window", config["window_size"] // 2)
    return {"o": attend(rope.rotate(q, at), rope.rotate(k, at), v, scale=config.get("scale"), window=left)}


def _baseconv(config: Config, tensors: Tensors) -> Tensors:
    long = config["kernel_size"] < 0
    options: dict[str, Any] = {"kernel": None if long else config["kernel_size"], "max_length": config["l_max"]}
    if long and config.get("implicit", True):
        options |= {"bands": (config["d_emb"] - 1) // 2, "hidden": config["d_hidden"]}
    if long and not config.get("implicit", True):
        options["filter"] = "explicit"
    mixer = _loaded(
        "baseconv", tensors, dim=config["d_model"], activation=bool(config.get("use_act", False)), **options
    )
    return _layer(mixer, tensors)


def _lookups(config: Config, tensors: Tensors) -> Tensors:
    scorer = tensors["selecting.weight"]
    selection = "two-way" if scorer.shape[0] == 2 else "softmax" if "selecting.bias" in tensors else "sigmoid"
    count = config.get("n_lookups")
    mixer = _loaded(
        "lookups",
        tensors,
        dim=config["d_model"],
        heads=config.get("heads", 1),
        selection=selection,
        evaluation="top-k",
        lookups=count if isinstance(count, int) else None,
        penalty=config.get("selection_penalty", 1e-3),
    ).train(config["mode"] == "train")
    y, state = mixer(tensors["x"])
    return {"y": y} | ({} if state.auxiliary_loss is None else {"aux_loss": state.auxiliary_loss.reshape(1)})


def _mqar(config: Config, tensors: Tensors) -> Tensors:
    drawn = {name: tensors[name] for name in ("keys", "values", "gaps") if name in tensors}
    if len(drawn) == 3 and not config.get("random_non_queries", False):
        examples = lay_out_recall(
            **{name: each.long() for name, each in drawn.items()},
            length=config["input_seq_len"],
            passes=config.get("num_passes", 1),
        )
    else:
        examples = mqar(
            config["num_examples"],
            vocab=config["vocab_size"],
            length=config["input_seq_len"],
            pairs=config["num_kv_pairs"],
            passes=config.get("num_passes", 1),
            power=config["power_a"],
            filler="random" if config.get("random_non_queries", False) else "zero",
            seed=config["seed"],
            filler_seed=config.get("torch_seed"),
        )
    return {"inputs": examples.inputs.int(), "labels": examples.labels.int()}


ADAPTERS = {
    "hybrid-linear-analysis/retnet-token-mixing-layer": _retnet,
    "hybrid-linear-analysis/gla-token-mixing-layer": _gla,
    "hybrid-linear-analysis/deltanet-token-mixing-layer": _deltanet,
    "hybrid-linear-analysis/gated-deltanet-token-mixing-layer": _gated_deltanet,
    "hybrid-linear-analysis/hgrn-token-mixing-layer": _hgrn,
    "hybrid-linear-analysis/hgrn2-token-mixing-layer": _hgrn2,
    "hybrid-linear-analysis/retnet-retention-kernel": _retention,
    "lightning-attention/tnlattention-layer-silu-on-q-k": _tnl,
    "based/based-linear-attention-layer": _based,
    "based/sliding-window-softmax-attention-based-rotary": _based_window,
    "zoology/baseconv": _baseconv,
    "zoology/sparse-lookups": _lookups,
    "zoology/mqar": _mqar,
}
