"""linear_scan on CPU against PyTorch's causal SDPA of the same shape: float32, forward only.

    python benchmarks/scan_cpu.py            writes benchmarks/results/scan_cpu.json

SDPA runs first and again last, so that a change of the machine's load during the run shows. Times are medians in
milliseconds of `--repeats` calls after two warm-up calls, with gradients off.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F

from foveate.attention.linear import linear_scan

RESULTS = Path(__file__).parent / "results" / "scan_cpu.json"


def measure(run: Callable[[], object], repeats: int) -> dict[str, float]:
    """Median, fastest and slowest of `repeats` calls, in ms."""
    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return {"median": statistics.median(times), "fastest": min(times), "slowest": max(times)}


def machine() -> dict[str, object]:
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": cpu,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": " ".join(["python", *sys.argv]),
    }


def loadavg() -> str:
    return Path("/proc/loadavg").read_text().strip()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    T, H, D = args.length, args.heads, args.dim
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    q, k, v = normal(1, T, H, D), F.normalize(normal(1, T, H, D), dim=-1), normal(1, T, H, D)
    heads_first = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    scalar, vector = -normal(1, T, H).abs() / 10, -normal(1, T, H, D).abs() / 10
    beta = normal(1, T, H).sigmoid()
    forms = {
        "no decay": {},
        "fixed decay": {"g": scalar[0, 0]},
        "scalar decay": {"g": scalar},
        "vector decay": {"g": vector},
        "delta rule": {"beta": beta},
        "gated delta rule": {"g": scalar, "beta": beta},
        "vector-gated delta rule": {"g": vector, "beta": beta},
    }

    def sdpa() -> object:
        return F.scaled_dot_product_attention(*heads_first, is_causal=True)

    record: dict[str, object] = {**machine(), "shape": {"B": 1, "T": T, "H": H, "K": D, "V": D}, "dtype": "float32"}
    record["loadavg before"] = loadavg()
    rows = [{"operator": "SDPA, causal", "chunk_size": None, **measure(sdpa, args.repeats)}]
    for name, options in forms.items():
        for chunk in args.chunks:
            timing = measure(lambda o=options, c=chunk: linear_scan(q, k, v, chunk_size=c, **o), args.repeats)
            rows.append({"operator": name, "chunk_size": chunk, **timing})
    rows.append({"operator": "SDPA, causal, again", "chunk_size": None, **measure(sdpa, args.repeats)})
    record["loadavg after"] = loadavg()
    base = rows[0]["median"]
    record["milliseconds"] = [{**row, "speedup over SDPA": base / row["median"]} for row in rows]
    for row in record["milliseconds"]:
        print(
            f"{row['operator']:26s} C={row['chunk_size']!s:5s} {row['median']:8.1f} ms "
            f"({row['fastest']:.1f} .. {row['slowest']:.1f})  {row['speedup over SDPA']:.2f} x"
        )
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
