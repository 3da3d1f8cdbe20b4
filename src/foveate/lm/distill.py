"""Distillation layer by layer: new mixers learn what the softmax layers in their place do.

The teacher runs as it is, so every layer is given what the softmax model gives it; as soon as a replaced layer has run,
its student's loss is computed on the same input and its gradient taken, and nothing of it is kept. All students train
in one forward pass, with the memory of one.

    weights    L = cross-entropy of the student's attention weights against softmax's     (Hedgehog, arXiv 2402.04347)
    outputs    L = |student(x) - teacher(x)|^2 / |teacher(x)|^2                           (as LoLCATs, arXiv 2410.10254)
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from foveate.errors import OptionError
from foveate.hf.calibrations.base import Work, frozen
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText
from foveate.lm.model import HybridLM
from foveate.lm.pretrained import mixer_at
from foveate.lm.stages import Stage, computing
from foveate.mixers.base import Mixer
from foveate.mixers.linear.hedgehog import HedgehogMixer

Learn = Callable[[int, Tensor, Tensor], None]


def objective_of(students: dict[int, Mixer], asked: str) -> str:
    """What the students are trained on; raises OptionError where they cannot be."""
    mimics = all(isinstance(each, HedgehogMixer) for each in students.values())
    if asked == "weights" and not mimics:
        name = next(each.name for each in students.values() if not isinstance(each, HedgehogMixer))
        raise OptionError(
            f"convert: objective='weights' with {name!r}, allowed: 'outputs'; only hedgehog's maps learn weights"
        )
    return asked if asked != "auto" else "weights" if mimics else "outputs"


def student_loss(student: Mixer, x: Tensor, y: Tensor, objective: str) -> Tensor:
    """One student's loss, a scalar: x [B, N, C] is the layer's input, y [B, N, C] its teacher's output."""
    if objective == "weights":
        assert isinstance(student, HedgehogMixer)
        return student.mimicry(x)
    made, _ = student(x)
    return (made.float() - y.float()).square().mean() / y.float().square().mean()


def learned(student: Mixer, objective: str) -> dict[str, nn.Parameter]:
    """What an objective trains: the maps, or all parameters."""
    own = dict(student.named_parameters())
    return {name: each for name, each in own.items() if objective == "outputs" or name.split(".")[0].endswith("_map")}


@contextlib.contextmanager
def overhearing(teacher: HybridLM, layers: dict[int, Any], learn: Learn) -> Iterator[None]:
    """Call `learn(layer, input, output)` whenever one of these layers' mixers has run, with gradients enabled."""

    def hook(index: int) -> Callable[..., None]:
        def run(module: nn.Module, given: tuple[Tensor, ...], made: tuple[Tensor, Any]) -> None:
            with torch.enable_grad():
                learn(index, given[0].detach(), made[0].detach())

        return run

    handles = [mixer_at(teacher, index).register_forward_hook(hook(index)) for index in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def distill(
    teacher: HybridLM, students: dict[int, Mixer], data: PackedText, config: ConvertConfig, work: Work
) -> list[float]:
    """Train the students to do what the teacher's mixers of the same layers do.

    Args:
        teacher: a model of softmax mixers; it does not change.    students: new mixers by layer; trained in place.
        data: text.    config: steps, rate, objective, precision.    work: see `Stage.run`.
    Returns:
        per step, the loss, the mean over students.
    Raises:
        OptionError for an objective that the students do not have.
    """
    objective = objective_of(students, config.objective)
    parameters = {
        f"{index}.{name}": each
        for index, student in students.items()
        for name, each in learned(student, objective).items()
    }

    def backward(tokens: Tensor, targets: Tensor, weight: float) -> float:
        heard: list[Tensor] = []

        def learn(index: int, x: Tensor, y: Tensor) -> None:
            loss = student_loss(students[index], x, y, objective)
            (weight * loss).backward()
            heard.append(loss.detach())

        with overhearing(teacher, students, learn), torch.no_grad(), computing(config.precision, tokens.device):
            # The logits of one token are the least that the shell computes.
            teacher(tokens, use_cache=False, logits_to_keep=1)
        return float(torch.stack(heard).mean())

    stage = Stage("distill", config.distill_steps, config.distill_rate, config.distill_minutes, config)
    with frozen(teacher):
        for student in students.values():
            student.train()
        losses = stage.run(parameters, backward, data, work)
        for student in students.values():
            student.eval()
    return losses
