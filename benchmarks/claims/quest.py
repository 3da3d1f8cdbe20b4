"""Quest's claim in small: pages chosen by bounds come close to the dense model at budgets where recent keys alone, or
pages chosen by their mean key, are further away; the exact best tokens are the limit.

    python benchmarks/claims/quest.py [--length 2048] [--seeds 2]
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
    for budget in (given.length // 16, given.length // 8, given.length // 4):
        methods += [
            f"quest:budget={budget}",
            f"quest:budget={budget},per_query_head=true,force_last=false",
            f"kinetics:blocks={budget // 16},sinks=0,local=1,dense_layers=2",
            f"kinetics:rule=token,blocks={budget - 5},block=1,sinks=4,local=1,dense_layers=2",
            f"streaming-llm:window={budget - 4},reindex=false",
        ]
    claim = "pages chosen by their bounds stay close to dense attention at a small budget"
    record("quest", claim, given, started, model=model, rows=divergence(model, tokenizer, methods, given))


if __name__ == "__main__":
    main()
