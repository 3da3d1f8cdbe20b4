"""HCAM's claim in small: a sequence seen once is repeated from its cue, also among more sequences and after longer
distractions than in training, where flat attention of the same size loses more and local attention remembers nothing.

    python benchmarks/claims/hcam.py [--device cuda] [--steps 1500]
"""

from __future__ import annotations

import time
from typing import Any

from landmark import arguments, fit, make_model, predictions, record

from foveate.lm.hcam_recall import ballet, ballet_vocabulary, whole_dances
from foveate.lm.synthetic import IGNORED, TEST_SEEDS


def main() -> None:
    started = time.perf_counter()
    parser = arguments(__doc__, steps=1500)
    parser.add_argument("--dances", type=int, nargs="+", default=[8, 16, 32], help="the first is trained on")
    parser.add_argument("--delay", type=int, nargs="+", default=[64, 512], help="the first is trained on")
    parser.add_argument("--retrieve", type=int, default=4)
    given = parser.parse_args()
    local = "softmax:window=16"
    models = {
        "hierarchical memory": [local, f"hcam:chunk=16,retrieve={given.retrieve}"] * 2,
        "flat memory": [local, "softmax"] * 2,
        "flat memory without positions": [local, "softmax:rotary=false"] * 2,
        "no memory": [local] * 4,
    }
    train = ballet(given.train, dances=given.dances[0], delay=given.delay[0], asked=2, seed=given.seed)
    rows: list[dict[str, Any]] = []
    for name, mixers in models.items():
        model = make_model(mixers, ballet_vocabulary(), given)
        loss = fit(model, train, given)
        for dances in given.dances:
            for delay in given.delay:
                data = ballet(given.test, dances=dances, delay=delay, seed=TEST_SEEDS + given.seed)
                said = predictions(model, data.inputs)
                asked = data.labels != IGNORED
                rows.append(
                    {
                        "model": name,
                        "mixers": mixers,
                        "dances": dances,
                        "delay": delay,
                        "steps_right": float((said == data.labels)[asked].float().mean()),
                        "dances_right": float(whole_dances(said, data.labels, 15).mean()),
                        "train_loss": loss,
                    }
                )
                print(rows[-1], flush=True)
    claim = "recall of a cued sequence transfers to more sequences and longer delays, better than with a flat memory"
    record("hcam", claim, model, given, started, rows=rows)


if __name__ == "__main__":
    main()
