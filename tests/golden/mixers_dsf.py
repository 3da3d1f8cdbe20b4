"""Golden adapters of the dynamical-systems layers (arXiv 2405.15731); they call the public API only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.attention import attend
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.rg_lru import RGLRU
from foveate.mixers.linear.s6 import selective_scan

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _load(module: nn.Module, tensors: Tensors) -> nn.Module:
    own = module.state_dict()
    module.load_state_dict({name: tensors[name].reshape(own[name].shape) for name in own})
    return module.to(tensors["x"].dtype).eval()


def _given(tensors: Tensors, names: dict[str, str], like: nn.Module) -> Tensors:
    """The tensors under our names; biases that a case lacks are zero."""
    zeros = {name: torch.zeros_like(each) for name, each in like.state_dict().items() if name.endswith("bias")}
    return {**zeros, **{names.get(name, name): each for name, each in tensors.items()}}


def _normalised_attention(config: Config, tensors: Tensors) -> Tensors:
    dim, heads = config["d_model"], config["heads"]
    keys = tensors["Wqk.weight"].shape[0] // 2
    mixer = create_mixer("normalised-attention", dim=dim, heads=heads, keys=keys, bound=None)
    names = {"Wn.weight": "n_proj.weight", "Wn.bias": "n_bias"}
    for theirs, ours in (("Wqk", "qk_proj"), ("Wv", "v_proj"), ("out_proj", "o_proj")):
        names |= {f"{theirs}.weight": f"{ours}.weight", f"{theirs}.bias": f"{ours}.bias"}
    _load(mixer, _given(tensors, names, mixer))
    return {"y": mixer(tensors["x"])[0]}


def _qlstm(config: Config, tensors: Tensors) -> Tensors:
    mixer = create_mixer(
        "qlstm",
        dim=config["d_model"],
        expand=float(config["expansion"]),
        kernel=config["kernel"],
        reverse=config["reversed"],
    )
    names = {"input.weight": "in_proj.weight", "output.weight": "o_proj.weight"}
    _load(mixer, _given(tensors, names, mixer))
    return {"y": mixer(tensors["x"])[0]}


def _rg_lru(config: Config, tensors: Tensors) -> Tensors:
    x = tensors["x"]
    module = _load(RGLRU(config["width"], config["heads"]), tensors)
    position = tensors["position_ids"].expand(x.shape[:2])
    starts = position == 0
    starts[:, 0] = True
    starts = starts.flatten().nonzero().flatten()
    bounds = torch.cat((starts, starts.new_tensor([x.shape[0] * x.shape[1]])))
    begun = position.flatten()[starts] != 0
    y, _ = module(x.flatten(0, 1)[None], x.new_zeros(len(starts), x.shape[2]), begun, bounds)
    return {"y": y.view_as(x)}


def _selective_scan(config: Config, tensors: Tensors) -> Tensors:
    given = ("u", "delta_raw", "A", "B", "C", "D", "delta_bias", "z")
    inputs = {name: tensors[name].clone().requires_grad_() for name in given if name in tensors}
    delta = inputs["delta_raw"].transpose(1, 2)
    if "delta_bias" in inputs:
        delta = delta + inputs["delta_bias"]
    if config.get("delta_softplus", True):
        delta = F.softplus(delta)
    b, c = (each.movedim(-1, 1) for each in (inputs["B"], inputs["C"]))
    y, state = selective_scan(inputs["u"].transpose(1, 2), delta, inputs["A"], b, c, inputs.get("D"))
    y = y.transpose(1, 2)
    if config.get("gate_z", False) and "z" in inputs:
        y = y * F.silu(inputs["z"])
    outputs = {"y": y, "last_state": state}
    if "do" not in tensors:
        return outputs
    found = torch.autograd.grad(y, list(inputs.values()), tensors["do"])
    names = {"delta_raw": "ddelta"}
    return outputs | {names.get(name, f"d{name}"): each for name, each in zip(inputs, found)}


def _softmax_attention(config: Config, tensors: Tensors) -> Tensors:
    x = tensors["x"]
    qk = F.linear(x, tensors["Wqk.weight"], tensors.get("Wqk.bias"))
    v = F.linear(x, tensors["Wv.weight"], tensors.get("Wv.bias"))
    q, k, v = (each.unflatten(-1, (config["heads"], -1)).transpose(1, 2) for each in (*qk.chunk(2, -1), v))
    o = attend(q, k, v, scale=config["scale"]).transpose(1, 2).flatten(2)
    return {"y": F.linear(o, tensors["out_proj.weight"], tensors.get("out_proj.bias"))}


ADAPTERS = {
    "dsf/normalised-attention": _normalised_attention,
    "dsf/qlstm": _qlstm,
    "dsf/rg-lru-layer": _rg_lru,
    "dsf/s6-selective-scan": _selective_scan,
    "dsf/softmax-attention-baseline": _softmax_attention,
}
