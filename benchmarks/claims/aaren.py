"""Aaren's claim in small: where a summary of the prefix is what is asked, a fixed query does as well as attention, and
its state and the time of a token do not grow.

    python benchmarks/claims/aaren.py [--device cuda] [--steps 400]

On text the order of tokens matters, which a fixed query does not see by itself; the rows with a short convolution in
the first layer show how much of the gap that is. Recall (MQAR) asks for a query that depends on the token.
"""

from __future__ import annotations

import time

from claim import record
from language import arguments, decoding, on_task, on_text


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    stacks = [["softmax"] * given.layers, ["aaren"] * given.layers]
    shifted = [["baseconv", *stack[1:]] for stack in stacks]
    options = {"vocab": 2 * given.length, "pairs": max(2, given.length // 32), "filler": "zero"}
    record(
        "aaren",
        "comparable to attention on summaries of a prefix, with a state that does not grow",
        given,
        started,
        majority=[on_task(stack, "majority", given, options={}) for stack in stacks],
        text=[on_text(stack, given) for stack in stacks + shifted],
        recall=[on_task(stack, "mqar", given, options=options, learning_rate=3e-3) for stack in shifted],
        decoding=decoding(["softmax", "aaren"], [given.length, 8 * given.length, 32 * given.length], given),
    )


if __name__ == "__main__":
    main()
