"""Expected Attention's claim in small: where the question is not known yet, expected weights choose better keys than
observed ones, norms or similarities.

The context is compressed, then the question comes.

    python benchmarks/claims/expected_attention.py [--length 768] [--seeds 6]
"""

from __future__ import annotations

import time

from claim import record
from keeping import arguments, load, retrieval

from foveate.tasks.recall import Recall


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=768, seeds=6)
    model, tokenizer = load(given)
    methods = ["full"]
    for ratio in (0.3, 0.5):
        methods += [
            f"{name}:ratio={ratio}"
            for name in ("expected-attention", "snapkv", "observed-attention", "knorm", "keydiff")
        ]
        methods += [
            f"expected-attention:ratio={ratio},covariance=false",
            f"adakv:ratio={ratio},base=expected-attention",
        ]
    rows = retrieval(model, tokenizer, methods, Recall(pairs=8), given, question_seen=False)
    claim = "without the question, expected weights choose the better keys"
    record("expected_attention", claim, given, started, model=model, rows=rows)


if __name__ == "__main__":
    main()
