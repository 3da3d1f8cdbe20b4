"""InLine's claim in small: an injective normaliser and a local residual carry linear attention past softmax.

Also measured: how far apart weights stand for a query and for twice the query, which division makes equal.

    python benchmarks/claims/inline.py [--device cuda] [--steps 1500] [--seeds 2] [--data fashion-mnist]
"""

from __future__ import annotations

import time
from functools import partial

import torch
from images import GRID, accuracies, arguments, record, with_mixer

from foveate.attention.linear import kv_matmul_attention

CLAIM = "with an injective normaliser and a local residual, linear attention does better than softmax attention"


@torch.no_grad()
def distance(device: str) -> dict[str, float]:
    """The mean L1 distance between the weights of q and of 2 q."""
    torch.manual_seed(0)
    tokens = GRID[0] * GRID[1]
    q, k = torch.randn(2, 8, tokens, 4, 16, dtype=torch.float64, device=device).relu()
    identity = torch.eye(tokens, dtype=torch.float64, device=device)[None, :, None].expand(8, -1, 4, -1)
    apart = {}
    for normalizer in ("sum", "subtractive"):
        once, twice = (
            kv_matmul_attention(size * q, k, identity, normalizer=normalizer)  # type: ignore[arg-type]
            for size in (1.0, 2.0)
        )
        apart[normalizer] = float((once - twice).abs().sum(-1).mean())
    return apart


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    save = partial(record, "inline", CLAIM, given, started)
    specs = (
        "softmax:rotary=false,causal=false",
        "linear:causal=false,feature_map=relu",
        "inline:residual=false",
        "inline",
    )
    rows, _ = accuracies({spec: with_mixer(spec) for spec in specs}, given, lambda rows: save(rows=rows))
    save(rows=rows, distance_of_weights_of_q_and_2q=distance(given.device))


if __name__ == "__main__":
    main()
