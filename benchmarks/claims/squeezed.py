"""Squeezed attention's claim in small: keys found by cluster centres and one global threshold stay closer to the dense
model than pages chosen by bounds at an equal share of keys read, and heads read very different shares.

    python benchmarks/claims/squeezed.py [--length 2048] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load
from selecting import divergence


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    model, tokenizer = load(given)
    methods = []
    for sparsity in (0.5, 0.7, 0.9):
        read = int(given.length * (1 - sparsity))
        methods += [
            f"squeezed:sparsity={sparsity},iterations=30",
            f"squeezed:sparsity={sparsity},levels=2,coarse_sparsity=0.3,iterations=30",
            f"quest:budget={read},dense_layers=0",
            f"streaming-llm:window={read - 4},reindex=false",
        ]
    claim = "cluster centres with one global threshold stay close to dense attention"
    record("squeezed", claim, given, started, model=model, rows=divergence(model, tokenizer, methods, given))


if __name__ == "__main__":
    main()
