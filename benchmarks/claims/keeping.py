"""What the claims about eviction share: retrieval and next-token loss of a model under methods, and the result file.

Every script takes --length, --seeds, --dtype, --device and --out, and writes <out>/<system>.json (by default in
benchmarks/results/claims).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from foveate.compare.environment import environment, model_facts
from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.hf.models import default_model
from foveate.tasks.base import Task

RESULTS = Path(__file__).parents[1] / "results" / "claims"


def arguments(doc: str | None, *, length: int, seeds: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=length)
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


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
    lengths = [length for layer in run.stats.lengths for length in layer]
    return torch.tensor(rows), sum(lengths) / len(lengths)


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


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def record(name: str, claim: str, model: Any, given: argparse.Namespace, started: float, **rows: Any) -> None:
    """Write what came out, with what it was made on."""
    given.out.mkdir(parents=True, exist_ok=True)
    made = {
        "claim": claim,
        "settings": {key: value for key, value in vars(given).items() if key != "out"},
        "environment": environment(model),
        "model": model_facts(model),
        "seconds": round(time.perf_counter() - started, 1),
        **rows,
    }
    (given.out / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")
    print(given.out / f"{name}.json")
