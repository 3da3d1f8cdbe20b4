"""The main job's numbers on CPU: `full`, snapkv, duo and adakv at a quarter of the cache, against the stock model.

    python benchmarks/decode_cpu.py [--length 8192] [--dtype bfloat16] [--rounds 3]

Writes benchmarks/results/decode_cpu_<dtype>_<length>.json.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from rich.console import Console

from foveate.compare.bench import bench
from foveate.hf.models import default_model

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    model, _ = default_model(dtype=given.dtype)
    quarter = given.length // 4
    methods = ["full", f"snapkv:budget={quarter}", "duo:sparsity=0.78", f"adakv:budget={quarter}"]
    result = bench(model, methods=methods, length=given.length, rounds=given.rounds)
    Console().print(result.table())
    # FOVEATE_CPP=0 times the torch kernels alone.
    kernels = "_torch" if os.environ.get("FOVEATE_CPP") == "0" else ""
    result.to_json(RESULTS / f"decode_cpu_{given.dtype}_{given.length}{kernels}.json")


if __name__ == "__main__":
    main()
