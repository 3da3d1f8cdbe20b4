"""Miras' claim in small: losses that large errors do not rule keep a memory's recall when a part of what it reads is
wrong.

    python benchmarks/claims/miras.py [--device cuda] [--steps 800] [--corrupted 0.0 0.2 0.4]

Every key is shown `passes` times with its value, a share `corrupted` of the times with another one, and asked once;
training has 20 % of them. `lengths` are those of the tests, training ends with the first. Every model is a short
convolution, which ties a value to its key, and one layer of its kind, without MLPs; training goes from few pairs in
short texts to all. A chunk is no longer than one showing of all keys, so that the second meets what the first wrote.
Rows that the result file holds already are kept.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from claim import each_done, earlier, in_order, record
from landmark import accuracy, arguments, fit, make_model

from foveate.lm.synthetic import TEST_SEEDS, Examples, mqar

VOCAB, TRAINED_WITH = 320, 0.2
MIXERS = (
    "linear",
    "miras:chunk=16",
    "yaad:chunk=16",
    "yaad:huber=huber-norm,chunk=16",
    "moneta:chunk=16",
    "moneta:p=1.5,chunk=16",
    "memora:chunk=16",
)
CLAIM = "with corrupted values, memories of robust losses recall more than one of the squared error"


def corrupted_recall(count: int, length: int, pairs: int, passes: int, share: float, seed: int) -> Examples:
    """MQAR where a share of the shown values is replaced by values drawn at random."""
    data = mqar(count, vocab=VOCAB, length=length, pairs=pairs, passes=passes, filler="zero", seed=seed)
    random = torch.Generator().manual_seed(seed)
    inputs = data.inputs.clone()
    shown = inputs[:, 1 : 2 * pairs * passes : 2]
    wrong = torch.rand(shown.shape, generator=random) < share
    shown[wrong] = torch.randint(VOCAB // 2, VOCAB, (int(wrong.sum()),), generator=random)
    return Examples(inputs, data.labels)


def row(mixer: str, given: argparse.Namespace) -> dict[str, Any]:
    stages = [
        corrupted_recall(given.train, given.lengths[0] >> n, given.pairs >> n, given.passes, TRAINED_WITH, given.seed)
        for n in reversed(range(given.stages))
    ]
    began, model = time.perf_counter(), make_model(["baseconv", mixer], VOCAB, given, mlp_ratio=0.0)
    loss = fit(model, stages, given)
    found = []
    for length in given.lengths:
        for share in given.corrupted:
            test = corrupted_recall(given.test, length, given.pairs, given.passes, share, TEST_SEEDS + given.seed)
            found.append({"length": length, "corrupted": share, "accuracy": round(accuracy(model, test), 4)})
    made = {
        "mixer": mixer,
        "parameters": sum(each.numel() for each in model.parameters()),
        "state_bytes": model.state_bytes(1, given.lengths[0]),
        "training_loss": round(loss, 4),
        "tests": found,
        "seconds": round(time.perf_counter() - began, 1),
    }
    print(made, flush=True)
    return made


def main() -> None:
    parser = arguments(__doc__, steps=800)
    parser.set_defaults(batch=512, dim=64, heads=2, train=8192, rate=5e-3)
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--stages", type=int, default=3, help="each of twice the pairs and length of the one before")
    parser.add_argument("--corrupted", type=float, nargs="+", default=[0.0, 0.2, 0.4])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--only", nargs="+", default=list(MIXERS), metavar="MIXER", help="what is trained")
    parser.add_argument("--workers", type=int, default=1, help="processes")
    given, started = parser.parse_args(), time.perf_counter()
    known = earlier("miras", given).get("rows", [])
    jobs = [(mixer, given) for mixer in given.only if mixer not in [each["mixer"] for each in known]]
    for each in each_done(row, jobs, given.workers):
        known.append(each)
        record("miras", CLAIM, given, started, chance=2 / VOCAB, rows=in_order(known, "mixer", given.only))


if __name__ == "__main__":
    main()
