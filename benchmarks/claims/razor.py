"""RazorAttention's claims in small: probed heads retrieve what random heads do not, and the compensation token helps.

python benchmarks/claims/razor.py [--length 1024] [--seeds 4]
"""

from __future__ import annotations

import tempfile
import time

from claim import record
from heads import labelled, profile_of, saved, shuffled
from keeping import arguments, load, next_token, retrieval

from foveate.tasks.passkey import Passkey
from foveate.tasks.perplexity import Perplexity

SHARE = "least=128,induction=0.14,echo=0.01"


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=4)
    model, tokenizer = load(given)
    found = profile_of("razor", model, tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        labels = {"full": "full"}
        profiles = {"probed heads": found}
        profiles |= {f"random heads {seed}": shuffled(found, ("induction", "echo"), seed) for seed in range(2)}
        for label, profile in profiles.items():
            place = saved(folder, label.replace(" ", "-"), profile)
            labels[f"razor:{SHARE},profile={place}"] = f"razor, {label}"
        rows = labelled(retrieval(model, tokenizer, list(labels), Passkey(), given, question_seen=False), labels)
        place = saved(folder, "probed-heads", found)
        none = f"razor:least=48,compression=1000,induction=0,echo=0,profile={place}"
        labels = {
            "full": "full",
            none: "every head compressed",
            f"{none},compensate=false": "every head compressed, without compensation",
        }
        language = labelled(next_token(model, tokenizer, list(labels), Perplexity(), given), labels)
    claim = "induction and echo heads retrieve what random heads do not; the compensation token lowers perplexity"
    record("razor", claim, given, started, model=model, passkey=rows, perplexity=language)


if __name__ == "__main__":
    main()
