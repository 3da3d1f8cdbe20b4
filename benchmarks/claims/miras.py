"""Miras' claim in small: losses that large errors do not rule keep a memory's recall when a part of what it reads is
wrong.

    python benchmarks/claims/miras.py [--device cuda] [--steps 600] [--corrupted 0.0 0.2 0.4]

Every key is shown `passes` times with its value, a share `corrupted` of the times with another one, and asked once;
training has 20 % of them. `lengths` are those of the tests, training has the first.
"""

from __future__ import annotations

import time

import torch
from claim import record
from landmark import accuracy, arguments, fit, make_model

from foveate.lm.synthetic import TEST_SEEDS, Examples, mqar

VOCAB, TRAINED_WITH = 1024, 0.2
MIXERS = (
    "linear",
    "miras:chunk=16",
    "yaad:chunk=16",
    "yaad:huber=huber-norm,chunk=16",
    "moneta:chunk=16",
    "moneta:p=1.5,chunk=16",
    "memora:chunk=16",
)


def corrupted_recall(count: int, length: int, pairs: int, passes: int, share: float, seed: int) -> Examples:
    """MQAR where a share of the shown values is replaced by values drawn at random."""
    data = mqar(count, vocab=VOCAB, length=length, pairs=pairs, passes=passes, filler="zero", seed=seed)
    random = torch.Generator().manual_seed(seed)
    inputs = data.inputs.clone()
    shown = inputs[:, 1 : 2 * pairs * passes : 2]
    wrong = torch.rand(shown.shape, generator=random) < share
    shown[wrong] = torch.randint(VOCAB // 2, VOCAB, (int(wrong.sum()),), generator=random)
    return Examples(inputs, data.labels)


def main() -> None:
    parser = arguments(__doc__, steps=600)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--corrupted", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    given, started = parser.parse_args(), time.perf_counter()
    data = corrupted_recall(given.train, given.lengths[0], given.pairs, given.passes, TRAINED_WITH, given.seed)
    tests = {
        (length, share): corrupted_recall(given.test, length, given.pairs, given.passes, share, TEST_SEEDS + given.seed)
        for length in given.lengths
        for share in given.corrupted
    }
    rows = []
    for mixer in MIXERS:
        began, model = time.perf_counter(), make_model([mixer] * 2, VOCAB, given)
        loss = fit(model, data, given)
        found = [
            {"length": length, "corrupted": share, "accuracy": round(accuracy(model, test), 4)}
            for (length, share), test in tests.items()
        ]
        rows.append(
            {
                "mixer": mixer,
                "parameters": sum(each.numel() for each in model.parameters()),
                "training_loss": round(loss, 4),
                "tests": found,
                "seconds": round(time.perf_counter() - began, 1),
            }
        )
        print(rows[-1], flush=True)
    claim = "with corrupted values, memories of robust losses recall more than one of the squared error"
    record("miras", claim, given, started, parameters=rows[-1]["parameters"], rows=rows)


if __name__ == "__main__":
    main()
