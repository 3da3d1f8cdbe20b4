"""Contextual memory's claim in small: a model that sees 512 tokens at a time recalls facts that stand 2000 tokens
earlier once a memory of hidden states is trained for it, which the window alone cannot.

    python benchmarks/claims/cmr.py [--device cuda] [--steps 150]

A text: sentences that give people colours, Python's manual, and the people's colours asked again. The bundled model is
frozen.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import Any

import torch
from claim import parser, record

from foveate.hf.models import default_model
from foveate.lm.cmr import Reweaving, fit, memory_for
from foveate.lm.data import PackedText, read_documents
from foveate.lm.synthetic import IGNORED, TEST_SEEDS

NAMES = [
    "Anna",
    "Bob",
    "Carl",
    "Dora",
    "Emma",
    "Frank",
    "Grace",
    "Henry",
    "Ivan",
    "Jack",
    "Kate",
    "Leo",
    "Mary",
    "Nick",
]
COLOURS = [" red", " blue", " green", " black", " white", " brown", " pink", " orange", " purple", " yellow", " gray"]
MODELS: dict[str, dict[str, Any] | None] = {
    "window only": None,
    "memory of three layers": {},
    "memory of one layer": {"captured": 1},
    "memory without training": {"trained": False},
}
CLAIM = "with a trained memory of hidden states a model recalls facts from far before its window"


def texts(tokenizer: Any, count: int, seed: int, given: argparse.Namespace) -> PackedText:
    """Texts with targets at the asked colours alone."""
    source = random.Random(seed)
    manual = tokenizer("\n".join(read_documents(("manual",))), add_special_tokens=False, verbose=False).input_ids
    tokens = torch.zeros(count, given.length, dtype=torch.int64)
    targets = torch.full_like(tokens, IGNORED)
    for row in range(count):
        people = source.sample(NAMES, given.facts)
        facts = {name: source.choice(COLOURS) for name in people}
        told = "".join(f"The colour of {name} is{colour}.\n" for name, colour in facts.items())
        ids, asked = tokenizer(told, add_special_tokens=False).input_ids, []
        for name in source.sample(people, len(people)):
            question = tokenizer(f"The colour of {name} is", add_special_tokens=False).input_ids
            answer = tokenizer(facts[name], add_special_tokens=False).input_ids
            asked.append((question, answer[0], tokenizer(".\n", add_special_tokens=False).input_ids))
        room = given.length - len(ids) - sum(len(q) + 1 + len(end) for q, _, end in asked)
        start = source.randrange(len(manual) - room)
        ids = ids + manual[start : start + room]
        for question, answer, end in asked:
            ids = ids + question
            targets[row, len(ids) - 1] = answer
            ids = [*ids, answer, *end]
        tokens[row] = torch.tensor(ids)
    return PackedText(tokens, targets)


@torch.no_grad()
def recall(run: Reweaving, test: PackedText, given: argparse.Namespace) -> float:
    """Share of asked colours that are the most likely next token."""
    right = []
    for tokens, targets in zip(test.tokens.split(given.batch), test.targets.split(given.batch)):
        scores, _ = run(tokens.to(given.device))
        said = scores.argmax(-1).cpu()
        right.append((said == targets)[targets != IGNORED])
    return round(float(torch.cat(right).float().mean()), 4)


def main() -> None:
    made = parser(__doc__, length=2560, segment=512, facts=8, steps=150, batch=8, dtype="bfloat16", seed=0)
    made.add_argument("--train", type=int, default=1000, help="training texts")
    made.add_argument("--test", type=int, default=64, help="test texts")
    made.add_argument("--rate", type=float, default=1e-3, help="1e-4 is for long training")
    given = made.parse_args()
    started = time.perf_counter()
    model, tokenizer = default_model(dtype=given.dtype, device=given.device)
    train = texts(tokenizer, given.train, given.seed, given)
    test = texts(tokenizer, given.test, TEST_SEEDS + given.seed, given)
    rows = []
    for name, options in MODELS.items():
        memory = memory_for(model, segment=given.segment, seed=given.seed, **(options or {}))
        losses = []
        if options is not None and memory.trained:
            losses = fit(model, memory, train, steps=given.steps, batch=given.batch, rate=given.rate, seed=given.seed)
        # An untrained memory with weights changes nothing: it is the window.
        with Reweaving(model, memory) as run:
            rows.append(
                {"model": name, "recall": recall(run, test, given), "losses": losses[:: max(1, given.steps // 10)]}
            )
        print(rows[-1], flush=True)
        record("cmr", CLAIM, given, started, chance=1 / len(COLOURS), rows=rows)


if __name__ == "__main__":
    main()
