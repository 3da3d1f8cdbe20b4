"""The Dynamical Systems Framework's claims in small: recall grows with the state's expansion n, towards softmax;
linear attention recalls more divided by a learned function of the token than by its own sum of weights; a reversed
sigmoid as forget gate improves the qLSTM.

    python benchmarks/claims/dsf.py [--device cuda] [--steps 400] [--length 512] [--dim 128]

Recall is MQAR of 16 pairs in 128 tokens: a short convolution, then one layer of the kind with dim / 2 channels, without
MLPs, trained from few pairs in short texts to all; the better of two learning rates counts. n is what the state holds
per channel, here the keys' width per head. Text is Python's manual in `layers` layers.
Rows that the result file holds already are kept.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from claim import each_done, earlier, record
from landmark import accuracy, fit, make_model
from language import on_text, options

from foveate.lm.synthetic import TEST_SEEDS, Examples, mqar

LENGTH, PAIRS, VOCAB, STAGES = 128, 16, 256, 4
RATES = (3e-3, 1e-2)
# Linear attention with normalize=false has its features but no division, and so tells the two changes apart. Normalised
# attention's divisor starts at 1, or at a text's length.
RECALL = (
    "softmax:heads=1",
    *(f"{spec}heads={heads}" for heads in (1, 4) for spec in ("linear:", "normalised-attention:typical_length=1,")),
    "normalised-attention:heads=1,typical_length=128",
    "linear:heads=1,normalize=false",
    "s6",
    "s6:state_dim=4",
    "qlstm",
    "qlstm:reverse=false",
    "rg-lru",
)
TEXT = (
    "softmax",
    "linear",
    "normalised-attention",
    "normalised-attention:typical_length=1",
    "s6",
    "qlstm",
    "qlstm:reverse=false",
    "rg-lru",
)
CLAIM = (
    "recall grows with the state's expansion; a learned normaliser beats linear attention's, and a reversed sigmoid "
    "qLSTM's gate"
)


@lru_cache
def mqar_stages(count: int, seed: int, stages: int) -> list[Examples]:
    """MQAR of `PAIRS` pairs in `LENGTH` tokens, after stages of half of both, a quarter, and so on; made once."""
    return [
        mqar(count, vocab=VOCAB, length=LENGTH >> n, pairs=PAIRS >> n, filler="zero", seed=seed)
        for n in reversed(range(stages))
    ]


def recalled(mixers: Sequence[str], given: argparse.Namespace, rates: Sequence[float] = RATES) -> dict[str, Any]:
    """Train a stack at every rate, and test the one whose loss was lowest at the end. Layers have half of `dim`,
    training takes half as many steps again and 16 times the batch."""
    began, seed = time.perf_counter(), given.seed
    train, test = mqar_stages(8192, seed, STAGES), mqar_stages(256, TEST_SEEDS + seed, 1)[0]
    sizes = {"dim": given.dim // 2, "heads": 4, "batch": 16 * given.batch, "steps": given.steps * 3 // 2}
    best: dict[str, Any] = {}
    for rate in rates:
        run = argparse.Namespace(device=given.device, seed=seed, rate=rate, **sizes)
        model = make_model(list(mixers), VOCAB, run, mlp_ratio=0.0)
        loss = fit(model, train, run)
        # A loss that is not a number is no better than any.
        if not best or loss < best["training_loss"] or not best["training_loss"] < float("inf"):
            best = {
                "mixers": list(mixers),
                "accuracy": round(accuracy(model, test), 4),
                "training_loss": loss,
                "rate": rate,
                "parameters": sum(each.numel() for each in model.parameters()),
                "state_bytes": model.state_bytes(1, LENGTH),
            }
    row = {**best, "seconds": round(time.perf_counter() - began, 1)}
    print(row, flush=True)
    return row


def row(part: str, spec: str, given: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Of "recall" or "text", and which."""
    return part, recalled(["baseconv", spec], given) if part == "recall" else on_text([spec] * given.layers, given)


def main() -> None:
    parser = options(__doc__, steps=400)
    parser.add_argument("--workers", type=int, default=1, help="processes")
    started, given = time.perf_counter(), parser.parse_args()
    known = earlier("dsf", given)
    rows: dict[str, list[dict[str, Any]]] = {part: known.get(part, []) for part in ("recall", "text")}
    done = {(part, each["mixers"][-1]) for part, own in rows.items() for each in own}
    jobs = [(part, spec) for part, specs in (("recall", RECALL), ("text", TEXT)) for spec in specs]
    for part, made in each_done(row, [(*job, given) for job in jobs if job not in done], given.workers):
        rows[part].append(made)
        record("dsf", CLAIM, given, started, chance=2 / VOCAB, **rows)


if __name__ == "__main__":
    main()
