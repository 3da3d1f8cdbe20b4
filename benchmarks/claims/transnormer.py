"""TransNormer's claim in small: a norm of the output in place of the denominator trains at rates where linear attention
does not, and layers of attention within blocks, before linear ones and not after them, come near softmax attention.

    python benchmarks/claims/transnormer.py [--device cuda] [--steps 400]
"""

from __future__ import annotations

import time

from claim import record
from language import arguments, on_text


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    half = given.layers // 2
    t1 = ["transnormer-diag"] * half, ["transnormer-norm"] * (given.layers - half)
    t2 = ["transnormer-diag:weights=softmax"] * half, ["transnormer-norm:feature_map=elu+1"] * (given.layers - half)
    stacks = [
        ["softmax"] * given.layers,
        ["linear"] * given.layers,
        ["transnormer-norm:feature_map=elu+1,lrpe=false"] * given.layers,
        ["transnormer-norm"] * given.layers,
        [*t1[0], *t1[1]],
        [*t2[0], *t2[1]],
        [*t2[1], *t2[0]],
    ]
    # The third row differs from the second by the norm alone.
    rates = [
        {"learning_rate": rate, **on_text(stack, given, learning_rate=rate)}
        for stack in stacks[1:3]
        for rate in (3e-3, 1e-2, 3e-2)
    ]
    record(
        "transnormer",
        "a norm instead of the denominator, and attention in blocks before linear attention, close the gap to softmax",
        given,
        started,
        text=[on_text(stack, given) for stack in stacks],
        by_learning_rate=rates,
    )


if __name__ == "__main__":
    main()
