"""StreamingLLM's claim in small: a window alone loses the text as soon as the first tokens leave it; a few of them
kept as sinks restore it, whether distances are counted in the cache or in the text.

    python benchmarks/claims/streaming_llm.py [--length 1024] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, next_token

from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=2)
    model, tokenizer = load(given)
    budget = given.length // 4
    methods = ["full"]
    for sinks in (0, 1, 4):
        methods += [
            f"streaming-llm:sinks={sinks},window={budget - sinks},schedule=after",
            f"streaming-llm:sinks={sinks},window={budget - sinks},schedule=after,reindex=false",
        ]
    rows = next_token(model, tokenizer, methods, Perplexity(target=64), given)
    claim = "a window alone fails once the first tokens leave it, four sinks restore it"
    record("streaming_llm", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
