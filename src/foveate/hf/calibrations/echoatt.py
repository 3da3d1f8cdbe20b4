"""The calibration of EchoAtt: how alike the attention weights of every two layers are.

Windows of prose are read by the dense model. In each, the weights of `queries` positions, spread evenly, are compared
row by row, query head h of one layer with query head h of the other:

    similarity[i, j] = mean over windows, heads and queries of the cosine of A_i[h, t] and A_j[h, t]

The first quarter of a window's positions is left out: rows of few keys are alike in all layers. Layers with a sliding
window of their own get NaN. Memory: layers x Hq x queries x length weights at once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from foveate.attention.positions import Positions
from foveate.attention.statistics import attention_rows
from foveate.hf.calibrations.base import Calibration, Found, Work, calibration
from foveate.hf.subject import ModelSubject
from foveate.methods.select.echoatt import layer_similarity
from foveate.methods.step import Step
from foveate.options import option
from foveate.tasks.perplexity import Perplexity


@calibration("echoatt")
@dataclass(frozen=True, kw_only=True)
class EchoAttCalibration(Calibration):
    """Windows of text, and the rows that are compared."""

    length: int = option(256, "tokens per window", at_least=8)
    samples: int = option(32, "windows", at_least=1)
    queries: int = option(32, "positions per window whose weights are compared", at_least=1)
    text: str | None = option(None, "a UTF-8 file of prose; default: the English prose of Python's manual")

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        task = Perplexity(target=self.length // 2, text=self.text)
        rows = torch.linspace(self.length // 4, self.length - 1, self.queries).round().long().unique()
        meter = Meter(rows)
        total = torch.zeros(0)
        with ModelSubject(model).session(meter.hear) as session:
            for seed in work.track(range(self.samples), "similarity", self.samples):
                example = task.example(tokenizer, self.length, seed)
                session.start()
                session.feed(torch.tensor([example.context + example.target]))
                own = layer_similarity(torch.stack([meter.weights[layer] for layer in sorted(meter.weights)]))
                total = total + own if total.numel() else own
        heard = torch.tensor(sorted(meter.weights))
        similarity = torch.full((work.identity.layers,) * 2, torch.nan, dtype=torch.float64)
        similarity[heard[:, None], heard] = (total / self.samples).cpu()
        return Found({"similarity": similarity})


@dataclass
class Meter:
    """Notes every layer's weights of some queries. rows: int64 [R]. weights: [Hq, R, N] by layer."""

    rows: Tensor
    weights: dict[int, Tensor] = field(default_factory=dict)

    def hear(self, step: Step) -> None:
        if step.window is not None:
            return
        rows = self.rows.to(step.q.device)
        found = attention_rows(step.q[:, :, rows], step.k, scale=step.scale, positions=Positions(q=rows[None]))
        self.weights[step.layer] = found[0]
