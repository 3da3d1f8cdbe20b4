"""One stage of training chosen parameters, with AdamW, that an interruption does not undo.

    rate = peak * min(progress / warmup, 1) * (0.1 + 0.9 cos^2(pi / 2 * progress))

progress is the share of the stage's steps, or of its minutes where that is more. Batches depend on the seed and their
number alone, so that a resumed stage without a time limit ends where an uninterrupted one does.
"""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from foveate.hf.calibrations.base import Work
from foveate.lm.convert_config import ConvertConfig
from foveate.lm.data import PackedText

Backward = Callable[[Tensor, Tensor, float], float]


@dataclass(frozen=True)
class Stage:
    """name: "distill" or "finetune".    steps, rate, minutes: as the config has them for it."""

    name: str
    steps: int
    rate: float
    minutes: float | None
    config: ConvertConfig

    def run(
        self,
        parameters: dict[str, nn.Parameter],
        backward: Backward,
        data: PackedText,
        work: Work,
    ) -> list[float]:
        """Train the parameters, from where an earlier call with the same settings stopped.

        Args:
            parameters: what is trained, by names that stay the same.
            backward: (tokens [B, L], targets [B, L], weight) adds the gradient of weight times the loss, and returns
                the loss.
            data: the examples.    work: where unfinished work is kept and progress is shown.
        Returns:
            the loss of every step.
        """
        state = _State(self, parameters, work)
        device = next(iter(parameters.values())).device
        for _ in work.track(range(state.done, self.steps), self.name, self.steps, state.done):
            if state.progress() >= 1:
                break
            losses = []
            state.optimiser.zero_grad()
            for part in range(self.config.accumulate):
                rows = batch_rows(
                    len(data), self.config.batch, state.done * self.config.accumulate + part, self.config.seed
                )
                losses.append(
                    backward(data.tokens[rows].to(device), data.targets[rows].to(device), 1 / self.config.accumulate)
                )
            state.step(sum(losses) / len(losses))
            work.note(f"loss {state.losses[-1]:.4f}")
            if state.done % self.config.save_every == 0:
                state.save()
        state.save()
        return state.losses


class _State:
    """The optimiser of a stage, and how far it is."""

    def __init__(self, stage: Stage, parameters: dict[str, nn.Parameter], work: Work) -> None:
        self.stage, self.parameters, self.work = stage, parameters, work
        self.optimiser = torch.optim.AdamW(
            parameters.values(), lr=stage.rate, betas=(0.9, 0.95), weight_decay=stage.config.weight_decay
        )
        self.losses: list[float] = []
        self.before = 0.0
        self.started = time.monotonic()
        self._resume()

    @property
    def done(self) -> int:
        return len(self.losses)

    def seconds(self) -> float:
        """How long the stage has trained, earlier calls included."""
        return self.before + time.monotonic() - self.started

    def progress(self) -> float:
        of_steps = self.done / self.stage.steps
        return of_steps if self.stage.minutes is None else max(of_steps, self.seconds() / (60 * self.stage.minutes))

    def step(self, loss: float) -> None:
        rate = self.stage.rate * rate_factor(self.progress(), self.stage.config.warmup)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        nn.utils.clip_grad_norm_(list(self.parameters.values()), self.stage.config.clip)
        self.optimiser.step()
        self.losses.append(loss)

    def save(self) -> None:
        tensors = {f"value.{name}": each.detach() for name, each in self.parameters.items()}
        for name, each in self.parameters.items():
            held = self.optimiser.state.get(each, {})
            tensors |= {f"{key}.{name}": held[key] for key in ("exp_avg", "exp_avg_sq") if key in held}
        settings = {"config": self.stage.config.as_dict(), "losses": self.losses, "seconds": self.seconds()}
        self.work.save_partial(f"convert-{self.stage.name}", tensors, settings)

    def _resume(self) -> None:
        found = self.work.load_partial(f"convert-{self.stage.name}")
        if found is None or found.settings["config"] != self.stage.config.as_dict():
            return
        self.losses, self.before = list(found.settings["losses"]), found.settings["seconds"]
        with torch.no_grad():
            for name, each in self.parameters.items():
                each.copy_(found.tensors[f"value.{name}"])
                held: dict[str, Any] = {
                    key: found.tensors[f"{key}.{name}"].to(each.device)
                    for key in ("exp_avg", "exp_avg_sq")
                    if f"{key}.{name}" in found.tensors
                }
                if held:
                    self.optimiser.state[each] = {**held, "step": torch.tensor(float(self.done))}


def rate_factor(progress: float, warmup: float) -> float:
    """Share of the peak rate: up over `warmup`, then down a half cosine to a tenth."""
    rise = 1.0 if warmup == 0 else min(1.0, progress / warmup)
    return max(rise, 0.01) * (0.1 + 0.9 * math.cos(math.pi / 2 * min(progress, 1.0)) ** 2)


def batch_rows(examples: int, batch: int, number: int, seed: int) -> Tensor:
    """[batch] int64, the examples of batch `number`: every pass over all is in an order of its own."""
    first = number * batch
    rows = []
    for index in range(first, first + batch):
        epoch, place = divmod(index, examples)
        rows.append(_order(examples, epoch, seed)[place])
    return torch.stack(rows)


@functools.lru_cache(maxsize=2)
def _order(examples: int, epoch: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(examples, generator=generator)


@contextlib.contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """Autocast to bfloat16, or nothing for "float32"."""
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        yield


@torch.no_grad()
def perplexity(model: Any, data: PackedText, config: ConvertConfig) -> float:
    """exp of the mean loss per token of the examples, each read alone."""
    device, training = model.device, model.training
    model.eval()
    total, count = 0.0, 0
    for tokens, targets in zip(data.tokens.split(config.batch), data.targets.split(config.batch)):
        with computing(config.precision, device):
            logits = model(tokens.to(device), use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits.float().flatten(0, 1), targets.to(device).flatten(), reduction="sum", ignore_index=-100
        )
        total, count = total + float(loss), count + int((targets != -100).sum())
    model.train(training)
    return math.exp(min(total / count, 700.0))
