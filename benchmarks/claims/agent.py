"""Agent attention's claim in small: few agents keep softmax attention's accuracy, at a cost that grows with N alone.

python benchmarks/claims/agent.py [--device cuda] [--steps 1500] [--seeds 2] [--data fashion-mnist]
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from images import accuracies, arguments, record, with_mixer

from foveate.mixers.base import create_mixer

CLAIM = "attention through few agents is as good as softmax attention and above plain linear attention"


@torch.no_grad()
def seconds(given: argparse.Namespace) -> list[dict[str, float]]:
    """Median time of one layer over growing grids, forward only."""
    rows = []
    for side in (16, 32, 64):
        x = torch.randn(4, side * side, 64, device=given.device)
        row: dict[str, float] = {"tokens": side * side}
        for spec in ("softmax:rotary=false,causal=false", "agent"):
            grid = {"height": side} if spec == "agent" else {}
            mixer = create_mixer(spec, dim=64, heads=4, **grid).to(given.device).eval()
            times = []
            for _ in range(8):
                started = time.perf_counter()
                mixer(x)
                if given.device.startswith("cuda"):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
            row[spec] = sorted(times[3:])[2]
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    save = partial(record, "agent", CLAIM, given, started)
    specs = ("softmax:rotary=false,causal=false", "linear:causal=false", "agent:pool=2", "agent:pool=4", "agent:pool=7")
    rows, _ = accuracies({spec: with_mixer(spec) for spec in specs}, given, lambda rows: save(rows=rows))
    save(rows=rows, seconds_by_tokens=seconds(given))


if __name__ == "__main__":
    main()
