"""How many keys each index scans to find the 100 best, when queries are distributed differently from keys.

    python benchmarks/retrieval_recall.py [--keys 200000] [--queries 20000] [--heads 1] [--indexes flat,attention-graph]

Keys are N(0, I). Queries are N(mu, S): |mu| = sqrt(D), and S has eigenvalues falling as 1 / i^2 along random
directions, of trace 4 D; so prompt queries and held-out decode queries lie together, and far from the keys. The graph
is built from the prompt queries; `attention-graph (keys)` is the same graph built from keys in the place of queries;
usearch is an ordinary HNSW index. Recall is the share of the exact 100 best, the mean over heads and held-out queries.
Each index is searched with rising beams; `at_scan` is its recall with the widest beam that scans at most --scan.

Writes benchmarks/results/retrieval_recall.json. Times are of one thread (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from foveate.compare.environment import environment
from foveate.compare.files import write_atomic
from foveate.methods.index import AttentionGraph, FlatIndex, GraphOptions, KeyIndex, UsearchIndex

RESULTS = Path(__file__).parent / "results"
COUNT = 100
BEAMS = (100, 125, 150, 175, 200, 250, 300, 400, 600, 800)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--keys", type=int, default=200_000, help="keys per head")
    parser.add_argument("--queries", type=int, default=20_000, help="prompt queries per head that build the graph")
    parser.add_argument("--heads", type=int, default=1)
    parser.add_argument("--held-out", type=int, default=64, help="decode queries per head")
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--scan", type=float, default=0.02, help="share of keys that a search may scan")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--indexes", default="flat,attention-graph,attention-graph (keys),usearch")
    parser.add_argument("--output", type=Path, default=RESULTS / "retrieval_recall.json")
    return parser.parse_args()


def draw(given: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [1, H, n, D], prompt queries [1, H, m, D] and held-out queries [1, H, t, D]."""
    source, H, D = torch.Generator().manual_seed(given.seed), given.heads, given.width
    keys = torch.randn(1, H, given.keys, D, generator=source)
    centre = torch.randn(1, H, 1, D, generator=source)
    centre *= D**0.5 / centre.norm(dim=-1, keepdim=True)
    spread = torch.randn(1, H, D, D, generator=source) / torch.arange(1, D + 1)[:, None]
    spread *= 2 * D**0.5 / spread.norm(dim=(-2, -1), keepdim=True)
    prompt, held = (
        centre + torch.randn(1, H, count, D, generator=source) @ spread for count in (given.queries, given.held_out)
    )
    return keys, prompt, held


def builders(keys: Tensor, prompt: Tensor, length: Tensor) -> dict[str, Callable[[], KeyIndex]]:
    options = GraphOptions(sample=None)
    instead = keys[:, :, torch.linspace(0, keys.shape[2] - 1, prompt.shape[2]).long()]
    return {
        "flat": lambda: FlatIndex.build(keys, length),
        "attention-graph": lambda: AttentionGraph.build(keys, length, prompt, options),
        "attention-graph (keys)": lambda: AttentionGraph.build(keys, length, instead, options),
        "usearch": lambda: UsearchIndex.build(keys, length),
    }


def measure(index: KeyIndex, keys: Tensor, length: Tensor, held: Tensor, best: Sequence[Tensor], beam: int) -> Any:
    """Recall, share of keys scanned and milliseconds per query and head, at one beam."""
    recall, scanned, spent = 0.0, 0.0, 0.0
    for t, exact in enumerate(best):
        started = time.perf_counter()
        found = index.search(held[:, :, t], keys, length, count=COUNT, beam=beam)
        spent += time.perf_counter() - started
        hits = (found.index[..., None] == exact[..., None, :]).any(-1)
        recall += float(hits.float().mean())
        scanned += float(found.scanned.double().mean()) / keys.shape[2]
    runs = len(best)
    return {
        "beam": beam,
        "recall": recall / runs,
        "scanned": scanned / runs,
        "search_ms": 1e3 * spent / runs / keys.shape[1],
    }


def main() -> None:
    given = arguments()
    keys, prompt, held = draw(given)
    length = torch.tensor([given.keys])
    exact = FlatIndex.build(keys, length)
    best = [exact.search(held[:, :, t], keys, length, count=COUNT).index for t in range(given.held_out)]
    rows = []
    for name, build in builders(keys, prompt, length).items():
        if name not in given.indexes.split(","):
            continue
        started = time.perf_counter()
        index = build()
        row: dict[str, Any] = {"index": name, "build_s": (time.perf_counter() - started) / given.heads}
        beams = (COUNT,) if name == "flat" else BEAMS
        row["searches"] = [measure(index, keys, length, held, best, beam) for beam in beams]
        within = [each for each in row["searches"] if each["scanned"] <= given.scan]
        row["at_scan"] = within[-1] if within else None
        row["index_bytes_per_key"] = index.nbytes / given.heads / given.keys
        rows.append(row)
        print(json.dumps(row), flush=True)
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    made = {"settings": settings, "environment": environment(torch.device("cpu")), "rows": rows}
    write_atomic(given.output, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
