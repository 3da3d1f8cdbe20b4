"""PyramidKV's claim in small: with few keys in all, giving lower layers more of them beats the same for every layer.

python benchmarks/claims/pyramidkv.py [--length 1024] [--seeds 6]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, retrieval

from foveate.tasks.recall import Recall


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=6)
    model, tokenizer = load(given)
    methods = ["full"]
    for budget in (48, 96):
        methods += [f"{name}:budget={budget},window=8,kernel=7" for name in ("snapkv", "pyramidkv", "pyramidkv:beta=2")]
    methods = [each.replace("beta=2:", "beta=2,") for each in methods]
    rows = retrieval(model, tokenizer, methods, Recall(pairs=8), given, question_seen=True)
    claim = "with few keys in all, a falling budget beats an even one"
    record("pyramidkv", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
