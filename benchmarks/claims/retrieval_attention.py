"""RetrievalAttention's claim in small: with sinks and a window alone a passkey in the middle is lost; a few retrieved
keys per query head find it again and bring the loss of the next tokens back to the dense model's. The graph does what
exact retrieval does, while scanning a part of the keys.

    python benchmarks/claims/retrieval_attention.py [--length 2048] [--seeds 2] [--device cuda]
"""

from __future__ import annotations

import time
from typing import Any

import torch
from claim import record
from keeping import arguments, load, next_token, retrieval

from foveate.methods.index import KeyIndex
from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity

SIZES = "sinks=16,window=64"


class Scans:
    """Listens to all searches while it is entered: the mean share of keys they scanned."""

    def __init__(self) -> None:
        self.shares: list[float] = []
        self.search = KeyIndex.search

    def __enter__(self) -> Scans:
        def search(index: KeyIndex, *args: Any, **options: Any) -> Any:
            found = self.search(index, *args, **options)
            self.shares.append(float((found.scanned / index.length[:, None]).mean()))
            return found

        KeyIndex.search = search  # type: ignore[assignment, method-assign]
        return self

    def __exit__(self, *error: object) -> None:
        KeyIndex.search = self.search  # type: ignore[method-assign]

    @property
    def mean(self) -> float | None:
        return sum(self.shares) / len(self.shares) if self.shares else None


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    model, tokenizer = load(given)
    chosen = [
        "budget=0,index=flat",
        "budget=25,index=flat",
        "budget=100,index=flat",
        "budget=25,index=attention-graph,beam=50,fresh=128,sample=256",
        "budget=25,index=usearch,beam=50",
    ]
    methods = ["full", *(f"retrieval-attention:{each},{SIZES}" for each in chosen)]
    torch.manual_seed(0)
    found, rows = [], []
    for method in methods:
        with Scans() as scans:
            found += retrieval(model, tokenizer, [method], Passkey(), given, question_seen=True)
            rows += next_token(model, tokenizer, [method], Perplexity(target=32), given)
        rows[-1]["scanned"] = scans.mean
    claim = "what a window loses, 100 retrieved keys bring back; a graph made from queries finds them"
    record("retrieval_attention", claim, given, started, model=model, rows=rows, passkey=found)


if __name__ == "__main__":
    main()
