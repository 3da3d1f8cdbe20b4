"""What `foveate bench gpu` is made of: cases of contenders, how they are timed, and relative errors.

A contender is opened, judged on its first call, and then timed in one of three ways:

    graph    a CUDA graph of `calls` calls, replayed: device time alone, for calls of microseconds
    queued   `calls` calls issued one after another while the device is kept waiting, so that it runs them back to
             back: device time of eager calls that never wait for the device. What the host needs to issue a call
             (`host_us`) is a fact beside it
    eager    wall time of `calls` calls from an idle device to an idle device: what waiting for a model takes

Call i gets the number i, so that it may read inputs of its own where nothing may stay in the cache.
"""

from __future__ import annotations

import contextlib
import importlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

Run = Callable[[int], Any]
# What a call returned -> its errors, "error" first, and further figures.
Judge = Callable[[Any], dict[str, float]]
Opened = AbstractContextManager[tuple[Run, Judge]]
How = Literal["graph", "queued", "eager"]

# Of the fastest clock of present GPUs.
CYCLES_PER_US = 2000
# Largest relative errors in half precision; docs/kernels.md, "Numeric gates".
FORWARD = {"error": 5e-3, "lse_error": 2e-3}
GRADIENTS = {"error": 2e-2, "o": 5e-3, "dq": 1.5e-2, "dk": 1.5e-2, "dv": 1.5e-2, "dbeta": 1.5e-2, "dg": 2e-2}


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row: who runs, how it is timed, and what it should reach.

    judged: what its errors are against.    gate: largest allowed value of a judged figure.
    calls, samples: calls per sample, and samples (None: by the command's rounds).
    target_us, target_speedup: microseconds at most, times the strongest baseline at least.
    within: another contender's name and a factor: at most that times its time.
    once: contenders of several cases with one such name are measured once in a run.
    flop, moved: floating-point operations and bytes of memory traffic of a call, for rates.
    """

    name: str
    open: Callable[[], Opened]
    judged: str
    baseline: bool = False
    how: How = "queued"
    calls: int = 1
    samples: int | None = None
    gate: Mapping[str, float] = field(default_factory=dict)
    target_us: float | None = None
    target_speedup: float | None = None
    within: tuple[str, float] | None = None
    once: str | None = None
    flop: float | None = None
    moved: float | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Case:
    """One table: the same work for all contenders. absent: baselines that could not be had, a line each."""

    title: str
    contenders: list[Contender]
    absent: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Job:
    """A case before its tensors are made. compiles: worth compiling in a process of its own beforehand."""

    part: str
    name: str
    build: Callable[[], Case]
    compiles: bool = True

    @property
    def key(self) -> str:
        return f"{self.part}/{self.name}"


def always(run: Run, judge: Judge) -> Callable[[], Opened]:
    """A contender that needs no preparation."""
    return lambda: contextlib.nullcontext((run, judge))


def prepared(make: Callable[[], tuple[Run, Judge]]) -> Callable[[], Opened]:
    """A contender whose preparation (compilation, a forward pass) may fail and then counts as its own failure."""

    @contextlib.contextmanager
    def opened() -> Iterator[tuple[Run, Judge]]:
        yield make()

    return opened


def relative(found: Tensor, exact: Tensor) -> float:
    """||found - exact|| / ||exact|| in float64; infinite where something is not a number."""
    exact = exact.double()
    value = ((found.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()
    return value if value == value else float("inf")


def finite(*found: Tensor) -> bool:
    return all(bool(each.isfinite().all()) for each in found)


def over_the_gate(found: Mapping[str, float], gate: Mapping[str, float]) -> str | None:
    """Which judged figures are larger than allowed, or None."""
    # Not a number is over every gate.
    wrong = [f"{name} {found[name]:.3g} > {most:g}" for name, most in gate.items() if not found.get(name, 0.0) <= most]
    return f"incorrect: {', '.join(wrong)}" if wrong else None


def timed(contender: Contender, run: Run, device: torch.device, rounds: int) -> tuple[list[float], dict[str, float]]:
    """Microseconds per call, one per sample, and facts about how they came."""
    if contender.how == "graph" and device.type == "cuda":
        return graph_times(run, contender.calls, contender.samples or 4 * rounds), {}
    samples = contender.samples or rounds
    if contender.how == "eager" or device.type != "cuda":
        return eager_times(run, contender.calls, samples, device), {}
    times, host = queued_times(run, contender.calls, samples)
    return times, {"host_us": host}


def graph_times(run: Run, calls: int, samples: int) -> list[float]:
    """Replays of a graph of `calls` calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for i in range(min(2, calls)):
            run(i)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # Held, so that no call's output takes the place of another's.
        held = [run(i) for i in range(calls)]
    for _ in range(3):
        graph.replay()
    times = []
    for _ in range(samples):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    del held
    return times


def queued_times(run: Run, calls: int, samples: int) -> tuple[list[float], float]:
    """Times behind a waiting device, and the host's median microseconds per call."""
    run(0)
    times: list[float] = []
    host: list[float] = []
    for sample in range(samples + 1):
        torch.cuda.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # Half as long again as the slowest round of calls took to issue; the first round only measures that.
        if sample:
            torch.cuda._sleep(int(1.5 * max(host) * calls * CYCLES_PER_US))
        begin.record()
        issued = time.perf_counter()
        for i in range(calls):
            run(i)
        host.append((time.perf_counter() - issued) * 1e6 / calls)
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1e3 / calls)
    return times[1:], statistics.median(host[1:])


def eager_times(run: Run, calls: int, samples: int, device: torch.device) -> list[float]:
    """Wall time from idle to idle."""
    times = []
    for _ in range(samples):
        synchronize(device)
        begin = time.perf_counter()
        for i in range(calls):
            run(i)
        synchronize(device)
        times.append((time.perf_counter() - begin) * 1e6 / calls)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def quantiles(times: Sequence[float]) -> tuple[float, float, float]:
    """20, 50 and 80 %."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    deciles = statistics.quantiles(times, n=10, method="inclusive")
    return deciles[1], deciles[4], deciles[7]


@cache
def optional(name: str) -> tuple[ModuleType | None, str]:
    """A baseline's module, or None and why it is not there."""
    try:
        return importlib.import_module(name), ""
    except Exception as problem:  # an installed package may fail in any way where its binaries do not fit
        return None, f"{type(problem).__name__}: {str(problem)[:200]}"


def generator(device: torch.device, seed: int = 0) -> torch.Generator:
    """Random numbers of a case's own: a failed CUDA graph may leave torch's default ones unusable."""
    return torch.Generator(device).manual_seed(seed)
