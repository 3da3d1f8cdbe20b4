"""The calibration of DuoAttention: one gate per KV head, trained to keep the hidden states and to be small.

Each step runs one synthetic prompt with several passkeys twice. The first pass is the unmodified model; it gives the
target hidden states h_F and every layer's attention output o_F. The second pass attends in every layer with
(1 - a) o_stream + a o_F (methods.keep.duo.gated_mix), and

    loss = mean over question and answer tokens of mean_d (h_F - h_S)^2  +  l1 * mean |alpha|

with h after the final norm. AdamW on alpha alone, no weight decay; alpha is clamped to [0, 1] in place before every
step. The learning rate rises over the first fifth of the steps and falls over the last, with a floor of a tenth.

Cost per step: two forwards and one backward through the activations; memory O(layers x N x hidden). With the
defaults, SmolLM2-135M takes a few minutes on two CPU cores. The authors' settings are sinks=128, window=256,
passkeys=10, words=32, min_length=1000, max_length=32000, steps=2000, lr=0.02 on BookSum.

Layers with a sliding window of their own get no gate (NaN). The model's weights do not change.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.attention.softmax import attend
from foveate.hf.apply import apply
from foveate.hf.calibrations.base import Calibration, Found, Work, calibration, frozen
from foveate.hf.calibrations.passkeys import ORDINALS, PasskeyPrompts
from foveate.hf.modules import decoder_of
from foveate.methods.base import Method
from foveate.methods.keep.duo import gated_mix, streaming_plan
from foveate.methods.step import Phase, Step
from foveate.options import option

LENGTHS = 50


@dataclass
class Passes:
    """What the two passes of one prompt share.

    gates: [layers, Hkv], trained. full: o_F [1, Hq, N, D] by layer. gated: whether the second pass runs.
    """

    gates: Tensor
    full: dict[int, Tensor] = field(default_factory=dict)
    gated: bool = False


@dataclass(frozen=True, kw_only=True)
class TwoWay(Method):
    """Notes each layer's full attention in the first pass, and mixes it in, in the second."""

    acts_in: ClassVar[frozenset[Phase]] = frozenset({"prefill"})

    passes: Passes
    sinks: int
    window: int

    def attend(self, step: Step) -> Tensor:
        full, stream = self.passes.full, streaming_plan(self.sinks, self.window)
        if not self.passes.gated:
            full[step.layer] = step.attend()
            return full[step.layer]
        own: Tensor = attend(
            step.q, step.k, step.v, stream, scale=step.scale, window=step.window, sink=step.sink, softcap=step.softcap
        )
        return gated_mix(full[step.layer], own, self.passes.gates[step.layer])


