"""H2O's claim in small: a fifth of the cache, half heavy hitters, half recent keys, keeps the model's perplexity where
recent keys alone, or heavy ones alone, lose it.

    python benchmarks/claims/h2o.py [--length 1024] [--seeds 2]

Beside it at the same budget: `observed-attention`, its normalised form without recent keys, which evicts once after
the prompt (what follows is kept on top) or, with when=always, at every step; H2O once after the prompt; and
StreamingLLM's four sinks and recent keys.
"""

from __future__ import annotations

import time
from typing import Any

from claim import record
from keeping import arguments, load, next_token

from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=2)
    model, tokenizer = load(given)
    task = Perplexity(target=64)
    budget = (given.length - task.target) // 5
    methods = [
        "full",
        f"h2o:budget={budget}",
        f"h2o:budget={budget},recent={budget}",
        f"h2o:budget={budget},recent=0",
        f"h2o:budget={budget},normalize=true",
        f"h2o:budget={budget},when=prompt",
        f"observed-attention:budget={budget}",
        f"observed-attention:budget={budget},when=always",
        f"streaming-llm:sinks=4,window={budget - 4},schedule=after",
    ]
    claim = "20 % of the cache, half heavy hitters and half recent keys, keeps quality"
    rows: list[dict[str, Any]] = []
    for method in methods:
        rows += next_token(model, tokenizer, [method], task, given)
        record("h2o", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
