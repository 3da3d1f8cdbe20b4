"""linear_scan on CPU against PyTorch's causal SDPA of the same shape: float32, forward only.

    python benchmarks/scan_cpu.py            writes benchmarks/results/scan_cpu.json

SDPA runs first and again last, so that a change of the machine's load during the run shows. Times are medians of
`--repeats` calls after two warm-up calls, with gradients off: milliseconds of wall time, and of CPU time summed over
threads, which other processes disturb less. On a loaded machine (see "loadavg" in the file) trust neither alone.
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
    """Median, fastest and slowest wall time of `repeats` calls, and median CPU time, in ms."""
    for _ in range(2):
        run()
    wall, cpu = [], []
    for _ in range(repeats):
        start, start_cpu = time.perf_counter(), time.process_time()
        run()
        wall.append(1e3 * (time.perf_counter() - start))
        cpu.append(1e3 * (time.process_time() - start_cpu))
    return {
        "median": statistics.median(wall),
        "fastest": min(wall),
        "slowest": max(wall),
        "cpu median": statistics.median(cpu),
    }


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
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 128])
    args = parser.parse_args()
    if args.threads is not None:
        torch.set_num_threads(args.threads)
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
    rows: list[dict] = [{"operator": "SDPA, causal", "chunk_size": None, **measure(sdpa, args.repeats)}]
    for name, options in forms.items():
        for chunk in args.chunks:
            timing = measure(lambda o=options, c=chunk: linear_scan(q, k, v, chunk_size=c, **o), args.repeats)
            rows.append({"operator": name, "chunk_size": chunk, **timing})
    rows.append({"operator": "SDPA, causal, again", "chunk_size": None, **measure(sdpa, args.repeats)})
    record["loadavg after"] = loadavg()
    base = rows[0]
    for row in rows:
        row["speedup over SDPA"] = base["median"] / row["median"]
        row["speedup over SDPA, CPU time"] = base["cpu median"] / row["cpu median"]
        print(
            f"{row['operator']:26s} C={row['chunk_size']!s:5s} {row['median']:8.1f} ms "
            f"({row['fastest']:.1f} .. {row['slowest']:.1f}), cpu {row['cpu median']:.1f} ms; "
            f"{row['speedup over SDPA']:.2f} x, cpu {row['speedup over SDPA, CPU time']:.2f} x"
        )
    record["milliseconds"] = rows
    RESULTS.parent.mkdir(parents=True, exist_ok=True)
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
