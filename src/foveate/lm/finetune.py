"""The second stage of a conversion: the whole model learns to predict the next token again.

With "lora", the base weights stay and low-rank updates of q, k, v and o of every layer train, besides what the new
mixers have of their own (feature maps, gates); the updates are then added to the weights. With "full", all trains.

LoRA: Hu et al. 2021 (arXiv 2106.09685), by the package peft.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import MissingPackageError
from foveate.hf.calibrations.base import Work
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText
from foveate.lm.model import HybridLM
from foveate.lm.pretrained import PROJECTIONS, mixer_at
from foveate.lm.stages import Stage, computing


def check_installed(config: ConvertConfig) -> None:
    """Raise MissingPackageError where LoRA is asked for without peft."""
    if (
        config.finetune == "lora"
        and (config.finetune_steps or config.extend)
        and importlib.util.find_spec("peft") is None
    ):
        raise MissingPackageError("peft", "finetuning with LoRA", "pip install 'foveate[train]'")


def finetune(
    model: HybridLM,
    layers: Iterable[int],
    data: PackedText,
    config: ConvertConfig,
    work: Work,
    *,
    stage: str = "finetune",
    steps: int | None = None,
) -> tuple[HybridLM, list[float]]:
    """Train on the next token.

    Args:
        model: trained in place.    layers: whose mixers are new; all their parameters but the projections train as
            they are.    data: text.    config: steps, rate, rank, precision.    work: see `Stage.run`.
        stage: its name; with other steps than the config's, another stage of the same kind.
    Returns:
        the model, in evaluation mode, with every update added to its weights; per step, the loss in nats.
    """
    trained: Any = _with_lora(model, layers, config) if config.finetune == "lora" else model
    if config.finetune == "full":
        model.requires_grad_(True)
    parameters = {name: each for name, each in trained.named_parameters() if each.requires_grad}

    def backward(tokens: Tensor, targets: Tensor, weight: float) -> float:
        with computing(config.precision, tokens.device):
            loss = trained(input_ids=tokens, shift_labels=targets, use_cache=False).loss
        (weight * loss).backward()
        return float(loss.detach())

    trained.train()
    count = config.finetune_steps if steps is None else steps
    run = Stage(stage, count, config.finetune_rate, config.finetune_minutes, config)
    losses = run.run(parameters, backward, data, work)
    merged: HybridLM = trained.merge_and_unload() if config.finetune == "lora" else trained
    return merged.requires_grad_(True).eval(), losses


def _with_lora(model: HybridLM, layers: Iterable[int], config: ConvertConfig) -> Any:
    """The model with low-rank updates; they and what is new in `layers` are all that takes gradients."""
    from peft import LoraConfig, get_peft_model

    new = [
        parameter
        for index in layers
        for name, parameter in mixer_at(model, index).named_parameters()
        if name.split(".")[0] not in PROJECTIONS
    ]
    settings = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=_targets(model), lora_dropout=0.0)
    cuda = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(config.seed)
        made = get_peft_model(model, settings)
    for parameter in new:
        parameter.requires_grad_(True)
    return made


def _targets(model: HybridLM) -> list[str]:
    """The full names of the mixers' projections."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".mixer." in name and name.rsplit(".", 1)[-1] in PROJECTIONS
    ]
