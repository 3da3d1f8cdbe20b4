"""Rolling perplexity: how well the next words of a long text are predicted.

The text is read as one stream of tokens. Seed s stands for the s-th window of `length` tokens; its last `target`
tokens are scored, given all before them in the window. The windows of following seeds move on by `target`, so
they score each token of the text once (until the text ends: then the seeds begin again).

    perplexity = exp( -(1 / target) sum of log p(token | tokens before it in the window) )

The runner sums over seeds with `perplexity_from_nll`. The beginning-of-sequence token, where the tokenizer has
one, opens every window and counts.

Differs from other definitions: no stride option (it is `target`); the windows' first tokens are only context.

Errors: `length` must leave room for context, and must not exceed the text; OptionError names the bound. A text file
that cannot be read raises DataError. Cost: one encoding of the whole text per example.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from foveate.errors import OptionError
from foveate.options import option
from foveate.registry import register
from foveate.tasks.base import Example, Task, check_length
from foveate.tasks.prompt import beginning, encode
from foveate.tasks.text import paragraphs


@register(
    "perplexity",
    kind="task",
    paper="Efficient Streaming Language Models with Attention Sinks",
    arxiv="2309.17453",
    year=2023,
    applies_to="causal language models",
)
@dataclass(frozen=True, kw_only=True)
class Perplexity(Task):
    """Predict the last tokens of successive windows of a long text."""

    measure: ClassVar[str] = "perplexity"

    target: int = option(256, "tokens scored at each window's end", at_least=1)
    text: str | None = option(None, "UTF-8 text file; None: Python's manual")

    def check(self) -> None:
        if self.text is not None:
            paragraphs(self.text)

    def example(self, tokenizer: Any, length: int, seed: int) -> Example:
        check_length(self, length)
        start = beginning(tokenizer)
        least = len(start) + 1 + self.target
        if length < least:
            raise OptionError(f"perplexity: length={length}, allowed: >= {least} with target={self.target}")
        stream = encode(tokenizer, "\n\n".join(paragraphs(self.text)))
        room = length - len(start)
        if room > len(stream):
            most = len(stream) + len(start)
            raise OptionError(f"perplexity: length={length}, allowed: <= {most} tokens of this text; give text=PATH")
        windows = (len(stream) - room) // self.target + 1
        window = seed % windows
        ids = stream[window * self.target : window * self.target + room]
        context = (*start, *ids[: -self.target])
        meta = {"window": window, "windows": windows}
        return Example(context, (), length, seed, None, meta, tuple(ids[-self.target :]))
