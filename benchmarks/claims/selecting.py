"""What the claims about selection share: how far a method's next-token distributions are from the dense model's."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from keeping import mean
from torch import Tensor

from foveate.hf import apply
from foveate.hf.compat import cache_keyword
from foveate.methods import Method
from foveate.methods.base import describe
from foveate.tasks.perplexity import Perplexity


@torch.no_grad()
def distributions(model: Any, method: str | Method, prompt: Sequence[int], text: Sequence[int]) -> tuple[Tensor, Any]:
    """Log-probabilities [len(text), vocabulary] after the prompt and after each token of the text but the last, and
    the request's statistics."""
    with apply(model, method) as run:
        held = {cache_keyword(model): run.new_cache()}
        rows = [model(torch.tensor([list(prompt)], device=model.device), **held).logits[0, -1]]
        for token in text[:-1]:
            rows.append(model(torch.tensor([[token]], device=model.device), **held).logits[0, -1])
        stats = run.stats
    return F.log_softmax(torch.stack(rows).float(), -1), stats


def divergence(
    model: Any, tokenizer: Any, methods: Sequence[str | Method], given: argparse.Namespace, steps: int = 64
) -> list[dict[str, Any]]:
    """Per method, over the last `steps` tokens of each window, fed one by one after one prompt: the mean KL divergence
    from the dense model in nats, the share of steps with its most likely token, perplexity, and decode density."""
    task = Perplexity(target=steps)
    windows = [task.example(tokenizer, given.length, seed) for seed in range(given.seeds)]
    dense = [distributions(model, "full", each.context, each.target)[0] for each in windows]
    rows = []
    for method in ["full", *methods]:
        kl, same, loss, density = [], [], [], []
        for window, expected in zip(windows, dense):
            made, stats = distributions(model, method, window.context, window.target)
            kl.append(float(F.kl_div(made, expected, log_target=True, reduction="none").sum(-1).mean()))
            same.append(float((made.argmax(-1) == expected.argmax(-1)).float().mean()))
            loss.append(-float(made.gather(1, torch.tensor(window.target, device=made.device)[:, None]).mean()))
            density.append(stats.decode_density or 0.0)
        name = method if isinstance(method, str) else describe(method)
        rows.append(
            {
                "method": name,
                "kl_to_dense": mean(kl),
                "same_token": mean(same),
                "perplexity": math.exp(mean(loss)),
                "decode_density": mean(density),
            }
        )
        print(rows[-1], flush=True)
    return rows
