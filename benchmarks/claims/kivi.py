"""KIVI's claim in small: 4 bits lose nearly nothing and 2 bits little of next-token quality and of retrieval, at a
fifth of the bytes.

    python benchmarks/claims/kivi.py [--length 2048] [--seeds 2]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, next_token, retrieval
from selecting import divergence

from foveate.tasks.niah import Niah
from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    model, tokenizer = load(given)
    methods = [f"kivi:bits={bits},residual=32" for bits in (8, 4, 2)]
    methods += ["kivi:bits=2", "kivi:bits=2,value_bits=4,residual=32", "kivi:bits=2,group=16,residual=32"]
    record(
        "kivi",
        "4 bits lose nearly nothing and 2 bits little",
        given,
        started,
        model=model,
        rows=next_token(model, tokenizer, ["full", *methods], Perplexity(target=64), given),
        retrieval=retrieval(model, tokenizer, ["full", *methods], Niah(), given, question_seen=True),
        divergence=divergence(model, tokenizer, methods, given),
    )


if __name__ == "__main__":
    main()
