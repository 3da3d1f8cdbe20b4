"""Golden adapters of the test-time memories; they call the public API only.

Widths are read off the parameters' shapes, so that any option value of a system fits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.attention.delta import WeightState
from foveate.attention.ttt import ttt_linear
from foveate.mixers.base import create_mixer

Config = dict[str, Any]
Tensors = dict[str, Tensor]

# Their parameter names -> ours.
RENAMED = {
    "to_queries.weight": "q_proj.weight",
    "to_queries.0.weight": "q_proj.weight",
    "to_keys.weight": "k_proj.weight",
    "to_keys.0.weight": "k_proj.weight",
    "to_values.weight": "v_proj.weight",
    "to_values.0.weight": "v_proj.weight",
    "to_adaptive_step.0.weight": "rate_proj.weight",
    "to_adaptive_step.0.bias": "rate_proj.bias",
    "to_decay_factor.0.weight": "decay_proj.weight",
    "to_decay_factor.0.bias": "decay_proj.bias",
    "to_momentum.0.weight": "momentum_proj.weight",
    "to_momentum.0.bias": "momentum_proj.bias",
    "to_layer_modulation.0.weight": "modulation_proj.weight",
    "to_layer_modulation.0.bias": "modulation_proj.bias",
    "retrieve_gate.0.weight": "gate_proj.weight",
    "combine_heads.weight": "o_proj.weight",
    "multihead_rmsnorm.gamma": "o_norm.gain",
    "q_norm.gamma": "q_norm.gain",
    "k_norm.gamma": "k_norm.gain",
}


def _memory_name(theirs: str) -> str:
    """Our name of one of the memory's weights, as their parameter order calls it."""
    return "gain" if theirs.endswith("gamma") else f"w{theirs.rsplit('.', 1)[1]}"


def _in_their_order(names: list[str], order: list[str], tensor: Tensor, heads: int) -> Tensor:
    """The modulation's rows [H weights, ...], sorted by their order of weights, sorted by ours."""
    rows = tensor.unflatten(0, (heads, len(order)))
    places = torch.tensor([[_memory_name(each) for each in order].index(name) for name in names])
    return rows[:, places].flatten(0, 1)


def _neural_memory(config: Config, tensors: Tensors) -> Tensors:
    order = config["memory_parameter_order"]
    mixer = create_mixer(
        "titans-memory-chunked",
        dim=config["dim"],
        heads=config["heads"],
        head_dim=config["dim_head"],
        depth=config["memory_depth"],
        expansion=config["memory_expansion"],
        form="residual-gain" if config["norm_residual_wrapper"] else "plain",
        chunk=config["chunk_size"],
        refresh=config["refresh_every"],
        max_rate=config["max_lr"],
        momentum=config["momentum"],
        pre_norm=config["pre_rmsnorm"],
        qk_norm=config["qk_rmsnorm"],
        post_norm=config["post_rmsnorm"],
        modulation=config["per_parameter_lr"],
        max_norm=config["max_grad_norm"],
        orthogonal=config["spectral_norm"],
    )
    own = mixer.state_dict()
    given = {RENAMED.get(name, name): tensor for name, tensor in tensors.items()}
    for n, theirs in enumerate(order):
        given[f"weights.{_memory_name(theirs)}"] = tensors[f"memory_model_parameters.{n}"]
    names = [name.removeprefix("weights.") for name in own if name.startswith("weights.")]
    for name in ("modulation_proj.weight", "modulation_proj.bias"):
        if name in own:
            given[name] = _in_their_order(names, order, given[name], config["heads"])
    mixer.load_state_dict({name: given[name].reshape(own[name].shape) for name in own})
    mixer = mixer.to(tensors["x"].dtype).eval()
    x = tensors["x"].detach().requires_grad_()
    y, state = mixer(x)
    found = {"y": y.detach()}
    weights = dict(zip(names, state.memory.memory.weights))
    found |= {f"state.{each}": weights[_memory_name(each)].detach().flatten(0, 1) for each in order}
    if "do" in tensors:
        found["dx"] = torch.autograd.grad(y, x, tensors["do"])[0]
    return found


def _ttt_linear(config: Config, tensors: Tensors) -> Tensors:
    q, k, v, eta = (tensors[name].transpose(1, 2) for name in ("q", "k", "v", "eta"))
    state = None
    if config["initial_state"]:
        weights = (tensors["initial_state"], tensors["initial_state_bias"])
        state = WeightState(weights, tuple(torch.zeros_like(each) for each in weights))
    o, after = ttt_linear(
        q,
        k,
        v,
        eta[..., 0],
        tensors["w"],
        tensors["b"],
        scale=config["scale"],
        eps=config["eps"],
        state=state,
        chunk_size=config["mini_batch"],
        pad_tail=True,
    )
    return {"o": o.transpose(1, 2), "state": after.weights[0], "bias": after.weights[1]}


ADAPTERS = {
    "titans/neural-long-term-memory-layer": _neural_memory,
    "miras/ttt-linear-memory-layer": _ttt_linear,
}
