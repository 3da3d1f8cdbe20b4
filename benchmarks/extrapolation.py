"""Beyond the model's own positions: passkeys and next-token loss on prompts longer than a pretrained model learnt.

    python benchmarks/extrapolation.py [--lengths 4096,8000,12288,16384] [--seeds 10] [--device cuda] [--out FILE]

SmolLM2 knows 8192 positions. The same prompts for the dense model, StreamingLLM (positions counted inside the cache),
LongHeads and TokenSelect (both read compact positions). Writes benchmarks/results/extrapolation.json, as measured.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from foveate.compare import compare
from foveate.hf.models import default_model

RESULTS = Path(__file__).parent / "results"
METHODS = (
    "full",
    "streaming-llm:window=4092",
    "longheads",
    "longheads:chunk=128,length=6144,start=6144",
    "tokenselect",
    "tokenselect:budget=3072,local=1024,chunk=512",
)
KEPT = ("method", "task", "length", "score", "perplexity", "cache_bytes", "density", "decode_density", "error")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,8000,12288,16384")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--tasks", nargs="+", default=["passkey", "perplexity"])
    parser.add_argument("--cells", default="foveate-report/extrapolation")
    parser.add_argument("--out", type=Path, default=RESULTS / "extrapolation.json")
    given = parser.parse_args()
    model, tokenizer = default_model(dtype=given.dtype, device=given.device)
    comparison = compare(
        model,
        tokenizer,
        given.methods,
        given.tasks,
        [int(each) for each in given.lengths.split(",")],
        given.seeds,
        out=given.cells,
        min_decode_tokens=0,
    )
    Console().print(comparison.table())
    rows = [{name: row.get(name) for name in KEPT} for row in comparison.rows]
    data = {"environment": comparison.environment, "model": comparison.model, "seeds": given.seeds, "rows": rows}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
