"""The head table of needle trials: retrieval and semantic score of every query head, [layers, Hq]."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from foveate.hf.calibrations.base import Calibration, Found, Work, calibration
from foveate.hf.subject import ModelSubject
from foveate.options import option
from foveate.probes.base import HeadTable
from foveate.probes.retrieval_heads import NEEDLES, RetrievalHeads
from foveate.tasks.text import paragraphs


@dataclass(frozen=True, kw_only=True)
class NeedleSettings(Calibration):
    """Settings of the needle trials (probes.retrieval_heads)."""

    min_length: int = option(256, "tokens of the shortest prompt", at_least=64)
    max_length: int = option(768, "tokens of the longest prompt", at_least=64)
    lengths: int = option(3, "how many lengths", at_least=1)
    depths: int = option(4, "how many depths of the needle", at_least=1)
    needles: int = option(len(NEEDLES), "how many of the needles", at_least=1, at_most=len(NEEDLES))
    max_new_tokens: int = option(24, "tokens of the longest reply", at_least=1)
    chat: bool | None = option(None, "use the tokenizer's chat template; default: when it has one")
    text: str | None = option(None, "a UTF-8 file of filler prose; default: the English prose of Python's manual")

    def check(self) -> None:
        if self.max_length < self.min_length:
            raise self.refuse("max_length", f">= min_length={self.min_length}")

    @property
    def probe(self) -> RetrievalHeads:
        return RetrievalHeads(
            min_length=self.min_length,
            max_length=self.max_length,
            lengths=self.lengths,
            depths=self.depths,
            needles=self.needles,
            max_new_tokens=self.max_new_tokens,
            chat=self.chat,
        )

    def head_table(self, model: Any, tokenizer: Any, work: Work) -> HeadTable:
        probe = self.probe
        trials = work.track(probe.trials(tokenizer, paragraphs(self.text)), "needles", probe.count)
        return probe.score(ModelSubject(model), tokenizer, trials)


@calibration("retrieval-heads")
@dataclass(frozen=True, kw_only=True)
class RetrievalHeadsCalibration(NeedleSettings):
    """Needle trials over lengths, depths and needles."""

    def run(self, model: Any, tokenizer: Any, work: Work) -> Found:
        table = self.head_table(model, tokenizer, work)
        return Found(table.tables, table.facts)