@calibration("duo")
@dataclass(frozen=True, kw_only=True)
class DuoCalibration(Calibration):
    """Settings of the gates' training."""

    sinks: int = option(16, "first tokens that the gated pass streams over", at_least=0)
    window: int = option(64, "last tokens that the gated pass streams over", at_least=1)
    steps: int = option(60, "optimiser steps, one prompt each", at_least=1)
    lr: float = option(0.05, "AdamW's learning rate at its highest", above=0)
    l1: float = option(0.05, "weight of the mean gate in the loss", at_least=0)
    passkeys: int = option(4, "passkeys per prompt", at_least=1, at_most=len(ORDINALS))
    words: int = option(8, "words per passkey", at_least=1)
    min_length: int = option(256, "tokens of the shortest context", at_least=1)
    max_length: int = option(768, "tokens of the longest context", at_least=1)
    seed: int = option(0, "seed of the prompts", at_least=0)
    save_every: int = option(10, "steps between saves of unfinished work", at_least=1)
    text: str | None = option(None, "a UTF-8 file of filler prose; default: the English prose of Python's manual")

    def check(self) -> None:
        if self.max_length < self.min_length:
            raise self.refuse("max_length", f">= min_length={self.min_length}")

    def lengths(self) -> tuple[int, ...]:
        """Context lengths, evenly spaced."""
        return tuple(torch.linspace(self.min_length, self.max_length, LENGTHS).round().int().tolist())

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        prompts = PasskeyPrompts(tokenizer, self.lengths(), self.passkeys, self.words, self.text)
        shape = (work.identity.layers, work.identity.kv_heads)
        training = Training(torch.ones(shape, device=model.device, requires_grad=True), self)
        training.resume(work)
        decoder = decoder_of(model)
        passes = Passes(training.gates)
        method = TwoWay(passes=passes, sinks=self.sinks, window=self.window)
        with frozen(model), apply(model, method):
            for number in work.track(range(training.done, self.steps), "duo", self.steps, training.done):
                ids, asked = prompts.sample(f"duo {self.seed} {number}")
                distance = training.step(decoder, passes, ids.to(model.device), asked.to(model.device))
                work.note(f"distance {distance:.4f}, mean gate {training.gates.mean():.3f}")
                if training.done % self.save_every == 0:
                    training.save(work)
        gates = training.gates.detach().clamp(0.0, 1.0).cpu()
        ungated = [layer for layer in range(shape[0]) if layer not in passes.full]
        gates[ungated] = torch.nan
        return Found({"alpha": gates}, {"distances": training.distances})


class Training:
    """The gates, their optimiser, and how far it is."""

    def __init__(self, gates: Tensor, settings: DuoCalibration) -> None:
        self.gates = gates
        self.settings = settings
        self.optimiser = torch.optim.AdamW([gates], lr=settings.lr, weight_decay=0.0)
        self.done = 0
        self.distances: list[float] = []

    def step(self, decoder: Any, passes: Passes, ids: Tensor, asked: Tensor) -> float:
        """One prompt ids [1, N] with the questions and answers `asked` bool [1, N]; returns the distillation loss."""
        with torch.no_grad():
            self.gates.clamp_(0.0, 1.0)
            passes.full.clear()
            passes.gated = False
            target = decoder(input_ids=ids, use_cache=False).last_hidden_state[asked]
        passes.gated = True
        hidden = decoder(input_ids=ids, use_cache=False).last_hidden_state[asked]
        distance = (target.float() - hidden.float()).square().mean()
        small = self.gates[sorted(passes.full)].abs().mean()
        self.optimiser.param_groups[0]["lr"] = self.settings.lr * lr_factor(self.done, self.settings.steps)
        self.optimiser.zero_grad()
        (distance + self.settings.l1 * small).backward()
        self.optimiser.step()
        self.done += 1
        self.distances.append(distance.item())
        return self.distances[-1]

    def save(self, work: Work) -> None:
        state = self.optimiser.state[self.gates]
        tensors = {name: state[name] for name in ("exp_avg", "exp_avg_sq")}
        described = {"settings": dataclasses.asdict(self.settings), "done": self.done, "distances": self.distances}
        work.save_partial("duo", {"alpha": self.gates.detach(), **tensors}, described)

    def resume(self, work: Work) -> None:
        """Go on where an interrupted calibration with the same settings stopped."""
        found = work.load_partial("duo")
        if found is None or found.settings["settings"] != dataclasses.asdict(self.settings):
            return
        with torch.no_grad():
            self.gates.copy_(found.tensors["alpha"])
        self.done, self.distances = found.settings["done"], list(found.settings["distances"])
        state = {name: found.tensors[name].to(self.gates.device) for name in ("exp_avg", "exp_avg_sq")}
        self.optimiser.state[self.gates] = {**state, "step": torch.tensor(float(self.done))}


def lr_factor(step: int, steps: int) -> float:
    """Share of the highest learning rate at `step` of `steps`: up over a fifth, down over the last, at least 0.1."""
    fifth = steps / 5
    return min(1.0, max((step + 1) / fifth, 0.1), max((steps - step) / fifth, 0.1))
