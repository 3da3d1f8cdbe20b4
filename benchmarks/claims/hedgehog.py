"""Hedgehog's claim in small: learned maps come close to softmax's weights, where fixed maps do not.

Half of SmolLM2's layers get maps, which are distilled on text. On held-out text, per layer and in the mean: the KL
divergence from softmax's weights in nats and how often both weigh the same key most, for the fixed map elu + 1, for the
maps at their start, and for the learned ones.

    python benchmarks/claims/hedgehog.py [--device cuda] [--steps 200]
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from claim import record
from features import arguments
from torch import Tensor

from foveate.attention.features import elu_plus_one
from foveate.hf.calibrations.base import Work
from foveate.hf.identity import identify
from foveate.hf.models import default_model
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText, pack, read_documents
from foveate.lm.distill import distill, overhearing
from foveate.lm.model import HybridLM
from foveate.lm.pretrained import as_hybrid, mixer_at, replace_layers
from foveate.mixers.linear.hedgehog import HedgehogMixer, mimicry_loss


def agreement(p: Tensor, phi_q: Tensor, phi_k: Tensor) -> float:
    """Share of rows in which a linear attention weighs the key most that softmax weighs most."""
    w = torch.einsum("bnhe,bmhe->bhnm", phi_q, phi_k).tril()
    return float((w.argmax(-1) == p.argmax(-1)).float().mean())


@torch.no_grad()
def measure(mixer: HedgehogMixer, x: Tensor) -> dict[str, tuple[float, float]]:
    """Per map, (KL from softmax in nats, agreement) at one layer's input x [B, N, C]."""
    positions = torch.arange(x.shape[1], device=x.device)[None]
    q, k = mixer.queries_and_keys(x, x, positions)
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    log_p = scores.masked_fill(later, -torch.inf).log_softmax(-1)
    entropy = -(log_p.exp() * log_p.masked_fill(later, 0)).sum(-1).mean()
    maps = {"elu": (elu_plus_one(q), elu_plus_one(k)), "hedgehog": mixer.features(q, k)}
    return {name: (float(mimicry_loss(q, k, *phi) - entropy), agreement(log_p, *phi)) for name, phi in maps.items()}


def over_text(
    teacher: HybridLM, mixers: dict[int, HedgehogMixer], data: PackedText
) -> dict[int, dict[str, tuple[float, float]]]:
    """`measure` of every replaced layer, on the teacher's inputs."""
    found: dict[int, dict[str, tuple[float, float]]] = {}

    def learn(index: int, x: Tensor, y: Tensor) -> None:
        found[index] = measure(mixers[index], x)

    with overhearing(teacher, mixers, learn), torch.no_grad():
        teacher(data.tokens[:4].to(teacher.device), use_cache=False, logits_to_keep=1)
    return found


def row(name: str, found: dict[int, dict[str, tuple[float, float]]], which: str) -> dict[str, Any]:
    kl, same = zip(*(each[which] for each in found.values()))
    made = {"map": name, "kl": sum(kl) / len(kl), "same_key": sum(same) / len(same), "kl_by_layer": list(kl)}
    print({key: value for key, value in made.items() if key != "kl_by_layer"}, flush=True)
    return made


def work_of(model: Any, given: argparse.Namespace) -> ConvertConfig:
    precision = "bfloat16" if model.device.type == "cuda" else "float32"
    return ConvertConfig(
        distill_steps=given.steps, batch=given.batch, accumulate=1, length=given.length, precision=precision
    )


def main() -> None:
    started = time.perf_counter()
    given = arguments(__doc__, steps=200, length=512, batch=8)
    model, tokenizer = default_model(device=given.device)
    config = work_of(model, given)
    teacher = as_hybrid(model)
    layers = config.chosen(len(teacher.layers))
    train, test = pack(read_documents([given.text]), tokenizer, given.length).split(config.held_out)
    rows: list[dict[str, Any]] = []
    for feature_map in ("softmax", "exp"):
        student = replace_layers(teacher, layers, f"hedgehog:feature_map={feature_map}")
        mixers: Any = {index: mixer_at(student, index) for index in layers}
        before = over_text(teacher, mixers, test)
        if not rows:
            rows.append(row("elu + 1", before, "elu"))
        rows.append(row(f"{feature_map}, at its start", before, "hedgehog"))
        distill(teacher, mixers, train, config, Work(identify(model), shown=True))
        rows.append(row(f"{feature_map}, learned", over_text(teacher, mixers, test), "hedgehog"))
    claim = "learned maps come close to softmax's weights, and fixed ones do not"
    record("hedgehog", claim, given, started, rows=rows)


if __name__ == "__main__":
    main()
