"""Golden adapters of the mixers that are made of feature maps; they call the public API only.

A linear attention's weights are its outputs for one-hot values, and so are softmax attention's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import attend
from foveate.attention.linear import kv_matmul_attention, linear_scan
from foveate.mixers.linear.ecoformer import binary_codes, learn_hashes
from foveate.mixers.linear.flow import causal_flow_attention, flow_attention, flow_start
from foveate.mixers.linear.hedgehog import HedgehogMap, mimicry_loss

Config = dict[str, Any]
Tensors = dict[str, Tensor]

MAPS = {"softmax_dim": "softmax", "exp_dim": "exp"}


def _token_first(x: Tensor) -> Tensor:
    """[B, H, N, D] <-> [B, N, H, D]."""
    return x.transpose(1, 2)


def _hedgehog_map(config: Config, weight: Tensor) -> HedgehogMap:
    made = HedgehogMap(*weight.shape, kind=MAPS[config["activation"]], skip=config.get("skip_connection", False))
    made.load_state_dict({"weight": weight})
    return made


def _linear(config: Config, phi_q: Tensor, phi_k: Tensor, v: Tensor) -> Tensor:
    if config.get("causal", True):
        return linear_scan(phi_q, phi_k, v, scale=1.0, normalize=True, eps=config["eps"])[0]
    return kv_matmul_attention(phi_q, phi_k, v, normalizer="sum", eps=config["eps"])


def _hedgehog(config: Config, tensors: Tensors) -> Tensors:
    q, k, v = (tensors[name] for name in ("q", "k", "v"))
    group, N = q.shape[1] // k.shape[1], q.shape[2]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    map_q = _hedgehog_map(config, tensors["Wq"])
    map_k = _hedgehog_map(config, tensors["Wk"]) if "Wk" in tensors else map_q
    phi_q, phi_k = map_q(_token_first(q)), map_k(_token_first(k))
    one_hot = torch.eye(N).expand(*q.shape[:2], N, N)
    softmax = {"scale": config["teacher_scale"], "causal": config.get("causal", True)}
    y_true, y_pred = attend(q, k, v, **softmax), _token_first(_linear(config, phi_q, phi_k, _token_first(v)))
    loss = mimicry_loss(_token_first(q), _token_first(k), phi_q, phi_k, eps=config["eps"], **softmax)
    loss.backward()
    return {
        "phi_q": _token_first(phi_q),
        "phi_k": _token_first(phi_k),
        "a_true": attend(q, k, one_hot, **softmax),
        "a_pred": _token_first(_linear(config, phi_q, phi_k, _token_first(one_hot))),
        "y_true": y_true,
        "y_pred": y_pred,
        "loss_xent": loss[None],
        "loss_mse": F.mse_loss(y_pred, y_true)[None],
        **{f"dW{name}": each.weight.grad for name, each in (("q", map_q), ("k", map_k))},
    }


def _flow(config: Config, tensors: Tensors) -> Tensors:
    def projected(name: str, x: Tensor) -> Tensor:
        return F.linear(x, tensors[f"{name}_projection.weight"], tensors[f"{name}_projection.bias"])

    given = {"query": "queries", "key": "keys", "value": "values"}
    q, k, v = (projected(name, tensors[each]).unflatten(-1, (config["heads"], -1)) for name, each in given.items())
    # No case says whether it is causal; those that are read themselves and have one width in and out.
    if torch.equal(tensors["queries"], tensors["keys"]) and config["d_input"] == config["d_output"]:
        start = flow_start(q.shape[0], config["heads"], q.shape[-1], v.shape[-1], q)
        o, _ = causal_flow_attention(q, k, v, start, eps=config["eps"])
    else:
        o = flow_attention(q, k, v, eps=config["eps"])
    return {"y": projected("out", o.flatten(2))}


def _ecoformer(config: Config, tensors: Tensors) -> Tensors:
    anchors = tensors["anchors"][0]
    hashes, centre, _ = learn_hashes(
        _token_first(tensors["x_train"]),
        anchors,
        tensors["A_init"],
        tensors["S_target"],
        steps=config["iterations"],
        rate=config["lr"],
        momentum=config["momentum"],
    )
    x = tensors["x"].requires_grad_()
    codes = _token_first(binary_codes(_token_first(x), anchors, centre, hashes))
    (dx,) = torch.autograd.grad(codes, x, tensors["do"])
    return {"A": hashes, "mu": centre[None, :, None], "codes": codes, "dx": dx}


ADAPTERS = {
    "hedgehog/learned-feature-maps-linear-attention-quadratic": _hedgehog,
    "flowformer/flow-attention": _flow,
    "ecoformer/kernel-hash": _ecoformer,
}
