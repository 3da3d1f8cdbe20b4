"""Upcycling: the dense SwiGLU blocks of a trained HybridLM become experts (`foveate.lm.mlp`), all copies at first."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch

from foveate.errors import OptionError
from foveate.lm.config import HybridConfig
from foveate.lm.mlp import SCALES, SwiGLU, upcycled_weights
from foveate.lm.model import HybridBlock, HybridLM
from foveate.lm.pretrained import built


@torch.no_grad()
def upcycle(
    model: HybridLM,
    *,
    experts: int = 16,
    top: int = 1,
    shared: int = 1,
    scale: str = "cube-root",
    noise: float = 0.0,
    dense_layers: Sequence[int] = (),
    seed: int = 0,
) -> HybridLM:
    """A model like `model` with experts in place of its dense blocks, as SpikingBrain-76B is made of a 7B model.

    Args:
        model: with dense blocks; left as it is. The new model holds its very tensors, except in the experts.
        experts: N.    top: k, that a token is sent to.    shared: S, that all read.    scale: of the copies, see
            `foveate.lm.mlp`.    noise: std of the router's in training.
        dense_layers: which keep one dense block (the 76B model's: 0, 1, 2, 4, 6, 8, 10 from 0).
        seed: of the routers, normal with the model's initializer_range.
    Returns:
        the new model in evaluation mode. With scale "down" or "cube-root" it computes about what `model` does.
    Raises:
        OptionError for options that do not fit, or a model without dense blocks.
    """
    if experts < 1 or scale not in SCALES:
        raise OptionError(f"upcycle: experts={experts}, scale={scale!r}, allowed: experts >= 1, a scale of {SCALES}")
    own = model.config
    if own.experts or not own.mlp_width or own.spike_k is not None:
        raise OptionError(
            f"upcycle: a model with experts={own.experts}, mlp_ratio={own.mlp_ratio}, spike_k={own.spike_k}, allowed: "
            "one with dense SwiGLU blocks that is not coded"
        )
    settings = {
        **own.to_dict(),
        "experts": experts,
        "top_experts": top,
        "shared_experts": shared,
        "router_noise": noise,
        "dense_layers": list(dense_layers),
    }
    config = HybridConfig.from_dict(settings)
    state = model.state_dict()
    random = torch.Generator().manual_seed(seed)
    for index, block in enumerate(model.layers):
        if index in dense_layers:
            continue
        assert isinstance(block, HybridBlock)
        assert isinstance(block.mlp, SwiGLU)
        dense = block.mlp.state_dict()
        for name in dense:
            del state[f"layers.{index}.mlp.{name}"]
        like = dense["gate_proj.weight"]
        router = torch.randn(experts, config.dim, generator=random) * config.initializer_range
        made = upcycled_weights(dense, experts=experts, top=top, shared=shared, scale=scale, router=router.to(like))
        state |= {f"layers.{index}.mlp.{name}": each for name, each in made.items()}
    upcycled = built(config, state)
    upcycled.generation_config = copy.deepcopy(model.generation_config)
    return upcycled
