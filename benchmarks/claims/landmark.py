"""Landmark Attention's claim in small: trained on short contexts, it finds what a query needs far beyond them in a few
blocks, where dense attention and a window fail.

    python benchmarks/claims/landmark.py [--device cuda] [--steps 1500] [--extra 0 256 768 1792 3840]

Keys and values stand at the start of 240 tokens and are asked later; tests put `extra` tokens of noise in between.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from foveate.compare.environment import environment
from foveate.lm import HybridConfig, HybridLM
from foveate.lm.landmarks import with_landmarks
from foveate.lm.synthetic import IGNORED, TEST_SEEDS, Examples, recall

RESULTS = Path(__file__).parents[1] / "results" / "claims"
VOCAB, NOISE = 256, 64
LANDMARK = VOCAB + NOISE
BLOCK = 17


def arguments(doc: str | None, *, steps: int) -> argparse.ArgumentParser:
    """What scripts that train small models take."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--train", type=int, default=20000, help="training examples")
    parser.add_argument("--test", type=int, default=128, help="test examples")
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser


def make_model(mixers: list[str], vocab: int, given: argparse.Namespace) -> HybridLM:
    torch.manual_seed(given.seed)
    config = HybridConfig(mixers=mixers, dim=given.dim, heads=given.heads, vocab_size=vocab)
    return HybridLM(config).to(given.device)


def fit(model: HybridLM, data: Examples, given: argparse.Namespace) -> float:
    """Train on examples in random order, AdamW with warm-up and cosine; returns the mean loss of the last steps."""
    matrices = [each for each in model.parameters() if each.dim() >= 2]
    vectors = [each for each in model.parameters() if each.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.rate, betas=(0.9, 0.95))
    warmup = max(1, given.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / given.steps))
    )
    random = torch.Generator().manual_seed(given.seed)
    model.train()
    losses = []
    for _ in range(given.steps):
        rows = torch.randint(len(data), (given.batch,), generator=random)
        inputs, labels = data.inputs[rows].to(given.device), data.labels[rows].to(given.device)
        loss = model(input_ids=inputs, shift_labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return float(torch.stack(losses[-50:]).mean())


@torch.no_grad()
def predictions(model: HybridLM, inputs: Tensor, batch: int = 16) -> Tensor:
    """The best next token at every place, [n, L]."""
    model.eval()
    found = [model(each.to(model.device), use_cache=False).logits.argmax(-1).cpu() for each in inputs.split(batch)]
    return torch.cat(found)


def accuracy(model: HybridLM, data: Examples) -> float:
    asked = data.labels != IGNORED
    return float((predictions(model, data.inputs) == data.labels)[asked].float().mean())


def record(name: str, claim: str, model: HybridLM, given: argparse.Namespace, started: float, **rows: Any) -> None:
    """Write what came out, with what it was made on."""
    given.out.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(given).items() if key != "out"}
    made = {
        "claim": claim,
        "settings": settings,
        "environment": environment(model),
        "parameters": sum(each.numel() for each in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        **rows,
    }
    (given.out / f"{name}.json").write_text(json.dumps(made, indent=2) + "\n")
    print(given.out / f"{name}.json")


def questions(count: int, pairs: int, extra: int, seed: int) -> Examples:
    """Pairs, `extra` tokens of noise, and the pairs' keys asked among more noise."""
    data = recall(count, vocab=VOCAB, length=240, pairs=pairs, queries=pairs, filler="zero", seed=seed)
    inputs = torch.cat(
        (data.inputs[:, : 2 * pairs], data.inputs.new_zeros(count, extra), data.inputs[:, 2 * pairs :]), 1
    )
    labels = F.pad(data.labels[:, 2 * pairs :], (2 * pairs + extra, 0), value=IGNORED)
    noise = torch.randint(VOCAB, LANDMARK, inputs.shape, generator=torch.Generator().manual_seed(seed))
    return Examples(torch.where(inputs == 0, noise, inputs), labels)


def marked(data: Examples) -> Examples:
    made = with_landmarks(data, block=BLOCK, landmark=LANDMARK)
    assert isinstance(made, Examples)
    return made


def main() -> None:
    started = time.perf_counter()
    parser = arguments(__doc__, steps=1500)
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 256, 768, 1792, 3840])
    parser.add_argument("--pairs", type=int, default=32)
    parser.add_argument("--retrieve", type=int, default=2)
    parser.add_argument("--layers", type=int, default=4)
    given = parser.parse_args()
    train = questions(given.train, given.pairs, 0, given.seed)
    tests = [questions(given.test, given.pairs, extra, TEST_SEEDS + given.seed) for extra in given.extra]
    landmark = f"landmark:block={BLOCK},retrieve={given.retrieve},chunk=2"
    rows: list[dict[str, Any]] = []

    def judge(name: str, model: HybridLM, loss: float, change: Callable[[Examples], Examples]) -> None:
        for data in tests:
            length = data.inputs.shape[1]
            rows.append(
                {"model": name, "length": length, "accuracy": accuracy(model, change(data)), "train_loss": loss}
            )
            print(rows[-1], flush=True)

    for mixer in ("softmax", "softmax:window=64"):
        model = make_model([mixer] * given.layers, LANDMARK + 1, given)
        judge(mixer, model, fit(model, train, given), lambda data: data)
    model = make_model([landmark] * given.layers, LANDMARK + 1, given)
    loss = fit(model, marked(train), given)
    judge(landmark, model, loss, marked)
    everything = make_model([f"landmark:block={BLOCK}"] * given.layers, LANDMARK + 1, given)
    everything.load_state_dict(model.state_dict())
    judge("the same, reading all blocks at their own positions", everything, loss, marked)
    claim = (
        "trained at 255 positions, retrieving a few blocks answers far beyond them, unlike dense attention or a window"
    )
    record("landmark", claim, model, given, started, rows=rows)


if __name__ == "__main__":
    main()
