"""Bottlenecked Transformers' claim in small: a frozen model whose cache is rewritten after every step reasons better
than the model itself and than an adapter of the same size, also in longer chains than it was trained on.

    python benchmarks/claims/bottlenecked.py [--device cuda] [--steps 1500]

A question gives a start and operations; its solution writes the value after each one on a line of its own, mod 23:
    "7 +5 *3 -9"  ->  "12\\n13\\n4\\n"                        (12; 36 mod 23; 13 - 9)
A solution counts when generation gives all of its lines.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from typing import Any

import torch
import torch.nn.functional as F
from claim import parser, record
from transformers import LlamaConfig, LlamaForCausalLM

from foveate.hf.finetune import lora
from foveate.lm.bottlenecked import Bottlenecked, Solutions, encode, fit, newline_tokens, processor_for
from foveate.lm.data import load_tokenizer
from foveate.lm.synthetic import IGNORED, TEST_SEEDS

MODULUS = 23
CLAIM = "rewriting the cache after steps solves more chains than the model or an adapter of that size"


def chains(count: int, length: tuple[int, int], seed: int) -> list[tuple[str, str]]:
    """Questions with their solutions, of length[0] to length[1] operations."""
    source, pairs = random.Random(seed), []
    for _ in range(count):
        value = source.randrange(MODULUS)
        question, lines = [str(value)], []
        for _ in range(source.randint(*length)):
            sign, by = source.choice("+-*"), source.randrange(1, 10)
            value = {"+": value + by, "-": value - by, "*": value * by}[sign] % MODULUS
            question.append(f"{sign}{by}")
            lines.append(f"{value}\n")
        pairs.append((" ".join(question) + "=", "".join(lines)))
    return pairs


def make_model(vocab: int, end: int, given: argparse.Namespace) -> LlamaForCausalLM:
    torch.manual_seed(given.seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=given.dim,
        intermediate_size=3 * given.dim,
        num_hidden_layers=given.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        eos_token_id=end,
        bos_token_id=end,
    )
    return LlamaForCausalLM(config).to(given.device)


def train(model: Any, data: Solutions, steps: int, rate: float, given: argparse.Namespace) -> float:
    """Next-token training on solutions of whatever takes gradients; returns the mean loss of the last steps."""
    parameters = [each for each in model.parameters() if each.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    source = torch.Generator().manual_seed(given.seed)
    losses = []
    for step in range(steps):
        rows = torch.randint(len(data.tokens), (given.batch,), generator=source)
        length = int(data.length[rows].max())
        tokens = data.tokens[rows, :length]
        at = torch.arange(length)[None]
        asked = (at >= data.prompt[rows, None]) & (at < data.length[rows, None])
        labels = tokens.masked_fill(~asked, IGNORED)[:, 1:].to(given.device)
        scores = model(input_ids=tokens.to(given.device), use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(scores.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 0.55 + 0.45 * math.cos(math.pi * step / steps))
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return sum(losses[-20:]) / len(losses[-20:])


def solved(run: Bottlenecked, tokenizer: Any, pairs: list[tuple[str, str]]) -> float:
    """Share of questions whose solution generation gives in full."""
    asked = [tokenizer(question, add_special_tokens=False).input_ids for question, _ in pairs]
    width = max(map(len, asked))
    ids = torch.tensor([[0] * (width - len(each)) + each for each in asked], device=run.model.device)
    real = torch.tensor([[False] * (width - len(each)) + [True] * len(each) for each in asked], device=run.model.device)
    room = max(len(tokenizer(solution, add_special_tokens=False).input_ids) for _, solution in pairs) + 1
    said = run.generate(ids, room, real)[:, width:]
    texts = [text.split(tokenizer.eos_token)[0] for text in tokenizer.batch_decode(said)]
    return sum(text == solution for text, (_, solution) in zip(texts, pairs)) / len(pairs)


def main() -> None:
    made = parser(__doc__, batch=64, dim=128, layers=4, train=20000, test=256, rate=1e-3, seed=0)
    made.add_argument("--steps", type=int, default=1500, help="of the model; processor and adapter take a fifth")
    made.add_argument("--width", type=int, default=64, help="of the processor")
    made.add_argument("--operations", type=int, nargs="+", default=[4, 6, 8], help="up to the first is trained on")
    given = made.parse_args()
    started = time.perf_counter()
    tokenizer = load_tokenizer("bytes")
    data = encode(tokenizer, chains(given.train, (2, given.operations[0]), given.seed))
    tests = {each: chains(given.test, (each, each), TEST_SEEDS + given.seed) for each in given.operations}
    newlines = newline_tokens(tokenizer)
    model = make_model(len(tokenizer), tokenizer.eos_token_id, given)
    loss = train(model, data, given.steps, given.rate, given)
    rows: list[dict[str, Any]] = []
    more = max(1, given.steps // 5)

    def judge(name: str, run: Bottlenecked, parameters: int, loss: float) -> None:
        found = {str(each): solved(run, tokenizer, pairs) for each, pairs in tests.items()}
        rows.append({"model": name, "parameters": parameters, "loss": loss, "solved_by_operations": found})
        print(rows[-1], flush=True)
        record("bottlenecked", CLAIM, given, started, rows=rows)

    untrained = processor_for(model, width=given.width, heads=4, seed=given.seed)
    model.eval()
    # A new processor rewrites nothing: this is the model alone.
    with Bottlenecked(model, untrained, newlines) as run:
        judge("model", run, 0, loss)
    processor = processor_for(model, width=given.width, heads=4, seed=given.seed)
    size = sum(each.numel() for each in processor.parameters())
    with Bottlenecked(model, processor, newlines) as run:
        losses = fit(run, data, steps=more, batch=given.batch, rate=given.rate, seed=given.seed)
        judge("cache processor", run, size, sum(losses[-20:]) / len(losses[-20:]))
    rank = max(1, round(size / (given.layers * 4 * 2 * given.dim)))
    adapted = lora(model, rank=rank, alpha=2 * rank, trainable=(), seed=given.seed)
    own = sum(each.numel() for each in adapted.parameters() if each.requires_grad)
    loss = train(adapted.train(), data, more, given.rate, given)
    merged = adapted.eval().merge_and_unload()
    with Bottlenecked(merged, untrained, newlines) as run:
        judge("adapter of that size", run, own, loss)


if __name__ == "__main__":
    main()
