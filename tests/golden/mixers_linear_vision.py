"""Golden adapters of the linear mixers of images: MALA, InLine, Agent Attention, L2ViT; public API only."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.attention import attend
from foveate.mixers.base import create_mixer
from foveate.mixers.linear.agent_diffusion import agent_attention, match_tokens
from foveate.mixers.linear.l2vit import GlobalBlock, LocalConcentration, WindowBlock

Config = dict[str, Any]
Tensors = dict[str, Tensor]
PROJECTIONS = {"qkv.": "qkv_proj.", "qkvo.": "qkvo_proj.", "proj.": "o_proj.", "lepe.": "local.", "dwc.": "local."}


def _loaded(module: Any, tensors: Tensors, renamed: dict[str, str]) -> Any:
    """The module in evaluation mode, with every parameter and buffer taken from the case."""
    given = {}
    for name, tensor in tensors.items():
        prefix = next((each for each in sorted(renamed, key=len, reverse=True) if name.startswith(each)), "")
        given[renamed.get(prefix, "") + name.removeprefix(prefix)] = tensor
    own = module.state_dict()
    module.load_state_dict({name: given[name].reshape(own[name].shape) for name in own})
    return module.to(tensors["x"].dtype).eval()


def _on_grid(config: Config) -> dict[str, Any]:
    return {
        "dim": config["dim"],
        "heads": config["heads"],
        "height": config["grid"][0],
        "width": config["grid"][1],
    }


def _mala(config: Config, tensors: Tensors, attention: str) -> Tensors:
    mixer = _loaded(create_mixer("mala", **_on_grid(config), attention=attention), tensors, PROJECTIONS)
    y, _ = mixer(tensors["x"].flatten(2).transpose(1, 2))
    return {"y": y.transpose(1, 2).unflatten(2, tuple(config["grid"]))}


def _inline(config: Config, tensors: Tensors) -> Tensors:
    tensors = _joined(tensors)
    mixer = create_mixer(
        "inline",
        **_on_grid(config),
        class_token=config.get("class_token", False),
        feature_map=config["kernel_func"].replace("leakyrelu", "leaky-relu"),
        qkv_bias="qkv.bias" in tensors,
    )
    return {"y": _loaded(mixer, tensors, {**PROJECTIONS, "residual.": "kernel."})(tensors["x"])[0]}


def _joined(tensors: Tensors) -> Tensors:
    """With one projection for q, k and v, where the case has one for q and one for k and v."""
    parts = [part for part in ("weight", "bias") if f"q.{part}" in tensors]
    return tensors | {f"qkv.{part}": torch.cat((tensors[f"q.{part}"], tensors[f"kv.{part}"])) for part in parts}


def _agent(config: Config, tensors: Tensors) -> Tensors:
    bias = {
        "an_bias": "gather_table",
        "ah_bias": "gather_rows",
        "aw_bias": "gather_columns",
        "ac_bias": "gather_class",
        "na_bias": "spread_table",
        "ha_bias": "spread_rows",
        "wa_bias": "spread_columns",
        "ca_bias": "spread_class",
    }
    tensors = _joined(tensors)
    # Theirs keep the agent last on this side.
    agent_last = {name: tensors[name].movedim(-1, 2) for name in ("ha_bias", "wa_bias", "ca_bias") if name in tensors}
    mixer = create_mixer(
        "agent",
        **_on_grid(config),
        pool=round(config["agents"] ** 0.5),
        class_token=config.get("class_token", False),
        qkv_bias="qkv.bias" in tensors,
    )
    return {"y": _loaded(mixer, {**tensors, **agent_last}, {**PROJECTIONS, **bias})(tensors["x"])[0]}


def _agent_diffusion(config: Config, tensors: Tensors) -> Tensors:
    x, grid = tensors["x"], tuple(config["grid"])
    matching = match_tokens(x, grid, (config["sy"], config["sx"]))
    features, agents = (matching.merge(x, config[name]) for name in ("r", "agent_r"))
    q, k, v, a = (
        F.linear(each, tensors[f"{name}.weight"]).unflatten(-1, (config["heads"], -1)).transpose(1, 2)
        for each, name in ((features, "to_q"), (features, "to_k"), (features, "to_v"), (agents, "to_q"))
    )
    if 2 * agents.shape[1] < features.shape[1]:
        o = agent_attention(q, k, v, a, exponent=config["k_scale2"], shortcut=config["k_shortcut"])
    else:
        o = attend(q, k, v, causal=False)
    y = F.linear(o.transpose(1, 2).flatten(2), tensors["to_out.weight"], tensors["to_out.bias"])
    return {"features": features, "agents": agents, "attn": y, "unmerged": matching.unmerge(y, config["r"])}


def _l2vit_attention(config: Config, tensors: Tensors) -> Tensors:
    mixer = create_mixer(
        "l2vit",
        dim=config["dim"],
        heads=config["heads"],
        floor=float(config["clamp_min"]),
        qkv_bias="qkv.bias" in tensors,
    )
    return {"y": _loaded(mixer, tensors, {**PROJECTIONS, "temperature": "tau"})(tensors["x"])[0]}


def _concentration(config: Config, tensors: Tensors) -> Tensors:
    module = LocalConcentration(config["dim"], config["kernel"])
    module.norm.eps = config["bn_eps"]
    return {"y": _loaded(module, tensors, {"bn.": "norm."})(tensors["x"], tuple(config["grid"]))}


IN_BLOCKS = {
    "attn.qkv.": "attention.qkv_proj.",
    "attn.proj.": "attention.o_proj.",
    "attn.temperature": "attention.tau",
    "mlp.fc1.": "mlp.0.",
    "mlp.fc2.": "mlp.2.",
    "local_mp.": "concentration.",
    "local_mp.bn.": "concentration.norm.",
}


def _global_block(config: Config, tensors: Tensors) -> Tensors:
    module = GlobalBlock(
        config["dim"], config["heads"], floor=float(config["clamp_min"]), mlp_ratio=config["mlp_ratio"]
    )
    renamed = {**IN_BLOCKS, "cpe.0.proj.": "position."}
    return {"y": _loaded(module, tensors, renamed)(tensors["x"], tuple(config["grid"]))}


def _window_block(config: Config, tensors: Tensors) -> Tensors:
    module = WindowBlock(config["dim"], config["heads"], window=config["window"], mlp_ratio=config["mlp_ratio"])
    renamed = {**IN_BLOCKS, "cpe.0.proj.": "position1.", "cpe.1.proj.": "position2."}
    return {"y": _loaded(module, tensors, renamed)(tensors["x"], tuple(config["grid"]))}


ADAPTERS = {
    "mala/mala-magnitude-aware-linear-attention-layer": lambda config, tensors: _mala(config, tensors, "linear"),
    "mala/softmax-twin-layer-mala-backbone": lambda config, tensors: _mala(config, tensors, "softmax"),
    "inline-attention/inline-attention-layer": _inline,
    "inline-attention/inline-attention-layer-pvt-version-on": _inline,
    "agent-attention/agent-attention-module-position-biases-depthwise": _agent,
    "agent-attention/agentsd": _agent_diffusion,
    "l2vit/linear-global-attention": _l2vit_attention,
    "l2vit/local-concentration-module": _concentration,
    "l2vit/linear-global-attention-block": _global_block,
    "l2vit/local-window-attention-block-two-conditional": _window_block,
}
