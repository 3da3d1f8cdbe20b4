"""KeyDiff's claim in small: a prompt read in pieces under a fixed budget keeps a needle that attention-based eviction
(TOVA, H2O) and a window lose, since those see only the queries of the pieces so far.

    python benchmarks/claims/keydiff.py [--length 768] [--seeds 6] [--dtype float32]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, retrieval

from foveate.tasks.passkey import Passkey


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=768, seeds=6)
    model, tokenizer = load(given)
    methods = ["full"]
    for share in (2, 4):
        budget = given.length // share
        methods += [
            f"keydiff:budget={budget},when=always",
            f"knorm:budget={budget},when=always",
            f"tova:budget={budget}",
        ]
        methods += [f"h2o:budget={budget}", f"h2o:budget={budget},recent={budget}"]
    rows = retrieval(model, tokenizer, methods, Passkey(), given, question_seen=False, chunk=128)
    claim = "pieces under a fixed budget: distinct keys keep a needle that others lose"
    record("keydiff", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
