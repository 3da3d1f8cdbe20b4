"""What the claims about selection share: how far a method's next-token distributions are from the dense model's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from keeping import mean
from torch import Tensor

from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.hf.stats import Stats
from foveate.methods import Method
from foveate.tasks.perplexity import Perplexity

Prompt = tuple[Sequence[int], Sequence[int]]  # its tokens, and those of the text that follows


@torch.no_grad()
def distributions(
    model: Any, method: str | Method, prompt: Sequence[int], text: Sequence[int], *, first: bool = True
) -> tuple[Tensor, Stats]:
    """Log-probabilities [n, vocabulary] of a text's tokens, fed one by one after one prompt, and the statistics.

    first=False leaves out the text's first token (n = len(text) - 1): the prompt's own pass predicts it, which is dense
    under methods that act afterwards.
    """
    with apply(model, method) as run:
        held = {cache_keyword(model): run.new_cache()}
        rows = [model(torch.tensor([[*prompt]], device=model.device), logits_to_keep=1, **held).logits[0, -1]]
        for token in text[:-1]:
            rows.append(model(torch.tensor([[token]], device=model.device), **held).logits[0, -1])
        stats = run.stats
    return F.log_softmax(torch.stack(rows if first else rows[1:]).float(), -1), stats


def distances(
    model: Any, methods: Mapping[str, str | Method], prompts: Sequence[Prompt], *, first: bool = True
) -> Iterator[tuple[dict[str, Any], float, list[Stats]]]:
    """For the dense model and each method by its label: a row with the mean KL divergence from the dense model in nats
    and the share of tokens with its likeliest one; the text's mean loss; the statistics of every prompt."""
    dense = [distributions(model, "full", *prompt, first=first)[0] for prompt in prompts]
    for label, method in {"full": "full", **methods}.items():
        kl, same, loss, stats = [], [], [], []
        for (prompt, text), expected in zip(prompts, dense):
            made, of_run = distributions(model, method, prompt, text, first=first)
            asked = torch.tensor(text[-len(made) :], device=made.device)[:, None]
            kl.append(float(F.kl_div(made, expected, log_target=True, reduction="none").sum(-1).mean()))
            same.append(float((made.argmax(-1) == expected.argmax(-1)).float().mean()))
            loss.append(-float(made.gather(1, asked).mean()))
            stats.append(of_run)
        yield {"method": label, "kl_to_dense": mean(kl), "same_token": mean(same)}, mean(loss), stats


def divergence(
    model: Any, tokenizer: Any, methods: Sequence[str], given: argparse.Namespace, steps: int = 64
) -> list[dict[str, Any]]:
    """Per method, over the last `steps` tokens of each window, fed one by one after one prompt: the mean KL divergence
    from the dense model in nats, the share of steps with its most likely token, perplexity, and decode density.

    All `steps` tokens count, as in `keeping.next_token`: a method that acts in the prompt's pass differs at the first.
    """
    task = Perplexity(target=steps)
    windows = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    prompts = [(window.context, window.target) for window in windows]
    rows = []
    for row, loss, stats in distances(model, {method: method for method in methods}, prompts):
        density = mean([each.decode_density or 0.0 for each in stats])
        rows.append({**row, "perplexity": math.exp(loss), "decode_density": density})
        print(rows[-1], flush=True)
    return rows
