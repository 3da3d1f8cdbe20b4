"""A result file from the cells that `needles.py` and `extrapolation.py` keep, where several processes shared the work.

    python benchmarks/from_cells.py CELLS [CELLS ...] --out benchmarks/results/extrapolation.json

Rows are those of the scripts, and say of which seeds: a run that was stopped has fewer of them. All cells must be of
one model, device, versions and way to run. Nothing is computed but means (medians of times) over seeds.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from foveate.compare.files import write_atomic
from foveate.compare.matrix import Group
from foveate.compare.rows import row_of
from foveate.compare.subject import DENSE
from foveate.methods import create, describe

# What tells rows apart; everything else in a cell's key must be alike.
OWN = ("method", "task", "length", "seed", "example", "profile")
KEPT = (
    *("method", "task", "length", "seeds", "query_aware", "score", "perplexity", "cache_bytes"),
    *("density", "decode_density", "error"),
)


def place(row: tuple[tuple[str, str, int], Any]) -> tuple[int, str, bool, str]:
    """By length and task, the dense model first."""
    method, task, length = row[0]
    return length, task, method != DENSE, method


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="+", type=Path, help="folders of cells")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=[], help="specs to call methods by; cells omit default options")
    given = parser.parse_args()
    files = sorted(file for folder in given.cells for file in folder.rglob("*.json"))
    stored = [json.loads(file.read_text()) for file in files]
    ways = {json.dumps({k: v for k, v in each["key"].items() if k not in OWN}, sort_keys=True) for each in stored}
    if len(ways) != 1:
        parser.error(f"{len(files)} cells made in {len(ways)} ways, allowed: cells made in one")
    way: dict[str, Any] = json.loads(ways.pop())
    seeds: dict[tuple[str, str, int], dict[int, Any]] = defaultdict(dict)
    for each in stored:
        key = each["key"]
        seeds[key["method"], key["task"], key["length"]][key["seed"]] = each["cell"]
    names = {describe(create(spec)): spec for spec in given.methods}
    rows = []
    for (method, task, length), cells in sorted(seeds.items(), key=place):
        row = row_of(Group(method, task, length), dict(sorted(cells.items())), {}, way["query_aware"])
        row["method"] = names.get(method, method)
        rows.append({name: row[name] for name in KEPT})
        print({name: row[name] for name in ("method", "task", "length", "score", "perplexity", "seeds")})
    date = datetime.fromtimestamp(max(file.stat().st_mtime for file in files), UTC).isoformat(timespec="seconds")
    environment = {**{name: way[name] for name in ("device", "versions", "threads")}, "date": date}
    most = max(len(row["seeds"]) for row in rows)
    data = {"environment": environment, "model": way["model"], "seeds": most, "rows": rows}
    write_atomic(given.out, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
