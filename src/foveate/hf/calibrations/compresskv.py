"""The calibration of CompressKV: semantic scores of query heads, and how much each layer suffers from eviction.

First needle trials rank the heads (probes.retrieval_heads). Then, with a uniform budget, the method chooses what each
layer would keep of a needle prompt, the model answers from its full cache, and at every decode step the layer's
attention output after its output projection is compared with what it would be over the kept keys and all decoded ones:

    e_l += |O_kept - O| / |O|,  summed over steps and trials of a needle, normalised over layers; the mean over needles

Only the longest prompts are used for e. Layers with a sliding window of their own get NaN.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attention.plan import Tokens
from foveate.attention.softmax import attend
from foveate.errors import UnsupportedModelError
from foveate.hf.calibrations.base import Found, Work, calibration
from foveate.hf.calibrations.retrieval_heads import NeedleSettings
from foveate.hf.modules import attention_modules
from foveate.hf.subject import ModelSession, ModelSubject
from foveate.methods.cache import Keep
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.compresskv import CompressKV
from foveate.methods.step import Step
from foveate.options import option
from foveate.probes.retrieval_heads import Trial
from foveate.tasks.text import paragraphs

PROJECTIONS = ("o_proj", "out_proj", "dense", "wo", "c_proj")


@calibration("compresskv")
@dataclass(frozen=True, kw_only=True)
class CompressKVCalibration(NeedleSettings):
    """Needle trials, then errors of eviction."""

    budget: int = option(96, "keys per layer whose eviction error is measured", at_least=9)

    def check(self) -> None:
        super().check()
        if self.budget >= self.max_length:
            raise self.refuse("budget", f"< max_length={self.max_length}, or nothing would be dropped")

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        projections = [output_projection(module) for module in attention_modules(model)]
        table = self.head_table(model, tokenizer, work)
        semantic = table.scores("semantic")
        layers = work.identity.layers
        flat = torch.full((layers,), 1 / layers, dtype=torch.float64)
        profile = table_profile("compresskv", work.identity, semantic=semantic, error=flat)
        method = CompressKV(budget=self.budget, allocate=False, profile=profile).for_model(work.identity)
        meter = Meter(method, projections)
        longest = dataclasses.replace(self.probe, min_length=self.max_length, lengths=1)
        trials = work.track(longest.trials(tokenizer, paragraphs(self.text)), "layer errors", longest.count)
        with ModelSubject(model).session(meter.hear) as session:
            error = self._errors(session, meter, trials, tokenizer)
        whole = torch.full((layers,), torch.nan, dtype=torch.float64)
        whole[sorted(meter.errors)] = error
        return Found({"semantic": semantic, "error": whole}, table.facts)

    def _errors(self, session: ModelSession, meter: Meter, trials: Iterator[Trial], tokenizer: Any) -> Tensor:
        """Mean over needles of the layers' normalised errors: float64 [heard layers], summing to 1."""
        by_needle: dict[str, Tensor] = {}
        for trial in trials:
            session.start()
            meter.errors.clear()
            logits = session.feed(trial.ids)
            for _ in range(self.max_new_tokens):
                token = int(logits[0].argmax())
                if token == tokenizer.eos_token_id:
                    break
                logits = session.feed(torch.tensor([[token]]))
            total = torch.tensor([meter.errors[layer] for layer in sorted(meter.errors)], dtype=torch.float64)
            question = trial.needle.question
            by_needle[question] = by_needle.get(question, torch.zeros_like(total)) + total
        shares = torch.stack([each / each.sum() for each in by_needle.values()]).mean(0)
        return shares / shares.sum()


@dataclass
class Meter:
    """Compares, step by step, a layer's output over everything with its output over what a method would keep.

    kept: slots int64 [1, Hkv, n] by layer, None where nothing would go. prompt: the prompt's tokens. errors: the sums
    by layer.
    """

    method: CompressKV
    projections: list[nn.Module]
    prompt: int = 0
    kept: dict[int, Tensor | None] = field(default_factory=dict)
    errors: dict[int, float] = field(default_factory=dict)

    def hear(self, step: Step) -> None:
        if step.phase == "prefill":
            change = self.method.choose(step)
            self.kept[step.layer] = change.index if isinstance(change, Keep) else None
            self.errors[step.layer] = 0.0
            self.prompt = step.cache.stored
            return
        slots = self.kept[step.layer]
        if slots is None:
            return
        decoded = torch.arange(self.prompt, step.cache.stored, device=slots.device).expand(*slots.shape[:2], -1)
        whole = self._project(step, step.attend())
        less = self._project(step, self._attend(step, torch.cat((slots, decoded), 2)))
        self.errors[step.layer] += float((less - whole).norm() / whole.norm().clamp_min(1e-6))

    @staticmethod
    def _attend(step: Step, slots: Tensor) -> Tensor:
        o: Tensor = attend(
            step.q,
            step.k,
            step.v,
            Tokens(slots),
            scale=step.scale,
            window=step.window,
            sink=step.sink,
            softcap=step.softcap,
        )
        return o

    def _project(self, step: Step, o: Tensor) -> Tensor:
        projected: Tensor = self.projections[step.layer](o.transpose(1, 2).flatten(2))
        return projected.float()


def output_projection(module: nn.Module) -> nn.Module:
    """The projection that an attention module applies to its heads' outputs."""
    for name in PROJECTIONS:
        found = getattr(module, name, None)
        if isinstance(found, nn.Module):
            return found
    raise UnsupportedModelError(
        f"{type(module).__name__} has no output projection under a known name ({', '.join(PROJECTIONS)}), so the error "
        "of eviction cannot be measured"
    )
