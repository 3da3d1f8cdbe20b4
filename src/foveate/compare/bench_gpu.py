"""`foveate bench gpu`: every kernel and whole models on one NVIDIA GPU beside the strongest baselines, in one run.

What users get is measured: public operators, shipped configurations, their own choice of backend. Every row is judged
first and timed afterwards; a result over its gate keeps its time, is marked, and neither meets a target nor counts as a
baseline. The file is written after every row, so nothing that was measured is lost.

The JSON: schema_version 1; device, versions, command, date, rounds, parts, seconds, finished, stopped (why a run ended
early), absent (baselines that are not installed), and rows, each with

    part, case, name       which table, and who
    baseline, strongest    not ours; the fastest correct baseline of its case
    how                    graph, queued or eager (`bench_gpu_timing`)
    us, us20, us80         microseconds per call: median, 20 and 80 %
    error, judged          the relative error, and what it is against
    target_us, target_speedup, met
    speedup                the strongest baseline's time over this one
    failed                 why there is no result, or why it does not count
    facts                  backend, rates, further errors, host microseconds per call
"""

from __future__ import annotations

import gc
import importlib.util
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from foveate.compare.bench_gpu_attention import AttentionSizes, attention_jobs
from foveate.compare.bench_gpu_decode import DecodeSizes, decode_jobs
from foveate.compare.bench_gpu_models import ModelSizes, model_jobs
from foveate.compare.bench_gpu_scans import SCANS, ScanSize, fla_version, scan_jobs
from foveate.compare.bench_gpu_timing import Case, Contender, Job, over_the_gate, quantiles, synchronize, timed
from foveate.compare.environment import command_line, device_name, now, versions
from foveate.compare.files import document, write_atomic
from foveate.compare.progress import Silent, showing
from foveate.errors import BackendError, MissingPackageError, OptionError

SCHEMA_VERSION = 1
# Foreign scans last: a kernel that breaks the device ends the run.
PARTS = ("prefill", "decode", "topk", "models", "scans", "train")
DEFAULT_PATH = Path("foveate-bench-gpu.json")
ROUNDS = 5


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What is measured; the defaults are those that the targets were set for."""

    attention: AttentionSizes = field(default_factory=AttentionSizes)
    decode: DecodeSizes = field(default_factory=DecodeSizes)
    scans: tuple[ScanSize, ...] = SCANS
    models: ModelSizes = field(default_factory=ModelSizes)


@dataclass
class Row:
    """One contender's result; see the module."""

    part: str
    case: str
    name: str
    baseline: bool = False
    how: str = ""
    us: float | None = None
    us20: float | None = None
    us80: float | None = None
    error: float | None = None
    judged: str = ""
    target_us: float | None = None
    target_speedup: float | None = None
    met: bool | None = None
    strongest: bool = False
    speedup: float | None = None
    failed: str | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def counts(self) -> bool:
        return self.us is not None and self.failed is None


@dataclass
class GpuBench:
    """The rows so far, and where they were made."""

    device: torch.device
    parts: tuple[str, ...]
    rounds: int
    path: Path
    name: str
    rows: list[Row] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)
    stopped: str | None = None
    finished: bool = False
    began: float = field(default_factory=time.perf_counter)

    def as_dict(self) -> dict[str, Any]:
        settle(self.rows)
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "bench-gpu",
            "device": self.name,
            "device_type": self.device.type,
            "versions": _versions(),
            "command": command_line(),
            "date": now(),
            "rounds": self.rounds,
            "parts": list(self.parts),
            "seconds": round(time.perf_counter() - self.began, 1),
            "finished": self.finished,
            "stopped": self.stopped,
            "absent": self.absent,
            "rows": [asdict(row) for row in self.rows],
        }

    def save(self) -> None:
        """Atomically; ResultsError where the file cannot be written."""
        write_atomic(self.path, document(self.as_dict()))

    def table(self) -> Any:
        """A rich group: one table per case, the strongest baseline first."""
        from foveate.compare.bench_gpu_table import tables

        settle(self.rows)
        return tables(self.rows, self.absent, self.stopped)


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = dict(versions())
    if importlib.util.find_spec("triton") is not None:
        found["triton"] = importlib.import_module("triton").__version__
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {**found, "cuda": torch.version.cuda, "cudnn": cudnn and str(cudnn), "fla": fla_version()}


def jobs(sizes: Sizes, device: torch.device, parts: Sequence[str] = PARTS) -> list[Job]:
    """In the order of `PARTS`."""
    made = [
        *attention_jobs(sizes.attention, device),
        *decode_jobs(sizes.decode, device),
        *scan_jobs(sizes.scans, device),
        *model_jobs(sizes.models, device),
    ]
    return sorted((job for job in made if job.part in parts), key=lambda job: PARTS.index(job.part))


