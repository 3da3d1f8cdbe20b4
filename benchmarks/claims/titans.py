"""Titans' claim in small: a memory trained while it reads recalls across more text than it was trained on, where
attention and a window fail and a plain linear mixer fades.

    python benchmarks/claims/titans.py [--device cuda] [--steps 800] [--extra 0 128 384 896 1920]

Keys and values stand at the start of 128 tokens and are asked later; tests put `extra` tokens of noise in between.
Every model is a short convolution, which ties a value to its key, and one layer of its kind, without MLPs; training
goes from few pairs in short texts to all. In windows and segments of 32 tokens, attention alone reaches few pairs.
Rows that the result file holds already are kept.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from claim import each_done, earlier, in_order, record
from landmark import NOISE, VOCAB, accuracy, arguments, fit, make_model, questions

from foveate.lm.synthetic import TEST_SEEDS

MIXERS = (
    "softmax",
    "softmax:window=32",
    "linear",
    "gated-deltanet",
    "titans-memory:chunk=32",
    "titans-memory-chunked:chunk=32",
    "titans-mac:segment=32,chunk=32",
    "titans-mag:window=32,chunk=32",
    "titans-mal:window=32,chunk=32",
)
CLAIM = "recall by a neural memory, alone or beside attention, holds beyond the length of training"


def row(mixer: str, given: argparse.Namespace) -> dict[str, Any]:
    stages = [
        questions(given.train, given.pairs >> n, 0, given.seed, given.length >> n)
        for n in reversed(range(given.stages))
    ]
    began, model = time.perf_counter(), make_model(["baseconv", mixer], VOCAB + NOISE, given, mlp_ratio=0.0)
    loss = fit(model, stages, given)
    found = {
        extra: accuracy(model, questions(given.test, given.pairs, extra, TEST_SEEDS + given.seed, given.length))
        for extra in given.extra
    }
    made = {
        "mixer": mixer,
        "parameters": sum(each.numel() for each in model.parameters()),
        "state_bytes": {given.length + extra: model.state_bytes(1, given.length + extra) for extra in given.extra},
        "training_loss": round(loss, 4),
        "accuracy": {extra: round(share, 4) for extra, share in found.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(made, flush=True)
    return made


def main() -> None:
    parser = arguments(__doc__, steps=800)
    parser.set_defaults(batch=256, dim=64, heads=2, train=8192, rate=5e-3)
    parser.add_argument("--length", type=int, default=128, help="tokens of a training example")
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--stages", type=int, default=3, help="each of twice the pairs and length of the one before")
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 128, 384, 896, 1920], help="tokens put in between")
    parser.add_argument("--only", nargs="+", default=list(MIXERS), metavar="MIXER", help="what is trained")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given, started = parser.parse_args(), time.perf_counter()
    known = earlier("titans", given).get("rows", [])
    jobs = [(mixer, given) for mixer in given.only if mixer not in [each["mixer"] for each in known]]
    for each in each_done(row, jobs, given.workers):
        known.append(each)
        record("titans", CLAIM, given, started, chance=2 / VOCAB, rows=in_order(known, "mixer", given.only))


if __name__ == "__main__":
    main()
