"""Golden adapters of the mixers between softmax and linear attention; they call the public API only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.mixers.base import Mixer, create_mixer
from foveate.mixers.linear.transnormerllm import SGLU, simple_norm
from foveate.mixers.parts import RMSNorm

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _load(module: torch.nn.Module, tensors: Tensors) -> None:
    """Set every parameter and buffer that the case names, reshaped."""
    own = module.state_dict()
    module.load_state_dict({name: tensors[name].reshape(own[name].shape) for name in own})


def _loaded(spec: str, tensors: Tensors, prefix: str = "", **options: Any) -> Mixer:
    mixer = create_mixer(spec, **options)
    stripped = {name.removeprefix(prefix): each for name, each in tensors.items()}
    renamed = {name.replace("out_proj.", "o_proj."): each for name, each in stripped.items()}
    _load(mixer, renamed)
    return mixer.to(tensors["x"].dtype).eval()


@torch.no_grad()
def _in_steps(mixer: Mixer, x: Tensor, sizes: list[int]) -> tuple[Tensor, Any]:
    outputs, state = [], None
    for piece in x.split(sizes, 1):
        y, state = mixer(piece, state=state)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def _rat(config: Config, tensors: Tensors) -> Tensors:
    x, chunk = tensors["x"], config["chunk"]
    mixer = _loaded(
        "rat",
        tensors,
        dim=config["d_model"],
        heads=config["heads"],
        chunk=chunk,
        groups=config["ngroups"],
        rope_base=float(config["rope_base"]),
    )
    norm = RMSNorm(config["d_model"], config["eps"])
    _load(norm, {"weight": tensors["input_norm.weight"]})
    stepped, _ = _in_steps(mixer, norm(x), [1] * x.shape[1])
    return {"y": x + mixer(norm(x))[0], "y_step_after_first_chunk": (x + stepped)[:, chunk:]}


def _transnormer(spec: str, config: Config, tensors: Tensors, **options: Any) -> Tensors:
    names = {"urpe.v": "lrpe.mirror", "urpe.theta": "lrpe.theta"}
    mixer = _loaded(
        spec,
        {names.get(name, name): each for name, each in tensors.items()},
        dim=config["embed_dim"],
        heads=config["heads"],
        causal=config["causal"],
        lrpe="urpe.v" in tensors,
        learned_angles="urpe.theta" in tensors,
        **options,
    )
    return {"y": mixer(tensors["x"])[0]}


def _norm_attention(config: Config, tensors: Tensors) -> Tensors:
    feature_map = {"1+elu": "elu+1"}.get(config["activation"], config["activation"])
    return _transnormer("transnormer-norm", config, tensors, feature_map=feature_map)


def _diag_attention(config: Config, tensors: Tensors) -> Tensors:
    weights = "relu" if "ReLU" in config["variant"] else "softmax"
    options = {"block": config["block"], "weights": weights, "fill_keys": not config["causal"]}
    return _transnormer("transnormer-diag", config, tensors, **options)


def _tnl_block(config: Config, tensors: Tensors) -> Tensors:
    x, dim = tensors["x"], config["d_model"]
    given = {name.replace("lrpe.theta", "theta"): each for name, each in tensors.items()}
    mixer = _loaded(
        "transnormerllm",
        given,
        "token_mixer.",
        dim=dim,
        heads=config["heads"],
        layer=config["layer_index"],
        layers=config["num_layers"],
        lrpe=config["lrpe"],
        eps=config["norm_eps"],
    )
    norm, channels = simple_norm(dim, config["norm_eps"]), SGLU(dim, config["glu_dim"])
    _load(channels, {name.removeprefix("channel_mixer."): each for name, each in tensors.items()})
    prompt = config.get("prefill_tokens", x.shape[1])
    stepped, state = _in_steps(mixer, norm(x), [prompt] + [1] * (x.shape[1] - prompt))
    outputs = {"y": x + mixer(norm(x))[0], "y_prefill_decode": x + stepped}
    outputs = {name: mixed + channels(norm(mixed)) for name, mixed in outputs.items()}
    return outputs | {"kv_state": state.memory, "slopes": -mixer.log_decay()}


ADAPTERS = {
    "rat/rat-layer-input-rmsnorm-output-gate": _rat,
    "transnormer/normattention-layer": _norm_attention,
    "transnormer/diagattention-layer": _diag_attention,
    "transnormerllm/transnormerllm-block": _tnl_block,
}
