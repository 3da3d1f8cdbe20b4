"""Echo and induction heads: who finds earlier copies of the current token?  (RazorAttention, arXiv 2407.15891)

A block of K random tokens is repeated R times, so that nothing but the repetition can be attended to by meaning. With
A the attention row of a query at position t >= K,

    echo(t)      = sum over m >= 1 of A[t, t - m K]         mass on earlier copies of the current token
    induction(t) = sum over m >= 1 of A[t, t - m K + 1]     mass on the token that followed an earlier copy

and a head's score is the mean over `samples` evenly spaced t in repeats 2..R. One prefill of R K tokens; the rows are
recomputed from q and k in pieces: O(samples x R K) memory per head piece, never N x N.

Differs from the paper: K is 250 by default (there 2500, for models of long context); t is sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from foveate.attention.positions import Positions
from foveate.attention.statistics import attention_rows
from foveate.methods.step import Step
from foveate.options import option
from foveate.probes.base import HeadTable, Probe, Subject, empty_table
from foveate.registry import register

ROWS = 32


@register(
    "echo-heads",
    kind="probe",
    paper="RazorAttention: Efficient KV Cache Compression Through Retrieval Heads",
    arxiv="2407.15891",
    year=2024,
    applies_to="pretrained",
)
@dataclass(frozen=True, kw_only=True)
class EchoHeads(Probe):
    """Scores heads by the mass they put on earlier copies of the current token, and on what followed them."""

    tokens: int = option(250, "random tokens in the repeated block (K)", at_least=2)
    repeats: int = option(4, "how often the block stands in the prompt", at_least=2)
    samples: int = option(256, "queries that are looked at, evenly spaced over repeats 2 and later", at_least=1)
    seed: int = option(0, "seed of the random tokens", at_least=0)

    def prompt(self, vocabulary: int, special: Sequence[int]) -> Tensor:
        """int64 [1, repeats * tokens]: the repeated block."""
        allowed = torch.ones(vocabulary, dtype=torch.bool)
        allowed[[each for each in special if each < vocabulary]] = False
        ids = allowed.nonzero()[:, 0]
        drawn = torch.randint(ids.numel(), (self.tokens,), generator=torch.Generator().manual_seed(self.seed))
        return ids[drawn].repeat(self.repeats)[None]

    def measure(self, subject: Subject, tokenizer: Any = None, text: Sequence[str] = ()) -> HeadTable:
        echo, induction = empty_table(subject.identity), empty_table(subject.identity)

        def hear(step: Step) -> None:
            at = sample_queries(self.tokens, self.repeats, self.samples).to(step.q.device)
            scores = echo_scores(step.q[:, :, at], step.k, at, self.tokens, scale=step.scale)
            echo[step.layer], induction[step.layer] = (each[0].cpu() for each in scores)

        special = [] if tokenizer is None else list(tokenizer.all_special_ids)
        with subject.session(hear) as session:
            session.feed(self.prompt(subject.vocabulary, special))
        facts = {"tokens": self.tokens, "repeats": self.repeats, "samples": self.samples, "seed": self.seed}
        return HeadTable("echo-heads", subject.identity, {"induction": induction, "echo": echo}, facts)


def sample_queries(tokens: int, repeats: int, samples: int) -> Tensor:
    """Positions int64 of at most `samples` queries, evenly spaced over repeats 2 and later."""
    count = tokens * (repeats - 1)
    return tokens + torch.linspace(0, count - 1, min(samples, count)).round().long().unique()


def echo_scores(q: Tensor, k: Tensor, at: Tensor, tokens: int, *, scale: float) -> tuple[Tensor, Tensor]:
    """Echo and induction score of each head, both [B, Hq] float32.

    q: [B, Hq, S, D], the queries at positions `at` int64 [S], all >= tokens.
    k: [B, Hkv, N, D], keys of a prompt that repeats with period `tokens`, from position 0 on.
    """
    N = k.shape[2]
    echo = torch.zeros(q.shape[:2], device=q.device)
    induction = torch.zeros_like(echo)
    keys = torch.arange(N, device=q.device)
    for some, rows in zip(at.split(ROWS), q.split(ROWS, dim=2)):
        weights = attention_rows(rows, k, scale=scale, positions=Positions(some.expand(q.shape[0], -1)))
        back = some[:, None] - keys
        copies = (back > 0) & (back % tokens == 0)
        # What followed a copy stands one later; nothing precedes key 0.
        followers = (back > 0) & ((back + 1) % tokens == 0) & (keys > 0)
        echo += (weights * copies).sum((2, 3))
        induction += (weights * followers).sum((2, 3))
    return echo / at.numel(), induction / at.numel()
