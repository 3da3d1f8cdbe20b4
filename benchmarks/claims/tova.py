"""TOVA's claim in small: an eighth of the cache is nearly as good as all of it, and better than a window of that size.

python benchmarks/claims/tova.py [--length 1024] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, next_token

from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=2)
    model, tokenizer = load(given)
    methods = ["full"]
    for share in (4, 8):
        budget = given.length // share
        # A recency window is H2O without heavy hitters.
        methods += [
            f"tova:budget={budget}",
            f"tova:budget={budget},per_head=true",
            f"h2o:budget={budget},recent={budget}",
        ]
    rows = next_token(model, tokenizer, methods, Perplexity(target=64), given)
    claim = "an eighth of the cache is nearly as good as the whole, and better than a window"
    record("tova", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
