"""Retrieval heads: which heads copy the answer out of a needle?  (arXiv 2404.15574; CompressKV, arXiv 2508.02401)

A sentence is hidden in long prose, a question asks for it, and the model answers greedily. At the step that produces
token y, with A a head's attention row over the prompt's token ids and [s, e) the answer's place in it,

    retrieval += 1 / (e - s)                 if j* = argmax_j A[j] lies in [s, e) and ids[j*] == y
    semantic  += sum over j in [s, e) of A[j], once for every i in [s, e) with ids[i] == y

A trial counts if more than half of the answer's words occur in the reply; scores are means over the trials that
count. A head above 0.1 is called a retrieval head, above 0.5 a strong one. The row belongs to the query that produced
y, i.e. to the token fed before it. GQA: scores belong to query heads.

Per decode step O(Hq N); one row per head is recomputed from q and the cached k.

Differs from the authors' code: needles are put in as tokens, at the end of a sentence, so the answer's place is known
exactly (theirs is searched for in the text tokenised anew); words are compared in lower case without stemming; needles
and filler are ours. The retrieval score can exceed 1 when the model repeats itself, as theirs; it is clipped at 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from foveate.attention.statistics import attention_rows
from foveate.errors import DataError
from foveate.methods.step import Step
from foveate.options import option
from foveate.probes.base import HeadTable, Probe, Session, Subject, empty_table
from foveate.registry import register

RETRIEVAL_ABOVE = 0.1
RECALL_ABOVE = 0.5


@dataclass(frozen=True)
class Needle:
    """A sentence `before + answer + "."`, and the question that asks for the answer."""

    before: str
    answer: str
    question: str


NEEDLES = (
    Needle(
        "The best thing to do in Lisbon on a rainy afternoon is to",
        "drink hot chocolate in the old library by the harbour",
        "What is the best thing to do in Lisbon on a rainy afternoon?",
    ),
    Needle(
        "The secret ingredient of the soup of Grandmother Ida is",
        "a large spoon of honey from roasted chestnut flowers",
        "What is the secret ingredient of the soup of Grandmother Ida?",
    ),
    Needle(
        "Everybody in the village dislikes Mr. Brown because",
        "he plays the trumpet on his balcony at four in the morning",
        "Why does everybody in the village dislike Mr. Brown?",
    ),
)


@dataclass(frozen=True)
class Trial:
    """One prompt ids int64 [1, N]; the answer's tokens lie at start..end of it."""

    ids: Tensor
    start: int
    end: int
    needle: Needle


@register(
    "retrieval-heads",
    kind="probe",
    paper="Retrieval Head Mechanistically Explains Long-Context Factuality",
    arxiv="2404.15574",
    year=2024,
    applies_to="pretrained",
)
@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(Probe):
    """Scores heads by how they attend to a needle while the model copies it into its answer."""

    needs_tokenizer: ClassVar[bool] = True

    min_length: int = option(256, "tokens of the shortest prompt", at_least=64)
    max_length: int = option(768, "tokens of the longest prompt", at_least=64)
    lengths: int = option(3, "how many lengths", at_least=1)
    depths: int = option(4, "how many depths of the needle, from the start to the end", at_least=1)
    needles: int = option(len(NEEDLES), "how many of the needles", at_least=1, at_most=len(NEEDLES))
    max_new_tokens: int = option(24, "tokens of the longest reply", at_least=1)
    chat: bool | None = option(None, "use the tokenizer's chat template; default: when it has one")

    def check(self) -> None:
        if self.max_length < self.min_length:
            raise self.refuse("max_length", f">= min_length={self.min_length}")

    def trials(self, tokenizer: Any, text: Sequence[str]) -> Iterator[Trial]:
        """Every length, depth and needle; `text` is the prose that the needle hides in."""
        lengths = torch.linspace(self.min_length, self.max_length, self.lengths).round().int().tolist()
        depths = torch.linspace(0, 1, self.depths).tolist() if self.depths > 1 else [0.5]
        template = getattr(tokenizer, "chat_template", None) is not None
        chat = template if self.chat is None else self.chat
        if chat and not template:
            raise self.refuse("chat", "False for a tokenizer without a chat template")
        for number, needle in enumerate(NEEDLES[: self.needles]):
            for length in lengths:
                for depth in depths:
                    yield make_trial(
                        tokenizer, text, needle, length, depth, skip=number * len(text) // self.needles, chat=chat
                    )

    @property
    def count(self) -> int:
        """How many trials there are."""
        return self.needles * self.lengths * self.depths

    def measure(self, subject: Subject, tokenizer: Any = None, text: Sequence[str] = ()) -> HeadTable:
        """Raises DataError when the model answers no trial: there is nothing to score then."""
        if tokenizer is None or not text:
            raise DataError("retrieval-heads needs the model's tokenizer and filler text; give both")
        return self.score(subject, tokenizer, self.trials(tokenizer, text))

    def score(self, subject: Subject, tokenizer: Any, trials: Iterator[Trial]) -> HeadTable:
        """The tables over given trials."""
        ear = Ear()
        retrieval, semantic = [], []
        with subject.session(ear.hear) as session:
            for trial in trials:
                hits, mass, reply = self._listen(session, ear, trial, tokenizer)
                if word_recall(trial.needle.answer, reply) > RECALL_ABOVE:
                    retrieval.append(hits)
                    semantic.append(mass)
        if not retrieval:
            raise DataError(
                f"the model answered none of the {self.count} needle questions, so no head can be scored; use shorter "
                "prompts (max_length), the other setting of chat, or a stronger model"
            )
        tables = {}
        for name, found in (("retrieval", retrieval), ("semantic", semantic)):
            tables[name] = empty_table(subject.identity)
            tables[name][ear.layers] = torch.stack(found).mean(0)
        tables["retrieval"] = tables["retrieval"].clamp(max=1.0)
        return HeadTable("retrieval-heads", subject.identity, tables, {"trials": self.count, "counted": len(retrieval)})

    def _listen(self, session: Session, ear: Ear, trial: Trial, tokenizer: Any) -> tuple[Tensor, Tensor, str]:
        """One trial: retrieval and semantic totals [heard layers, Hq], and the reply."""
        ids, span = trial.ids[0], (trial.start, trial.end)
        session.start()
        ear.open = False
        session.feed(trial.ids[:, :-1])
        ear.open = True
        fed, reply = trial.ids[:, -1:], []
        hits = mass = torch.zeros(())
        for _ in range(self.max_new_tokens):
            ear.rows.clear()
            token = int(session.feed(fed)[0].argmax())
            rows = ear.stacked()
            hits = hits + retrieval_hits(rows.argmax(-1), ids, *span, token)
            mass = mass + semantic_hits(rows, ids, *span, token)
            piece = tokenizer.decode([token])
            if token == tokenizer.eos_token_id or "\n" in piece:
                break
            reply.append(token)
            fed = torch.tensor([[token]])
        return hits, mass, tokenizer.decode(reply)


