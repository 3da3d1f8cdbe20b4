"""DuoAttention's claim in small: with half the KV heads streaming, it matters which half.

The context is prefilled and truncated, then the question comes. Heads with the highest gates are kept whole, against
random halves and the half with the lowest gates.

    python benchmarks/claims/duo.py [--length 1024] [--seeds 6]
"""

from __future__ import annotations

import tempfile
import time

from claim import record
from heads import changed, labelled, profile_of, saved, shuffled
from keeping import arguments, load, retrieval

from foveate.tasks.niah import NiahSingle
from foveate.tasks.passkey import Passkey


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=1024, seeds=6)
    model, tokenizer = load(given)
    found = profile_of("duo", model, tokenizer)
    gates = found.tensors["alpha"]
    with tempfile.TemporaryDirectory() as folder:
        profiles = {"gates": found, "lowest gates": changed(found, {"alpha": 1 - gates})}
        profiles |= {f"random heads {seed}": shuffled(found, ("alpha",), seed) for seed in range(2)}
        labels = {"full": "full"}
        for label, profile in profiles.items():
            place = saved(folder, label.replace(" ", "-"), profile)
            labels[f"duo:sinks=16,window=64,sparsity=0.5,profile={place}"] = f"duo, half of the heads by {label}"
        rows = {
            name: labelled(retrieval(model, tokenizer, list(labels), task, given, question_seen=False), labels)
            for name, task in (("passkey", Passkey()), ("niah-single", NiahSingle()))
        }
    counts = gates.histc(bins=10, min=0, max=1).int().tolist()
    claim = "half of the heads, chosen by trained gates, retrieve what random halves do not"
    record("duo", claim, given, started, model=model, gates_histogram=counts, calibration=found.settings, **rows)


if __name__ == "__main__":
    main()
