"""What the GPU benchmarks share: times by events and by graph replays, rows of results, judges by float64."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable

import torch

Run = Callable[[int], object]
Judge = Callable[[object], dict]
ROWS: list[dict] = []
GATES = {torch.float32: 1e-5, torch.bfloat16: 5e-3, torch.float16: 5e-3}


def graph_time(call: Callable[[int], object], calls: int, reps: int = 20) -> tuple[float, float, float]:
    """Microseconds per call: 20, 50 and 80 % quantiles over replays of a graph of `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(2, calls)):
            call(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    kept = []
    with torch.cuda.graph(graph):
        for i in range(calls):
            kept.append(call(i))
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(reps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return tuple(statistics.quantiles(times, n=10)[i] for i in (1, 4, 7))


def event_time(call: Callable[[], object], reps: int = 5) -> tuple[float, float, float]:
    """Microseconds per eager call, for calls of a millisecond and more."""
    call()
    times = []
    for _ in range(reps):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3)
    times.sort()
    return times[0], times[len(times) // 2], times[-1]


def host_time(call: Callable[[], object], reps: int = 100) -> float:
    """Microseconds of host work per eager call."""
    call()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(reps):
        call()
    spent = time.perf_counter() - begin
    torch.cuda.synchronize()
    return spent / reps * 1e6


def error(out: torch.Tensor, ref: torch.Tensor) -> float:
    value = ((out.double() - ref).norm() / ref.norm().clamp_min(1e-300)).item()
    return value if value == value else float("inf")


def row(part: str, what: str, quantiles, floor: float | None = None, **facts) -> None:
    low, mid, high = quantiles
    ROWS.append({"part": part, "what": what, "us": mid, "us20": low, "us80": high, "floor_us": floor, **facts})
    shown = "  ".join(
        f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in facts.items()
    )
    print(f"{part:8s} {what:64s} {mid:10.2f} us  [{low:.2f} {high:.2f}]  {shown}", flush=True)


def failed(part: str, what: str, why: str) -> None:
    ROWS.append({"part": part, "what": what, "us": None, "failed": why})
    print(f"{part:8s} {what:64s} FAIL {why}", flush=True)


def attempt(
    part: str, what: str, run: Run, judge: Judge, calls: int = 8, floor: float | None = None, eager: bool = False
) -> float | None:
    """Judge run(0), then time run(0), run(1), ... in a graph (or one eager call). Microseconds, None on FAIL."""
    try:
        found = judge(run(0))
        quantiles = event_time(lambda: run(0)) if eager else graph_time(run, calls)
    except AssertionError as problem:
        failed(part, what, f"incorrect: {problem}")
    except Exception as problem:
        failed(part, what, f"{type(problem).__name__}: {str(problem)[:300]}")
        traceback.print_exc(limit=3)
    else:
        row(part, what, quantiles, floor, **found)
        return quantiles[1]
    return None


def correct(part: str, what: str, run: Callable[[], object], judge: Judge) -> None:
    """A check without a time; only failures make a row."""
    try:
        judge(run())
    except Exception as problem:
        failed(part, what, f"{type(problem).__name__}: {str(problem)[:200]}")


def best_of(part: str, name: str, runs: dict[str, Run], judge: Judge, calls: int = 8, floor=None, eager=False) -> str:
    """The label of the fastest correct candidate (the first where none is correct)."""
    times = {label: attempt(part, f"{name} | {label}", run, judge, calls, floor, eager) for label, run in runs.items()}
    right = {label: spent for label, spent in times.items() if spent is not None}
    if not right:
        return next(iter(runs))
    best = min(right, key=right.__getitem__)
    bytes_alone = f" (bytes alone {floor:.2f})" if floor else ""
    print(f"{part:8s} BEST {name}: {best} = {right[best]:.2f} us{bytes_alone}")
    return best


def within(ref, dtype) -> Judge:
    """Judges (o, lse or None) by float64 reference `ref` and the dtype's gate."""

    def judge(got) -> dict:
        o, lse = got
        found = {"error": error(o, ref[0])}
        assert found["error"] <= GATES[dtype], f"error {found['error']:.3g} > {GATES[dtype]}"
        if lse is not None:
            found["lse_error"] = (lse.double() - ref[1]).abs().max().item()
            assert found["lse_error"] <= 2e-3, f"lse off by {found['lse_error']:.3g}"
        return found

    return judge


def unjudged(got) -> dict:
    return {}


def copy_bandwidth() -> float:
    """Bytes per microsecond of a device copy, read and written."""
    x = torch.randn(1 << 30, device="cuda")
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / event_time(lambda: y.copy_(x))[1]