class Ear:
    """Notes the attention row of the single query of each decode step, by layer."""

    def __init__(self) -> None:
        self.open = False
        self.rows: dict[int, Tensor] = {}

    @property
    def layers(self) -> list[int]:
        """Layers that were heard in the last step."""
        return sorted(self.rows)

    def hear(self, step: Step) -> None:
        if self.open:
            weights = attention_rows(step.q, step.k, scale=step.scale, positions=step.positions, window=step.window)
            self.rows[step.layer] = weights[0, :, -1].cpu()

    def stacked(self) -> Tensor:
        """[heard layers, Hq, N]."""
        return torch.stack([self.rows[layer] for layer in self.layers])


def retrieval_hits(top: Tensor, ids: Tensor, start: int, end: int, token: int) -> Tensor:
    """1 / (end - start) where a head's most attended key lies in [start, end) and holds the produced token, else 0.

    top: int64 [..., Hq], index of the most attended key; it may lie beyond the prompt.
    ids: int64 [N], the prompt. token: what the step produced. Returns float32 like `top`.
    """
    inside = (top >= start) & (top < end)
    same = ids[top.clamp(max=ids.numel() - 1)] == token
    return (inside & same).float() / (end - start)


def semantic_hits(rows: Tensor, ids: Tensor, start: int, end: int, token: int) -> Tensor:
    """A head's mass on [start, end), times how often the produced token stands there: [..., Hq].

    rows: [..., Hq, N or more], the attention row of the query that produced `token`. ids: int64 [N], the prompt.
    """
    return rows[..., start:end].sum(-1) * (ids[start:end] == token).sum()


def word_recall(answer: str, reply: str) -> float:
    """Share of the answer's words, counted with repetition, that occur in the reply (ROUGE-1 recall, lower case)."""
    wanted, given = (re.findall(r"\w+", each.lower()) for each in (answer, reply))
    return sum(min(wanted.count(word), given.count(word)) for word in set(wanted)) / max(1, len(wanted))


def make_trial(
    tokenizer: Any,
    text: Sequence[str],
    needle: Needle,
    length: int,
    depth: float,
    *,
    skip: int = 0,
    chat: bool = False,
) -> Trial:
    """A prompt of `length` tokens with the needle at `depth` (0 to 1), after the nearest sentence end before it.

    text: paragraphs of filler, used from number `skip` on, round and round.
    Raises DataError when the needle and the question leave no room.
    """
    head, tail = _frame(tokenizer, needle.question, chat)
    before, answer = _ids(tokenizer, " " + needle.before), _ids(tokenizer, " " + needle.answer)
    sentence = before + answer + _ids(tokenizer, ".")
    room = length - len(head) - len(tail) - len(sentence)
    if room < 1:
        raise DataError(f"a prompt of {length} tokens has no room for needle and question ({length - room} tokens)")
    filler = _filler(tokenizer, text, room, skip)
    at = round(depth * room)
    while 0 < at < room and not tokenizer.decode([filler[at - 1]]).rstrip().endswith((".", "!", "?")):
        at -= 1
    ids = head + filler[:at] + sentence + filler[at:] + tail
    start = len(head) + at + len(before)
    return Trial(torch.tensor([ids]), start, start + len(answer), needle)


def _frame(tokenizer: Any, question: str, chat: bool) -> tuple[list[int], list[int]]:
    """Tokens before and after the context."""
    asked = f"\n\nBased on the text above.\nQuestion: {question}\nAnswer:"
    if chat:
        mark = "\0"
        whole = tokenizer.apply_chat_template(
            [{"role": "user", "content": mark + asked}], tokenize=False, add_generation_prompt=True
        )
        opening, asked = whole.split(mark)
        return _ids(tokenizer, opening), _ids(tokenizer, asked)
    first = tokenizer.bos_token_id
    return ([] if first is None else [first]), _ids(tokenizer, asked)


def _filler(tokenizer: Any, text: Sequence[str], count: int, skip: int) -> list[int]:
    found: list[int] = []
    at = skip
    while len(found) < count:
        found += _ids(tokenizer, ("" if not found else "\n\n") + text[at % len(text)])
        at += 1
    return found[:count]


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return found
