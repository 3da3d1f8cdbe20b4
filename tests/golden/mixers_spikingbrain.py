"""Golden adapters of SpikingBrain: its two layers, the spike codes and W8ASpike; public API only."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.mixers.base import create_mixer
from foveate.mixers.linear.spikes import SpikeLinear, decode, encode, firing_rate, spike_counts, spike_matmul

Config = dict[str, Any]
Tensors = dict[str, Tensor]


def _loaded(mixer: Any, tensors: Tensors) -> Any:
    renamed = {name.replace("gk_proj.", "decay_proj.").replace("g_norm.", "o_norm."): t for name, t in tensors.items()}
    mixer.load_state_dict({name: renamed[name] for name in mixer.state_dict()})
    return mixer.to(tensors["x"].dtype).eval()


def _sizes(config: Config, tensors: Tensors) -> dict[str, Any]:
    return {
        "dim": config["hidden"],
        "heads": config["heads"],
        "kv_heads": config["kv_heads"],
        "head_dim": tensors["q_proj.weight"].shape[0] // config["heads"],
        "bias": "q_proj.bias" in tensors,
    }


def _run(mixer: Any, config: Config, tensors: Tensors) -> Tensors:
    mask = tensors.get("mask")
    positions = tensors.get("position_ids")
    y, _ = mixer(
        tensors["x"],
        padding=None if mask is None else mask.bool(),
        positions=None if positions is None else positions.long(),
    )
    return {"y": y}


def _linear_layer(config: Config, tensors: Tensors) -> Tensors:
    mixer = create_mixer(
        "spikingbrain",
        **_sizes(config, tensors),
        gate_rank=config["gate_low_rank"],
        temperature=float(config["gate_normaliser"]),
        norm_eps=config["norm_eps"],
    )
    return _run(_loaded(mixer, tensors), config, tensors)


def _window_layer(config: Config, tensors: Tensors) -> Tensors:
    mixer = create_mixer(
        "spikingbrain-window",
        **_sizes(config, tensors),
        window=config["visible_keys"] - 1,
        rope_base=float(config["rope_theta"]),
    )
    return _run(_loaded(mixer, tensors), config, tensors)


def _codings(config: Config, tensors: Tensors) -> Tensors:
    counts = tensors["counts"].float()
    size = counts.abs()
    bits, unary = config["T_bitwise"], config["unary_length"]
    spikes = {
        "binary_of_abs": encode(size, "binary", unary),
        "ternary": encode(counts, "ternary", unary),
        "bitwise_of_abs": encode(size, "bitwise", bits),
        "bidirectional_bitwise": encode(counts, "bidirectional", bits),
        "twos_complement": encode(counts, "twos-complement", config["T_twos_complement"]),
    }
    rates = [firing_rate(each) for name, each in spikes.items() if name != "twos_complement"]
    return {
        **spikes,
        "decoded_ternary": decode(spikes["ternary"], "ternary"),
        "decoded_bidirectional": decode(spikes["bidirectional_bitwise"], "bidirectional"),
        "decoded_twos_complement_raw": decode(spikes["twos_complement"], "twos-complement", signed=False),
        "firing_rates": torch.stack(rates),
    }


def _matmul(config: Config, tensors: Tensors) -> Tensors:
    counts, w = tensors["counts"], tensors["w"]
    return {
        "y_ternary": spike_matmul(encode(counts, "ternary"), w, "ternary"),
        "y_bidirectional_bitwise": spike_matmul(encode(counts, "bidirectional"), w, "bidirectional"),
    }


def _coded_linear(config: Config, tensors: Tensors) -> Tensors:
    weight, bias = tensors["weight"], tensors.get("bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    linear.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias}))
    layer = SpikeLinear.of(linear, k=config["k"], group=config["weight_group"], scale=tensors.get("scales"))
    counts, threshold = spike_counts(tensors["x"], config["k"])
    return {"y": layer(tensors["x"]), "vth": threshold, "spikes": counts}


ADAPTERS = {
    "spikingbrain/7b-linear-layer": _linear_layer,
    "spikingbrain/7b-sliding-window-softmax-layer": _window_layer,
    "spikingbrain/integer-spike-counts-expanded-time-five": _codings,
    "spikingbrain/spike-driven-matrix-product": _matmul,
    "spikingbrain/w8aspike-linear-layer": _coded_linear,
}
