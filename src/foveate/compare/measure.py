"""One example through one method: what it answers, how long it takes and what it holds.

    query-aware        the first forward reads context and question; compression sees the question
    query-agnostic     the context is read (and compressed) first, the question follows as an extension
    turns              on one kept cache with the answers in it, or each on a copy of the context's cache; a
                       query-aware turn that does not share reads the whole prompt again, as a request of its own
    time to first token   all that precedes the first token of the first answer, context and question
    decode speed       tokens after the first of every answer over the time of their forwards; when the answers
                       are shorter than `min_decode_tokens`, further tokens are decoded, timed and not scored
    perplexity         the target is read with the method in place, `stride` tokens at a time (1: as in decoding)

Batch 1, greedy, no gradients: what `generate()` does, without its bookkeeping.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from foveate.compare.memory import PeakMemory
from foveate.compare.subject import Figures, MeasuredRun, Subject
from foveate.errors import FoveateError


@dataclass(frozen=True)
class Ways:
    """How examples are run; the same for every cell of a comparison."""

    query_aware: bool = True
    stride: int = 1
    min_decode_tokens: int = 8


@dataclass
class Timing:
    """Seconds up to the first token, and seconds and number of the decode steps after it."""

    ttft_s: float | None = None
    decode_s: float = 0.0
    decode_steps: int = 0

    @property
    def decode_tokens_per_s(self) -> float | None:
        return self.decode_steps / self.decode_s if self.decode_steps else None


@dataclass
class Request:
    """One cache being read into and written from. `left` are tokens said but not yet in the cache."""

    subject: Subject
    cache: Any
    timing: Timing = field(default_factory=Timing)
    left: tuple[int, ...] = ()
    reading_s: float = 0.0
    next: int | None = None

    def read(self, ids: Sequence[int]) -> None:
        """Put tokens into the cache; afterwards `next` is the most likely token."""
        with self.subject.timed() as watch:
            self.next = int(self.subject.logits((*self.left, *ids), self.cache)[-1].argmax())
        self.reading_s += watch.seconds
        self.left = ()

    def write(self, limit: int) -> list[int]:
        """Greedy tokens, at most `limit` and without the one that ends them."""
        if self.timing.ttft_s is None:
            self.timing.ttft_s = self.reading_s
        said = self._decode(limit, self.subject.eos)
        if said and said[-1] in self.subject.eos:
            return said[:-1]
        self.left = tuple(said[-1:])
        return said

    def _decode(self, limit: int, stop: frozenset[int]) -> list[int]:
        assert self.next is not None
        said = [self.next][:limit]
        with self.subject.timed() as watch:
            while said and len(said) < limit and said[-1] not in stop:
                said.append(int(self.subject.logits(said[-1:], self.cache)[-1].argmax()))
        self.timing.decode_s += watch.seconds
        self.timing.decode_steps += max(0, len(said) - 1)
        self.next = said[-1] if said else self.next
        return said

    def time_more(self, steps: int) -> None:
        """Decode on, for the clock only, until `steps` were timed."""
        if self.timing.decode_steps < steps:
            self._decode(1 + steps - self.timing.decode_steps, frozenset())

    def fork(self) -> Request:
        """The same request on a copy of its cache."""
        return Request(self.subject, copy.deepcopy(self.cache), self.timing, self.left, self.reading_s, self.next)


@dataclass(frozen=True)
class Measured:
    """What one cell found.

    score: 0 to 1, or None for perplexity, which has nll_sum (natural log) over nll_count tokens instead.
    prompt_tokens: tokens read before the first one came.
    """

    score: float | None
    nll_sum: float | None
    nll_count: int
    outputs: list[str]
    prompt_tokens: int
    ttft_s: float | None
    decode_tokens_per_s: float | None
    peak_bytes: int | None
    figures: Figures

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(subject: Subject, run: MeasuredRun, tokenizer: Any, task: Any, example: Any, ways: Ways) -> Measured:
    """Run one example; the model must be under the method already (see subject.on)."""
    with torch.no_grad(), PeakMemory(subject.model.device) as peak:
        if task.measure == "perplexity":
            found = _likelihood(subject, run, example, ways.stride)
            outputs, score = [], None
        else:
            found, answers = _answers(subject, run, example, task.turns_share_cache, ways)
            outputs = [tokenizer.decode(each, skip_special_tokens=True) for each in answers]
            score = float(task.score(outputs, example))
    return Measured(
        score=score,
        nll_sum=found.nll_sum,
        nll_count=found.nll_count,
        outputs=outputs,
        prompt_tokens=found.prompt_tokens,
        ttft_s=found.timing.ttft_s,
        decode_tokens_per_s=found.timing.decode_tokens_per_s,
        peak_bytes=peak.bytes,
        figures=found.figures,
    )


@dataclass(frozen=True)
class _Found:
    timing: Timing
    figures: Figures
    prompt_tokens: int
    nll_sum: float | None = None
    nll_count: int = 0


def _answers(
    subject: Subject, run: MeasuredRun, example: Any, share: bool, ways: Ways
) -> tuple[_Found, list[list[int]]]:
    timing = Timing()
    answers: list[list[int]] = []
    figures: list[Figures] = []
    base = Request(subject, run.new_cache(), timing)
    if not ways.query_aware:
        base.read(example.context)
    request = base
    for turn_number, turn in enumerate(example.turns):
        last = turn_number == len(example.turns) - 1
        if share:
            context = example.context if ways.query_aware and turn_number == 0 else ()
        elif ways.query_aware:
            request = base if turn_number == 0 else Request(subject, run.new_cache(), timing)
            context = example.context
        else:
            # The last turn may have the original: nobody needs it any more.
            request = base if last else base.fork()
            context = ()
        request.read((*context, *turn.question))
        answers.append(request.write(turn.max_new_tokens))
        if last or not share:
            figures.append(run.figures(request.cache))
    request.time_more(ways.min_decode_tokens)
    prompt = len(example.context) + len(example.turns[0].question)
    return _Found(timing, _together(figures), prompt), answers


def _together(figures: list[Figures]) -> Figures:
    """Of several requests: the mean densities and recall, and what the largest cache held."""
    largest = max(figures, key=lambda each: each.cache_bytes)
    means = {
        name: _mean([getattr(each, name) for each in figures])
        for name in ("density", "prefill_density", "decode_density", "recall")
    }
    return Figures(
        cache_bytes=largest.cache_bytes,
        lengths=largest.lengths,
        tokens_seen=largest.tokens_seen,
        kept=largest.kept,
        host_bytes=largest.host_bytes,
        **means,
    )


def _mean(values: list[float | None]) -> float | None:
    known = [each for each in values if each is not None]
    return fmean(known) if known else None


def _likelihood(subject: Subject, run: MeasuredRun, example: Any, stride: int) -> _Found:
    """Log-likelihood of the target under teacher forcing: the token before each piece predicts its first token."""
    cache = run.new_cache()
    target = torch.tensor(example.target, device=subject.model.device)
    with subject.timed() as reading:
        logits = subject.logits(example.context, cache)
    with subject.timed() as decoding:
        nll = _nll(logits, target[:1])
        # The last target token predicts nothing that is scored, so it is not read.
        for start in range(0, len(target) - 1, stride):
            stop = min(start + stride, len(target) - 1)
            logits = subject.logits(example.target[start:stop], cache, last=stop - start)
            nll = nll + _nll(logits, target[start + 1 : stop + 1])
        total = float(nll)
    if not math.isfinite(total):
        raise FoveateError(f"the model's log-likelihoods are not finite (their sum is {total}); try dtype float32")
    timing = Timing(reading.seconds, decoding.seconds, len(target) - 1)
    return _Found(timing, run.figures(cache), len(example.context), total, len(target))


def _nll(logits: Tensor, tokens: Tensor) -> Tensor:
    """Summed negative log-likelihood, float64: logits [n, V], tokens [n]."""
    return -logits.float().log_softmax(-1).gather(1, tokens[:, None]).double().sum()


def warm_up(subject: Subject, run: MeasuredRun, ids: Sequence[int]) -> None:
    """Run once, untimed: allocators, thread pools and lazily loaded weights settle."""
    with torch.no_grad():
        request = Request(subject, run.new_cache())
        request.read(ids)
        request.write(3)
