"""SpikingBrain's claim in small: integer spikes with an adaptive threshold and 8-bit weights change the perplexity of
a pretrained model by a few percent, and most steps of their coding are silent.

    python benchmarks/claims/spikingbrain.py [--device cuda] [--length 2048] [--seeds 4]
"""

from __future__ import annotations

import math
import time
from contextlib import nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from claim import parser, record
from keeping import mean
from torch import Tensor, nn

from foveate.hf.models import default_model
from foveate.mixers.linear.spikes import SpikeLinear, encode, firing_rate, spike_counts, spiking
from foveate.tasks.perplexity import Perplexity


@torch.no_grad()
def perplexity(model: Any, windows: list[Tensor]) -> float:
    losses = [float(F.cross_entropy(model(ids[None]).logits[0, :-1].float(), ids[1:])) for ids in windows]
    return math.exp(mean(losses))


@torch.no_grad()
def activity(model: Any, coded: dict[str, SpikeLinear], ids: Tensor, k: float) -> dict[str, float]:
    """Over the inputs of every coded layer: spikes per channel, channels without one, and the share of silent steps of
    the two signed codes, over 3 steps and over as many as needed."""
    found: dict[str, list[float]] = {"spikes_per_channel": [], "silent_channels": [], "sparsity": []}

    def look(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        counts, _ = spike_counts(args[0], k)
        found["spikes_per_channel"].append(float(counts.abs().mean()))
        found["silent_channels"].append(float((counts == 0).float().mean()))
        found["sparsity"].append(1 - float(firing_rate(encode(counts.flatten()[: 1 << 20], "bidirectional"))))

    hooks = [layer.register_forward_pre_hook(look) for layer in coded.values()]
    try:
        model(ids[None])
    finally:
        for hook in hooks:
            hook.remove()
    return {name: mean(values) for name, values in found.items()}


def main() -> None:
    started, given = time.perf_counter(), parser(__doc__, length=2048, seeds=4).parse_args()
    model, tokenizer = default_model(device=given.device)
    task = Perplexity(target=64)
    windows = []
    for seed in range(given.seeds):
        example = task.example(tokenizer, given.length, seed)
        windows.append(torch.tensor([*example.context, *example.target], device=given.device))
    rows: list[dict[str, Any]] = []
    codes: list[tuple[str, Any]] = [("dense", None), ("8-bit weights", {"k": None})]
    codes += [(f"8-bit weights, spikes k={k:g}", {"k": k}) for k in (1.0, 2.0, 3.0, 6.0, 12.0)]
    for name, options in codes:
        coding: Any = nullcontext({}) if options is None else spiking(model, **options, group=64)
        with coding as coded:
            row: dict[str, Any] = {"coding": name, "perplexity": perplexity(model, windows)}
            if options and options["k"]:
                row |= activity(model, coded, windows[0], options["k"])
        rows.append(row)
        row["over_dense"] = row["perplexity"] / rows[0]["perplexity"]
        print(row, flush=True)
    claim = "adaptive spike coding with k=3 and 8-bit weights changes perplexity by a few percent"
    task_name = "perplexity of windows of Python's manual"
    record("spikingbrain", claim, given, started, model=model, task=task_name, rows=rows)


if __name__ == "__main__":
    main()
