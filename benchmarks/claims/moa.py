"""MoA's claim in small: with the same mean number of keys per head, spans that fit each head keep a needle and the next
token's quality better than one window for all heads.

Calibrates first (length/2 tokens, so that the claim also asks whether spans carry over to the longer text).

    python benchmarks/claims/moa.py [--length 1536] [--seeds 4]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from claim import record
from heads import labelled
from keeping import arguments, load, next_token, retrieval

from foveate.hf.calibrate import calibrate
from foveate.tasks.niah import Niah
from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1536, seeds=4)
    model, tokenizer = load(given)
    block = max(8, given.length // 48)
    length = given.length // 2 // block * block
    sizes = f"sinks={block},minimum={2 * block},multiple={block},new_tokens=64"
    labels, calibration = {"full": "full"}, []
    with tempfile.TemporaryDirectory() as folder:
        for bound in (0.25, 0.5):
            name = f"moa-{int(100 * bound)}"
            out = Path(folder) / name
            profile = calibrate("moa", model, tokenizer, out=out, length=length, block=block, bound=bound, samples=4)
            calibration.append({"bound": bound, **profile.settings})
            labels[f"moa:profile={out},{sizes}"] = f"moa:profile={name},{sizes}"
            window = f"streaming-llm:sinks={block},window={int(bound * given.length) - block},reindex=false"
            labels[window] = window
        rows = labelled(next_token(model, tokenizer, list(labels), Perplexity(target=64), given), labels)
        task = Niah(depth=0.5)
        found = labelled(retrieval(model, tokenizer, list(labels), task, given, question_seen=True), labels)
    claim = "spans that fit each head keep more than one window for all heads, at an equal number of keys"
    record("moa", claim, given, started, model=model, calibration=calibration, rows=rows, retrieval=found)


if __name__ == "__main__":
    main()
