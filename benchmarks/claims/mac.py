"""MAC-Attention's claim in small: the more alike queries must be, the fewer keys are saved and the closer the output
is to the dense model's; the rate of hits and the divergence fall together.

    python benchmarks/claims/mac.py [--length 2048] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load
from selecting import divergence


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    model, tokenizer = load(given)
    sizes = f"memory={given.length // 8},margin={given.length // 16},start={given.length // 4}"
    methods = [f"mac:threshold={each},{sizes}" for each in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)]
    methods += [f"mac:threshold=0.5,sinks=64,{sizes}"]
    claim = (
        "the nearer a reused query must be, the fewer keys are saved and the closer the output is to dense attention"
    )
    record("mac", claim, given, started, model=model, rows=divergence(model, tokenizer, methods, given))


if __name__ == "__main__":
    main()
