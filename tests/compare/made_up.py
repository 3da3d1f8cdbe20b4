"""Made-up results in the schema of results.json: for the report and the tables, no model needed."""

from __future__ import annotations

import random
from typing import Any

from foveate.compare.breakeven import break_even, points_of
from foveate.compare.rows import with_dense

METHODS = {
    "dense": 1.0,
    "full": 1.0,
    "streaming-llm:window=508": 0.25,
    "snapkv:budget=512": 0.25,
    "adakv:budget=512": 0.26,
    "quest:budget=512": 1.04,
    "flexprefill+snapkv:budget=512+quest:budget=128": 0.27,
}
TASKS = ("niah-single", "multi-turn:questions=3", "perplexity:target=128")
ROW_BYTES = 2 * 3 * 64 * 2


def made_up(
    *, layers: int = 30, heads: int = 3, lengths: tuple[int, ...] = (1024, 2048, 4096), refused: str | None = None
) -> dict[str, Any]:
    draw = random.Random(0)
    rows = []
    for task in TASKS:
        for length in lengths:
            made = {name: _row(draw, name, share, task, length, layers, heads) for name, share in METHODS.items()}
            if refused is not None:
                dead = dict.fromkeys(made["dense"]) | {
                    key: made["dense"][key] for key in ("task", "length", "seeds", "query_aware")
                }
                message = "UnsupportedModelError: Tiny</script><b>Model</b> cannot be served"
                made[refused] = dead | {"method": refused, "depths": [], "needles": [], "error": message}
            rows += [with_dense(row, made["dense"]) for row in made.values()]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    return {
        "schema_version": 1,
        "environment": {
            "device": "Made-up CPU @ 2.00GHz",
            "device_type": "cpu",
            "versions": {"python": "3.11.9", "torch": "2.13.0", "transformers": "5.24.0", "foveate": "0.1.0"},
            "threads": 2,
            "date": "2026-11-24T17:00:00+00:00",
            "loadavg": [2.0, 1.5, 1.1],
            "platform": "Linux-6.1-x86_64",
            "peak_bytes_kind": "growth of resident memory",
        },
        "model": {
            "name": "smollm2-135m-instruct",
            "type": "llama",
            "parameters": 134_515_008,
            "dtype": "bfloat16",
            "layers": layers,
            "heads": 9,
            "kv_heads": heads,
            "head_dim": 64,
            "fingerprint": "0123456789abcdef",
        },
        "settings": {
            "methods": methods,
            "tasks": list(TASKS),
            "lengths": list(lengths),
            "seeds": [0, 1, 2],
            "query_aware": True,
            "stride": 8,
            "min_decode_tokens": 8,
            "break_even_lengths": [],
            "cells_computed": len(rows) * 3,
            "cells_reused": 0,
        },
        "break_even": [break_even(name, points_of(rows, name)).as_dict() for name in methods if name != "dense"],
        "rows": rows,
    }


def _row(
    draw: random.Random, method: str, share: float, task: str, length: int, layers: int, heads: int
) -> dict[str, Any]:
    keeps = min(1.0, share)
    perplexity = task.startswith("perplexity")
    loss = 0.0 if keeps == 1.0 else draw.uniform(0.05, 0.6) * length / 4096
    depths = [(0.3 + seed * 0.618) % 1.0 for seed in range(3)]
    scores = [max(0.0, round(0.95 - loss - draw.random() * 0.1, 2)) for _ in depths]
    return {
        "method": method,
        "task": task,
        "length": length,
        "seeds": [0, 1, 2],
        "query_aware": True,
        "score": None if perplexity else sum(scores) / 3,
        "perplexity": 14.0 + 4 * loss if perplexity else None,
        "ttft_s": length / 700 * (1 if method == "dense" else 0.98),
        "decode_tokens_per_s": 1 / (0.04 + 2.8e-5 * length * (1 if method == "dense" else 0.3 * keeps)),
        "peak_bytes": int(3e5 * length),
        "cache_bytes": int(length * share * ROW_BYTES * layers),
        "density": 1.0 if share == 1.0 else 0.9,
        "prefill_density": 1.0,
        "decode_density": 0.12 if method.startswith("quest") else keeps,
        "prompt_tokens": length,
        "depths": [
            {
                "seed": seed,
                "depth": depth if task == "niah-single" else None,
                "score": None if perplexity else score,
                "perplexity": 14.0 if perplexity else None,
            }
            for seed, (depth, score) in enumerate(zip(depths, scores))
        ],
        "lengths_kept": [
            [round(length * keeps * (1 if keeps == 1 else draw.uniform(0.8, 1.2))) for _ in range(heads)]
            for _ in range(layers)
        ],
        "tokens_seen": length + 12,
        "kept": None if keeps == 1.0 else [[_shares(draw) for _ in range(heads)] for _ in range(layers)],
        "needles": [0.3] if task == "niah-single" else [0.3, 0.63, 0.96] if task.startswith("multi") else [],
        "error": None,
    }


def _shares(draw: random.Random) -> list[float]:
    middle = draw.randrange(64)
    return [
        1.0 if bin in (0, 63) else round(max(0.02, 0.9 - abs(bin - middle) / 12, 0.2 * draw.random()), 3)
        for bin in range(64)
    ]
