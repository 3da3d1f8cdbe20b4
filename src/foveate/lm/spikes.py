"""HybridLM on spikes: its linear layers with 8-bit weights, on activations coded as spike counts (W8ASpike).

    coded = spike_coded(model)                                  # SpikingBrain's k = 3, no training
    coded.save_pretrained("coded"); HybridLM.from_pretrained("coded")

The codes are in `foveate.mixers.linear.spikes`, which also has `spiking`, the same for the length of a block and for
any model. Of the report's W8ASpike, scales calibrated on 128 samples and the int8 KV cache are left out.

Paper: SpikingBrain Technical Report, Pan et al. 2025 (arXiv 2509.05276).
"""

from __future__ import annotations

import copy

import torch

from foveate.errors import OptionError, UnsupportedModelError
from foveate.lm.model import HybridLM
from foveate.mixers.linear.spikes import code_linears


def spike_coded(model: HybridLM, *, k: float = 3.0, group: int = 128) -> HybridLM:
    """A copy of a model whose linear layers, all but the head, read spike counts with 8-bit weights.

    Args:
        model: left as it is.    k: spikes that a channel of mean size fires, see `spike_counts`; larger is finer.
        group: inputs that share a scale of the weights, at most.
    Returns:
        the coded model in evaluation mode; it saves, loads and generates as any HybridLM, and does not train.
    Raises:
        OptionError for k or group, or a model that is coded already; UnsupportedModelError for a mixer that does more
        with a layer than to run it.
    """
    if not k > 0 or group < 1:
        raise OptionError(f"spike_coded: k={k}, group={group}, allowed: k > 0, group >= 1")
    if model.config.spike_k is not None:
        raise OptionError(f"spike_coded: the model is coded with k={model.config.spike_k}, allowed: one that is not")
    made = copy.deepcopy(model).eval()
    code_linears(made, k, group)
    made.config.spike_k, made.config.spike_group = k, group
    ids = torch.zeros(1, 2, dtype=torch.int64, device=model.device)
    try:
        with torch.no_grad():
            made(ids, use_cache=False)
    except (AttributeError, RuntimeError, TypeError) as error:
        raise UnsupportedModelError(
            f"spike_coded: a mixer of {sorted(set(model.config.mixers))} reads a linear layer's weights itself "
            f"({error}), allowed: mixers that only run their layers"
        ) from error
    return made
