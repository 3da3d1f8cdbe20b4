"""Golden adapters of CAB: its attentions and the compositional index; public API only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import attend
from foveate.compare.cab import compositional_index
from foveate.mixers.base import Mixer, create_mixer
from foveate.mixers.sparse.probsparse import ProbSparseMixer

Config = dict[str, Any]
Tensors = dict[str, Tensor]
RENAMED = {
    "out_proj.": "o_proj.",
    "compress_k": "key_slots",
    "compress_v": "value_slots",
}


def _loaded(spec: str, tensors: Tensors, renamed: dict[str, str] | None = None, **options: Any) -> Mixer:
    """The mixer in evaluation mode with every parameter of the case."""
    mixer = create_mixer(spec, **options)
    given = {}
    for name, tensor in tensors.items():
        names = {**RENAMED, **(renamed or {})}
        prefix = next((each for each in sorted(names, key=len, reverse=True) if name.startswith(each)), "")
        given[names.get(prefix, "") + name.removeprefix(prefix)] = tensor
    own = mixer.state_dict()
    mixer.load_state_dict({name: given[name].reshape(own[name].shape) for name in own})
    like = tensors.get("x", tensors.get("query"))
    assert like is not None
    return mixer.to(like.dtype).eval()


def _sizes(config: Config) -> dict[str, Any]:
    return {"dim": config["embed_dim"], "heads": config["heads"]}


def _self(mixer: Mixer, tensors: Tensors) -> Tensors:
    return {"y": mixer(tensors["x"])[0]}


def _either(mixer: Mixer, tensors: Tensors) -> Tensors:
    """Self attention where the memory is the query, else cross attention."""
    query, memory = tensors["query"], tensors["memory"]
    same = query.shape == memory.shape and torch.equal(query, memory)
    return {"y": (mixer(query) if same else mixer(query, context=memory))[0]}


def _abc(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded("abc", tensors, **_sizes(config), slots=config["slots"], causal=config.get("causal", False))
    return _either(mixer, tensors)


def _cosformer(config: Config, tensors: Tensors) -> Tensors:
    return _either(_loaded("cosformer", tensors, **_sizes(config), eps=config["eps"]), tensors)


def _nystromformer(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded(
        "nystromformer",
        tensors,
        **_sizes(config),
        landmarks=config["landmarks"],
        iterations=config["pinv_iterations"],
        kernel=config["conv_kernel"],
        release=True,
    )
    return _self(mixer, tensors)


def _lara(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded("lara", tensors, **_sizes(config), landmarks=config["landmarks"])
    return _self(mixer, tensors)


def _performer(config: Config, tensors: Tensors) -> Tensors:
    mixer = _loaded(
        "performer",
        tensors,
        **_sizes(config),
        features=config["features"],
        eps=config["eps"],
        least=config["denominator_min"],
    )
    return _either(mixer, tensors)


def _probsparse(config: Config, tensors: Tensors) -> Tensors:
    renamed = {
        "query_projection.": "q_proj.",
        "key_projection.": "k_proj.",
        "value_projection.": "v_proj.",
        "out_projection.": "o_proj.",
    }
    mixer = _loaded("probsparse", tensors, renamed, **_sizes(config), factor=config["factor"])
    assert isinstance(mixer, ProbSparseMixer)
    return {"y": mixer.mix_sampled(tensors["x"], tensors["index_sample"].long())}


def _s4d(config: Config, tensors: Tensors) -> Tensors:
    renamed = {
        "kernel.kernel.C": "C",
        "kernel.kernel.log_dt": "log_dt",
        "kernel.kernel.log_w_real": "log_real",
        "kernel.kernel.w_imag": "imaginary",
        "output_linear.": "o_proj.",
    }
    mixer = _loaded(
        "s4d",
        tensors,
        renamed,
        dim=config["embed_dim"],
        state_dim=config["d_state"],
        channels=config["channels"],
        causal=not config["bidirectional"],
    )
    return _self(mixer, tensors)


def _local(config: Config, tensors: Tensors) -> Tensors:
    causal = config.get("causal", "previous" in config["visible_keys"])
    return _self(_loaded("local", tensors, **_sizes(config), reach=config["wsize"], causal=causal), tensors)


def _long_short(config: Config, tensors: Tensors) -> Tensors:
    if "W_q.weight" in tensors:
        renamed = {
            "W_q.": "q_proj.",
            "W_k.": "k_proj.",
            "W_v.": "v_proj.",
            "W_o.": "o_proj.",
            "dconv_fc.": "compress.",
            "dual_ln_l.": "near_norm.",
            "dual_ln_s.": "far_norm.",
        }
        sizes = {"landmarks": config["landmarks"], "window": config["window"]}
        return _self(_loaded("long-short", tensors, renamed, **_sizes(config), **sizes), tensors)
    renamed = {
        "proj_query.": "q_proj.",
        "proj_key.": "k_proj.",
        "proj_val.": "v_proj.",
        "proj_out.": "o_proj.",
        "dconv_1.": "compress.",
        "dual_ln_win.": "near_norm.",
        "dual_ln_dproj.": "far_norm.",
        "r_net.": "near_distance.",
        "r_net_chunk.": "far_distance.",
        "r_w_bias": "content_bias",
        "r_r_bias": "distance_bias",
    }
    sizes = {
        "chunk": config["chunk"],
        "rank": config["chunk_rank"],
        "window": config["window"],
        "memory": config["mem_len"],
    }
    return _self(_loaded("long-short-causal", tensors, renamed, **_sizes(config), **sizes), tensors)


def _vanilla(config: Config, tensors: Tensors) -> Tensors:
    q, k, v = (
        F.linear(tensors[source], tensors[f"{name}.weight"], tensors[f"{name}.bias"])
        .unflatten(-1, (config["heads"], -1))
        .transpose(1, 2)
        for source, name in (("query", "q_proj"), ("memory", "k_proj"), ("memory", "v_proj"))
    )
    o = attend(q, k, v, causal=config.get("causal", False)).transpose(1, 2).flatten(2)
    return {"y": F.linear(o, tensors["out_proj.weight"], tensors["out_proj.bias"])}


def _index(config: Config, tensors: Tensors) -> Tensors:
    found = [
        compositional_index(pattern.replace(" ", "-"), tensors["".join(word[0] for word in pattern.split())].tolist())
        for pattern in config["pattern_order"]
    ]
    return {
        "tasks": torch.tensor([score for each in found for score in each.tasks.values()], dtype=torch.float64),
        "total": torch.tensor([each.total for each in found], dtype=torch.float64),
    }


ADAPTERS = {
    "cab/abc": _abc,
    "cab/cosformer": _cosformer,
    "cab/nystromformer": _nystromformer,
    "cab/lara": _lara,
    "cab/performer": _performer,
    "cab/probsparse": _probsparse,
    "cab/s4d": _s4d,
    "cab/local": _local,
    "cab/long-short": _long_short,
    "cab/vanilla": _vanilla,
    "cab/compositional-index": _index,
}
