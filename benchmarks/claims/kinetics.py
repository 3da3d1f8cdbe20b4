"""Kinetics' claims in small: counted in eFLOPs, reading the cache outweighs the parameters after a few hundred tokens,
where FLOPs alone put that at tens of thousands; block top-k keeps it down, and stays closer to the dense model than the
last tokens alone at the same budget.

    python benchmarks/claims/kinetics.py [--length 2048] [--seeds 2]
"""

from __future__ import annotations

import time
from typing import Any

from claim import record
from keeping import arguments, load
from selecting import divergence

from foveate.methods.select.kinetics import KineticsCost

# Qwen3: parameters in billions, layers, query heads (all: 8 KV heads of 128).
QWEN3 = {"0.6B": (0.752, 28, 16), "1.7B": (2.03, 28, 16), "4B": (4.02, 36, 32), "8B": (8.19, 36, 32)}
QWEN3 |= {"14B": (14.77, 40, 40), "32B": (32.76, 64, 64)}
PROMPT = 256


def costs() -> list[dict[str, Any]]:
    """eFLOPs (1e12) by length: parameters' share of the dense cost, and what block top-k leaves of it."""
    rows = []
    for name, (billions, layers, heads) in QWEN3.items():
        model = KineticsCost(params=billions * 1e9, heads=heads, kv_heads=8, width=128 * layers)
        row: dict[str, Any] = {"model": name}
        for length in (1024, 2048, 4096, 8192, 16384, 32768):
            dense = float(model.dense(PROMPT, length).sum())
            sparse = float(model.block_topk(PROMPT, length, local=64, block=16, blocks=28).sum())
            row[str(length)] = {
                "dense": round(dense, 1),
                "parameter_share": round(2 * billions * 1e9 * length * 1e-12 / dense, 3),
                "block_topk_over_dense": round(sparse / dense, 3),
            }
        lengths = range(64, 262144, 64)
        for what, cost in (
            ("eflops", lambda n, m=model: m.dense(PROMPT, n).sum()),
            ("flops", lambda n, m=model: m.dense(PROMPT, n)[0]),
        ):
            half = (n for n in lengths if 4 * billions * 1e9 * n * 1e-12 < float(cost(n)))
            row[f"attention_dominates_from_{what}"] = next(half, None)
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    started, given = time.perf_counter(), arguments(__doc__, length=2048, seeds=2)
    table = costs()
    model, tokenizer = load(given)
    methods = []
    for budget in (128, 256, 512):
        local = 64
        methods += [
            f"kinetics:blocks={(budget - local) // 16},local={local}",
            f"kinetics:rule=strided,blocks={(budget - local) // 16},local={local}",
            f"kinetics:rule=token,blocks={budget - local},block=1,local={local}",
            f"kinetics:rule=random,blocks={budget - local},block=1,local={local},correct=true",
            f"kinetics:rule=local,local={budget}",
            f"quest:budget={budget},dense_layers=1",
        ]
    claim = "in eFLOPs the cache outweighs the parameters early; block top-k beats the last tokens alone"
    record(
        "kinetics", claim, given, started, model=model, costs=table, rows=divergence(model, tokenizer, methods, given)
    )


if __name__ == "__main__":
    main()
