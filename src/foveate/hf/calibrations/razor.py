"""The calibration of RazorAttention: echo and induction scores of every query head, from one random prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.hf.calibrations.base import Calibration, Found, Work, calibration
from foveate.hf.subject import ModelSubject
from foveate.options import option
from foveate.probes.echo_heads import EchoHeads


@calibration("razor")
@dataclass(frozen=True, kw_only=True)
class RazorCalibration(Calibration):
    """Settings of the probe (probes.echo_heads); the paper's are tokens=2500, repeats=4."""

    tokens: int = option(250, "random tokens in the repeated block", at_least=2)
    repeats: int = option(4, "how often the block stands in the prompt", at_least=2)
    samples: int = option(256, "queries that are looked at", at_least=1)
    seed: int = option(0, "seed of the random tokens", at_least=0)

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        probe = EchoHeads(tokens=self.tokens, repeats=self.repeats, samples=self.samples, seed=self.seed)
        return Found(probe.measure(ModelSubject(model), tokenizer).tables)
