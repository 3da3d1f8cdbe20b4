"""Titans' claim in small: a memory trained while it reads recalls across more text than it was trained on, where a
plain linear mixer of the same size fades and a window sees nothing.

    python benchmarks/claims/titans.py [--device cuda] [--steps 600] [--extra 0 240 720 1680]

Keys and values stand at the start of 240 tokens and are asked later; tests put `extra` tokens of noise in between.
"""

from __future__ import annotations

import time

from claim import record
from landmark import NOISE, VOCAB, accuracy, arguments, fit, make_model, questions

from foveate.lm.synthetic import TEST_SEEDS

MIXERS = (
    "linear",
    "softmax:window=64",
    "gated-deltanet",
    "titans-memory:chunk=32",
    "titans-mac:segment=64,chunk=32",
    "titans-mag:window=64,chunk=32",
    "titans-mal:window=64,chunk=32",
)


def main() -> None:
    parser = arguments(__doc__, steps=600)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--extra", type=int, nargs="+", default=[0, 240, 720, 1680], help="tokens put in between")
    given, started = parser.parse_args(), time.perf_counter()
    data = questions(given.train, given.pairs, 0, given.seed)
    tests = {extra: questions(given.test, given.pairs, extra, TEST_SEEDS + given.seed) for extra in given.extra}
    rows = []
    for mixer in MIXERS:
        began, model = time.perf_counter(), make_model([mixer] * 2, VOCAB + NOISE, given)
        loss = fit(model, data, given)
        rows.append(
            {
                "mixer": mixer,
                "parameters": sum(each.numel() for each in model.parameters()),
                "state_bytes": model.state_bytes(1, 240),
                "training_loss": round(loss, 4),
                "accuracy": {extra: round(accuracy(model, test), 4) for extra, test in tests.items()},
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(rows[-1], flush=True)
    claim = "recall by a neural memory, alone or beside a window, holds beyond the length of training"
    record("titans", claim, given, started, parameters=rows[-1]["parameters"], chance=2 / VOCAB, rows=rows)


if __name__ == "__main__":
    main()
