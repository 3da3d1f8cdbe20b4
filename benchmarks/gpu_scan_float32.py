"""Float32 scans and steps on one GPU, Triton beside torch: what backend="auto" should choose where both are right.

    python benchmarks/gpu_scan_float32.py [--workers 8] [--out FILE]

Writes benchmarks/results/gpu_scan_float32.json: microseconds per call of both backends (median of 20; CUDA events
around one call, so what the host takes to issue it is inside), forward, forward with backward, and single steps.
`gpu_scan_checks.py` has judged the same calls in float64.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

from foveate.attention.linear import linear_scan, linear_step  # noqa: E402
from foveate.compare.environment import command_line, versions  # noqa: E402
from foveate.compare.files import write_atomic  # noqa: E402

FORMS = ("none", "normalised", "fixed", "scalar", "vector", "delta", "gated delta")
# Sequences, tokens, heads, channels: a small model in training, a long text, and a wide head.
SHAPES = ((16, 512, 4, 32), (1, 8192, 16, 64), (1, 4096, 8, 128))
WHAT = ("forward", "forward and backward", "step")


def draw(form: str, shape: tuple[int, int, int, int]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    B, T, H, D = shape
    torch.manual_seed(0)
    made = {name: torch.randn(B, T, H, D, device="cuda") for name in "qkv"}
    if "delta" in form:
        made["k"] = torch.nn.functional.normalize(made["k"], dim=-1)
        made["beta"] = torch.rand(B, T, H, device="cuda")
    if form == "normalised":
        made["q"], made["k"] = (torch.nn.functional.softplus(made[name]) for name in "qk")
    if form == "fixed":
        made["g"] = -torch.linspace(0.001, 0.5, H, device="cuda")
    elif form in ("scalar", "gated delta"):
        made["g"] = torch.nn.functional.logsigmoid(3 + 2 * torch.randn(B, T, H, device="cuda"))
    elif form == "vector":
        made["g"] = torch.nn.functional.logsigmoid(4 + torch.randn(B, T, H, D, device="cuda"))
    return made, {"normalize": form == "normalised"}


def call_of(what: str, form: str, shape: tuple[int, int, int, int], backend: str) -> Callable[[], Any]:
    x, options = draw(form, shape)
    if what == "forward":
        return lambda: linear_scan(**x, **options, backend=backend)
    if what == "step":
        B, _, H, D = shape
        here = {name: each if each.dim() == 1 else each[:, :1] for name, each in x.items()}
        state = torch.rand(B, H, D, D + options["normalize"], device="cuda")
        return lambda: linear_step(**here, state=state, **options, backend=backend)
    leaves = {name: each.requires_grad_() for name, each in x.items()}
    weight = torch.randn_like(x["v"])

    def both() -> None:
        o, _ = linear_scan(**leaves, **options, backend=backend)
        torch.autograd.grad(o, list(leaves.values()), weight)

    return both


def compiled(job: tuple[str, str, tuple[int, int, int, int]]) -> None:
    call_of(*job, "triton")()
    torch.cuda.synchronize()


def microseconds(call: Callable[[], Any], rounds: int = 20) -> float:
    for _ in range(3):
        call()
    times = []
    for _ in range(rounds):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        began.record()
        call()
        ended.record()
        torch.cuda.synchronize()
        times.append(1e3 * began.elapsed_time(ended))
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=8, help="processes that compile before anything is timed")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gpu_scan_float32.json")
    given = parser.parse_args()
    jobs = list(itertools.product(WHAT, FORMS, SHAPES))
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compiled, jobs))
    rows: list[dict[str, Any]] = []
    for what, form, shape in jobs:
        found = {backend: microseconds(call_of(what, form, shape, backend)) for backend in ("torch", "triton")}
        ratio = found["torch"] / found["triton"]
        rows.append({"what": what, "form": form, "shape": shape, **found, "torch_over_triton": round(ratio, 2)})
        print(rows[-1], flush=True)
        data = {
            "device": torch.cuda.get_device_name(),
            "versions": versions(),
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command_line(),
            "rows": rows,
        }
        write_atomic(given.out, json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
