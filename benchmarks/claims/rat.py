"""RAT's claim in small: chunks of 16 stay near attention in perplexity and recall, a recurrence alone does not, and
decoding reads a sixteenth of the keys.

    python benchmarks/claims/rat.py [--device cuda] [--steps 400]

chunk=1 is attention, and a chunk as long as the text the recurrence alone.
"""

from __future__ import annotations

import time

from claim import record
from language import arguments, decoding, on_task, on_text

CHUNKS = (1, 16, 64, 1 << 20)


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    pairs = max(2, given.length // 16)
    options = {"vocab": 2 * given.length, "pairs": pairs, "filler": "zero"}
    text = [on_text([f"rat:chunk={chunk}"] * given.layers, given) for chunk in CHUNKS]
    recall = [
        on_task([f"rat:chunk={chunk}"] * 2, "mqar", given, options=options, learning_rate=3e-3) for chunk in CHUNKS
    ]
    record(
        "rat",
        "perplexity and recall of attention at a sixteenth of its cache; longer chunks give some of it away",
        given,
        started,
        text=text,
        recall=recall,
        decoding=decoding(["softmax", "rat:chunk=16"], [given.length, 8 * given.length, 32 * given.length], given),
    )


if __name__ == "__main__":
    main()