def bench_gpu(
    only: Sequence[str] | None = None,
    *,
    rounds: int = ROUNDS,
    out: str | Path = DEFAULT_PATH,
    progress: bool = True,
    sizes: Sizes | None = None,
    device: str = "cuda",
) -> GpuBench:
    """Measure on the present GPU; about 7 minutes on an H200 for all parts.

    only: some of `PARTS`.    rounds: samples of every eager time; CUDA graphs get four times as many.
    sizes, device: smaller work on the CPU, to check this command itself.
    Returns all rows, failed ones among them; `stopped` says why a run ended early (a broken device).
    Raises OptionError for an unknown part or rounds < 1, BackendError without a CUDA GPU, MissingPackageError without
    Triton, ResultsError where `out` cannot be written: all before work.
    """
    parts = _check(only, rounds, device)
    place = torch.device(device)
    # A broken device cannot say its name any more.
    result = GpuBench(place, parts, rounds, Path(out), device_name(place))
    result.save()
    todo = jobs(sizes or Sizes(), place, parts)
    measured: dict[str, Row] = {}
    with showing(progress, len(todo)) as show:
        if place.type == "cuda":
            from foveate.compare.bench_gpu_compile import compile_jobs

            show.now("compiling, several processes at once")
            compile_jobs([job.key for job in todo if job.compiles])
        while todo and result.stopped is None:
            # Taken off the list, so that what only it holds (a model) is freed.
            _run_job(todo.pop(0), result, measured, show)
            gc.collect()
            show.step(1)
    result.finished = result.stopped is None
    result.save()
    return result


def _check(only: Sequence[str] | None, rounds: int, device: str) -> tuple[str, ...]:
    parts = tuple(only or PARTS)
    unknown = [each for each in parts if each not in PARTS]
    if unknown:
        raise OptionError(f"parts {unknown}, allowed: {', '.join(PARTS)}")
    if rounds < 1:
        raise OptionError(f"rounds={rounds}, allowed: at least 1")
    if device == "cuda":
        if not torch.cuda.is_available():
            raise BackendError(
                "foveate bench gpu needs an NVIDIA GPU, and torch.cuda.is_available() is False here; run it on a "
                "machine with one, or time methods on the CPU with: foveate bench decode"
            )
        if importlib.util.find_spec("triton") is None:
            raise MissingPackageError("triton", "foveate bench gpu", "pip install triton")
    return parts


def _run_job(job: Job, result: GpuBench, measured: dict[str, Row], show: Silent) -> None:
    """All contenders of one case; a row, a saved file and a look at the device after each."""
    show.now(f"{job.part}: {job.name}")
    try:
        case = job.build()
    except Exception as problem:
        _finish(Row(job.part, job.name, "(making its inputs)", failed=_text(problem)), result)
        return
    result.absent += [line for line in case.absent if line not in result.absent]
    for contender in case.contenders:
        show.now(f"{case.title}: {contender.name}")
        row = _known(contender, measured, job.part, case.title)
        if row is None:
            row = _measure(contender, job.part, case, result)
            if contender.once is not None:
                measured[contender.once] = row
        _finish(row, result)
        if result.stopped is not None:
            return


def _known(contender: Contender, measured: dict[str, Row], part: str, case: str) -> Row | None:
    """What an earlier case measured, as a row of this one."""
    if contender.once not in measured:
        return None
    kept = asdict(measured[contender.once])
    return Row(**{**kept, "part": part, "case": case, "facts": {**kept["facts"], "measured_in": kept["case"]}})


def _measure(contender: Contender, part: str, case: Case, result: GpuBench) -> Row:
    row = Row(
        part, case.title, contender.name, contender.baseline, contender.how, judged=contender.judged,
        target_us=contender.target_us, target_speedup=contender.target_speedup, facts=dict(contender.facts),
    )  # fmt: skip
    if contender.within is not None:
        name, factor = contender.within
        other = next((each for each in result.rows if (each.case, each.name) == (case.title, name)), None)
        row.target_us = None if other is None or other.us is None else factor * other.us
    try:
        with contender.open() as (run, judge):
            found = judge(run(0))
            row.error = found.get("error")
            row.facts.update({name: value for name, value in found.items() if name != "error"})
            row.failed = over_the_gate(found, contender.gate)
            times, facts = timed(contender, run, result.device, result.rounds)
    except Exception as problem:
        # Another contender may run; a broken device is found by the look at it.
        row.failed = _text(problem)
        return row
    row.us20, row.us, row.us80 = quantiles(times)
    row.facts.update(facts)
    if contender.flop is not None:
        row.facts["tflop_s"] = contender.flop / row.us / 1e6
    if contender.moved is not None:
        row.facts["tb_s"] = contender.moved / row.us / 1e6
    return row


def _finish(row: Row, result: GpuBench) -> None:
    result.rows.append(row)
    try:
        synchronize(result.device)
        if result.device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError as problem:
        result.stopped = f"the device is broken after {row.case}, {row.name}: {_text(problem)}"
    result.save()


def _text(problem: Exception) -> str:
    """One line."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:500]


def settle(rows: Sequence[Row]) -> None:
    """Fill in what depends on other rows: the strongest baseline of each case, ratios to it, and met targets."""
    for case in dict.fromkeys((row.part, row.case) for row in rows):
        own = [row for row in rows if (row.part, row.case) == case]
        times = [row.us for row in own if row.baseline and row.counts and row.us is not None]
        best = min(times, default=None)
        for row in own:
            row.strongest = row.baseline and row.counts and row.us == best
            row.speedup = best / row.us if best is not None and row.us is not None else None
            row.met = _met(row)


def _met(row: Row) -> bool | None:
    """None without a target, or where there is nothing to compare with."""
    if row.target_us is None and row.target_speedup is None:
        return None
    if not row.counts or row.us is None:
        return False
    if row.target_us is not None:
        return row.us <= row.target_us
    assert row.target_speedup is not None
    return None if row.speedup is None else row.speedup >= row.target_speedup
