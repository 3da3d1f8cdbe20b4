"""CompressKV's claim in small: a layer's semantic retrieval heads choose better keys than all heads or random ones.

python benchmarks/claims/compresskv.py [--length 1024] [--seeds 6]
"""

from __future__ import annotations

import tempfile
import time

from claim import record
from heads import labelled, profile_of, saved, shuffled
from keeping import arguments, load, retrieval

from foveate.tasks.recall import Recall


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=6)
    model, tokenizer = load(given)
    found = profile_of("compresskv", model, tokenizer)
    budget = given.length // 16
    with tempfile.TemporaryDirectory() as folder:
        ours, other = saved(folder, "semantic", found), saved(folder, "random", shuffled(found, ("semantic",), 0))
        choices = {
            "semantic heads, calibrated budgets": f"first_k=4,profile={ours}",
            "semantic heads": f"first_k=4,allocate=false,profile={ours}",
            "all heads": f"first_k=99,allocate=false,profile={ours}",
            "random heads": f"first_k=4,allocate=false,profile={other}",
        }
        labels = {"full": "full"}
        labels |= {f"compresskv:budget={budget},{each}": label for label, each in choices.items()}
        rows = labelled(retrieval(model, tokenizer, list(labels), Recall(pairs=8), given, question_seen=True), labels)
    claim = "semantic retrieval heads choose better keys than all heads together or random ones"
    record("compresskv", claim, given, started, model=model, layer_error=found.tensors["error"].tolist(), rows=rows)


if __name__ == "__main__":
    main()
