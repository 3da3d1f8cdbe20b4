"""HCAM's claim in small: a sequence seen once is repeated from its cue, also among more sequences and after longer
distractions than in training, where flat attention of the same size loses more and local attention remembers nothing.
Flat attention stands there twice, with rotary positions and without any: the second transfers as well.

    python benchmarks/claims/hcam.py [--device cuda] [--steps 900]

Every model is a short convolution, which lets a step know the one before it, and one layer of its kind, without MLPs.
Training goes from one sequence, repeated at once, to those of the tests' first size, all of them asked.
"""

from __future__ import annotations

import time
from typing import Any

from claim import record
from landmark import arguments, fit, make_model, predictions

from foveate.lm.hcam_recall import ballet, ballet_vocabulary, whole_dances
from foveate.lm.synthetic import IGNORED, TEST_SEEDS


def main() -> None:
    started = time.perf_counter()
    parser = arguments(__doc__, steps=900)
    parser.set_defaults(batch=8, dim=128, heads=1, train=8192, test=64, rate=3e-3)
    parser.add_argument("--dances", type=int, nargs="+", default=[8, 16, 32], help="the first is trained on")
    parser.add_argument("--delay", type=int, nargs="+", default=[64, 512], help="the first is trained on")
    parser.add_argument("--symbols", type=int, default=256)
    parser.add_argument("--retrieve", type=int, default=4)
    given = parser.parse_args()
    models = {
        "flat memory": "softmax",
        "flat memory without positions": "softmax:rotary=false",
        "no memory": "softmax:window=16",
        "hierarchical memory": f"hcam:chunk=16,retrieve={given.retrieve}",
    }
    sizes = [(1, 0), (max(given.dances[0] // 2, 1), given.delay[0] // 4), (given.dances[0], given.delay[0])]
    train = [
        ballet(given.train, dances=dances, delay=delay, asked=dances, symbols=given.symbols, seed=given.seed)
        for dances, delay in sizes
    ]
    rows: list[dict[str, Any]] = []
    for name, mixer in models.items():
        mixers = ["baseconv", mixer]
        model = make_model(mixers, ballet_vocabulary(symbols=given.symbols), given, mlp_ratio=0.0)
        loss = fit(model, train, given)
        for dances in given.dances:
            for delay in given.delay:
                data = ballet(
                    given.test, dances=dances, delay=delay, symbols=given.symbols, seed=TEST_SEEDS + given.seed
                )
                said = predictions(model, data.inputs)
                asked = data.labels != IGNORED
                rows.append(
                    {
                        "model": name,
                        "mixers": mixers,
                        "dances": dances,
                        "delay": delay,
                        "steps_right": round(float((said == data.labels)[asked].float().mean()), 4),
                        "dances_right": round(float(whole_dances(said, data.labels, 15).mean()), 4),
                        "train_loss": round(loss, 4),
                    }
                )
                print(rows[-1], flush=True)
    claim = "recall of a cued sequence transfers to more sequences and longer delays, better than with a flat memory"
    parameters = sum(each.numel() for each in model.parameters())
    record("hcam", claim, given, started, parameters=parameters, chance=1 / given.symbols, rows=rows)


if __name__ == "__main__":
    main()
