"""What the claims about eviction share: retrieval and next-token loss of a model under methods.

Every script takes --device, --length, --seeds, --dtype and --out.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from claim import parser

from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.hf.models import default_model
from foveate.hf.stats import Stats
from foveate.tasks.base import Task


def arguments(doc: str | None, *, length: int, seeds: int) -> argparse.Namespace:
    return parser(doc, device="cpu", length=length, seeds=seeds, dtype="float32").parse_args()


def load(given: argparse.Namespace) -> tuple[Any, Any]:
    model, tokenizer = default_model(dtype=given.dtype)
    return model.to(given.device), tokenizer


@torch.no_grad()
def losses(model: Any, run: Any, pieces: Sequence[Sequence[int]], answer: Sequence[int]) -> tuple[torch.Tensor, float]:
    """Feed `pieces` in turn, then the answer token by token.

    Returns the answer's log-likelihoods [n, 2] (natural log; 1 where the token was the most likely one) and the keys
    held per KV head at the end, in the mean.
    """
    held = {cache_keyword(model): run.new_cache()}
    for piece in pieces:
        logits = model(torch.tensor([piece], device=model.device), **held).logits[0, -1]
    if run.runtime.chunked:
        run.finish_prefill()
    rows = []
    for token in answer:
        rows.append((float(F.log_softmax(logits.float(), -1)[token]), float(int(logits.argmax()) == token)))
        logits = model(torch.tensor([[token]], device=model.device), **held).logits[0, -1]
    return torch.tensor(rows), keys_held(run.stats)


def retrieval(
    model: Any,
    tokenizer: Any,
    methods: Sequence[str],
    task: Task,
    given: argparse.Namespace,
    *,
    question_seen: bool,
    chunk: int | None = None,
) -> list[dict[str, Any]]:
    """Per method: share of answers that greedy decoding gives, the answers' loss per token, and the keys held.

    question_seen: the prompt ends with the question (else the method decides after the context). chunk: the context
    comes in pieces of so many tokens.
    """
    rows = []
    examples = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    for method in methods:
        found, loss, stored = [], [], []
        for example in examples:
            turn = example.turns[0]
            answer = tokenizer.encode(" " + turn.answers[0], add_special_tokens=False)
            context, question = list(example.context), list(turn.question)
            pieces = [context + question] if question_seen else [context, question]
            if chunk is not None:
                pieces = [context[start : start + chunk] for start in range(0, len(context), chunk)] + [question]
            with apply(model, method, chunked=chunk is not None) as run:
                likely, held = losses(model, run, pieces, answer)
            found.append(float(likely[:, 1].min()))
            loss.append(-float(likely[:, 0].mean()))
            stored.append(held)
        rows.append({"method": method, "found": mean(found), "answer_loss": mean(loss), "keys_held": mean(stored)})
        print(rows[-1], flush=True)
    return rows


def next_token(
    model: Any, tokenizer: Any, methods: Sequence[str], task: Task, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Per method: perplexity of each window's last tokens, fed one by one after one prompt, and the keys held."""
    rows = []
    examples = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    for method in methods:
        loss, stored = [], []
        for example in examples:
            with apply(model, method) as run:
                likely, held = losses(model, run, [list(example.context)], example.target)
            loss.append(-float(likely[:, 0].mean()))
            stored.append(held)
        rows.append({"method": method, "perplexity": math.exp(mean(loss)), "keys_held": mean(stored)})
        print(rows[-1], flush=True)
    return rows


def keys_held(stats: Stats) -> float:
    """Keys per KV head after the last step, in the mean."""
    return mean([length for layer in stats.lengths for length in layer])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
