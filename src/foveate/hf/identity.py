"""What a model is: enough to tell whether a calibration profile was made for it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from foveate.hf.modules import attention_modules, text_config
from foveate.methods.profile import ModelIdentity


def identify(model: Any) -> ModelIdentity:
    """The model's type, attention shape, and a fingerprint of a few of its weights."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    return ModelIdentity(
        model_type=str(config.model_type),
        layers=len(attention_modules(model)),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        fingerprint=_fingerprint(model),
    )


def _fingerprint(model: Any) -> str:
    """A hash over a sample of the weights, the same in float32 and bfloat16."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2 and parameter.device.type != "meta":
            step = max(1, parameter.shape[0] // 4)
            sample = parameter.detach()[::step, :4].to("cpu", torch.bfloat16)
            digest.update(name.rsplit(".", 2)[-2].encode())
            digest.update(sample.float().numpy().tobytes())
    return digest.hexdigest()[:16]
