"""TCA-Attention's claim in small: calibrated mixes of counts, given to blocks by what they are worth, stay closer to
the dense model than the same count for every block, and than SnapKV with as many keys.

Profiles are measured now, on other prompts, by the last query and by the last 16. `tau` sets the density; SnapKV holds
as many keys as each setting, to a twentieth.

    python benchmarks/claims/tca.py [--device cuda] [--length 2048] [--seeds 4] [--block 64]
"""

from __future__ import annotations

import tempfile
import time
from typing import Any

import torch
from claim import record
from closeness import by_spec, closeness, parser, prompts
from keeping import load

from foveate.hf.calibrate import calibrate
from foveate.methods.calibrated import table_profile
from foveate.methods.keep.tca import TCA, densities
from foveate.methods.profile import Profile
from foveate.tasks.niah import NiahSingle
from foveate.tasks.perplexity import Perplexity
from foveate.tasks.variable_tracking import VariableTracking

TAUS = (0.02, 0.05, 0.1, 0.2)
WINDOWS = (1, 16)


def uniform(profile: Profile, count: int) -> Profile:
    """Every block of every head keeps `count` tokens."""
    counts = profile.tensors["proportions"].shape[1]
    proportions = torch.zeros(2, counts, dtype=torch.float64)
    proportions[0, count.bit_length() - 1] = proportions[1, -1] = 1.0
    loss = torch.zeros(*profile.tensors["loss"].shape[:2], 2)
    return table_profile("tca", profile.model, proportions=proportions, loss=loss)


def main() -> None:
    made = parser(__doc__, length=2048, seeds=4)
    made.add_argument("--block", type=int, default=64)
    started, given = time.perf_counter(), made.parse_args()
    model, tokenizer = load(given)
    profiles = {}
    for window in WINDOWS:
        settings = {"block": given.block, "length": given.length, "window": window, "progress": False}
        with tempfile.TemporaryDirectory() as folder:
            profiles[window] = calibrate("tca", model, tokenizer, out=f"{folder}/tca", **settings)
    methods: dict[str, TCA] = {}
    for window, profile in profiles.items():
        mixes = {f"tau {tau}": (tau, profile) for tau in TAUS}
        for count in (given.block // 2, given.block // 4):
            mixes[f"{count} of every {given.block} tokens"] = (TAUS[0], uniform(profile, count))
        for label, (tau, mix) in mixes.items():
            methods[f"{label}, window {window}"] = TCA(profile=mix, tau=tau, window=window).for_model(profile.model)
    tasks = {
        "niah-single": NiahSingle(),
        "variable-tracking": VariableTracking(),
        "text": Perplexity(target=32),
    }
    rows: dict[str, Any] = {}
    claim = "calibrated mixes of token counts stay closer to dense than equal counts and than SnapKV's keys"
    for name, task in tasks.items():
        asked = prompts(task, tokenizer, given)
        rows[name] = closeness(model, {**methods}, asked)
        ratios = sorted({round(20 * (1 - row["keys_held"])) / 20 for row in rows[name]} - {0.0})
        rows[name] += closeness(model, by_spec([f"snapkv:ratio={ratio},kernel=7" for ratio in ratios]), asked)[1:]
        chosen = {
            label: densities(method.table("proportions"))[method.chosen].tolist() for label, method in methods.items()
        }
        record("tca", claim, given, started, model=model, density_per_head=chosen, **rows)


if __name__ == "__main__":
    main()
