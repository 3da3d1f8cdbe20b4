"""Landmark Attention's claim in small: trained on short contexts, it finds what a query needs far beyond them in a few
blocks, where dense attention and a window fail.

    python benchmarks/claims/landmark.py [--device cuda] [--steps 1000] [--extra 0 256 768 1792 3840]

Keys and values stand at the start of 240 tokens and are asked later; tests put `extra` tokens of noise in between.
Every model is a short convolution, which ties a value to its key, and two layers of its kind, without MLPs. Two layers
are what a landmark needs: the first lets it read its block, the second lets queries find it. Training goes from few
pairs in short texts to all, as in `foveate.compare.study_fit`.
Dense attention stands there twice, with rotary positions and without any: the second does not fail.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from claim import parser, record
from torch import Tensor

from foveate.lm import HybridConfig, HybridLM
from foveate.lm.landmarks import with_landmarks
from foveate.lm.synthetic import IGNORED, TEST_SEEDS, Examples, recall

VOCAB, NOISE = 256, 64
LANDMARK = VOCAB + NOISE
BLOCK = 17


def arguments(doc: str | None, *, steps: int) -> argparse.ArgumentParser:
    """What scripts that train small models take."""
    made = parser(doc, device="cpu", steps=steps, batch=64, dim=128, heads=4, rate=1e-3, seed=0)
    made.add_argument("--train", type=int, default=20000, help="training examples")
    made.add_argument("--test", type=int, default=128, help="test examples")
    return made


def make_model(mixers: list[str], vocab: int, given: argparse.Namespace, **options: Any) -> HybridLM:
    torch.manual_seed(given.seed)
    config = HybridConfig(mixers=mixers, dim=given.dim, heads=given.heads, vocab_size=vocab, **options)
    return HybridLM(config).to(given.device)


def batches(stages: Sequence[Examples], given: argparse.Namespace) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels of every step, drawn stage by stage; the last stage takes half of the steps, or all if alone.

    `batch` counts examples of the last stage; the others' batches have as many tokens.
    """
    random = torch.Generator().manual_seed(given.seed)
    early = given.steps // 2 // (len(stages) - 1) if len(stages) > 1 else 0
    length = stages[-1].inputs.shape[1]
    for number, data in enumerate(stages, 1):
        size = given.batch * length // data.inputs.shape[1]
        for _ in range(early if number < len(stages) else given.steps - early * (len(stages) - 1)):
            rows = torch.randint(len(data), (size,), generator=random)
            yield data.inputs[rows].to(given.device), data.labels[rows].to(given.device)


def fit(model: HybridLM, data: Examples | Sequence[Examples], given: argparse.Namespace) -> float:
    """Train on examples, or stage by stage, in random order; returns the mean loss of the last steps.

    AdamW, a tenth of the steps to warm up, then cosine to 0.
    """
    matrices = [each for each in model.parameters() if each.dim() >= 2]
    vectors = [each for each in model.parameters() if each.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=given.rate, betas=(0.9, 0.95))
    warmup = max(1, given.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / given.steps))
    )
    model.train()
    losses = []
    for inputs, labels in batches([data] if isinstance(data, Examples) else data, given):
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


def questions(count: int, pairs: int, extra: int, seed: int, length: int = 240) -> Examples:
    """`length` tokens: pairs, and the pairs' keys asked among noise; with `extra` tokens of noise in between."""
    data = recall(count, vocab=VOCAB, length=length, pairs=pairs, queries=pairs, filler="zero", seed=seed)
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
    options = arguments(__doc__, steps=1000)
    options.set_defaults(batch=16, dim=64, heads=2, train=8192, test=64, rate=4e-3)
    options.add_argument("--extra", type=int, nargs="+", default=[0, 256, 768, 1792, 3840])
    options.add_argument("--pairs", type=int, default=16)
    options.add_argument("--stages", type=int, default=4, help="each of twice the pairs and length of the one before")
    options.add_argument("--retrieve", type=int, default=2)
    given = options.parse_args()
    train = [questions(given.train, given.pairs >> n, 0, given.seed, 240 >> n) for n in reversed(range(given.stages))]
    tests = [questions(given.test, given.pairs, extra, TEST_SEEDS + given.seed) for extra in given.extra]
    rows: list[dict[str, Any]] = []

    def make(mixer: str) -> HybridLM:
        return make_model(["baseconv", mixer, mixer], LANDMARK + 1, given, mlp_ratio=0.0)

    def judge(name: str, model: HybridLM, loss: float, change: Callable[[Examples], Examples]) -> None:
        for extra, data in zip(given.extra, tests):
            row = {"model": name, "extra": extra, "length": data.inputs.shape[1]}
            rows.append({**row, "accuracy": round(accuracy(model, change(data)), 4), "train_loss": round(loss, 4)})
            print(rows[-1], flush=True)

    for mixer in ("softmax", "softmax:rotary=false", "softmax:window=64"):
        model = make(mixer)
        judge(mixer, model, fit(model, train, given), lambda data: data)
    landmark = f"landmark:block={BLOCK},retrieve={given.retrieve},chunk=2"
    model = make(landmark)
    loss = fit(model, [marked(each) for each in train], given)
    judge(landmark, model, loss, marked)
    everything = make(f"landmark:block={BLOCK}")
    everything.load_state_dict(model.state_dict())
    judge("the same, reading all blocks at their own positions", everything, loss, marked)
    claim = (
        "trained at 255 positions, retrieving a few blocks answers far beyond them, unlike dense attention or a window"
    )
    parameters = sum(each.numel() for each in model.parameters())
    record("landmark", claim, given, started, parameters=parameters, chance=2 / VOCAB, rows=rows)


if __name__ == "__main__":
    main()
