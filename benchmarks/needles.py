"""Passkey and single needle at half and at a quarter of the cache, 20 seeds, every method against the dense model.

    python benchmarks/needles.py [--seeds 20] [--lengths 2048,4096] [--share 0.5] [--query-agnostic] [--out DIR]

Writes benchmarks/results/needles_<share>_<aware|agnostic>.json: one row per method, task and length, as measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from foveate.compare import compare
from foveate.hf.models import load_model

RESULTS = Path(__file__).parent / "results"
KEPT = ("method", "task", "length", "query_aware", "score", "cache_bytes", "density", "decode_density", "error")


def methods_for(length: int, share: float) -> list[str]:
    """Every method with `share` of a prompt of `length` tokens."""
    kept = int(length * share)
    drop = f"ratio={1 - share}"
    return [
        "full",
        f"streaming-llm:window={kept - 4}",
        f"h2o:{drop}",
        f"tova:{drop}",
        f"snapkv:{drop}",
        f"pyramidkv:{drop}",
        f"adakv:budget={kept}",
        f"expected-attention:{drop}",
        f"knorm:{drop}",
        f"keydiff:{drop}",
        f"quest:budget={kept}",
        f"recycled:budget={kept}",
        "duo:sparsity=0.5",
        f"flexprefill+snapkv:budget={kept}",
    ]


def variants_for(length: int, share: float) -> list[str]:
    """Small observation windows and another base for Ada-KV."""
    kept, drop = int(length * share), f"ratio={1 - share}"
    return [
        f"snapkv:{drop},window=16",
        f"snapkv:{drop},window=8,kernel=7,pool=max",
        f"adakv:budget={kept},window=16",
        f"pyramidkv:{drop},window=16",
        f"adakv:budget={kept},base=expected-attention",
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0, help="to share the work between processes")
    parser.add_argument("--lengths", default="2048,4096")
    parser.add_argument("--share", type=float, default=0.5)
    parser.add_argument("--query-agnostic", action="store_true")
    parser.add_argument("--methods", nargs="*", help="only those whose spec contains one of these words")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--variants", action="store_true", help="other windows and bases instead of every method")
    parser.add_argument("--model", default=None)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--cells", default="foveate-report/needles")
    parser.add_argument("--out", default=str(RESULTS))
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, dtype=given.dtype, device=given.device)
    rows, comparison = [], None
    for length in (int(each) for each in given.lengths.split(",")):
        methods = (variants_for if given.variants else methods_for)(length, given.share)
        if given.methods:
            methods = [each for each in methods if any(word in each for word in given.methods)]
        comparison = compare(
            model,
            tokenizer,
            methods,
            ["passkey", "niah-single"],
            [length],
            range(given.first_seed, given.first_seed + given.seeds),
            query_aware=not given.query_agnostic,
            out=given.cells,
            min_decode_tokens=0,
        )
        Console().print(comparison.table())
        rows += [{name: row[name] for name in KEPT} for row in comparison.rows]
    assert comparison is not None
    kind = "agnostic" if given.query_agnostic else "aware"
    suffix = "_variants" if given.variants else ""
    target = Path(given.out) / f"needles_{given.share}_{kind}{suffix}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    data = {"environment": comparison.environment, "model": comparison.model, "seeds": given.seeds, "rows": rows}
    target.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
