"""DELTA's claim in small: layers that share one page list come close to the dense model, far closer than with a list of
recent pages, and not far from every layer's own exact choice.

    python benchmarks/claims/delta.py [--length 2048] [--seeds 2]
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
    for budget in (given.length // 8, given.length // 4):
        pages = budget // 16
        methods += [
            f"delta:pages={pages},recent_pages=2",
            f"delta:pages={pages},recent_pages={pages}",
            f"delta:full_layers=0/1/2,pages={pages},recent_pages=2",
            f"quest:budget={budget},dense_layers=3",
            f"kinetics:rule=token,blocks={budget - 36},block=1,local=32,dense_layers=3",
        ]
    claim = "pages that a few layers choose serve the layers after them; recent pages do not"
    record("delta", claim, given, started, model=model, rows=divergence(model, tokenizer, methods, given))


if __name__ == "__main__":
    main()
