"""MALA's claim in small: its weights grow sharper with the query's size, as softmax's do and linear attention's do not,
and it does better than linear attention in the same network.

    python benchmarks/claims/mala.py [--device cuda] [--steps 1500] [--seeds 2] [--data fashion-mnist]
"""

from __future__ import annotations

import time
from functools import partial

import torch
from images import GRID, accuracies, arguments, record, with_mixer

from foveate.attention.features import elu_plus_one
from foveate.attention.linear import kv_matmul_attention

CLAIM = "weights sharpen with the size of the query, and accuracy rises above plain linear attention"


@torch.no_grad()
def sharpness(device: str) -> list[dict[str, float]]:
    """The largest weight of a row in the mean, for queries of growing size over the same keys."""
    torch.manual_seed(0)
    tokens = GRID[0] * GRID[1]
    q, k = torch.randn(2, 8, tokens, 4, 16, dtype=torch.float64, device=device)
    identity = torch.eye(tokens, dtype=torch.float64, device=device)[None, :, None].expand(8, -1, 4, -1)
    phi_q, phi_k = elu_plus_one(q), elu_plus_one(k)
    rows = []
    for size in (0.5, 1.0, 2.0, 4.0, 8.0):
        softmax = torch.einsum("bihd,bjhd->bihj", size * q, k).mul(16**-0.5).softmax(-1)
        weights = {
            "softmax": softmax,
            "linear": kv_matmul_attention(size * phi_q, phi_k, identity, normalizer="sum"),
            "mala": kv_matmul_attention(size * phi_q, phi_k, identity, normalizer="affine"),
        }
        rows.append({"query_size": size} | {name: float(each.amax(-1).mean()) for name, each in weights.items()})
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__)
    save = partial(record, "mala", CLAIM, given, started)
    specs = ("softmax:rotary=false,causal=false", "linear:causal=false", "mala", "mala:attention=softmax")
    rows, _ = accuracies({spec: with_mixer(spec) for spec in specs}, given, lambda rows: save(rows=rows))
    save(rows=rows, largest_weight=sharpness(given.device))


if __name__ == "__main__":
    main()
