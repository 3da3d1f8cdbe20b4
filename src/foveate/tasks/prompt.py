"""From texts to token ids of an exact length.

A `Draft` says what a prompt looks like with k units of filler (sentences, list items, pairs). `assemble` finds the
largest k that fits, by interpolation on whole encodings, and closes the gap that is left, always less than a
unit, with the first tokens of the draft's padding. So every token but the last few of the context is what the
tokenizer makes of the whole text, and the sum is exact for any tokenizer.

Cost: about five encodings of the context; linear in its length.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from foveate.errors import OptionError

# Room for what a model writes beside its answers: " and " at each, a few words in all.
_TOKENS_BESIDE_EACH = 2
_TOKENS_IN_ALL = 5
_INTERPOLATIONS = 8


@dataclass(frozen=True)
class Question:
    """A question, the cue with which the answer begins, and the strings expected after it.

    In a chat template the cue opens the model's reply; otherwise it follows the question.
    `lead` stands between the context and the question; `reply` is what a perfect model writes after the cue (by
    default the answers, with commas) and says how many tokens it may write.
    """

    text: str
    cue: str
    answers: tuple[str, ...]
    reply: str = ""
    max_new_tokens: int | None = None
    lead: str = "\n\n"


@dataclass(frozen=True)
class Draft:
    """A prompt of variable length.

    body: the context's text with k units of filler, k >= 0; its tokens grow with k.
    padding: what fills the gap of less than a unit, at the context's end; begins with the space or line break that
        sets it apart, and is repeated as often as needed.
    most: the largest k that `body` takes; None when there is no end.
    depth, meta: as in `Example`.
    """

    body: Callable[[int], str]
    padding: str
    questions: tuple[Question, ...]
    most: int | None = None
    depth: float | None = None
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Frame:
    """The text around a context and its questions: empty for plain prompts, else from the chat template.

    opening CONTEXT question closing cue ANSWER between question closing cue ANSWER ...
    """

    opening: str = ""
    closing: str = ""
    between: str = ""
    special_tokens: bool = True


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of `text` alone: nothing is added before or after it."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def beginning(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token where the tokenizer puts one before a text, else nothing."""
    bos = tokenizer.bos_token_id
    first = list(tokenizer("a", verbose=False)["input_ids"])[:1]
    return first if bos is not None and first == [bos] else []


def frame(owner: str, tokenizer: Any, chat: bool) -> Frame:
    """The frame of plain prompts, or the one of the tokenizer's chat template.

    Raises OptionError when there is no chat template, or when it does not repeat the texts it is given.
    """
    if not chat:
        return Frame()
    if not getattr(tokenizer, "chat_template", None):
        raise OptionError(f"{owner}: chat=True, but the tokenizer has no chat template; leave chat=False")
    marks = ("FOVEATE-FIRST", "FOVEATE-REPLY", "FOVEATE-SECOND")
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]

    def render(some: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=True)

    one, all_three = render(messages[:1]), render(messages)
    if one.count(marks[0]) != 1 or any(all_three.count(mark) != 1 for mark in marks):
        raise OptionError(f"{owner}: chat=True, but the chat template changes the text; leave chat=False")
    opening, closing = one.split(marks[0])
    between = all_three.split(marks[1])[1].split(marks[2])[0]
    return Frame(opening, closing, between, special_tokens=False)


def encode_question(
    tokenizer: Any, framed: Frame, question: Question, *, follows_answer: bool
) -> tuple[tuple[int, ...], int]:
    """The token ids of one question with its cue, and the number of tokens its answer may take."""
    start = framed.between if follows_answer and framed.between else question.lead
    # Plain prompts only: a chat template has its own text between question and reply.
    space = " " if question.text and not framed.closing else ""
    ids = encode(tokenizer, start + question.text + framed.closing + space + question.cue)
    if question.max_new_tokens is not None:
        return tuple(ids), question.max_new_tokens
    reply = encode(tokenizer, " " + (question.reply or ", ".join(question.answers)))
    return tuple(ids), len(reply) + _TOKENS_BESIDE_EACH * len(question.answers) + _TOKENS_IN_ALL


def assemble(
    owner: str, tokenizer: Any, draft: Draft, length: int, *, chat: bool, on_one_cache: bool
) -> tuple[tuple[int, ...], list[tuple[tuple[int, ...], int]], int]:
    """The context, per question its ids and its number of new tokens, and the units of filler used.

    The context and the first question are `length` tokens together. With `on_one_cache` a later question
    follows the answer before it, else the context.

    Raises OptionError when the length is below the smallest prompt, or above the largest.
    """
    framed = frame(owner, tokenizer, chat)
    questions = [
        encode_question(tokenizer, framed, each, follows_answer=on_one_cache and place > 0)
        for place, each in enumerate(draft.questions)
    ]
    start = beginning(tokenizer) if framed.special_tokens else []
    outside = len(start) + len(questions[0][0])

    def body(units: int) -> list[int]:
        return encode(tokenizer, framed.opening + draft.body(units))

    smallest = body(0)
    if outside + len(smallest) > length:
        least = outside + len(smallest)
        raise OptionError(f"{owner}: length={length}, allowed: >= {least} with this tokenizer and these options")
    units, ids = _most_that_fits(body, smallest, length - outside, draft.most)
    gap = length - outside - len(ids)
    if units == draft.most and gap:
        raise OptionError(f"{owner}: length={length}, allowed: <= {length - gap} with this tokenizer and options")
    context = start + ids + _padding(owner, tokenizer, draft.padding, gap)
    return tuple(context), questions, units


def _most_that_fits(
    body: Callable[[int], list[int]], smallest: list[int], room: int, most: int | None
) -> tuple[int, list[int]]:
    """The largest number of units whose tokens fit into `room`, and these tokens."""
    # A unit is at least one token, so `room` units are too many, or just fit.
    low, low_ids = 0, smallest
    high, high_count = room + 1 if most is None else min(room, most) + 1, None
    guess, tries = max(1, (room - len(smallest)) // 16), 0
    while high - low > 1:
        guess = min(max(guess, low + 1), high - 1)
        ids = body(guess)
        if len(ids) <= room:
            low, low_ids = guess, ids
        else:
            high, high_count = guess, len(ids)
        tries += 1
        if tries > _INTERPOLATIONS:
            guess = (low + high) // 2
        elif high_count is not None:
            guess = low + (room - len(low_ids)) * (high - low) // max(1, high_count - len(low_ids))
        else:
            guess = low + max(1, (room - len(low_ids)) * low // max(1, len(low_ids) - len(smallest)))
    return low, low_ids


def _padding(owner: str, tokenizer: Any, text: str, count: int) -> list[int]:
    if not count:
        return []
    ids = encode(tokenizer, text)
    if not ids:
        raise OptionError(f"{owner}: the tokenizer makes no tokens of {text!r}; use the model's own tokenizer")
    return (ids * (count // len(ids) + 1))[:count]
