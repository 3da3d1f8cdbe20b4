"""LongHeads' claim in small: beyond the trained length (8192 tokens for the bundled model) a passkey is still found,
which the dense model loses. Lengths below it show what is lost where the dense model still works.

    python benchmarks/claims/longheads.py [--length 12288] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, retrieval

from foveate.tasks.passkey import Passkey


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=12288, seeds=2)
    model, tokenizer = load(given)
    chunk = max(16, given.length // 192)
    size = max(4, given.length // 4 // chunk) * chunk
    methods = [
        "full",
        f"longheads:chunk={chunk},length={size},start={size}",
        f"streaming-llm:window={size - 4}",
    ]
    record(
        "longheads",
        "a passkey is found beyond the trained length",
        given,
        started,
        model=model,
        rows=retrieval(model, tokenizer, methods, Passkey(), given, question_seen=True),
    )


if __name__ == "__main__":
    main()
