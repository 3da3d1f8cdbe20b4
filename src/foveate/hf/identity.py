"""What a model is: enough to tell whether a calibration profile was made for it."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from foveate.hf.modules import attention_modules, text_config
from foveate.methods.profile import ModelIdentity

# Rows and columns of a matrix whose signs are compared; most fine-tuning changes some of them.
SAMPLE = 64


def identify(model: Any) -> ModelIdentity:
    """The model's type, attention shape, and a fingerprint of a few of its weights."""
    config = text_config(model)
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    modules = attention_modules(model)
    # Some configs refuse to name one width for layers of several.
    head_dim = getattr(modules[0], "head_dim", None) or getattr(config, "head_dim", None)
    return ModelIdentity(
        model_type=str(config.model_type),
        layers=len(modules),
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(head_dim or config.hidden_size // heads),
        fingerprint=_fingerprint(model),
    )


def _fingerprint(model: Any) -> str:
    """A hash over the signs of a sample of the weights: they are the same in every floating-point type."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() == 2 and parameter.device.type != "meta":
            step = max(1, parameter.shape[0] // SAMPLE)
            sample = parameter.detach()[::step, :SAMPLE].cpu()
            if sample.is_floating_point():
                sample = torch.signbit(sample.float())
            digest.update(name.rsplit(".", 2)[-2].encode())
            digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]
