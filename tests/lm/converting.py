"""Tiny models that conversions are tested on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from foveate.lm.convert import Conversion, convert
from foveate.lm.data import load_tokenizer
from tests.models import tiny

VOCAB = 264
IDS = torch.randint(3, 128, (2, 20), generator=torch.Generator().manual_seed(0))


def llama(**options: Any) -> Any:
    """Four layers, with weights wide enough for attention to be anything but even."""
    return tiny(vocab_size=VOCAB, num_hidden_layers=4, initializer_range=0.3, **options)


def biased(model: Any) -> Any:
    """With biases that matter: transformers' are zero at first."""
    random = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, each in model.named_parameters():
            if name.endswith("_proj.bias"):
                each.copy_(torch.randn(each.shape, generator=random))
    return model


def converted(text: str, model: Any = None, to: str = "hedgehog", **settings: Any) -> Conversion:
    given = {"length": 32, "distill_steps": 4, "finetune_steps": 4, "progress": False, **settings}
    return convert(llama() if model is None else model, load_tokenizer(), to, text=(text,), **given)


def logits(model: Any, ids: Tensor = IDS, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **given).logits
