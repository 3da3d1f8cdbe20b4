"""The calibration of TCA-Attention: what share of its attention every KV head loses under every configuration.

The model reads needle prompts that end with their question (probes.retrieval_heads). For each configuration the method
chooses the tokens that it would keep, forced ones included, and the loss is the attention that the others have under
the last queries, the mean over prompts. Nothing is generated, so that a model need not answer them.

One forward pass per prompt, and per layer as many selections as there are configurations (3 log2(block) + 4).
Layers with sliding windows of their own get NaN.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.hf.calibrations.base import Calibration, Found, Work, calibration
from foveate.hf.subject import ModelSubject
from foveate.methods.keep.tca import configurations, force, importance, select_tokens
from foveate.methods.step import Step
from foveate.options import option
from foveate.probes.retrieval_heads import NEEDLES, RetrievalHeads
from foveate.tasks.text import paragraphs


@calibration("tca")
@dataclass(frozen=True, kw_only=True)
class TCACalibration(Calibration):
    """Needle prompts of one length, and the options of the method that change what is kept."""

    block: int = option(64, "tokens per block", one_of=(2, 4, 8, 16, 32, 64, 128, 256))
    length: int = option(2048, "tokens per prompt", at_least=64)
    depths: int = option(2, "depths of the needle", at_least=1)
    needles: int = option(len(NEEDLES), "how many of the needles", at_least=1, at_most=len(NEEDLES))
    window: int = option(1, "last queries of a prompt that say what is important", at_least=1)
    rank: str = option("mass", "how blocks are ranked", one_of=("mass", "key"))
    recent_blocks: int = option(2, "last whole blocks that stay whole", at_least=1)
    chat: bool | None = option(None, "use the tokenizer's chat template; default: when it has one")
    text: str | None = option(None, "a UTF-8 file of filler prose; default: the English prose of Python's manual")

    def check(self) -> None:
        if self.length < (self.recent_blocks + 2) * self.block:
            raise self.refuse("length", f">= {(self.recent_blocks + 2) * self.block}, or every block would stay whole")

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        probe = RetrievalHeads(
            min_length=self.length,
            max_length=self.length,
            lengths=1,
            depths=self.depths,
            needles=self.needles,
            chat=self.chat,
        )
        meter = Meter(self, configurations(self.block))
        trials = probe.trials(tokenizer, paragraphs(self.text))
        with ModelSubject(model).session(meter.hear) as session:
            for trial in work.track(trials, "losses", probe.count):
                session.start()
                session.feed(trial.ids)
        heads = (work.identity.layers, work.identity.kv_heads, len(meter.proportions))
        loss = torch.full(heads, torch.nan, dtype=torch.float64)
        for layer, total in meter.losses.items():
            loss[layer] = total / probe.count
        return Found({"loss": loss, "proportions": meter.proportions})


@dataclass
class Meter:
    """Adds up what each configuration loses. losses: float64 [Hkv, C] by layer."""

    settings: TCACalibration
    proportions: Tensor
    losses: dict[int, Tensor] = field(default_factory=dict)

    def hear(self, step: Step) -> None:
        if step.window is not None:
            return
        settings = self.settings
        a = importance(step.q[:, :, -settings.window :], step.k, step.scale)
        lost = []
        for row in self.proportions.to(a.device):
            mask, _ = select_tokens(a, step.k, row.expand(step.kv_heads, -1), settings.rank)
            lost.append(a.masked_fill(force(mask, settings.block, settings.recent_blocks), 0.0).double().sum(-1)[0])
        total = torch.stack(lost, -1).cpu()
        self.losses[step.layer] = self.losses.get(step.layer, torch.zeros_like(total)) + total
