"""MoA's claim in small: with the same mean number of keys per head, spans that fit each head keep a needle and the next
token's quality better than one window for all heads.

Calibrates first (length/2 tokens, so that the claim also asks whether spans carry over to the longer text).

    python benchmarks/claims/moa.py [--length 1536] [--seeds 4]
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

from keeping import arguments, load, next_token, record, retrieval

from foveate.hf.calibrate import calibrate
from foveate.tasks.niah import Niah
from foveate.tasks.perplexity import Perplexity


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1536, seeds=4)
    model, tokenizer = load(given)
    block = max(8, given.length // 48)
    length = given.length // 2 // block * block
    sizes = f"sinks={block},minimum={2 * block},multiple={block},new_tokens=64"
    with tempfile.TemporaryDirectory() as folder:
        made = {}
        for bound in (0.25, 0.5):
            out = Path(folder) / f"moa-{int(100 * bound)}"
            profile = calibrate("moa", model, tokenizer, out=out, length=length, block=block, bound=bound, samples=4)
            made[bound] = profile.settings
        methods = ["full"]
        for bound in (0.25, 0.5):
            methods += [
                f"moa:profile={folder}/moa-{int(100 * bound)},{sizes}",
                f"streaming-llm:sinks={block},window={int(bound * given.length) - block},reindex=false",
            ]
        record(
            "moa",
            "spans that fit each head keep more than one window for all heads, at an equal number of keys",
            model,
            given,
            started,
            calibration=[{"bound": bound, **settings} for bound, settings in made.items()],
            rows=next_token(model, tokenizer, methods, Perplexity(target=64), given),
            retrieval=retrieval(model, tokenizer, methods, Niah(depth=0.5), given, question_seen=True),
        )


if __name__ == "__main__":
    main()
