"""Golden adapters of the linear operators: they call the public operators and hold no mathematics.

Reference tensors are [B, H, N, D]; the operators take [B, N, H, D].
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention.convolutions import toeplitz_attention
from foveate.attention.features import elu_plus_one, l2norm, positive_random, taylor2
from foveate.attention.linear import head_decay, linear_scan
from foveate.attention.scans import elementwise_scan, prefix_softmax

# Most cases are shorter than the default chunk; with 16 they carry a state between chunks too.
CHUNK = 16

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _swap(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def _gradients(inputs: Tensors, outputs: Tensors, cotangents: Tensors) -> Tensors:
    """d<name> of every input, for the cotangents given; nothing when none is given."""
    pairs = [(outputs[name], given) for name, given in cotangents.items() if name in outputs]
    if not pairs:
        return {}
    values, given = zip(*pairs)
    found = torch.autograd.grad(values, list(inputs.values()), given, allow_unused=True)
    return {f"d{name}": each for name, each in zip(inputs, found) if each is not None}


def _scan(config: Config, tensors: Tensors) -> Tensors:
    names = ("q", "k", "v", "g", "beta", "initial_state")
    inputs = {name: tensors[name].clone().requires_grad_() for name in names if name in tensors}
    tokens = {name: _swap(x) if x.dim() > 1 and name != "initial_state" else x for name, x in inputs.items()}
    normalize = bool(config.get("normalize", False))
    o, state = linear_scan(
        **tokens,
        scale=config.get("scale"),
        normalize=normalize,
        eps=config.get("eps", 1e-10),
        chunk_size=config.get("chunk", CHUNK),
        cu_seqlens=tensors.get("cu_seqlens"),
        output_final_state=True,
    )
    assert state is not None
    outputs = {"o": _swap(o), "state": state[..., :-1] if normalize else state}
    if normalize:
        outputs["z"] = state[..., -1]
    cotangents = {"o": tensors.get("do"), "state": tensors.get("dstate")}
    given = {name: x for name, x in cotangents.items() if x is not None}
    return {**outputs, **_gradients(inputs, outputs, given)}


def _mamba2(config: Config, tensors: Tensors) -> Tensors:
    x = _swap(tensors["x"])
    dt = F.softplus(_swap(tensors["dt_raw"]) + tensors["dt_bias"])
    y, state = linear_scan(
        _swap(tensors["C"]),
        _swap(tensors["B"]),
        x * dt[..., None],
        g=-tensors["A_log"].exp() * dt,
        scale=config.get("scale", 1.0),
        initial_state=tensors.get("initial_state"),
        chunk_size=config.get("chunk", CHUNK),
        output_final_state=True,
    )
    assert state is not None
    return {"y": _swap(y), "y_with_D": _swap(y + tensors["D"][:, None] * x), "state": state}


def _elementwise(config: Config, tensors: Tensors) -> Tensors:
    names = ("x", "g", "initial_state")
    inputs = {name: tensors[name].clone().requires_grad_() for name in names if name in tensors}
    h, last = elementwise_scan(**inputs, cu_seqlens=tensors.get("cu_seqlens"))
    outputs = {"o": h, "state": last}
    given = {name: tensors[f"d{name}"] for name in outputs if f"d{name}" in tensors}
    return {**outputs, **_gradients(inputs, outputs, given)}


def _fixed_decay(config: Config, tensors: Tensors) -> Tensors:
    schemes = {"alibi": "alibi", "paper": "lightning", "none": None}
    scheme = schemes[config["slope_scheme"]]
    decay: Tensors = {}
    if scheme is not None:
        layer, layers = config.get("layer_index"), config.get("num_layers")
        decay = {"g": head_decay(config["heads"], scheme, layer=layer, layers=layers)}  # type: ignore[arg-type]
    found = _scan({"scale": config.get("scale", 1.0)}, {**tensors, **decay})
    return found | ({"slopes": -decay["g"]} if decay else {})


def _prefix_softmax(config: Config, tensors: Tensors) -> Tensors:
    inputs = {name: tensors[name].clone().requires_grad_() for name in ("q", "k", "v")}
    scores = torch.einsum("hd,bhnd->bnh", inputs["q"], inputs["k"]) * config["scale"]
    o, _ = prefix_softmax(scores, _swap(inputs["v"]))
    outputs = {"o": _swap(o)}
    given = {"o": tensors["do"]} if "do" in tensors else {}
    return {**outputs, **_gradients(inputs, outputs, given)}


def _taylor_map(config: Config, tensors: Tensors) -> Tensors:
    return {"phi": taylor2(tensors["x"]), "phi_packed": taylor2(tensors["x"], packed=True)}


def _taylor_attention(config: Config, tensors: Tensors) -> Tensors:
    q, k = (taylor2(_swap(tensors[name]), scale=config["scale"]) for name in ("q", "k"))
    o, _ = linear_scan(
        q, k, _swap(tensors["v"]), scale=1.0, normalize=config["normalize"], eps=config["eps"], chunk_size=CHUNK
    )
    return {"o": _swap(o)}


def _toeplitz(config: Config, tensors: Tensors) -> Tensors:
    q, k = (positive_random(l2norm(_swap(tensors[name]), eps=0.0), tensors["projection"]) for name in ("q", "k"))
    o = toeplitz_attention(q, k, _swap(tensors["v"]), tensors["bias"], causal=config["causal"])
    return {"o": _swap(o)}


def _elu_layer(config: Config, tensors: Tensors) -> Tensors:
    x, heads = tensors["x"], config["heads"]
    qk = F.linear(x, tensors["Wqk.weight"], tensors.get("Wqk.bias"))
    q, k = (elu_plus_one(each.unflatten(-1, (heads, -1))) for each in qk.chunk(2, -1))
    v = F.linear(x, tensors["Wv.weight"], tensors.get("Wv.bias")).unflatten(-1, (heads, -1))
    o, _ = linear_scan(q, k, v, scale=config["scale"], normalize=True, chunk_size=CHUNK)
    return {"y": F.linear(o.flatten(-2), tensors["out_proj.weight"], tensors.get("out_proj.bias"))}


ADAPTERS = {
    "primitives/linear-attention": _scan,
    "primitives/fixed-decay": _scan,
    "primitives/scalar-gate": _scan,
    "primitives/vector-gate": _scan,
    "primitives/delta-rule": _scan,
    "primitives/gated-delta-rule": _scan,
    "primitives/kda": _scan,
    "primitives/packed": _scan,
    "primitives/mamba2-ssd": _mamba2,
    "primitives/elementwise-scan": _elementwise,
    "aaren/prefix-softmax-attention-one-learned-query": _prefix_softmax,
    "based/second-order-taylor-feature-map-full": _taylor_map,
    "based/second-order-taylor-linear-attention-quadratic": _taylor_attention,
    "lightning-attention/causal-linear-attention-fixed-per-head": _fixed_decay,
    "lightning-attention/lightning-attention-slope-scheme-paper-final": _fixed_decay,
    "nprf-rpe/kernel-attention-relative-positional-bias-noncausal": _toeplitz,
    "nprf-rpe/kernel-attention-relative-positional-bias-causal": _toeplitz,
    "dsf/linear-attention-elu-1-features": _elu_layer,
}
