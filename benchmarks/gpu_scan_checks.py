"""Correctness of the Triton scans on one GPU where nothing was timed: float32, normalisation, single steps, widths.

    python benchmarks/gpu_scan_checks.py [--workers 12] [--seconds 600]

Writes gpu_scan_checks.json to $OUT, or benchmarks/results/.

Every row is an operator call judged in float64 by the chunked torch backend, outputs, states and gradients; a row over
its gate says FAIL. `attention/backends/triton/scan.py` leaves to torch what is not found correct here.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import multiprocessing
import os
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src")]

from foveate.attention.linear import linear_scan, linear_step  # noqa: E402

WIDTHS = ((16, 64), (32, 32), (64, 64), (64, 128), (80, 80), (128, 128), (256, 256))
FORMS = ("none", "fixed", "scalar", "vector", "delta", "gated delta")
# Largest relative error of outputs, states and gradients; docs/kernels.md, "Numeric gates".
GATES = {torch.float32: (1e-5, 1e-4, 1e-4), torch.bfloat16: (5e-3, 1e-2, 2e-2), torch.float16: (5e-3, 1e-2, 2e-2)}


def draw(form: str, length: int, width: tuple[int, int], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    H, (K, V) = 3, width
    made = {name: torch.randn(2, length, H, n, device="cuda").to(dtype) for name, n in zip("qkv", (K, K, V))}
    if "delta" in form:
        made["k"] = torch.nn.functional.normalize(made["k"].float(), dim=-1).to(dtype)
        made["beta"] = torch.rand(2, length, H, device="cuda")
    if form == "fixed":
        made["g"] = -torch.tensor([0.001, 0.03, 0.5], device="cuda")
    elif form in ("scalar", "gated delta"):
        made["g"] = torch.nn.functional.logsigmoid(3 + 2 * torch.randn(2, length, H, device="cuda"))
    elif form == "vector":
        made["g"] = torch.nn.functional.logsigmoid(4 + torch.randn(2, length, H, K, device="cuda"))
    return made


def relative(found: torch.Tensor, want: torch.Tensor) -> float:
    value = ((found.double() - want).norm() / want.norm().clamp_min(1e-30)).item()
    return value if value == value else float("inf")


def scanned(form: str, width: tuple[int, int], dtype: torch.dtype, normalize: bool) -> dict[str, float]:
    x = draw(form, 777, width, dtype)
    if normalize:
        x["q"], x["k"] = (torch.nn.functional.softplus(x[name].float()).to(dtype) for name in "qk")
    options: dict[str, Any] = {"normalize": normalize, "output_final_state": True}

    def run(inputs: dict[str, torch.Tensor], backend: str) -> tuple[torch.Tensor, ...]:
        leaves = {name: each.detach().requires_grad_() for name, each in inputs.items()}
        o, state = linear_scan(**leaves, **options, backend=backend)
        return o, state, *torch.autograd.grad(o, list(leaves.values()), weight.to(o.dtype))

    weight = torch.randn(2, 777, 3, width[1], device="cuda").to(dtype)
    found = run(x, "triton")
    want = run({name: each.double() for name, each in x.items()}, "torch")
    names = ("error", "state", *(f"d{name}" for name in x))
    return {name: relative(a, b) for name, a, b in zip(names, found, want)}


def stepped(form: str, width: tuple[int, int], dtype: torch.dtype, normalize: bool) -> dict[str, float]:
    x = draw(form, 5, width, dtype)
    if normalize:
        x["q"], x["k"] = (torch.nn.functional.softplus(x[name].float()).to(dtype) for name in "qk")
    exact = {name: each.double() for name, each in x.items()}
    start = torch.randn(2, 3, width[0], width[1] + normalize, device="cuda").abs()
    state, wanted, errors = start, start.double(), []
    for t in range(5):
        here = {name: each if each.dim() == 1 else each[:, t : t + 1] for name, each in x.items()}
        there = {name: each if each.dim() == 1 else each[:, t : t + 1] for name, each in exact.items()}
        o, state = linear_step(state=state, normalize=normalize, backend="triton", **here)
        want, wanted = linear_step(state=wanted, normalize=normalize, backend="torch", **there)
        errors.append(relative(o, want))
    return {"error": max(errors), "state": relative(state, wanted)}


def case(kind: str, form: str, width: tuple[int, int], dtype: torch.dtype, normalize: bool) -> dict[str, Any]:
    """One row."""
    torch.manual_seed(0)
    row = {"kind": kind, "form": form, "K": width[0], "V": width[1], "dtype": str(dtype), "normalize": normalize}
    output, state, gradient = GATES[dtype]
    try:
        found = (scanned if kind == "scan" else stepped)(form, width, dtype, normalize)
        limits = {"error": output, "state": state}
        over = {name: each for name, each in found.items() if not each <= limits.get(name, gradient)}
        row |= found
        if over:
            row["failed"] = f"over the gate: {over}"
        torch.cuda.synchronize()
    except Exception as problem:
        row["failed"] = f"{type(problem).__name__}: {str(problem)[:200]}"
    if row.get("failed"):
        print("FAIL", row, flush=True)
    return row


def wanted() -> list[tuple[str, str, tuple[int, int], torch.dtype, bool]]:
    """All rows, those first whose kernels compile fast: float32 products of wide heads take minutes."""
    made = [
        (kind, form, width, dtype, normalize)
        for dtype, kind, width, form, normalize in itertools.product(
            (torch.bfloat16, torch.float16, torch.float32), ("step", "scan"), WIDTHS, FORMS, (False, True)
        )
        if not (normalize and ("delta" in form or width[0] > 128))
        and not (dtype == torch.float16 and width not in ((64, 64), (128, 128)))
    ]
    return sorted(made, key=lambda each: (each[3] == torch.float32) * max(each[2]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=600.0, help="rows that are not there by then are left out")
    given = parser.parse_args()
    folder = Path(os.environ.get("OUT") or ROOT / "benchmarks" / "results")
    todo, rows, began = wanted(), [], time.perf_counter()
    pool = ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn"))
    waiting = {pool.submit(case, *each) for each in todo}
    while waiting and time.perf_counter() - began < given.seconds:
        finished, waiting = wait(waiting, timeout=5.0, return_when=FIRST_COMPLETED)
        rows += [each.result() for each in finished]
        facts = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "seconds": round(time.perf_counter() - began),
            "rows_left_out": len(todo) - len(rows),
        }
        (folder / "gpu_scan_checks.json").write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print(f"{len(rows)} of {len(todo)} rows, {sum('failed' in row for row in rows)} failed", flush=True)
    # What is still compiling must not hold up the end.
    for process in pool._processes.values():
        process.kill()


if __name__ == "__main__":
    main()
